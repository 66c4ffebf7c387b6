"""Numeric contexts: real values stored as integer codes on an even grid.

`raw = minimum + step * code` gives the value back and `scaled = (code - mean) / std` is what a model reads and
predicts, with the mean and the standard deviation of the codes of the training split, so that predicting the mean
costs an MSE of 1.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megactx.errors import MegactxError

MAX_CODES = 65_536
_MAX_DECIMALS = 6


@dataclass(frozen=True)
class NumericScale:
    """`minimum` and `step` in raw units, `mean` and `std` in codes (std is 1 for a constant context)."""

    minimum: float
    step: float
    mean: float
    std: float

    def raw(self, codes: NDArray[Any]) -> NDArray[np.float64]:
        return self.minimum + self.step * np.asarray(codes, np.float64)

    def scaled(self, codes: NDArray[Any]) -> NDArray[np.float64]:
        return (np.asarray(codes, np.float64) - self.mean) / self.std

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def measure_scale(codes: NDArray[Any], minimum: float, step: float) -> NumericScale:
    """The scale of a context from the codes of its training split."""
    mean = float(np.mean(codes, dtype=np.float64))
    std = float(np.std(codes, dtype=np.float64))
    return NumericScale(float(minimum), float(step), mean, std if std > 0 else 1.0)


def quantise(values: NDArray[Any], name: str) -> tuple[NDArray[np.int64], float, float, int]:
    """Codes, minimum, step and number of codes for real `values` [n].

    A decimal grid (step 1, 0.1, ... 1e-6) is taken where all values lie on one and its codes fit 16 bits: then the
    codes are exact. Otherwise 65,536 even steps between the extremes, an error of at most half a step.
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise MegactxError(f"context {name!r} is empty")
    if not np.isfinite(values).all():
        at = int((~np.isfinite(values)).argmax())
        raise MegactxError(f"context {name!r}: value {at} is {values[at]}, expected a finite number")
    low, high = float(values.min()), float(values.max())
    span = high - low
    if not math.isfinite(span):
        raise MegactxError(f"context {name!r}: the range {low}..{high} is too wide for float64")
    if span == 0:
        return np.zeros(values.size, np.int64), low, 1.0, 1
    largest = max(abs(low), abs(high))
    for decimals in range(_MAX_DECIMALS + 1):
        factor = 10.0**decimals
        if span * factor > MAX_CODES - 1:
            break
        grid = (values - low) * factor
        codes = np.rint(grid)
        # What rounding in the decimal text and in the subtraction can explain; past a hundredth of a step it proves
        # nothing any more.
        tolerance = 8 * np.finfo(np.float64).eps * largest * factor
        if tolerance < 0.01 and codes.max() > 0 and np.abs(grid - codes).max() <= tolerance:
            return codes.astype(np.int64), low, 1.0 / factor, int(codes.max()) + 1
    step = span / (MAX_CODES - 1)
    if step == 0:
        raise MegactxError(f"context {name!r}: the range {low}..{high} is too narrow to divide")
    codes = np.rint((values - low) / step).clip(0, MAX_CODES - 1).astype(np.int64)
    return codes, low, step, MAX_CODES


def format_number(value: float, step: float) -> str:
    """`value` with just the decimals that tell codes `step` apart, and no trailing zeros."""
    decimals = max(0, 1 - math.floor(math.log10(step))) if step < 1 or value != int(value) else 0
    text = f"{value:.{min(decimals, 300)}f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text in ("-0", "") else text
