"""Shapes of the results, and the derivatives, of the operators of this family: for `op`, which registers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .. import _library
from .._runtime import compute_dtype
from .reference import Options

_OPTIONS = len(Options._fields)


def _loss_fakes(source: Tensor, targets: Tensor, reduction: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, contexts, steps = targets.shape
    dtype = compute_dtype(source.dtype)
    return (
        source.new_empty((rows, contexts, steps) if reduction == "none" else (), dtype=dtype),
        source.new_empty((contexts, steps), dtype=dtype),
        source.new_empty((rows, contexts), dtype=dtype),
        source.new_empty((rows, contexts, steps), dtype=dtype),
    )


def fake(logits: Tensor, targets: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _loss_fakes(logits, targets, Options(*options).reduction)


def backward_fake(grad_loss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def linear_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _loss_fakes(hidden, targets, Options(*options).reduction)


def linear_backward_fake(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    need_hidden, need_weight, need_bias = rest[-3:]
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        (weight if bias is None else bias).new_empty(weight.shape[0] if need_bias else 0),
    )


def gradients_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, per_step, _, _ = _loss_fakes(hidden, targets, Options(*rest[:-3]).reduction)
    return (loss, per_step, *linear_backward_fake(loss, hidden, weight, bias, *rest))


def rows_fake(
    logits: Tensor, targets: Tensor, vocab_sizes: Any, ignore_index: int, softcap: float | None, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(logits.dtype)
    rows, contexts, steps = targets.shape
    return (
        logits.new_empty((rows, contexts, steps), dtype=dtype),
        logits.new_empty((rows, contexts) if mean else (0,), dtype=dtype),
        logits.new_empty((rows, contexts), dtype=dtype),
    )


def rows_in_place_fake(
    logits: Tensor, targets: Tensor, weights: Tensor, sizes: Any, ignore: int, softcap: Any, eps: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    return rows_fake(logits, targets, sizes, ignore, softcap, eps > 0)


def rows_backward_fake(logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def no_derivative(name: str, public: str) -> Callable[..., NoReturn]:
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(f"{_library.NAMESPACE}::{name} has no derivative: call megactx.kernels.{public}")

    return backward


def _save(ctx: Any, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> None:
    o = Options(*options)
    # Copies of a few numbers: a schedule may write the next ones into the caller's before the backward pass.
    weights = o.step_weights.clone(), o.context_weights.clone()
    ctx.save_for_backward(*tensors, *weights, None if o.counts is None else o.counts.clone())
    ctx.settings = (o.ignore_index, o.reduction, o.softcap, o.label_smoothing, o.z_loss)
    ctx.vocab_sizes = o.vocab_sizes


def _saved(ctx: Any) -> tuple[tuple[Tensor | None, ...], Options]:
    *tensors, step_weights, context_weights, counts = ctx.saved_tensors
    ignore_index, reduction, softcap, label_smoothing, z_loss = ctx.settings
    weights = ctx.vocab_sizes, step_weights, context_weights
    return tuple(tensors), Options(*weights, ignore_index, reduction, softcap, label_smoothing, z_loss, counts)


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, targets, *options = inputs
    _, per_step, lse, log_p = output
    ctx.mark_non_differentiable(per_step, lse, log_p)
    ctx.set_materialize_grads(False)
    _save(ctx, (logits, targets, lse, log_p), tuple(options))


def backward(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * (_OPTIONS + 2)
    tensors, options = _saved(ctx)
    grad = _library.OPERATORS["mtp_cross_entropy_backward"].derivative(grad_loss, *tensors, *options)
    return (grad, None, *(None,) * _OPTIONS)


def linear_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, targets, *options = inputs
    _, per_step, lse, log_p = output
    ctx.mark_non_differentiable(per_step, lse, log_p)
    ctx.set_materialize_grads(False)
    _save(ctx, (hidden, weight, bias, targets, lse, log_p), tuple(options))


def linear_backward(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    if grad_loss is None:
        return (None,) * (_OPTIONS + 4)
    tensors, options = _saved(ctx)
    need = ctx.needs_input_grad[:3]
    run = _library.OPERATORS["linear_mtp_cross_entropy_backward"].derivative
    grads = run(grad_loss, *tensors, *options, *need)
    return (*(g if needed else None for g, needed in zip(grads, need, strict=True)), None, *(None,) * _OPTIONS)


def gradients_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """The gradients stay on the context rather than among its saved tensors: handed over, they can be a `.grad`."""
    _, per_step, *grads = output
    ctx.mark_non_differentiable(per_step, *grads)
    ctx.set_materialize_grads(False)  # or the backward pass is given zeros as large as the gradients
    ctx.grads = grads


def _plain(x: Tensor) -> bool:
    """False while a graph is traced or mapped over a batch of upstream gradients: then nothing may change in place."""
    functorch = torch._C._functorch
    return type(x) is Tensor and not (functorch.is_functorch_wrapped_tensor(x) or functorch.is_legacy_batchedtensor(x))


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """`grad.mul_(factor)`; on a GPU with Triton a factor of 1 costs no pass over the memory, nor a host sync."""
    if grad.device.type == "cuda" and not _library.why_not("mtp_rows_", "triton", "cuda"):
        from .scale import scale_

        return scale_(grad, factor)
    return grad.mul_(factor)


def gradients_backward(ctx: Any, grad_loss: Tensor | None, *unused: Tensor | None) -> tuple[Any, ...]:
    name = f"{_library.NAMESPACE}::linear_mtp_cross_entropy"
    if grad_loss is None:
        return (None,) * (_OPTIONS + 7)
    if torch.is_grad_enabled():  # create_graph: what follows would be a constant, and gradients of it silently zero
        raise RuntimeError(
            f"{name}_backward has no derivative, so a gradient of a gradient cannot pass through it: "
            'compute the forward under megactx.kernels.use_backend("reference")'
        )
    if ctx.grads is None:
        raise RuntimeError(
            f"{name}: its gradients were computed with the loss, and an earlier backward pass took them: take all that "
            'are wanted in one pass, compute the loss again, or sum that of reduction="none", which keeps what it needs'
        )
    grads = [grad if needed else None for grad, needed in zip(ctx.grads, ctx.needs_input_grad[:3], strict=True)]
    if not _plain(grad_loss):
        scaled = [None if grad is None else (grad * grad_loss).to(grad.dtype) for grad in grads]
    else:
        ctx.grads = None
        # A number on the CPU can be looked at; one on a GPU is multiplied with whatever it is.
        unit = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0
        scaled = [grad if grad is None or unit else _scaled(grad, grad_loss) for grad in grads]
    return (*scaled, *(None,) * (_OPTIONS + 4))
