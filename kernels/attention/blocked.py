"""Attention with an ALiBi bias from positions, one block of queries at a time: plain PyTorch on any device.

What runs where no kernel does.  It is the arithmetic of `reference`, with its guarantees, over [Hq, block, Tk] instead
of [B, Hq, Tq, Tk]: what it needs beyond inputs and gradients grows with the block and the keys, and keys that a
causal block cannot see are never touched.  Samples are taken one by one, so that the bits of each are those it has
alone, and the query heads that share a key head are rows of one product, so that no key is repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._runtime import compute_dtype

# Scores at a time: enough that a product outweighs its launch, little enough to stay near the cache.
_BLOCK_SCORES = 2**20
_MIN_BLOCK, _MAX_BLOCK = 32, 128


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
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.alibi_attention`, `block` queries at a time."""
    batch, queries, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty((batch, heads, queries), dtype=compute_dtype(q.dtype))
    for b in range(batch):
        row = _Row.of(b, q, k, v, positions_q, positions_k, slopes, causal, key_padding_mask, scale)
        for start, stop in row.blocks(block):
            scores = row.scores(start, stop)
            keys = scores.shape[-1]
            p = torch.softmax(scores, -1)
            top = scores.amax(-1, True) if keys else scores.new_full((*scores.shape[:2], 1), -torch.inf)
            dark = top == -torch.inf  # nothing to see, or every logit overflowed
            # The largest weight is 1 / sum(exp(s - s_max)): the logarithm of the sum without another pass of exp.
            own = torch.where(dark, top, top - p.amax(-1, True).log()) if keys else top
            result = row.ungrouped(torch.bmm(row.grouped(p), row.v[:, :keys])).masked_fill(dark, 0.0)
            total = own
            if sinks is not None:
                sink = sinks.to(own.dtype)[:, None, None]
                total = torch.logaddexp(own, sink.masked_fill(sink == torch.inf, torch.nan))
                result = result * (own - _filled(total)).exp()
            out[b, start:stop] = row.emptied(result, start, stop, 0.0).transpose(0, 1)
            lse[b, :, start:stop] = total.squeeze(-1)
    return out, lse


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
    block: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `reference.alibi_attention_backward`, `block` queries at a time: keys gather their gradient in float32."""
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    grad_sinks = q.new_empty(0) if sinks is None else lse.new_zeros(sinks.shape)
    for b in range(q.shape[0]):
        row = _Row.of(b, q, k, v, positions_q, positions_k, slopes, causal, key_padding_mask, scale)
        sum_k, sum_v = torch.zeros_like(row.k), torch.zeros_like(row.v)
        for start, stop in row.blocks(block):
            scores = row.scores(start, stop)
            keys = scores.shape[-1]
            row_lse = _filled(lse[b, :, start:stop, None])
            p = scores.sub_(row.emptied(row_lse, start, stop, 0.0)).exp_()
            row.hide_later_(p, 0.0)  # in a row that is NaN they are not zero yet
            d_out = row.grouped(row.queries(grad_out[b], start, stop))
            d_p = row.ungrouped(torch.bmm(d_out, row.v[:, :keys].mT))
            row.hide_later_(d_p, 0.0)
            delta = (p * d_p).sum(-1, keepdim=True)
            if sinks is not None:
                sink = (sinks.to(lse.dtype)[:, None, None] - row_lse).exp()
                grad_sinks -= row.emptied(sink * delta, start, stop, 0.0).sum((1, 2))
            d_s = row.grouped(row.hide_later_(d_p.sub_(delta).mul_(p), 0.0))
            sum_v[:, :keys].baddbmm_(row.grouped(p).mT, d_out)
            sum_k[:, :keys].baddbmm_(d_s.mT, row.grouped(row.queries(q[b], start, stop)) * scale)
            grad_q[b, start:stop] = row.ungrouped(torch.bmm(d_s, row.k[:, :keys])).mul_(scale).transpose(0, 1)
        grad_k[b], grad_v[b] = (row.shown_only(x).transpose(0, 1) for x in (sum_k, sum_v))
    return grad_q, grad_k, grad_v, grad_sinks if sinks is None else grad_sinks.to(sinks.dtype)


def _filled(logarithm: Tensor) -> Tensor:
    """With 0 for the -inf of a query without a logit above it, since -inf - -inf is NaN."""
    return logarithm.masked_fill(logarithm == -torch.inf, 0.0)


@dataclass
class _Row:
    """One sample: its keys by head in the dtype of the arithmetic, and what its queries may see.

    A key that is padding is zero and has a score of -inf, whatever its bias; one that is not finite is zero and has a
    score of NaN.
    """

    q: Tensor  # [Tq, Hq, D], as it came
    k: Tensor  # [Hk, Tk, D]
    v: Tensor
    offsets: Tensor  # [Hk, 1, Tk]: 0 or NaN, added to the scores
    hidden: Tensor | None  # [Tk]: keys that are padding
    positions_q: Tensor
    positions_k: Tensor
    slopes: Tensor | None  # [Hq, 1, 1]
    blind: Tensor | None  # [Tq]: queries that see no key
    shift: int | None  # query i sees the keys up to i + shift; None for all of them
    scale: float

    @classmethod
    def of(
        cls,
        b: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions_q: Tensor,
        positions_k: Tensor,
        slopes: Tensor | None,
        causal: bool,
        key_padding_mask: Tensor | None,
        scale: float,
    ) -> _Row:
        dtype, queries, keys = compute_dtype(q.dtype), q.shape[1], k.shape[1]
        own_k, own_v, hidden, blind = k[b].to(dtype), v[b].to(dtype), None, None
        offsets = (own_k * 0).sum(-1) + (own_v * 0).sum(-1)  # 0, or NaN where one channel is not finite
        if key_padding_mask is not None and keys:
            shown = key_padding_mask[b]
            own_k, own_v = (torch.where(shown[:, None, None], x, 0.0) for x in (own_k, own_v))
            hidden = ~shown
            dark = ~shown.cummax(0).values  # no key up to this one may be seen
            blind = dark[keys - queries :] if causal else dark[-1:].expand(queries)
        return cls(
            q[b],
            own_k.nan_to_num(0.0, 0.0, 0.0).transpose(0, 1).contiguous(),
            own_v.nan_to_num(0.0, 0.0, 0.0).transpose(0, 1).contiguous(),
            offsets.t()[:, None],
            hidden,
            (positions_q[b] if positions_q.ndim == 2 else positions_q).long(),
            (positions_k[b] if positions_k.ndim == 2 else positions_k).long(),
            None if slopes is None else slopes.to(dtype)[:, None, None],
            blind,
            keys - queries if causal else None,
            scale,
        )

    def blocks(self, block: int | None) -> Iterator[tuple[int, int]]:
        queries, heads, keys = self.q.shape[0], self.q.shape[1], self.k.shape[1]
        if block is None:
            block = min(max(_BLOCK_SCORES // max(heads * keys, 1), _MIN_BLOCK), _MAX_BLOCK)
        for start in range(0, queries if heads else 0, block):
            yield start, min(start + block, queries)

    def scores(self, start: int, stop: int) -> Tensor:
        """Logits [Hq, block, keys] for the keys that some query of the block may see by index."""
        keys = self.k.shape[1] if self.shift is None else stop + self.shift
        x = self.grouped(self.queries(self.q, start, stop)) * self.scale  # as `alpha` a scale of 0 would drop a NaN
        scores = self.ungrouped(torch.baddbmm(self.offsets[..., :keys], x, self.k[:, :keys].mT))
        if self.slopes is not None:
            distance = (self.positions_q[start:stop, None] - self.positions_k[None, :keys]).abs().to(scores.dtype)
            scores.addcmul_(self.slopes, distance, value=-1.0)
        if self.hidden is not None:  # last, since an infinite slope times a distance of 0 is NaN
            scores.masked_fill_(self.hidden[:keys], -torch.inf)
        return self.hide_later_(scores, -torch.inf)

    def hide_later_(self, x: Tensor, value: float) -> Tensor:
        """`value` into x [Hq, block, keys] where the key comes after the query: its last columns, when causal."""
        if self.shift is not None:
            corner = x[..., x.shape[-1] - x.shape[-2] :]
            corner.masked_fill_(torch.ones(corner.shape[-2:], dtype=torch.bool, device=x.device).triu(1), value)
        return x

    def shown_only(self, x: Tensor) -> Tensor:
        """x [Hk, Tk, D] with zeros for the keys that are padding."""
        return x if self.hidden is None else x.masked_fill(self.hidden[:, None], 0.0)

    def emptied(self, x: Tensor, start: int, stop: int, value: float) -> Tensor:
        """x [H, block, ...] with `value` for the queries that see no key."""
        if not self.k.shape[1]:
            return torch.full_like(x, value)
        return x if self.blind is None else x.masked_fill(self.blind[start:stop, None], value)

    def queries(self, x: Tensor, start: int, stop: int) -> Tensor:
        """The block of x [Tq, Hq, D] as [Hq, block, D], with zeros for the queries that see no key."""
        return self.emptied(x[start:stop].transpose(0, 1).to(self.k.dtype), start, stop, 0.0)

    def grouped(self, x: Tensor) -> Tensor:
        """[Hq, block, n] to [Hk, Hq / Hk * block, n]."""
        kv_heads = self.k.shape[0]
        return x.reshape(kv_heads, x.shape[0] // kv_heads * x.shape[1], x.shape[2])

    def ungrouped(self, x: Tensor) -> Tensor:
        """[Hk, Hq / Hk * block, n] to [Hq, block, n]."""
        heads = self.q.shape[1]
        return x.reshape(heads, x.shape[1] * x.shape[0] // max(heads, 1), x.shape[2])
