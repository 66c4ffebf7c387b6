"""`mtp_cross_entropy` and `linear_mtp_cross_entropy`: K shifted targets for the price of one logsumexp."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library
from .._runtime import (
    check_choice,
    check_constant,
    check_float,
    check_int,
    check_like,
    check_number,
    check_sequence,
    check_shape,
    check_tensor,
    check_vocab_sizes,
    compute_dtype,
    constant,
)
from . import reference

REDUCTIONS = ("mean", "sum", "none")


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
) -> MTPLoss:
    """Cross-entropy against K targets a row (multi-token prediction, Gloeckle et al. 2024) in each of C contexts.

    `logits` [N, V], V = sum(vocab_sizes), one context if None.  `targets` int64 [N, K], or [N, C, K] for C contexts;
    entry k is the target k + 1 steps ahead, `ignore_index` marks none.

        loss = sum_c cw_c sum_k sw_k mean over valid n of CE(n, c, k)

    with `step_weights` [K] and `context_weights` [C] (default 1 / C), numbers or tensors on the device; a mean over
    nothing is 0.  `reduction="sum"` sums instead of taking means; `"none"` gives each entry with its weights, 0 where
    ignored, so that its sum is the `"sum"`.  `softcap=c` turns logits a into c tanh(a / c); `label_smoothing` is
    torch's; `z_loss` adds z_loss * lse^2 to each CE.  Arithmetic and results are float32 (float64 for float64).

    Raises `ValueError` or `TypeError` naming the argument; a target outside its vocabulary names its row, context
    and step on the CPU, and makes the loss NaN on a GPU, where looking would stall the device.
    """
    check_float("logits", logits, 2)
    sizes = _sizes(vocab_sizes, logits.shape[1], "the width of logits")
    check_tensor("targets", targets, (2, 3))
    arguments = _arguments(
        logits,
        targets,
        sizes,
        (step_weights, context_weights, ignore_index, reduction, softcap, label_smoothing, z_loss),
    )
    loss, per_step, _ = _MTP(logits, *arguments)
    return _result(loss, per_step, targets)


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
) -> MTPLoss:
    """`mtp_cross_entropy` of `hidden @ weight.T + bias`, which never holds the logits.

    `hidden` [N, E], `weight` [V, E], `bias` [V] or None, of float dtypes that may differ; V = sum(vocab_sizes).  The
    gradient of the weight is summed in float32 and rounded once; an input that needs no gradient costs no product.
    """
    check_float("hidden", hidden, 2)
    check_like("weight", check_float("weight", weight, 2), "hidden", hidden, dtype=False)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must have shape [V, {hidden.shape[1]}] as hidden, got {tuple(weight.shape)}")
    if bias is not None:
        check_shape("bias", check_float("bias", bias, 1), weight.shape[:1])
        check_like("bias", bias, "hidden", hidden, dtype=False)
    sizes = _sizes(vocab_sizes, weight.shape[0], "the rows of weight")
    check_tensor("targets", targets, (2, 3))
    arguments = _arguments(
        hidden,
        targets,
        sizes,
        (step_weights, context_weights, ignore_index, reduction, softcap, label_smoothing, z_loss),
    )
    loss, per_step, _ = _LINEAR(hidden, weight, bias, *arguments)
    return _result(loss, per_step, targets)


def _result(loss: Tensor, per_step: Tensor, targets: Tensor) -> MTPLoss:
    squeeze = targets.ndim == 2 and loss.ndim == 3
    return MTPLoss(loss.squeeze(1) if squeeze else loss, per_step.detach())


def _sizes(vocab_sizes: Sequence[int] | None, width: int, width_name: str) -> list[int]:
    return check_vocab_sizes((width,) if vocab_sizes is None else vocab_sizes, width, width_name)


def _arguments(source: Tensor, targets: Tensor, sizes: list[int], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Everything behind the float inputs, checked, in the order of the schema."""
    step_weights, context_weights, ignore_index, reduction, softcap, label_smoothing, z_loss = options
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    check_like("targets", targets, "the logits or hidden", source, dtype=False)
    rows, contexts = source.shape[0], len(sizes)
    if targets.ndim == 2 and contexts == 1:
        targets = targets[:, None]
    if targets.ndim == 2 or targets.shape[0] != rows or targets.shape[1] != contexts:
        wanted = f"[{rows}, {contexts}, K]" + (f" or [{rows}, K]" if contexts == 1 else "")
        raise ValueError(f"targets must have shape {wanted}, got {tuple(targets.shape)}")
    check_choice("reduction", reduction, REDUCTIONS)
    ignore_index = check_int("ignore_index", ignore_index)
    if softcap is not None:
        softcap = check_number("softcap", softcap, "None or positive and finite")
        if softcap <= 0:
            raise ValueError(f"softcap must be None or positive and finite, got {softcap!r}")
    label_smoothing = check_number("label_smoothing", label_smoothing, "in [0, 1]")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
    z_loss = check_number("z_loss", z_loss, ">= 0 and finite")
    if z_loss < 0:
        raise ValueError(f"z_loss must be >= 0 and finite, got {z_loss!r}")
    if context_weights is None:
        context_weights = (1.0 / contexts,) * contexts
    return (
        targets,
        sizes,
        _weights("step_weights", step_weights, targets.shape[2], "one per step ahead (K)", source),
        _weights("context_weights", context_weights, contexts, "one per context (C)", source),
        ignore_index,
        reduction,
        softcap,
        label_smoothing,
        z_loss,
    )


def _weights(name: str, value: Sequence[float] | Tensor, length: int, words: str, source: Tensor) -> Tensor:
    dtype = compute_dtype(source.dtype)
    if isinstance(value, Tensor):
        check_like(name, check_tensor(name, value, 1), "the logits or hidden", source, dtype=False)
        weights = check_constant(name, value).to(dtype)
    else:
        numbers = check_sequence(name, value, "a sequence of numbers or a tensor")
        weights = constant(tuple(float(check_number(name, n, "finite numbers")) for n in numbers), dtype, source.device)
    if weights.shape[0] != length:
        raise ValueError(f"{name} must have {length} entries, {words}, got {weights.shape[0]}")
    return weights


def _loss_fakes(source: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor]:
    rows, contexts, steps = targets.shape
    dtype = compute_dtype(source.dtype)
    return (
        source.new_empty((rows, contexts, steps) if reduction == "none" else (), dtype=dtype),
        source.new_empty((contexts, steps), dtype=dtype),
        source.new_empty((rows, contexts), dtype=dtype),
    )


def _fake(logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _loss_fakes(logits, targets, reference.Options(*options).reduction)


def _linear_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _loss_fakes(hidden, targets, reference.Options(*options).reduction)


def _backward_fake(grad_loss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _linear_backward_fake(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = rest[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        (weight if bias is None else bias).new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, targets, sizes, step_weights, context_weights, *options = inputs
    _, per_step, lse = output
    ctx.mark_non_differentiable(per_step, lse)
    ctx.save_for_backward(logits, targets, lse, step_weights, context_weights)
    ctx.options = (sizes, options)


def _backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    logits, targets, lse, step_weights, context_weights = ctx.saved_tensors
    sizes, options = ctx.options
    grad = _MTP_BACKWARD.derivative(grad_loss, logits, targets, lse, sizes, step_weights, context_weights, *options)
    return (grad, *(None,) * 9)


def _linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, bias, targets, sizes, step_weights, context_weights, *options = inputs
    _, per_step, lse = output
    ctx.mark_non_differentiable(per_step, lse)
    ctx.save_for_backward(hidden, weight, bias, targets, lse, step_weights, context_weights)
    ctx.options = (sizes, options)


def _linear_backward(ctx: Any, grad_loss: Tensor, *unused: Tensor) -> tuple[Any, ...]:
    hidden, weight, bias, targets, lse, step_weights, context_weights = ctx.saved_tensors
    sizes, options = ctx.options
    need = ctx.needs_input_grad[:3]
    grads = _LINEAR_BACKWARD.derivative(
        grad_loss, hidden, weight, bias, targets, lse, sizes, step_weights, context_weights, *options, *need
    )
    return (*(grad if needed else None for grad, needed in zip(grads, need, strict=True)), *(None,) * 9)


_MTP = _library.register(
    "mtp_cross_entropy",
    reference=reference.mtp_cross_entropy,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_MTP_BACKWARD = _library.register(
    "mtp_cross_entropy_backward", reference=reference.mtp_cross_entropy_backward, fake=_backward_fake
)
_LINEAR = _library.register(
    "linear_mtp_cross_entropy",
    reference=reference.linear_mtp_cross_entropy,
    fake=_linear_fake,
    backward=_linear_backward,
    setup_context=_linear_setup_context,
)
_LINEAR_BACKWARD = _library.register(
    "linear_mtp_cross_entropy_backward",
    reference=reference.linear_mtp_cross_entropy_backward,
    fake=_linear_backward_fake,
)
