"""Cross-entropy of one set of logits against K targets a row: the specification, in plain PyTorch.

With z the (soft-capped) logits of a row and context, lse = log sum_v exp(z_v), eps the label smoothing and lambda the
z-loss, one entry is

    CE(n, c, k) = (1 - eps) (lse - z_y) + eps (lse - mean_v z_v) + lambda lse^2,      y = targets[n, c, k]

and needs the logsumexp once, however many targets the row has.  With a_k the weight an entry has in the loss (times
the gradient that arrives) and S = sum_k a_k,

    dloss/dz_v = (1 + 2 lambda lse) S softmax(z)_v - (1 - eps) sum_k a_k [v = y_k] - eps S / V.

Rows go through in chunks small enough for the caches.  That also lets the linear form make its logits from hidden
and weight chunk by chunk, so that they never exist at once.  Arithmetic is float32, float64 for float64 input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .._runtime import compute_dtype

_CHUNK_LOGITS = 1 << 21  # logits a chunk of the dense form: 8 MiB in float32, so that its passes run from cache
_CHUNK_GEMM = 1 << 24  # logits a chunk of the linear form: enough rows for an efficient matrix product


class Options(NamedTuple):
    """The arguments both forms share, in the order of the operators' schemas."""

    vocab_sizes: Sequence[int]
    step_weights: Tensor  # [K]
    context_weights: Tensor  # [C]
    ignore_index: int
    reduction: str
    softcap: float | None
    label_smoothing: float
    z_loss: float


def mtp_cross_entropy(logits: Tensor, targets: Tensor, *options: object) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, per_step [C, K], lse [N, C]) of logits [N, sum V] and targets [N, C, K]; the rest as in `Options`."""
    o = Options(*options)  # type: ignore[arg-type]
    dtype = compute_dtype(logits.dtype)
    return _forward(lambda rows: logits[rows].to(dtype), _CHUNK_LOGITS, targets, o, dtype)


def linear_mtp_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: object
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for logits = hidden @ weight.T + bias, with hidden [N, E] and weight [sum V, E]."""
    o = Options(*options)  # type: ignore[arg-type]
    dtype = compute_dtype(hidden.dtype)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    return _forward(lambda rows: F.linear(hidden[rows].to(dtype), w, b), _CHUNK_GEMM, targets, o, dtype)


def mtp_cross_entropy_backward(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, *options: object
) -> Tensor:
    """The gradient of the loss with respect to the logits, in their dtype."""
    o = Options(*options)  # type: ignore[arg-type]
    entry_weights = _entry_weights(grad_loss, targets, o)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _chunks(targets.shape[0], logits.shape[1], _CHUNK_LOGITS):
        z = logits[rows].to(entry_weights.dtype)
        _grad_logits(z, targets[rows], lse[rows], entry_weights[rows], o, out=grad[rows])
    return grad


def linear_mtp_cross_entropy_backward(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, lse: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where not needed.  The sums over rows are kept in float32."""
    *options, need_hidden, need_weight, need_bias = rest
    o = Options(*options)  # type: ignore[arg-type]
    dtype = compute_dtype(hidden.dtype)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    entry_weights = _entry_weights(grad_loss, targets, o)
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    grad_weight = torch.zeros(weight.shape if need_weight else 0, dtype=dtype, device=weight.device)
    grad_bias = torch.zeros(weight.shape[0] if need_bias else 0, dtype=dtype, device=weight.device)
    for rows in _chunks(hidden.shape[0], weight.shape[0], _CHUNK_GEMM):
        h = hidden[rows].to(dtype)
        z = F.linear(h, w, b)
        grad = torch.empty_like(z)
        _grad_logits(z, targets[rows], lse[rows], entry_weights[rows], o, out=grad)
        if need_hidden:
            grad_hidden[rows] = grad @ w
        if need_weight:
            grad_weight.addmm_(grad.T, h)
        if need_bias:
            grad_bias += grad.sum(0)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype if bias is None else bias.dtype)


def _chunks(rows: int, width: int, budget: int) -> Iterator[slice]:
    size = max(1, budget // width)
    for start in range(0, max(rows, 1), size):  # no rows: one empty chunk, which gives the results their shapes
        yield slice(start, min(start + size, rows))


def _segments(packed: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return packed.split(list(sizes), dim=1) if len(sizes) > 1 else (packed,)


def _soft_cap(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _forward(
    make_logits: Callable[[slice], Tensor], budget: int, targets: Tensor, o: Options, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    _check_targets(targets, o)
    entries, lses = [], []
    for rows in _chunks(targets.shape[0], sum(o.vocab_sizes), budget):
        parts = [
            _entries(z, targets[rows, context], o)
            for context, z in enumerate(_segments(make_logits(rows), o.vocab_sizes))
        ]
        entries.append(torch.stack([entry for entry, _ in parts], dim=1))
        lses.append(torch.stack([lse for _, lse in parts], dim=1))
    entry = torch.cat(entries)  # [N, C, K], zero where ignored
    weights = o.context_weights[:, None].to(dtype) * o.step_weights.to(dtype)
    per_step = entry.sum(0) / _counts(targets, o.ignore_index)
    if o.reduction == "none":
        loss = entry * weights
    elif o.reduction == "sum":
        loss = (entry.sum(0) * weights).sum()
    else:
        loss = (per_step * weights).sum()
    return loss, per_step, torch.cat(lses)


def _entries(z: Tensor, targets: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """CE [n, K], zero where ignored, and lse [n] of one context: z [n, V], targets [n, K]."""
    z = _soft_cap(z, o.softcap)
    vocab = z.shape[1]
    # One fused pass, and everything is read from it: log p_y keeps its digits where lse - z_y would cancel, and at the
    # largest logit z - log p is the logsumexp without a second pass of exponentials.
    log_p = torch.log_softmax(z, dim=-1)
    lse = z.amax(-1, keepdim=True) - log_p.amax(-1, keepdim=True)
    ce = -log_p.gather(1, targets.clamp(0, vocab - 1))
    if o.label_smoothing:
        ce = (1 - o.label_smoothing) * ce - o.label_smoothing * log_p.mean(-1, keepdim=True)
    if o.z_loss:  # differentiated, which the maxima above are not fit for
        lse = torch.logsumexp(z, dim=-1, keepdim=True)
        ce = ce + o.z_loss * lse.square()
    # A target outside the vocabulary was refused where the host can look at it.  Elsewhere it must show: NaN.
    outside = (targets < 0) | (targets >= vocab)
    ce = torch.where(outside, torch.nan, ce)
    return torch.where(targets == o.ignore_index, 0.0, ce), lse.squeeze(1)


def _counts(targets: Tensor, ignore_index: int) -> Tensor:
    """How many entries each mean runs over, [C, K], at least one so that an empty mean is 0."""
    return (targets != ignore_index).sum(0).clamp(min=1)


def _entry_weights(grad_loss: Tensor, targets: Tensor, o: Options) -> Tensor:
    """a [N, C, K]: d(total) / d(entry), zero where ignored."""
    weights = o.context_weights[:, None].to(grad_loss.dtype) * o.step_weights.to(grad_loss.dtype)
    if o.reduction == "mean":
        weights = weights / _counts(targets, o.ignore_index)
    return torch.where(targets == o.ignore_index, 0.0, grad_loss * weights)


def _grad_logits(z: Tensor, targets: Tensor, lse: Tensor, entry_weights: Tensor, o: Options, *, out: Tensor) -> None:
    """dloss/dlogits of a chunk z [n, sum V] into `out`; targets and entry_weights [n, C, K], lse [n, C]."""
    grads = _segments(out, o.vocab_sizes)
    for context, raw in enumerate(_segments(z, o.vocab_sizes)):
        a = entry_weights[:, context]
        total = a.sum(-1, keepdim=True)
        scale = total * (1 + 2 * o.z_loss * lse[:, context, None]) if o.z_loss else total
        capped = _soft_cap(raw, o.softcap)
        grad = grads[context] if out.dtype == z.dtype else torch.empty_like(raw)
        torch.softmax(capped, dim=-1, out=grad).mul_(scale)
        grad.scatter_add_(1, targets[:, context].clamp(0, raw.shape[1] - 1), a * -(1 - o.label_smoothing))
        if o.label_smoothing:
            grad.sub_(total * (o.label_smoothing / raw.shape[1]))
        if o.softcap is not None:
            grad.mul_(1 - (capped / o.softcap).square())
        if grad is not grads[context]:
            grads[context].copy_(grad)


def _check_targets(targets: Tensor, o: Options) -> None:
    """Refuse a target outside its vocabulary, where looking does not stall a device or break a traced graph."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    sizes = torch.tensor(list(o.vocab_sizes))[:, None]
    bad = (targets != o.ignore_index) & ((targets < 0) | (targets >= sizes))
    if bool(bad.any()):
        row, context, step = bad.nonzero()[0].tolist()
        raise ValueError(
            f"targets must be in [0, {o.vocab_sizes[context]}) or ignore_index ({o.ignore_index}), "
            f"got {int(targets[row, context, step])} at row {row}, context {context}, step {step}"
        )
