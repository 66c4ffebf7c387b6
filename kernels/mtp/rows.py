"""The three passes over logits that both losses are composed of, in plain PyTorch: what a kernel has to compute.

N rows hold the logits of C contexts side by side, [N, sum V]; targets int64 [N, C, K].  A target is ignored where it is
`ignore_index`, else bad where it is outside of [0, V_c), else valid.  With z the soft-capped logits of a row in one
context, p = softmax(z), a_k the weights of its valid targets y_k and S = sum_k a_k:

    log_p_k = log p[y_k], 0 where ignored, NaN where bad      mean_log_p = mean_v log p_v      lse = logsumexp(z)
    dz_v = (1 + 2 z_loss lse) S p_v - (1 - eps) sum_k a_k [v = y_k] - eps S / V,   times 1 - (z_v / softcap)^2

A bad target makes the gradient of its row and context NaN.  A logit of -inf is a symbol that cannot be; a row with a
NaN, with +inf, or without a logit above -inf gives NaN for all of its context, lse included, as F.log_softmax does (a
soft cap makes finite logits of infinite ones first).  A row and context whose targets are all ignored is not
looked at: its results are 0, whatever its logits.  Results are float32 (float64 for float64), the gradient is rounded
once, to the dtype of the logits.

Where p -> 1 nothing is subtracted that is nearly equal.  log p of the largest logit is -log1p(sum of the others), and
at a target, with A the weights of the targets equal to it and B those of the others,

    (1 + 2 z_loss lse) S p - (1 - eps) A = (B + 2 z_loss lse S) p - A (1 - p) + eps A,      1 - p = -expm1(log p).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._runtime import compute_dtype

_CHUNK_LOGITS = 1 << 19  # logits a chunk: 2 MiB in float32, so that the passes run from cache

Columns = tuple[Tensor, Tensor, Tensor]  # log_p [N, C, K], mean_log_p [N, C] (empty where unwanted), lse [N, C]


def mtp_rows(
    logits: Tensor, targets: Tensor, vocab_sizes: Sequence[int], ignore_index: int, softcap: float | None, mean: bool
) -> Columns:
    """What a loss needs of the logits; `mean`: whether mean_log_p is wanted."""
    columns = _empty_columns(logits, targets, mean)
    for rows, context, z, entries in _segments(logits, targets, vocab_sizes, ignore_index, softcap):
        _read(z, entries, columns, rows, context)
    return columns


def mtp_rows_(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    vocab_sizes: Sequence[int],
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
) -> Columns:
    """The same, and the gradient for `weights` [N, C, K] in the place of the logits."""
    columns = _empty_columns(logits, targets, label_smoothing > 0)
    settings = (softcap, label_smoothing, z_loss)
    for rows, context, z, entries in _segments(logits, targets, vocab_sizes, ignore_index, softcap):
        log_softmax = _read(z, entries, columns, rows, context)
        lse = columns[2][rows, context]
        grad = _gradient(z, log_softmax, lse, entries, weights[rows, context], settings)
        start = sum(vocab_sizes[:context])
        logits[rows, start : start + vocab_sizes[context]] = grad.to(logits.dtype)
    return columns


def mtp_rows_backward(
    logits: Tensor,
    targets: Tensor,
    log_p: Tensor,
    lse: Tensor,
    weights: Tensor,
    vocab_sizes: Sequence[int],
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The gradient for `weights` [N, C, K] in a tensor of its own, from what `mtp_rows` found."""
    grads = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    settings = (softcap, label_smoothing, z_loss)
    for rows, context, z, entries in _segments(logits, targets, vocab_sizes, ignore_index, softcap):
        log_softmax = _log_softmax(z)[0]
        grad = _gradient(z, log_softmax, lse[rows, context], entries, weights[rows, context], settings)
        start = sum(vocab_sizes[:context])
        grads[rows, start : start + vocab_sizes[context]] = grad.to(logits.dtype)
    return grads


class _Entries(NamedTuple):
    """The targets [n, K] of one context of some rows."""

    inside: Tensor  # moved into the vocabulary, fit for an index
    ignored: Tensor
    bad: Tensor
    idle: Tensor  # [n, 1], the rows that are not looked at

    @classmethod
    def of(cls, targets: Tensor, size: int, ignore_index: int) -> _Entries:
        ignored = targets == ignore_index
        bad = ~ignored & ((targets < 0) | (targets >= size))
        return cls(targets.clamp(0, size - 1), ignored, bad, ignored.all(-1, keepdim=True))


def _segments(
    logits: Tensor, targets: Tensor, vocab_sizes: Sequence[int], ignore_index: int, softcap: float | None
) -> Iterator[tuple[slice, int, Tensor, _Entries]]:
    """Chunk by chunk and context by context: the rows, the context, its soft-capped logits and its targets."""
    dtype = compute_dtype(logits.dtype)
    size = max(1, _CHUNK_LOGITS // logits.shape[1])
    for start in range(0, logits.shape[0], size):
        rows = slice(start, min(start + size, logits.shape[0]))
        segments = logits[rows].split(list(vocab_sizes), dim=1)
        for context, raw in enumerate(segments):
            entries = _Entries.of(targets[rows, context], raw.shape[1], ignore_index)
            z = raw.to(dtype).masked_fill(entries.idle, 0.0)
            yield rows, context, z if softcap is None else softcap * torch.tanh(z / softcap), entries


def _empty_columns(logits: Tensor, targets: Tensor, mean: bool) -> Columns:
    dtype, device = compute_dtype(logits.dtype), logits.device
    rows_contexts = targets.shape[:2]
    return (
        torch.empty(targets.shape, dtype=dtype, device=device),
        torch.empty(rows_contexts if mean else (0,), dtype=dtype, device=device),
        torch.empty(rows_contexts, dtype=dtype, device=device),
    )


def _log_softmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """log p [n, V] and lse [n, 1]."""
    top, where = z.max(-1, keepdim=True)
    top = top.masked_fill_(top.isinf(), torch.nan)  # nothing can be made of such a row
    z = z - top
    log_sum = z.exp().scatter_(-1, where, 0.0).sum(-1, keepdim=True).log1p()
    return z - log_sum, top + log_sum


def _read(z: Tensor, entries: _Entries, columns: Columns, rows: slice, context: int) -> Tensor:
    """Fill in the columns of one segment; log p of all its vocabulary."""
    log_p, mean_log_p, lse = columns
    log_softmax, log_sum = _log_softmax(z)
    found = log_softmax.gather(1, entries.inside).masked_fill_(entries.bad, torch.nan)
    log_p[rows, context] = found.masked_fill_(entries.ignored, 0.0)
    lse[rows, context] = log_sum.masked_fill(entries.idle, 0.0).squeeze(1)
    if mean_log_p.ndim == 2:
        mean_log_p[rows, context] = log_softmax.mean(-1, keepdim=True).masked_fill_(entries.idle, 0.0).squeeze(1)
    return log_softmax


def _gradient(
    z: Tensor,
    log_softmax: Tensor,
    lse: Tensor,
    entries: _Entries,
    weights: Tensor,
    settings: tuple[float | None, float, float],
) -> Tensor:
    """dloss/dlogits of one segment [n, V], from its soft-capped logits z."""
    softcap, eps, z_loss = settings
    a = weights.to(z.dtype).masked_fill(entries.bad, torch.nan).masked_fill_(entries.ignored, 0.0)
    total = a.sum(-1, keepdim=True)
    pull = 2 * z_loss * lse[:, None] * total  # the z-loss's share of each p_v
    smooth = total * (eps / z.shape[1])
    grad = log_softmax.exp().mul_(total + pull).sub_(smooth)
    for k in range(a.shape[1]):
        column = entries.inside[:, k : k + 1]
        ignored = entries.ignored[:, k : k + 1]
        equal = entries.inside == column  # an ignored one that looks equal has no weight
        own, others = (a.where(same, 0.0).sum(-1, keepdim=True) for same in (equal, ~equal))
        log_p = log_softmax.gather(1, column)
        value = (others + pull) * log_p.exp() + own * torch.expm1(log_p) + eps * own - smooth
        grad.scatter_(1, column, torch.where(ignored, grad.gather(1, column), value))
    if softcap is not None:
        grad.mul_(1 - (z / softcap).square())
    return grad.masked_fill_(entries.idle, 0.0)
