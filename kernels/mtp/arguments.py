"""The arguments both losses share: checked, and in the order of the operators' schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._runtime import (
    check_choice,
    check_constant,
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

REDUCTIONS = ("mean", "sum", "none")
_FLOAT = torch.finfo(torch.float32)
_COUNTS = (torch.int32, torch.int64, torch.float32, torch.float64)


def checked_sizes(vocab_sizes: Sequence[int] | None, width: int, width_name: str) -> list[int]:
    return check_vocab_sizes((width,) if vocab_sizes is None else vocab_sizes, width, width_name)


def checked(
    source: Tensor,
    targets: Tensor,
    sizes: list[int],
    step_weights: Sequence[float] | Tensor,
    context_weights: Sequence[float] | Tensor | None,
    ignore_index: int,
    reduction: str,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
    counts: Tensor | None,
) -> tuple[Any, ...]:
    """Everything behind the float inputs, of which `source` is the first."""
    targets = _targets(targets, source, len(sizes))
    check_choice("reduction", reduction, REDUCTIONS)
    ignore_index = check_int("ignore_index", ignore_index)
    if softcap is not None:
        softcap = check_number("softcap", softcap, "None or positive and finite")
        if not _FLOAT.tiny <= softcap <= _FLOAT.max:  # the kernels divide by it in float32
            raise ValueError(f"softcap must be None or positive and finite, in float32, got {softcap!r}")
    label_smoothing = check_number("label_smoothing", label_smoothing, "in [0, 1]")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing!r}")
    z_loss = check_number("z_loss", z_loss, ">= 0 and finite")
    if z_loss < 0:
        raise ValueError(f"z_loss must be >= 0 and finite, got {z_loss!r}")
    if context_weights is None:
        context_weights = (1.0 / len(sizes),) * len(sizes)
    steps = targets.shape[2]
    return (
        targets,
        sizes,
        _weights("step_weights", step_weights, steps, "one per step ahead (K)", source),
        _weights("context_weights", context_weights, len(sizes), "one per context (C)", source),
        ignore_index,
        reduction,
        softcap,
        label_smoothing,
        z_loss,
        _counts(counts, reduction, (len(sizes), steps), source),
    )


def _targets(targets: Tensor, source: Tensor, contexts: int) -> Tensor:
    """As [N, C, K]."""
    check_tensor("targets", targets, (2, 3))
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    check_like("targets", targets, "the logits or hidden", source, dtype=False)
    rows = source.shape[0]
    if targets.ndim == 2 and contexts == 1:
        targets = targets[:, None]
    if targets.ndim == 2 or targets.shape[0] != rows or targets.shape[1] != contexts:
        wanted = f"[{rows}, {contexts}, K]" + (f" or [{rows}, K]" if contexts == 1 else "")
        raise ValueError(f"targets must have shape {wanted}, got {tuple(targets.shape)}")
    if targets.shape[2] < 1:
        raise ValueError(f"targets must have at least one step ahead (K), got shape {tuple(targets.shape)}")
    return targets


def _weights(name: str, value: Sequence[float] | Tensor, length: int, words: str, source: Tensor) -> Tensor:
    dtype = compute_dtype(source.dtype)
    if isinstance(value, Tensor):
        check_like(name, check_tensor(name, value, 1), "the logits or hidden", source, dtype=False)
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} must be a tensor of floating-point numbers or integers, got {value.dtype}")
        weights = check_constant(name, value).to(dtype)
    else:
        numbers = check_sequence(name, value, "a sequence of numbers or a tensor")
        weights = constant(tuple(float(check_number(name, n, "finite numbers")) for n in numbers), dtype, source.device)
    if weights.shape[0] != length:
        raise ValueError(f"{name} must have {length} entries, {words}, got {weights.shape[0]}")
    return weights


def _counts(counts: Tensor | None, reduction: str, shape: tuple[int, int], source: Tensor) -> Tensor | None:
    if counts is None:
        return None
    if reduction != "mean":
        raise ValueError(f'counts must be None with reduction="{reduction}": it is what a mean divides by')
    check_shape("counts", check_tensor("counts", counts, 2), shape)
    if counts.dtype not in _COUNTS:
        raise TypeError(f"counts must be int32, int64, float32 or float64, got {counts.dtype}")
    return check_constant("counts", check_like("counts", counts, "the logits or hidden", source, dtype=False))
