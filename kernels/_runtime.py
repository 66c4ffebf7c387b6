"""Argument checks and small device facts shared by the families.

Each check raises a `ValueError` or `TypeError` that names the argument, what was expected and what came.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from numbers import Real
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)  # what an operator's schema takes; the last two while tracing
_LARGEST = sys.float_info.max
_CONSTANTS: dict[tuple[object, ...], tuple[Tensor, ...]] = {}
_MAX_CONSTANTS = 1024


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype arithmetic is done in: float64 for float64 input, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with autocast off: an operator takes its inputs as they come, and chooses its precision itself."""

    @wraps(function)
    def run(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def check_tensor(name: str, value: object, ndim: int | tuple[int, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if value.ndim not in allowed:
        dims = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(value.shape)}")
    return value


def check_float(name: str, value: object, ndim: int | tuple[int, ...]) -> Tensor:
    tensor = check_tensor(name, value, ndim)
    if tensor.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
    return tensor


def check_integer(name: str, value: object, ndim: int | tuple[int, ...]) -> Tensor:
    tensor = check_tensor(name, value, ndim)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {tensor.dtype}")
    return tensor


def check_mask(name: str, value: object, shape: Sequence[int]) -> Tensor:
    tensor = check_tensor(name, value, len(shape))
    if tensor.dtype != torch.bool:
        raise TypeError(f"{name} must be bool (True = attend), got {tensor.dtype}")
    return check_shape(name, tensor, shape)


def check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    return tensor


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> Tensor:
    """Same device, and unless told otherwise the same dtype."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name} ({other.device}), got {tensor.device}")
    if dtype and tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name} ({other.dtype}), got {tensor.dtype}")
    return tensor


def check_constant(name: str, tensor: Tensor) -> Tensor:
    """A tensor the operator has no derivative for: a silent zero gradient would be worse than an error."""
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require a gradient: the operator treats it as a constant")
    return tensor


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_number(name: str, value: Any, words: str = "a finite number") -> float:
    """A finite number, of Python or of numpy."""
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{name} must be {words}, got {value!r}")
        value = float(value)
    if not -_LARGEST <= value <= _LARGEST:  # a NaN fails every comparison
        raise ValueError(f"{name} must be {words}, got {value!r}")
    return value


def check_int(name: str, value: Any, words: str = "an integer") -> int:
    """An integer of 64 bits, of Python or of numpy.  A tensor is none: reading it would stall its device."""
    if type(value) is not int:
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be {words}, got {value!r}")
        value = operator.index(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be {words} of 64 bits, got {value!r}")
    return value


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_sequence(name: str, value: Any, words: str) -> list[Any]:
    try:
        return list(value)
    except TypeError:
        raise TypeError(f"{name} must be {words}, got {value!r}") from None


def check_vocab_sizes(vocab_sizes: Sequence[int], width: int, width_name: str) -> list[int]:
    """Positive sizes that add up to the width of the packed logits (or of the packed head)."""
    sizes = check_sequence("vocab_sizes", vocab_sizes, "a sequence of integers")
    sizes = [size if type(size) is int else check_int("vocab_sizes", size, "integers") for size in sizes]
    if not sizes or min(sizes) < 1:
        raise ValueError(f"vocab_sizes must be positive and at least one, got {sizes}")
    if sum(sizes) != width:
        raise ValueError(f"vocab_sizes must add up to {width_name} = {width}, got {sizes} (sum {sum(sizes)})")
    return sizes


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a tensor that is kept between calls."""
    return kept((values, dtype), lambda: (torch.tensor(values, dtype=dtype, device=device),), device)[0]


def kept(key: tuple[object, ...], make: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[Tensor, ...]:
    """The constants `make()`, made once per key and device, since making one costs as much as a small kernel.

    Not kept where a tensor would outlive what it belongs to: while a graph is traced (it may be symbolic) or
    captured (its memory belongs to the graph).  A mode that fakes tensors takes none that are real, so under a mode
    they are made anew.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return make()
    found = _CONSTANTS.get((key, device))
    if found is not None:
        return found
    with torch.inference_mode(False):
        made = make()
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if not capturing and all(type(tensor) is Tensor for tensor in made):
        if len(_CONSTANTS) >= _MAX_CONSTANTS:
            _CONSTANTS.clear()
        _CONSTANTS[key, device] = made
    return made
