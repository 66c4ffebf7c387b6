"""Attention with an ALiBi bias from positions: the specification, in plain PyTorch.

The bias of head h is -slope_h |pos_q - pos_k| (Press, Smith and Lewis, "Train Short, Test Long", 2022), with the
difference taken between integers.  A sink adds exp(sink_h) to the denominator of each softmax, a key without a value.

Three guarantees shape the code.  A query with nothing to attend to gives exactly zero, and zero gradients, and
touches no other row, be it or the gradient that arrives for it NaN: it enters every product as zeros.  A key that a
query may not see cannot touch it, be it NaN: products with it are formed from a copy in which what is not finite is
zero, since 0 * NaN is NaN, and what overflows is dropped before it meets a zero.  A key that a query does see and that
is not finite shows: that output row is NaN.

At the ends of the number line: a query whose every logit overflowed to -inf gives exactly zero too, with an lse of
-inf.  A sink of +inf, like one of NaN, makes every row that sees a key NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._runtime import compute_dtype


def alibi_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions_q: Tensor,
    positions_k: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, Tq, Hq, D], lse [B, Hq, Tq]) of q [B, Tq, Hq, D] and k, v [B, Tk, Hk, D]."""
    bias = _alibi_bias(positions_q, positions_k, slopes, compute_dtype(q.dtype))
    allowed = allowed_pairs(q.shape[1], k.shape[1], causal, None, key_padding_mask, q.device)
    return masked_attention(q, k, v, bias, allowed, sinks, scale)


def alibi_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    positions_q: Tensor,
    positions_k: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks (empty without sinks)."""
    bias = _alibi_bias(positions_q, positions_k, slopes, compute_dtype(q.dtype))
    allowed = allowed_pairs(q.shape[1], k.shape[1], causal, None, key_padding_mask, q.device)
    grad_q, grad_k, grad_v, delta = masked_attention_backward(grad_out, q, k, v, lse, bias, allowed, scale)
    if sinks is None:
        return grad_q, grad_k, grad_v, q.new_empty(0)
    # The sink's own probability times (0 - delta), since it has no value: nothing where a query saw only the sink.
    grad_sinks = -((sinks[:, None] - _filled(lse)).exp() * delta).sum((0, 2))
    return grad_q, grad_k, grad_v, grad_sinks.to(sinks.dtype)


def allowed_pairs(
    queries: int,
    keys: int,
    causal: bool,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which query may see which key: bool, broadcastable to [B, H, Tq, Tk].  Causality is by index, from the end."""
    allowed = torch.ones((1, 1, queries, keys), dtype=torch.bool, device=device)
    if causal:
        allowed = allowed.tril(keys - queries)
    if key_mask is not None:
        allowed = allowed & key_mask[:, None, None, :]
    if query_mask is not None:
        allowed = allowed & query_mask[:, None, :, None]
    return allowed


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, allowed: Tensor, sinks: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the allowed pairs; out in q's dtype, lse [B, Hq, Tq] with the sinks, -inf if empty."""
    dtype = compute_dtype(q.dtype)
    k, v, finite = _finite_keys(k, v)
    scores = _scores(_seeing(q, allowed), k, bias, allowed, finite, scale)
    largest = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((), -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype)[:, None, None]
        largest = torch.maximum(largest, sink.detach())
    largest = _filled(largest)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sink - largest).exp()
    lse = (largest + total.log()).squeeze(-1)
    # They are zero already where not allowed.  What autograd sends back there, which may have overflowed, is not.
    weights = torch.where(allowed, weights / torch.where(total == 0, 1.0, total), 0.0)
    out = _seeing(_from_heads(weights @ _to_heads(v, q.shape[2]).to(dtype)), allowed)
    return out.to(q.dtype).contiguous(), lse


def masked_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    allowed: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and delta [B, Hq, Tq] = sum_j P_ij dP_ij.

    P = exp(scores - lse),  dV = P^T dO,  dP = dO V^T,  dS = P (dP - delta),  dQ = scale dS K,  dK = scale dS^T Q.
    """
    dtype = compute_dtype(q.dtype)
    k_dtype, v_dtype, heads, kv_heads = k.dtype, v.dtype, q.shape[2], k.shape[2]
    k, v, finite = _finite_keys(k, v)
    q, grad_out = _seeing(q, allowed), _seeing(grad_out, allowed)
    scores = _scores(q, k, bias, allowed, finite, scale)
    # Zero for what is not allowed, even in a row that is NaN: a hidden key has no part in it.
    p = torch.where(allowed, (scores - _filled(lse)[..., None]).exp(), 0.0)
    d_out = _to_heads(grad_out, heads).to(dtype)
    d_p = torch.where(allowed, d_out @ _to_heads(v, heads).to(dtype).transpose(-1, -2), 0.0)
    delta = (p * d_p).sum(-1, keepdim=True)
    d_s = torch.where(allowed, p * (d_p - delta) * scale, 0.0)
    grad_q = _from_heads(d_s @ _to_heads(k, heads).to(dtype))
    grad_k = _from_heads(_sum_groups(d_s.transpose(-1, -2) @ _to_heads(q, heads).to(dtype), kv_heads))
    grad_v = _from_heads(_sum_groups(p.transpose(-1, -2) @ d_out, kv_heads))
    return (
        grad_q.to(q.dtype).contiguous(),
        grad_k.to(k_dtype).contiguous(),
        grad_v.to(v_dtype).contiguous(),
        delta.squeeze(-1),
    )


def _alibi_bias(positions_q: Tensor, positions_k: Tensor, slopes: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """-slope |pos_q - pos_k|, [1 or B, H, Tq, Tk]: the difference in integers, which any two near positions have."""
    if slopes is None:
        return None
    distance = (positions_q.long()[..., :, None] - positions_k.long()[..., None, :]).abs().to(dtype)
    if distance.ndim == 2:
        distance = distance[None]
    return -slopes.to(dtype)[:, None, None] * distance[:, None]


def _seeing(x: Tensor, allowed: Tensor) -> Tensor:
    """x [B, Tq, H, D] with zeros for the queries that see no key, whatever stood there."""
    return torch.where(allowed.any(-1).transpose(1, 2)[..., None], x, 0.0)


def _filled(logarithm: Tensor) -> Tensor:
    """With 0 for the -inf of a query that sees nothing, or no logit above -inf, since -inf - -inf is NaN."""
    return torch.where(logarithm == -torch.inf, 0.0, logarithm)


def _finite_keys(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k and v [B, T, H, D] with what is not finite set to zero, and which keys were finite, bool [B, T, H]."""
    finite_k, finite_v = torch.isfinite(k), torch.isfinite(v)
    finite = finite_k.all(-1) & finite_v.all(-1)
    return torch.where(finite_k, k, 0.0), torch.where(finite_v, v, 0.0), finite


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, allowed: Tensor, finite: Tensor, scale: float) -> Tensor:
    """Logits [B, H, Tq, Tk]: -inf where not allowed, NaN where an allowed key is not finite."""
    dtype, heads = compute_dtype(q.dtype), q.shape[2]
    scores = (_to_heads(q, heads).to(dtype) @ _to_heads(k, heads).to(dtype).transpose(-1, -2)) * scale
    if bias is not None:
        scores = scores + bias
    scores = torch.where(_to_heads(finite[..., None], heads).transpose(-1, -2), scores, torch.nan)
    return torch.where(allowed, scores, -torch.inf)


def _to_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H, D] to [B, heads, T, D], each key head repeated for the query heads that share it."""
    return x.transpose(1, 2).repeat_interleave(heads // max(x.shape[2], 1), dim=1)


def _from_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _sum_groups(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, T, D] to [B, Hk, T, D]: the gradient of a shared key head is the sum over the heads that share it."""
    return x.unflatten(1, (kv_heads, -1)).sum(2) if kv_heads != x.shape[1] else x
