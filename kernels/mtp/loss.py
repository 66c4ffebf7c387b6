"""The dense loss, composed of two passes over the logits: what runs on every device.

Everything but those passes works on [N, C, K] numbers, and is PyTorch.  The passes are the operators `mtp_rows` and
`mtp_rows_backward`, whichever implementation the device has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _library
from .reference import Options, Results, check_targets, divisors
from .rows import Columns


def part(name: str) -> Callable[..., Any]:
    """An operator this one is composed of, in the backend it is called for."""
    return _library.OPERATORS[name].derivative


def mtp_cross_entropy(logits: Tensor, targets: Tensor, *options: object) -> Results:
    """As `reference.mtp_cross_entropy`, reading the logits once."""
    o = Options(*options)  # type: ignore[arg-type]
    check_targets(targets, o)
    columns: Columns = part("mtp_rows")(
        logits, targets, o.vocab_sizes, o.ignore_index, o.softcap, o.label_smoothing > 0
    )
    return (*reduced(columns, targets, o), columns[2], columns[0])


def mtp_cross_entropy_backward(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, log_p: Tensor, *options: object
) -> Tensor:
    """As `reference.mtp_cross_entropy_backward`, reading the logits once and writing the gradient once."""
    o = Options(*options)  # type: ignore[arg-type]
    weights = entry_weights(grad_loss, targets, o)
    grad: Tensor = part("mtp_rows_backward")(
        logits, targets, log_p, lse, weights, o.vocab_sizes, o.ignore_index, o.softcap, o.label_smoothing, o.z_loss
    )
    return grad


def reduced(columns: Columns, targets: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """(loss, per_step [C, K]) from what the logits came down to."""
    log_p, mean_log_p, lse = columns
    entry = -log_p
    if o.label_smoothing or o.z_loss:
        if o.label_smoothing:
            entry = (1 - o.label_smoothing) * entry - o.label_smoothing * mean_log_p[:, :, None]
        if o.z_loss:
            entry = entry + o.z_loss * lse.square()[:, :, None]
        entry = entry.masked_fill_(targets == o.ignore_index, 0.0)
    weights = _weights(o, entry.dtype)
    total = entry.sum(0)
    if o.reduction == "mean":
        per_step = total / divisors(targets, o, entry.dtype)
        return (per_step * weights).sum(), per_step
    per_step = total / (targets != o.ignore_index).sum(0).clamp(min=1)
    return entry * weights if o.reduction == "none" else (total * weights).sum(), per_step


def entry_weights(grad_loss: Tensor | None, targets: Tensor, o: Options) -> Tensor:
    """What each entry weighs in the loss, times the gradient that arrives (1 where None): [N, C, K], often expanded.

    Ignored entries are not told apart: the passes leave them out.
    """
    weights = _weights(o, o.step_weights.dtype)
    if o.reduction == "mean":
        weights = weights / divisors(targets, o, weights.dtype)
    if grad_loss is not None:
        weights = weights * grad_loss
    return weights.expand(targets.shape)


def _weights(o: Options, dtype: torch.dtype) -> Tensor:
    return o.context_weights[:, None].to(dtype) * o.step_weights.to(dtype)
