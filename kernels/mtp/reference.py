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

from .._runtime import compute_dtype, constant

_CHUNK_LOGITS = 1 << 19  # logits a chunk of the dense form: 2 MiB in float32, so that its passes run from cache
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
    counts: Tensor | None  # [C, K], what each mean divides by: the valid targets of these rows where None


# What both losses return: loss, per_step [C, K], lse [N, C] and log_p [N, C, K], the log probability of each target.
Results = tuple[Tensor, Tensor, Tensor, Tensor]


def mtp_cross_entropy(logits: Tensor, targets: Tensor, *options: object) -> Results:
    """The loss of logits [N, sum V] and targets [N, C, K]; the rest as in `Options`.

    Of rows and contexts whose targets are all ignored, lse is 0, and so is log_p at every ignored target.
    """
    o = Options(*options)  # type: ignore[arg-type]
    dtype = compute_dtype(logits.dtype)
    return _forward(lambda rows: logits[rows].to(dtype), _CHUNK_LOGITS, targets, o, dtype)


def linear_mtp_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: object
) -> Results:
    """The same for logits = hidden @ weight.T + bias, with hidden [N, E] and weight [sum V, E]."""
    o = Options(*options)  # type: ignore[arg-type]
    dtype = compute_dtype(hidden.dtype)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    hidden = _awake(hidden, targets, o)
    return _forward(lambda rows: F.linear(hidden[rows].to(dtype), w, b), _CHUNK_GEMM, targets, o, dtype)


def mtp_cross_entropy_backward(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, log_p: Tensor, *options: object
) -> Tensor:
    """The gradient of the loss with respect to the logits, in their dtype."""
    o = Options(*options)  # type: ignore[arg-type]
    parts = _gradient_parts(grad_loss, targets, lse, o)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _chunks(targets.shape[0], logits.shape[1], _CHUNK_LOGITS):
        _grad_logits(logits[rows].to(parts.scale.dtype), rows, parts, o, out=grad[rows])
    return grad


def linear_mtp_cross_entropy_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    log_p: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where not needed.  The sums over rows are kept in float32."""
    *options, need_hidden, need_weight, need_bias = rest
    o = Options(*options)  # type: ignore[arg-type]
    dtype = compute_dtype(hidden.dtype)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    parts = _gradient_parts(grad_loss, targets, lse, o)
    hidden = _awake(hidden, targets, o)
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else 0)
    grad_weight = torch.zeros(weight.shape if need_weight else 0, dtype=dtype, device=weight.device)
    grad_bias = torch.zeros(weight.shape[0] if need_bias else 0, dtype=dtype, device=weight.device)
    for rows in _chunks(hidden.shape[0], weight.shape[0], _CHUNK_GEMM):
        h = hidden[rows].to(dtype)
        z = F.linear(h, w, b)
        grad = torch.empty_like(z)
        _grad_logits(z, rows, parts, o, out=grad)
        if need_hidden:
            grad_hidden[rows] = grad @ w
        if need_weight:
            grad_weight.addmm_(grad.T, h)
        if need_bias:
            grad_bias += grad.sum(0)
    return grad_hidden, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype if bias is None else bias.dtype)


def linear_mtp_cross_entropy_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, per_step) and the gradients of that loss with respect to hidden, weight and bias."""
    loss, per_step, lse, log_p = linear_mtp_cross_entropy(hidden, weight, bias, targets, *rest[:-3])
    one = torch.ones_like(loss)
    return (
        loss,
        per_step,
        *linear_mtp_cross_entropy_backward(one, hidden, weight, bias, targets, lse, log_p, *rest),
    )


def _awake(hidden: Tensor, targets: Tensor, o: Options) -> Tensor:
    """`hidden`, 0 in rows without a target: a NaN there must not reach the gradient of the weight either."""
    return hidden.masked_fill((targets == o.ignore_index).all(-1).all(-1, keepdim=True), 0.0)


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
) -> Results:
    check_targets(targets, o)
    inside = _inside(targets, o)
    ignored = targets == o.ignore_index
    idle = ignored.all(-1, keepdim=True)  # not looked at: a NaN there must not reach anything
    columns = []
    for rows in _chunks(targets.shape[0], sum(o.vocab_sizes), budget):
        segments = _segments(make_logits(rows), o.vocab_sizes)
        columns.append(
            [
                _columns(z.masked_fill(idle[rows, context], 0.0), inside[rows, context], o)
                for context, z in enumerate(segments)
            ]
        )
    # [N, C, K], [N, C] and [N, C]: all that is left of the logits
    log_p, mean_log_p, lse = (
        torch.cat([torch.stack([context[part] for context in chunk], dim=1) for chunk in columns]) for part in range(3)
    )
    # A target outside the vocabulary was refused where the host can look at it.  Elsewhere it must show: NaN.
    log_p = torch.where(ignored, 0.0, torch.where(targets == inside, log_p, torch.nan))
    entry = 0.0 - log_p  # an ignored one is 0, not the -0 of a change of sign
    if o.label_smoothing:
        entry = (1 - o.label_smoothing) * entry - o.label_smoothing * mean_log_p[:, :, None]
    if o.z_loss:
        entry = entry + o.z_loss * lse.square()[:, :, None]
    entry = torch.where(ignored, 0.0, entry)
    weights = o.context_weights[:, None].to(dtype) * o.step_weights.to(dtype)
    per_step = entry.sum(0) / divisors(targets, o, dtype)
    if o.reduction == "none":
        loss = entry * weights
    elif o.reduction == "sum":
        loss = (entry.sum(0) * weights).sum()
    else:
        loss = (per_step * weights).sum()
    return loss, per_step, torch.where(idle.squeeze(-1), 0.0, lse), log_p


def _columns(z: Tensor, targets: Tensor, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """log p of the targets [n, K], its mean over the vocabulary [n] and lse [n], from one context's logits [n, V].

    The mean is wanted for smoothing only, and lse takes its place otherwise.
    """
    z = _soft_cap(z, o.softcap).contiguous()
    # One fused pass, and everything is read from it: log p_y keeps its digits where lse - z_y would cancel, and at the
    # largest logit z - log p is the logsumexp without a second pass of exponentials.
    log_p = torch.log_softmax(z, dim=-1)
    # The z-loss differentiates it, which maxima are not fit for: they share a gradient between equals.
    if o.z_loss:
        # A row of which log_softmax makes nothing has no logsumexp either, though it may be infinite.
        lse = torch.logsumexp(z, dim=-1).masked_fill(log_p.detach().amax(-1).isnan(), torch.nan)
    else:
        lse = (z.amax(-1) - log_p.amax(-1)).detach()
    return log_p.gather(1, targets), log_p.mean(-1) if o.label_smoothing else lse, lse


def _inside(targets: Tensor, o: Options) -> Tensor:
    """The targets, moved into their vocabulary where they are outside of it, so that they can be used as indices."""
    last = constant(tuple(size - 1 for size in o.vocab_sizes), torch.int64, targets.device)
    return targets.clamp(min=0).minimum(last[:, None])


def divisors(targets: Tensor, o: Options, dtype: torch.dtype) -> Tensor:
    """What each mean divides by, [C, K], never 0, so that a mean over nothing is 0.

    A given count of 0 where there are valid targets contradicts itself, and shows as an infinite loss.
    """
    if o.counts is None:
        return (targets != o.ignore_index).sum(0).clamp(min=1)
    return o.counts.to(dtype).clamp(min=torch.finfo(dtype).tiny)


class _GradientParts(NamedTuple):
    """dloss/dz = scale * softmax(z) - smooth, less `entry` at the targets: everything but the softmax."""

    scale: Tensor  # [N, C, 1]
    smooth: Tensor  # [N, C, 1]
    entry: Tensor  # [N, C, K]
    targets: Tensor  # [N, C, K], inside their vocabularies
    idle: Tensor  # [N, C, 1], the rows that are not looked at


def _gradient_parts(grad_loss: Tensor, targets: Tensor, lse: Tensor, o: Options) -> _GradientParts:
    weights = o.context_weights[:, None].to(grad_loss.dtype) * o.step_weights.to(grad_loss.dtype)
    if o.reduction == "mean":
        weights = weights / divisors(targets, o, grad_loss.dtype)
    ignored, inside = targets == o.ignore_index, _inside(targets, o)
    entry = torch.where(ignored, 0.0, torch.where(targets == inside, grad_loss * weights, torch.nan))
    total = entry.sum(-1, keepdim=True)
    scale = total * (1 + 2 * o.z_loss * lse[:, :, None]) if o.z_loss else total
    sizes = constant(tuple(o.vocab_sizes), grad_loss.dtype, targets.device)
    smooth = total * (o.label_smoothing / sizes[:, None])
    idle = ignored.all(-1, keepdim=True)
    return _GradientParts(scale, smooth, entry * (1 - o.label_smoothing), inside, idle)


def _grad_logits(z: Tensor, rows: slice, parts: _GradientParts, o: Options, *, out: Tensor) -> None:
    """dloss/dlogits of the chunk `rows`, logits z [n, sum V], into `out`."""
    grads = _segments(out, o.vocab_sizes)
    for context, raw in enumerate(_segments(z, o.vocab_sizes)):
        capped = _soft_cap(raw.masked_fill(parts.idle[rows, context], 0.0), o.softcap)
        p, scale = torch.softmax(capped, dim=-1), parts.scale[rows, context]
        grad = torch.mul(p, scale, out=grads[context]) if out.dtype == p.dtype else p.mul_(scale)
        grad.scatter_add_(1, parts.targets[rows, context], -parts.entry[rows, context])
        if o.label_smoothing:
            grad.sub_(parts.smooth[rows, context])
        if o.softcap is not None:
            grad.mul_(1 - (capped / o.softcap).square())
        if grad is p:  # to be rounded once, here
            grads[context].copy_(p)


def check_targets(targets: Tensor, o: Options) -> None:
    """Refuse a target outside its vocabulary, where looking does not stall a device or break a traced graph."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return
    sizes = constant(tuple(o.vocab_sizes), torch.int64, targets.device)[:, None]
    bad = (targets != o.ignore_index) & ((targets < 0) | (targets >= sizes))
    if bool(bad.any()):
        row, context, step = bad.nonzero()[0].tolist()
        raise ValueError(
            f"targets must be in [0, {o.vocab_sizes[context]}) or ignore_index ({o.ignore_index}), "
            f"got {int(targets[row, context, step])} at row {row}, context {context}, step {step}"
        )
