"""The dense loss, composed of two passes over the logits: what runs on every device.

Everything but those passes works on [N, C, K] numbers, and is PyTorch.  The passes are the operators `mtp_rows` and
`mtp_rows_backward`, whichever implementation the device has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _library
from .._runtime import compute_dtype
from .reference import Options, Results, check_targets, divisors
from .rows import Columns


def part(name: str) -> Callable[..., Any]:
    """An operator this one is composed of, in the backend it is called for."""
    return _library.OPERATORS[name].derivative


def mtp_cross_entropy(logits: Tensor, targets: Tensor, *options: object) -> Results:
    """As `reference.mtp_cross_entropy`, reading the logits once."""
    o = Options(*options)  # type: ignore[arg-type]
    entries = Entries.of(targets, o, compute_dtype(logits.dtype))
    columns: Columns = part("mtp_rows")(
        logits, targets, o.vocab_sizes, o.ignore_index, o.softcap, o.label_smoothing > 0
    )
    return (*entries.reduced(columns), columns[2], columns[0])


def mtp_cross_entropy_backward(
    grad_loss: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, log_p: Tensor, *options: object
) -> Tensor:
    """As `reference.mtp_cross_entropy_backward`, reading the logits once and writing the gradient once."""
    o = Options(*options)  # type: ignore[arg-type]
    weights = Entries.of(targets, o, compute_dtype(logits.dtype)).weighed(grad_loss)
    grad: Tensor = part("mtp_rows_backward")(
        logits, targets, log_p, lse, weights, o.vocab_sizes, o.ignore_index, o.softcap, o.label_smoothing, o.z_loss
    )
    return grad


@dataclass(frozen=True)
class Entries:
    """What the loss is a sum over, found once: the loss and the gradient of a step ask for the same."""

    options: Options
    shape: torch.Size
    valid: Tensor | None  # [N, C, K], which are not ignored: all of them where None
    weights: Tensor  # [C, K], those of the steps times those of the contexts
    divisors: Tensor | int  # [C, K], of the means

    @classmethod
    def of(cls, targets: Tensor, o: Options, dtype: torch.dtype) -> Entries:
        valid = _valid(targets, o)
        weights = o.context_weights[:, None].to(dtype) * o.step_weights.to(dtype)
        whole = valid is None and o.counts is None
        return cls(o, targets.shape, valid, weights, len(targets) if whole else divisors(targets, o, dtype))

    def reduced(self, columns: Columns) -> tuple[Tensor, Tensor]:
        """(loss, per_step [C, K]) from what the logits came down to."""
        log_p, mean_log_p, lse = columns
        o = self.options
        entry = 0.0 - log_p  # an ignored one is 0, not the -0 of a change of sign
        if o.label_smoothing or o.z_loss:
            if o.label_smoothing:
                entry = (1 - o.label_smoothing) * entry - o.label_smoothing * mean_log_p[:, :, None]
            if o.z_loss:
                entry = entry + o.z_loss * lse.square()[:, :, None]
            if self.valid is not None:
                entry = entry.masked_fill_(~self.valid, 0.0)
        total = entry.sum(0)
        per_step = total / self.divisors
        if o.reduction == "none":
            return entry * self.weights, per_step
        return ((per_step if o.reduction == "mean" else total) * self.weights).sum(), per_step

    def weighed(self, grad_loss: Tensor | None) -> Tensor:
        """What each entry weighs in the loss, times the gradient that arrives (1 where None): [N, C, K], expanded.

        Ignored entries are not told apart: the passes leave them out.
        """
        weights = self.weights / self.divisors if self.options.reduction == "mean" else self.weights
        if grad_loss is not None:
            weights = weights * grad_loss
        return weights.expand(self.shape)


def _valid(targets: Tensor, o: Options) -> Tensor | None:
    """Which targets are not ignored, None for all; those outside of their vocabulary are refused as by the reference.

    On the CPU, where a look costs nothing, the smallest and the largest target mostly tell.
    """
    if targets.device.type == "cpu" and targets.numel():
        low, high = (int(x) for x in targets.aminmax())
        below = high < min(o.vocab_sizes)
        if below and low >= 0 and not low <= o.ignore_index <= high:
            return None
        if not (below and low >= (-1 if o.ignore_index == -1 else 0)):
            check_targets(targets, o)
    return targets != o.ignore_index
