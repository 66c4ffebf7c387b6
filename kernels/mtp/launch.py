"""Launches of the row kernels: the operators `mtp_rows`, `mtp_rows_` and `mtp_rows_backward`, by name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .. import _tune
from .._runtime import kept
from .config import WIDTHS, choose_rows, row_parts
from .kernel import combine_kernel, gradient_kernel, parts_kernel, rows_kernel

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_STEPS = 64  # the targets of a row are compared with each other
_MAX_PROGRAMS = 2**31 - 1
_MAX_WIDTH = 2**31 - 2**16  # a column plus a part is still an int32
_LINE = 16  # bytes of one load

_Columns = tuple[Tensor, Tensor, Tensor]


def unfit(name: str, *args: Any) -> str:
    logits, targets = args[0], args[1]
    vocab_sizes = args[5] if name == "mtp_rows_backward" else args[3] if name == "mtp_rows_" else args[2]
    if logits.dtype not in _DTYPES:
        return f"it takes float16, bfloat16 and float32, got {logits.dtype}"
    if targets.shape[2] > _MAX_STEPS:
        return f"it takes up to {_MAX_STEPS} targets a row and context, got {targets.shape[2]}"
    if logits.shape[1] > _MAX_WIDTH:
        return f"it takes rows of up to {_MAX_WIDTH:,} logits, got {logits.shape[1]:,}"
    if logits.shape[0] * sum(-(-size // WIDTHS[0]) for size in vocab_sizes) > _MAX_PROGRAMS:
        return f"it takes fewer than 2^31 stretches of {WIDTHS[0]} logits, got {tuple(logits.shape)}"
    return ""


def mtp_rows(
    logits: Tensor, targets: Tensor, vocab_sizes: Sequence[int], ignore_index: int, softcap: float | None, mean: bool
) -> _Columns:
    return _Rows(_dense(logits), targets, vocab_sizes, ignore_index, softcap).read(mean)


def mtp_rows_(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    vocab_sizes: Sequence[int],
    ignore_index: int,
    softcap: float | None,
    label_smoothing: float,
    z_loss: float,
) -> _Columns:
    dense = _dense(logits)
    rows = _Rows(dense, targets, vocab_sizes, ignore_index, softcap)
    if not _apart(logits):
        raise ValueError(
            f"mtp_rows_: logits must not overlap itself: it is written, got strides {list(logits.stride())}"
        )
    columns = rows.overwrite(weights, label_smoothing, z_loss)
    if dense is not logits:
        logits.copy_(dense)
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
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows = _Rows(_dense(logits), targets, vocab_sizes, ignore_index, softcap)
    rows.gradient(grad, log_p, lse, None, weights, label_smoothing, z_loss)
    return grad


class _Rows:
    """The arguments that the three operators share, checked, and what their launches have in common."""

    def __init__(
        self, logits: Tensor, targets: Tensor, vocab_sizes: Sequence[int], ignore_index: int, softcap: float | None
    ) -> None:
        _check(logits, targets, vocab_sizes, softcap)
        self.logits, self.targets = logits, targets
        self.sizes = tuple(vocab_sizes)
        self.contexts, self.steps = targets.shape[1:]
        self.config = choose_rows(
            _tune.arch_of(logits.device), logits.element_size(), max(self.sizes), softcap is not None
        )
        self.parts = row_parts(self.sizes, self.config.part)
        self.layout = self._layout() if self.contexts > 1 else None
        inverse = None if softcap is None else 1 / softcap
        self.strides = targets.stride()
        self.scalars = (self.contexts, self.steps, logits.shape[1], ignore_index, softcap, inverse)
        self.padded_steps = 1 << (self.steps - 1).bit_length()

    def read(self, mean: bool) -> _Columns:
        """What a loss needs of the logits."""
        columns, _ = self._columns(mean, self._is_split(), keep=False)
        if not self._is_split():
            self._launch_rows(columns, None, 0.0, 0.0)
        return columns

    def overwrite(self, weights: Tensor, smoothing: float, z_loss: float) -> _Columns:
        """The same, and the gradient over the logits."""
        _check_columns("weights", weights, self.targets.shape, self.logits)
        columns, softmax = self._columns(smoothing > 0, self._is_split(), keep=True)
        if self._is_split():
            log_p, _, lse = columns
            self.gradient(self.logits, log_p, lse, softmax, weights, smoothing, z_loss)
        else:
            self._launch_rows(columns, weights, smoothing, z_loss)
        return columns

    def gradient(
        self,
        grad: Tensor,
        log_p: Tensor,
        lse: Tensor,
        softmax: Tensor | None,
        weights: Tensor,
        smoothing: float,
        z_loss: float,
    ) -> None:
        _check_columns("log_p", log_p, self.targets.shape, self.logits)
        _check_columns("lse", lse, self.targets.shape[:2], self.logits)
        _check_columns("weights", weights, self.targets.shape, self.logits)
        if not self.logits.numel() or not self.steps:
            grad.zero_()
            return
        with on_device(self.logits.device):
            gradient_kernel[self.logits.shape[0] * len(self.parts),](
                self.logits,
                grad,
                self.targets,
                weights,
                self.layout,
                log_p.contiguous(),
                lse.contiguous(),
                softmax,
                self.logits.stride(0),
                grad.stride(0),
                *self.strides,
                *weights.stride(),
                *self.scalars,
                smoothing,
                z_loss,
                **self._tile(self.logits, grad),
                **self._options(),
            )

    def _columns(self, mean: bool, split: bool, keep: bool) -> tuple[_Columns, Tensor | None]:
        """Room for the results; with `split` the results, and to `keep` the softmax for a gradient over the logits."""
        rows, contexts = self.targets.shape[:2]
        options: dict[str, Any] = {"dtype": torch.float32, "device": self.logits.device}
        columns = (
            torch.empty(self.targets.shape, **options),
            torch.empty((rows, contexts) if mean else (0,), **options),
            torch.empty((rows, contexts), **options),
        )
        if not split:
            return columns, None
        softmax = torch.empty((rows, contexts, 2), **options) if keep else None
        states = torch.empty((rows, len(self.parts), 4), **options)
        common = (self.logits.stride(0), *self.strides, *self.scalars)
        with on_device(self.logits.device):
            parts_kernel[rows * len(self.parts),](
                self.logits,
                self.targets,
                self.layout,
                states,
                *common,
                MEAN=mean,
                **self._tile(self.logits),
                **self._options(),
            )
            combine_kernel[rows * contexts,](
                self.logits,
                self.targets,
                self.layout,
                states,
                columns[0],
                columns[1] if mean else None,
                columns[2],
                softmax,
                *common,
                STEPS=self.padded_steps,
                PART=self.config.part,
                num_warps=1,
                num_stages=1,
            )
        return columns, softmax

    def _launch_rows(self, columns: _Columns, weights: Tensor | None, smoothing: float, z_loss: float) -> None:
        log_p, mean, lse = columns
        if not self.logits.numel() or not self.steps:
            for column in columns:
                column.zero_()
            if weights is not None:
                self.logits.zero_()
            return
        with on_device(self.logits.device):
            rows_kernel[self.logits.shape[0] * self.contexts,](
                self.logits,
                self.targets,
                weights,
                self.layout,
                log_p,
                mean if mean.ndim == 2 else None,
                lse,
                self.logits.stride(0),
                *self.strides,
                *(weights.stride() if weights is not None else (0, 0, 0)),
                *self.scalars,
                smoothing,
                z_loss,
                **self._tile(self.logits),
                **self._options(),
            )

    def _is_split(self) -> bool:
        rows = self.logits.shape[0] * bool(self.steps)
        return len(self.parts) > self.contexts and 0 < rows * self.contexts < self.config.programs

    def _tile(self, *tensors: Tensor) -> dict[str, int]:
        """A tile by whether every segment of every row begins at a multiple of 16 bytes.

        That is a property of the tensor, not of the rows one looks at: the order of sums may depend on it.
        """
        unit = _LINE // self.logits.element_size()
        begins = accumulate(self.sizes[:-1])
        aligned = all(begin % unit == 0 for begin in begins) and all(
            tensor.stride(0) % unit == 0 and tensor.data_ptr() % _LINE == 0 for tensor in tensors
        )
        return self.config.tile(unit if aligned else 1) | {"ALIGN": unit if aligned else 1}

    def _options(self) -> dict[str, Any]:
        return {
            "STEPS": self.padded_steps,
            "PART": self.config.part,
            "num_warps": self.config.num_warps,
            "num_stages": 1,
            "enable_fp_fusion": True,
        }

    def _layout(self) -> Tensor:
        def make() -> tuple[Tensor, ...]:
            begins = [0, *accumulate(self.sizes)]
            firsts = [self.parts.index(context) for context in range(self.contexts)]
            numbers = [*begins, *firsts, len(self.parts), *self.parts]
            return (torch.tensor(numbers, dtype=torch.int32, device=self.logits.device),)

        return kept(("mtp layout", self.sizes, self.config.part), make, self.logits.device)[0]


def _dense(logits: Tensor) -> Tensor:
    return logits if logits.ndim != 2 or logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _apart(logits: Tensor) -> bool:
    """Whether no two elements can share memory: one dimension steps over all of the other."""
    (rows, columns), (row, column) = logits.shape, logits.stride()
    if rows <= 1 or columns <= 1:
        return (rows <= 1 or row != 0) and (columns <= 1 or column != 0)
    return row > (columns - 1) * column > 0 or column > (rows - 1) * row > 0


def _check(logits: Tensor, targets: Tensor, vocab_sizes: Sequence[int], softcap: float | None) -> None:
    """Refuse what a kernel would read or write out of bounds: not all calls come through the public functions."""
    if logits.ndim != 2:
        raise ValueError(f"mtp_rows: logits must have two dimensions, got {tuple(logits.shape)}")
    if not vocab_sizes or min(vocab_sizes) < 1 or sum(vocab_sizes) != logits.shape[1]:
        raise ValueError(
            f"mtp_rows: vocab_sizes must be positive and add up to the width of logits = {logits.shape[1]}, "
            f"got {list(vocab_sizes)}"
        )
    if targets.ndim != 3 or targets.shape[:2] != (logits.shape[0], len(vocab_sizes)):
        raise ValueError(
            f"mtp_rows: targets must have shape [{logits.shape[0]}, {len(vocab_sizes)}, K], got {tuple(targets.shape)}"
        )
    if targets.dtype != torch.int64 or targets.device != logits.device:
        raise ValueError(
            f"mtp_rows: targets must be int64 on {logits.device} as logits, got {targets.dtype} on {targets.device}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"mtp_rows: softcap must be None or positive, got {softcap}")


def _check_columns(name: str, value: Tensor, shape: Sequence[int], logits: Tensor) -> None:
    if value.shape != shape or value.dtype != torch.float32 or value.device != logits.device:
        raise ValueError(
            f"mtp_rows: {name} must be float32 {tuple(shape)} on {logits.device}, "
            f"got {value.dtype} {tuple(value.shape)} on {value.device}"
        )


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
