"""`alibi_attention`: causal attention with a distance bias computed from positions, and `alibi_slopes` for it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library
from .._runtime import (
    check_bool,
    check_choice,
    check_constant,
    check_float,
    check_int,
    check_integer,
    check_like,
    check_mask,
    check_number,
    check_shape,
    compute_dtype,
    without_autocast,
)
from . import blocked, reference


def alibi_slopes(num_heads: int, rule: str = "press", *, device: torch.device | str | None = None) -> Tensor:
    """Slopes float32 [num_heads] for `alibi_attention`, h = 0 .. num_heads - 1.

    `"press"`: 2^(-8 (h + 1) / num_heads), as in the ALiBi paper, for any number of heads; `"geometric"`: 2^-h.
    """
    num_heads = check_int("num_heads", num_heads)
    if num_heads < 1:
        raise ValueError(f"num_heads must be >= 1, got {num_heads!r}")
    check_choice("rule", rule, ("press", "geometric"))
    heads = torch.arange(num_heads, dtype=torch.float64, device=device)
    exponent = -8.0 * (heads + 1) / num_heads if rule == "press" else -heads
    return torch.exp2(exponent).float()


def alibi_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions_q: Tensor,
    positions_k: Tensor | None = None,
    slopes: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T - slope_h |pos_q - pos_k|) v, with no [B, H, Tq, Tk] tensor but in the reference.

    `q` [B, Tq, Hq, D]; `k`, `v` [B, Tk, Hk, D], Hq a multiple of Hk (grouped queries), all of one float dtype.
    `positions_q` int32 or int64 [Tq] or [B, Tq], `positions_k` [Tk] or [B, Tk], by default `positions_q`; anything in
    (-2^62, 2^62), beyond which a difference may wrap.  `slopes` float32 [Hq] (see `alibi_slopes`), None for no bias;
    they are constants.  `sinks` float32 [Hq], trainable: exp(sink) is added to the denominator of each softmax.
    `causal` is by index: the queries are the last Tq of the Tk keys.
    `key_padding_mask` bool [B, Tk], True = attend.  `scale` is 1 / sqrt(D) by default.  Returns [B, Tq, Hq, D].

    A query with nothing to attend to gives exactly 0 and zero gradients, and neither it nor a key that is masked away
    ever reaches another result, be it NaN.  Raises `ValueError` or `TypeError` naming the argument.

    Without slopes, sinks and padding this is `F.scaled_dot_product_attention` under the backend `auto`, for all but
    causal queries that are fewer than the keys and more than one.  That one does not contain what is not finite in a
    later key: its CPU kernel multiplies it by a weight of 0, so that a NaN in `v` makes the output NaN for every
    query that meets the same block of keys, and one in `k` or `v` reaches the gradients.  A named backend has the
    guarantee.  What that one says where it has no second derivative or no forward mode is PyTorch's own too; the
    backend `reference` has second derivatives.

    The backward pass has the logarithm of each softmax's denominator as one number in the dtype of the arithmetic.
    Where every key in sight is so far that slope times distance is about 10^6 or more, in float32, what the sum adds to
    the largest score is lost in it, and the gradients of that query are coarse; the output is not.
    """
    check_attention_inputs(q, k, v)
    check_bool("causal", causal)
    batch, queries, heads, head_dim = q.shape
    keys = k.shape[1]
    if causal and queries > keys:
        raise ValueError(f"q must not be longer than k when causal: got {queries} queries and {keys} keys")
    _check_positions("positions_q", positions_q, batch, queries, q)
    if positions_k is None:
        if queries != keys:
            raise ValueError(f"positions_k must be given where k is not as long as q, got {queries} and {keys}")
        positions_k = positions_q
    _check_positions("positions_k", positions_k, batch, keys, q)
    if slopes is not None:
        check_constant("slopes", _check_per_head("slopes", slopes, heads, q))
    if sinks is not None:
        _check_per_head("sinks", sinks, heads, q)
    if key_padding_mask is not None:
        check_mask("key_padding_mask", key_padding_mask, (batch, keys))
        check_like("key_padding_mask", key_padding_mask, "q", q, dtype=False)
    scale = checked_scale(scale, head_dim)
    plain = slopes is None and sinks is None and key_padding_mask is None
    # Conditions on lengths come last: a compiler guards on what is evaluated.
    if plain and _library.chosen() == "auto" and _torch_can(causal, queries, keys, scale):
        return _torch_attention(q, k, v, causal, scale)
    out, _ = _ALIBI(q, k, v, positions_q, positions_k, slopes, sinks, causal, key_padding_mask, scale)
    return out


def _torch_can(causal: bool, queries: int, keys: int, scale: float) -> bool:
    """Whether PyTorch's causality is ours: it counts from the first key, and multiplies -inf by a `scale` <= 0."""
    return not causal or queries == 1 or (scale > 0 and queries == keys)


@without_autocast
def _torch_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """PyTorch's own attention, for what has neither a bias nor a sink nor padding."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # Under a compiler a comparison of lengths is a symbol, and neither argument takes one.
    causal = True if causal and q.shape[2] == k.shape[2] else False  # noqa: SIM210
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous()


def checked_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores, 1 / sqrt(head_dim) by default."""
    return 1.0 / math.sqrt(max(head_dim, 1)) if scale is None else check_number("scale", scale)


def check_attention_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [B, Tq, Hq, D] and k, v [B, Tk, Hk, D] of one dtype and device, Hq a multiple of Hk."""
    check_float("q", q, 4)
    check_like("k", check_float("k", k, 4), "q", q)
    check_like("v", check_float("v", v, 4), "q", q)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have shape [{q.shape[0]}, Tk, Hk, {q.shape[3]}] as q, got {tuple(k.shape)}")
    check_shape("v", v, k.shape)
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of k's {k.shape[2]} heads, got {q.shape[2]}")


def _check_positions(name: str, positions: Tensor, batch: int, length: int, q: Tensor) -> None:
    check_integer(name, positions, (1, 2))
    check_shape(name, positions, (batch, length) if positions.ndim == 2 else (length,))
    check_like(name, positions, "q", q, dtype=False)


def _check_per_head(name: str, values: Tensor, heads: int, q: Tensor) -> Tensor:
    check_shape(name, check_float(name, values, 1), (heads,))
    return check_like(name, values, "q", q, dtype=False)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, queries), dtype=compute_dtype(q.dtype))


def _backward_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = rest[3]
    grad_sinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_sinks


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, positions_q, positions_k, slopes, sinks, causal, key_padding_mask, scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, positions_q, positions_k, slopes, sinks, key_padding_mask)
    ctx.settings = (causal, scale)


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Any, ...]:
    *tensors, key_padding_mask = ctx.saved_tensors
    causal, scale = ctx.settings
    grad_q, grad_k, grad_v, grad_sinks = _ALIBI_BACKWARD.derivative(grad_out, *tensors, causal, key_padding_mask, scale)
    with_sinks = tensors[-1] is not None
    return (grad_q, grad_k, grad_v, None, None, None, grad_sinks if with_sinks else None, None, None, None)


_ALIBI = _library.register(
    "alibi_attention",
    reference=reference.alibi_attention,
    fallback=blocked.alibi_attention,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_ALIBI_BACKWARD = _library.register(
    "alibi_attention_backward",
    reference=reference.alibi_attention_backward,
    fallback=blocked.alibi_attention_backward,
    fake=_backward_fake,
)
for _name in ("alibi_attention", "alibi_attention_backward"):
    _library.triton(_name, ".attention.launch")
