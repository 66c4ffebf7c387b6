"""`sample_contexts`: draw one token for each context from packed logits.

A draw happens once per generated token, so the way to the operator is kept short: numbers given as knobs become
tensors once and are looked up afterwards, and a loop can prepare its `Knobs` once and call `draw` directly.
"""

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .. import _library
from .._runtime import (
    check_float,
    check_int,
    check_number,
    check_sequence,
    check_tensor,
    check_vocab_sizes,
    constant,
)
from . import reference

Knob: TypeAlias = float | Sequence[float] | Tensor


class Knobs(NamedTuple):
    """The four sampling parameters as the operator takes them, each [B, C] on the device of the logits."""

    temperature: Tensor  # float32
    top_k: Tensor  # int64
    top_p: Tensor  # float32
    min_p: Tensor  # float32


class _Range(NamedTuple):
    dtype: torch.dtype
    low: float
    low_allowed: bool
    high: float
    words: str


_RANGES = {
    "temperature": _Range(torch.float32, 0.0, True, torch.finfo(torch.float32).max, "finite and >= 0"),
    "top_k": _Range(torch.int64, 0, True, 2**63 - 1, "an integer >= 0 (0 = off)"),
    "top_p": _Range(torch.float32, 0.0, False, 1.0, "in (0, 1] (1 = off)"),
    "min_p": _Range(torch.float32, 0.0, True, 1.0, "in [0, 1] (0 = off)"),
}
_PLAIN = frozenset((int, float))
_PREPARED: dict[tuple[object, ...], Knobs] = {}
_MAX_PREPARED = 256


def sample_contexts(
    logits: Tensor,
    vocab_sizes: Sequence[int],
    *,
    temperature: Knob = 1.0,
    top_k: Knob = 0,
    top_p: Knob = 1.0,
    min_p: Knob = 0.0,
    seeds: Tensor | int,
    step: Tensor | int,
) -> Tensor:
    """Draw one token id for each of C contexts.

    `logits` [B, sum(vocab_sizes)], any float dtype and strides: the contexts side by side.  Each knob is a number, a
    sequence of C numbers, or a tensor [C] or [B, C].  `seeds` int64 [B] or [B, C], or one number for all rows;
    `step` a number or a 0-d int64 tensor (so that a CUDA graph can advance it).  Returns int64 [B, C].

    The order is temperature, top-k, top-p over what top-k left, min-p (keep p >= min_p * p_max).  `top_k=0`,
    `top_p=1` and `min_p=0` are off; a `top_k` past a vocabulary's end means all of it.  `temperature=0` and `top_k=1`
    are argmax.  Ties go to the lowest id, exactly k survive top-k, and top-p keeps the smallest set whose mass
    reaches p, the crossing token included.

    The draw depends on (seed, step, context, that row's logits) alone, so it is the same in any batch, order or
    packing, and on every backend but for near ties.  A row that holds a NaN, or nothing but -inf, gives -1.

    Raises `TypeError` or `ValueError` naming the argument.  Values inside CUDA tensors are not checked: that would
    stall the device.
    """
    check_float("logits", logits, 2)
    sizes = check_vocab_sizes(vocab_sizes, logits.shape[1], "the width of logits")
    batch, contexts = logits.shape[0], len(sizes)
    knobs = prepare_knobs(
        batch, contexts, logits.device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    return draw(
        logits,
        sizes,
        knobs,
        prepare_seeds(seeds, batch, contexts, logits.device),
        _step_tensor(step, logits.device),
    )


def draw(logits: Tensor, vocab_sizes: Sequence[int], knobs: Knobs, seeds: Tensor, step: Tensor) -> Tensor:
    """`sample_contexts` without its checks: everything as `prepare_knobs` and `prepare_seeds` return it, step 0-d."""
    return _SAMPLE_CONTEXTS(logits, vocab_sizes, *knobs, seeds, step)


def prepare_knobs(
    batch: int,
    contexts: int,
    device: torch.device,
    *,
    temperature: Knob = 1.0,
    top_k: Knob = 0,
    top_p: Knob = 1.0,
    min_p: Knob = 0.0,
) -> Knobs:
    """Check the knobs and bring them to [B, C].  The same numbers give the same tensors again, from a table."""
    given = (temperature, top_k, top_p, min_p)
    fixed = not torch.compiler.is_compiling() and _PLAIN.issuperset(map(type, given))
    key = (*given, type(top_k), batch, contexts, device)  # 3.0 equals 3, and is no count
    if fixed and key in _PREPARED:
        return _PREPARED[key]
    shape = (batch, contexts)
    knobs = Knobs(*(_knob(name, value, shape, device) for name, value in zip(Knobs._fields, given, strict=True)))
    if fixed and all(type(knob) is Tensor for knob in knobs):
        if len(_PREPARED) >= _MAX_PREPARED:
            _PREPARED.clear()
        _PREPARED[key] = knobs
    return knobs


def prepare_seeds(seeds: Tensor | int, batch: int, contexts: int, device: torch.device) -> Tensor:
    """Seeds as int64 [B, C]."""
    if not isinstance(seeds, Tensor):
        seed = check_int("seeds", seeds, "an integer or an int64 tensor")
        return constant((seed,), torch.int64, device).expand(batch, contexts)
    check_tensor("seeds", seeds, (1, 2))
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds must be int64, got {seeds.dtype}")
    _check_device("seeds", seeds, device)
    wanted = (batch,) if seeds.ndim == 1 else (batch, contexts)
    if tuple(seeds.shape) != wanted:
        raise ValueError(f"seeds must have shape {(batch,)} or {(batch, contexts)}, got {tuple(seeds.shape)}")
    return seeds[:, None].expand(batch, contexts) if seeds.ndim == 1 else seeds


def _step_tensor(step: Tensor | int, device: torch.device) -> Tensor:
    if isinstance(step, Tensor):
        if step.ndim != 0 or step.dtype != torch.int64:
            raise ValueError(f"step must be a 0-d int64 tensor, got {step.dtype} of shape {tuple(step.shape)}")
        return _check_device("step", step, device)
    number = check_int("step", step, "an integer or a 0-d int64 tensor")
    return torch.full((), number, dtype=torch.int64, device=device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device != device:
        raise ValueError(f"{name} must be on the device of logits ({device}), got {tensor.device}")
    return tensor


def _knob(name: str, value: Knob, shape: tuple[int, int], device: torch.device) -> Tensor:
    dtype = _RANGES[name].dtype
    if isinstance(value, Tensor):
        return _knob_tensor(name, value, shape, device)
    if isinstance(value, (int, float, Real)):
        return constant((_checked_number(name, value),), dtype, device).expand(shape)
    values = check_sequence(name, value, f"a number, a sequence or a tensor, {_RANGES[name].words}")
    numbers = tuple(_checked_number(name, number) for number in values)
    if len(numbers) != shape[1]:
        raise ValueError(f"{name} must have one value per context ({shape[1]}), got {len(numbers)}")
    return constant(numbers, dtype, device).expand(shape)


def _knob_tensor(name: str, value: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    allowed = _RANGES[name]
    integer = not value.dtype.is_floating_point and value.dtype != torch.bool and not value.dtype.is_complex
    if not integer and (allowed.dtype == torch.int64 or not value.dtype.is_floating_point):
        raise TypeError(f"{name} must be {allowed.words}, got a tensor of {value.dtype}")
    _check_device(name, value, device)
    if tuple(value.shape) not in ((), shape[1:], shape):
        raise ValueError(f"{name} must have shape {shape[1:]} or {shape}, got {tuple(value.shape)}")
    if device.type == "cpu" and not torch.compiler.is_compiling():
        above = (value >= allowed.low) if allowed.low_allowed else (value > allowed.low)
        if not bool((above & (value <= allowed.high)).all()):
            raise ValueError(f"{name} must be {allowed.words} everywhere, got {value.tolist()}")
    return value.to(allowed.dtype).expand(shape)


def _checked_number(name: str, value: object) -> float:
    allowed = _RANGES[name]
    check = check_int if allowed.dtype == torch.int64 else check_number
    number = check(name, value, allowed.words)
    above = number >= allowed.low if allowed.low_allowed else number > allowed.low
    if not (above and number <= allowed.high):
        raise ValueError(f"{name} must be {allowed.words}, got {value!r}")
    return number


def _fake(logits: Tensor, vocab_sizes: Sequence[int], temperature: Tensor, *rest: Tensor) -> Tensor:
    return torch.empty(temperature.shape, dtype=torch.int64, device=logits.device)


_SAMPLE_CONTEXTS = _library.register("sample_contexts", reference=reference.sample_contexts, fake=_fake)
