"""`mtp_cross_entropy` and `linear_mtp_cross_entropy`: K shifted targets for the price of one logsumexp."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library
from .._runtime import check_float, check_like, check_shape
from . import config, derivatives, linear, loss, reference, rows
from .arguments import REDUCTIONS as REDUCTIONS
from .arguments import checked, checked_sizes


class MTPLoss(NamedTuple):
    """What both losses return.

    loss: float32 (float64 for float64 input): a scalar, or with `reduction="none"` [N, C, K], [N, K] without contexts.
    per_step: [C, K] mean over the valid rows of each context and step, unweighted, detached: for logging.
    """

    loss: Tensor
    per_step: Tensor


def mtp_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_sizes: Sequence[int] | None = None,
    step_weights: Sequence[float] | Tensor = (1.0,),
    context_weights: Sequence[float] | Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    counts: Tensor | None = None,
) -> MTPLoss:
    """Cross-entropy against K targets a row (multi-token prediction, Gloeckle et al. 2024) in each of C contexts.

    `logits` [N, V], V = sum(vocab_sizes), one context if None.  `targets` int64 [N, K], or [N, C, K] for C contexts;
    entry k is the target k + 1 steps ahead, `ignore_index` marks none.

        loss = sum_c cw_c sum_k sw_k mean over valid n of CE(n, c, k)

    with `step_weights` [K] and `context_weights` [C] (default 1 / C), numbers or tensors on the device; a mean over
    nothing is 0.  `reduction="sum"` sums instead of taking means; `"none"` gives each entry with its weights, 0 where
    ignored, so that its sum is the `"sum"`.  `softcap=c` turns logits a into c tanh(a / c); `label_smoothing` is
    torch's; `z_loss` adds z_loss * lse^2 to each CE.  Arithmetic and results are float32 (float64 for float64).

    `counts` [C, K] is what each mean divides by, by default this call's valid targets.  Give the counts of the whole
    batch where a call sees a part of it (gradient accumulation, data parallel): loss, `per_step` and gradients are then
    that part's share, and the shares add up to the whole.  A constant, on the device; 0 only where nothing is valid.

    The same input gives the same bits, on the CPU with the same number of threads: what is made of one row is its own,
    but PyTorch divides sums over the rows, and in the linear form matrix products, among the threads.

    Raises `ValueError` or `TypeError` naming the argument; a target outside its vocabulary names its row, context
    and step on the CPU, and makes the loss NaN on a GPU, where looking would stall the device.
    """
    check_float("logits", logits, 2)
    sizes = checked_sizes(vocab_sizes, logits.shape[1], "the width of logits")
    options = (step_weights, context_weights, ignore_index, reduction, softcap, label_smoothing, z_loss, counts)
    arguments = checked(logits, targets, sizes, *options)
    value, per_step, _, _ = _MTP(logits, *arguments)
    return _result(value, per_step, targets)


def linear_mtp_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    vocab_sizes: Sequence[int] | None = None,
    step_weights: Sequence[float] | Tensor = (1.0,),
    context_weights: Sequence[float] | Tensor | None = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    counts: Tensor | None = None,
) -> MTPLoss:
    """`mtp_cross_entropy` of `hidden @ weight.T + bias`, which never holds the logits.

    `hidden` [N, E], `weight` [V, E], `bias` [V] or None, of float dtypes that may differ: the products are taken in the
    dtype of `hidden`, which inside autocast is autocast's where it was float32 (but for float16 on the CPU, which has
    no fast products of it).  V = sum(vocab_sizes).  The gradient of the weight is summed in float32; an input that
    needs no gradient costs no product, and neither does, on the CPU, a row without a target.

    Where a gradient will be asked for, it is computed with the loss, from the logits while they are there, and rounded
    to the dtype of its input; the backward pass multiplies it by the number that arrives, which rounds a second time
    where that is not 1 (or a power of 2), and hands it over: it can run once, where a second time is an error.  With
    `reduction="none"`, which has no such number, and where `hidden`, or a weight or bias that needs a gradient, is
    float16, in which a gradient of a mean underflows before the loss scale arrives, the backward pass makes the logits
    again, and nothing is rounded before that number is in it.
    """
    check_float("hidden", hidden, 2)
    check_like("weight", check_float("weight", weight, 2), "hidden", hidden, dtype=False)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must have shape [V, {hidden.shape[1]}] as hidden, got {tuple(weight.shape)}")
    if bias is not None:
        check_shape("bias", check_float("bias", bias, 1), weight.shape[:1])
        check_like("bias", bias, "hidden", hidden, dtype=False)
    sizes = checked_sizes(vocab_sizes, weight.shape[0], "the rows of weight")
    hidden = _as_autocast(hidden)
    options = (step_weights, context_weights, ignore_index, reduction, softcap, label_smoothing, z_loss, counts)
    arguments = checked(hidden, targets, sizes, *options)
    needs = tuple(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if torch.is_grad_enabled() and any(needs) and _at_once(hidden, weight, bias, needs, reduction):
        value, per_step, *_ = _GRADIENTS(hidden, weight, bias, *arguments, *needs)
    else:
        value, per_step, _, _ = _LINEAR(hidden, weight, bias, *arguments)
    return _result(value, per_step, targets)


def _as_autocast(hidden: Tensor) -> Tensor:
    """What `F.linear` would make of a float32 input inside autocast."""
    device = hidden.device.type
    if hidden.dtype != torch.float32 or not torch.amp.is_autocast_available(device):  # there is none on meta
        return hidden
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    # The CPU takes products of float16 in float32 anyway, for want of fast ones: rounding would be for nothing.
    return hidden if (device, dtype) == ("cpu", torch.float16) else hidden.to(dtype)


def _at_once(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...], reduction: str) -> bool:
    """Whether loss and gradient may be computed together.  The reference has derivatives of every order instead.

    The gradient of the logits has the dtype of `hidden`, whichever input needs one.
    """
    rounded = [x.dtype for x, needed in zip((weight, bias), needs[1:], strict=True) if x is not None and needed]
    return reduction != "none" and torch.float16 not in (hidden.dtype, *rounded) and _library.chosen() != "reference"


def _result(value: Tensor, per_step: Tensor, targets: Tensor) -> MTPLoss:
    squeeze = targets.ndim == 2 and value.ndim == 3
    return MTPLoss(value.squeeze(1) if squeeze else value, per_step.detach())


class _Logits(NamedTuple):
    """What there is to know of logits that are yet to be made."""

    dtype: torch.dtype
    shape: tuple[int, int]


def _unfit(logits: Tensor | _Logits, targets: Tensor, vocab_sizes: Sequence[int], *rest: Any) -> str:
    """Why the row kernels in Triton do not take what an operator composed of them was given."""
    if logits.dtype == torch.float64:
        return "float64 is computed by the reference alone"
    return _library.OPERATORS["mtp_rows"].launchers().unfit("mtp_rows", logits, targets, vocab_sizes)


def _linear_unfit(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, vocab_sizes: Sequence[int], *rest: Any
) -> str:
    (rows, width), vocab = hidden.shape, weight.shape[0]
    rows = min(rows, config.chunk_rows(rows, vocab, width, hidden.element_size(), hidden.device.type))
    return _unfit(_Logits(hidden.dtype, (rows, vocab)), targets, vocab_sizes)


_library.register(
    "mtp_rows",
    reference=rows.mtp_rows,
    fake=derivatives.rows_fake,
    backward=derivatives.no_derivative("mtp_rows", "mtp_cross_entropy"),
)
_library.register("mtp_rows_", reference=rows.mtp_rows_, fake=derivatives.rows_in_place_fake)
_library.register("mtp_rows_backward", reference=rows.mtp_rows_backward, fake=derivatives.rows_backward_fake)
for _name in ("mtp_rows", "mtp_rows_", "mtp_rows_backward"):
    _library.triton(_name, ".mtp.launch")

_MTP = _library.register(
    "mtp_cross_entropy",
    reference=reference.mtp_cross_entropy,
    fallback=loss.mtp_cross_entropy,
    parts=("mtp_rows", "mtp_rows_backward"),
    unfit=_unfit,
    fake=derivatives.fake,
    backward=derivatives.backward,
    setup_context=derivatives.setup_context,
)
_library.register(
    "mtp_cross_entropy_backward",
    reference=reference.mtp_cross_entropy_backward,
    fallback=loss.mtp_cross_entropy_backward,
    parts=("mtp_rows_backward",),
    fake=derivatives.backward_fake,
)
_LINEAR = _library.register(
    "linear_mtp_cross_entropy",
    reference=reference.linear_mtp_cross_entropy,
    fallback=linear.linear_mtp_cross_entropy,
    parts=("mtp_rows", "mtp_rows_"),
    unfit=_linear_unfit,
    fake=derivatives.linear_fake,
    backward=derivatives.linear_backward,
    setup_context=derivatives.linear_setup_context,
)
_library.register(
    "linear_mtp_cross_entropy_backward",
    reference=reference.linear_mtp_cross_entropy_backward,
    fallback=linear.linear_mtp_cross_entropy_backward,
    parts=("mtp_rows_",),
    fake=derivatives.linear_backward_fake,
)
_GRADIENTS = _library.register(
    "linear_mtp_cross_entropy_gradients",
    reference=reference.linear_mtp_cross_entropy_gradients,
    fallback=linear.linear_mtp_cross_entropy_gradients,
    parts=("mtp_rows_",),
    unfit=_linear_unfit,
    fake=derivatives.gradients_fake,
    backward=derivatives.gradients_backward,
    setup_context=derivatives.gradients_setup_context,
)
