"""Rotary embedding with exact phases and Gaussian damping: the specification, in plain PyTorch.

Pair j of a head, at frequency f_j = base^(-2j/D), turns by theta = position * f_j (Su et al., "RoFormer", 2021) and
shrinks by exp(-(s f_j)^2 / 2): the mean of the rotation over a Gaussian of standard deviation s around the position,
for a token that stands for a span of text.

The phase is computed in turns, as a 64-bit fixed-point number: F_j = f_j / (2 pi) * 2^64, rounded, times the position,
and the wrap of the integer product drops exactly the whole turns.  In float32 position * f is wrong by 0.016 at a
position of 10^6; here the cosine is within 4e-7 at 10^12, and a shift of all positions changes no difference of phases.
"""

from __future__ import annotations

import math
import operator
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .._runtime import compute_dtype, kept

SIGMAS = ("none", "uniform", "power")
_DIGITS = 60  # decimal digits of the frequencies; 64 bits are 20
_UNIT = 2.0 * math.pi * 2.0**-64  # radians in one unit of a fixed-point phase
_QUARTER = 2**62  # a quarter turn, which makes a cosine of a sine
_WIDEST = 1e300  # a span's spread is kept finite, so that times a frequency of 0 it is 0


T = TypeVar("T", int, float)


class Settings(NamedTuple):
    """The arguments that are not tensors, in the order of the operators' schemas."""

    block_size: int
    base: float
    sigma: str
    lod_pairs: int
    interleaved: bool
    conjugate: bool
    qk_norm_eps: float | None
    norm_after: bool


def gaussian_rope(
    q: Tensor, k: Tensor, positions: Tensor, lods: Tensor | None, *settings: object
) -> tuple[Tensor, Tensor]:
    """Rotated copies of q [B, T, Hq, D] and k [B, T, Hk, D]; the rest as in `Settings`."""
    s = Settings(*settings)  # type: ignore[arg-type]
    dtype = compute_dtype(q.dtype)
    own, other = rotation(positions, lods, q.shape[-1], s, dtype)

    def turned(x: Tensor) -> Tensor:
        y = x.to(dtype)
        if s.qk_norm_eps is not None and not s.norm_after:
            y = _norm(y, s.qk_norm_eps)
        y = _rotate(y, own, other, s.interleaved)
        if s.qk_norm_eps is not None and s.norm_after:
            y = _norm(y, s.qk_norm_eps)
        return y.to(x.dtype)

    return turned(q), turned(k)


def gaussian_rope_(q: Tensor, k: Tensor, *rest: object) -> None:
    """The same, written over q and k."""
    new_q, new_k = gaussian_rope(q, k, *rest)  # type: ignore[arg-type]
    q.copy_(new_q)
    k.copy_(new_k)


def gaussian_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    positions: Tensor,
    lods: Tensor | None,
    *settings: object,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k, which are needed themselves only where they were normalised.

    The rotation is linear, y = g R x, and its transpose g R^T turns back with the same damping; it is not the
    inverse, so nothing is ever recovered from y.
    """
    s = Settings(*settings)  # type: ignore[arg-type]
    dtype = compute_dtype(grad_q.dtype)
    own, other = rotation(positions, lods, grad_q.shape[-1], s, dtype)
    back = -other

    def returned(grad: Tensor, x: Tensor | None) -> Tensor:
        d = grad.to(dtype)
        if s.qk_norm_eps is None or x is None:
            return _rotate(d, own, back, s.interleaved).to(grad.dtype)
        if s.norm_after:
            d = _norm_backward(d, _rotate(x.to(dtype), own, other, s.interleaved), s.qk_norm_eps)
            return _rotate(d, own, back, s.interleaved).to(grad.dtype)
        d = _rotate(d, own, back, s.interleaved)
        return _norm_backward(d, x.to(dtype), s.qk_norm_eps).to(grad.dtype)

    return returned(grad_q, q), returned(grad_k, k)


def rotation(
    positions: Tensor, lods: Tensor | None, head_dim: int, s: Settings, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What each channel of a token is multiplied by, shared by all heads: two tensors [T, 1, D] or [B, T, 1, D].

    The first multiplies the channel itself (the damped cosine), the second its partner in the pair (the damped sine,
    negative for the first of the two).  Both are sines of a fixed-point phase: -sin x = sin(-x), cos x = sin(x + 1/4
    turn).
    """
    position_steps, level_steps, offsets, unit, frequencies = _tables(head_dim, s, positions.device)
    phase = torch.addcmul(offsets, positions.long()[..., None], position_steps)
    if s.lod_pairs and lods is not None:
        phase = torch.addcmul(phase, lods.long()[..., None], level_steps)
    factors = (phase * unit).sin_()
    if s.sigma == "power" or (s.sigma == "uniform" and lods is not None):
        factors = factors * _damping(lods, frequencies, s)
    own, other = factors.to(dtype).unsqueeze(-2).chunk(2, dim=-1)
    return own, other


def _damping(lods: Tensor | None, frequencies: Tensor, s: Settings) -> Tensor:
    """exp(-(s f)^2 / 2), float64 [..., 2 D]; an overflowing spread gives 0."""
    level = frequencies.new_zeros(1) if lods is None else lods.double()
    width = torch.pow(float(s.block_size), level)[..., None]
    spread = (width.square() - 1).clamp(min=0).div(12).sqrt() if s.sigma == "uniform" else width
    return torch.exp(-0.5 * (spread.clamp(max=_WIDEST) * frequencies).square())


def _tables(head_dim: int, s: Settings, device: torch.device) -> tuple[Tensor, ...]:
    """Constants of the 2 D columns `rotation` computes: D for the channels themselves, D for their partners.

    int64: phase per position (0 for pairs turned by the level), phase per level (0 for the others), phase offset;
    float64: the radians of one unit of phase; the frequency f_j, for the damping (0 for pairs turned by the level).
    """

    # A graph traced for changing shapes holds these as symbols.  The tables are constants, made for the very numbers,
    # which Dynamo takes these two calls to ask for: `int` and `float` leave a symbol as it is.
    head_dim, lod_pairs = operator.index(head_dim), operator.index(s.lod_pairs)
    s = s._replace(base=s.base.__float__(), lod_pairs=lod_pairs)

    def make() -> tuple[Tensor, ...]:
        pairs = head_dim // 2 - s.lod_pairs
        by_position = [*phase_steps(s.base, head_dim, pairs), *[0] * s.lod_pairs]
        by_level = [*[0] * pairs, *phase_steps(s.base, 2 * s.lod_pairs, s.lod_pairs)]
        offsets = [_QUARTER] * head_dim + [0] * head_dim
        frequency = [s.base ** (-2.0 * j / head_dim) for j in range(pairs)] + [0.0] * s.lod_pairs
        integers = (_phase_columns(by_position, s), _phase_columns(by_level, s), offsets)
        floats = _columns(frequency, frequency, s.interleaved) * 2
        return (
            *(torch.tensor(columns, dtype=torch.int64, device=device) for columns in integers),
            torch.tensor(_UNIT, dtype=torch.float64, device=device),
            torch.tensor(floats, dtype=torch.float64, device=device),
        )

    return kept(("rope", head_dim, s.base, s.lod_pairs, s.interleaved, s.conjugate), make, device)


def _phase_columns(steps: list[int], s: Settings) -> list[int]:
    back, ahead = [-step for step in steps], steps
    if s.conjugate:
        back, ahead = ahead, back
    return _columns(steps, steps, s.interleaved) + _columns(back, ahead, s.interleaved)


def _columns(first: list[T], second: list[T], interleaved: bool) -> list[T]:
    """The channels of a head from the first and second member of each pair."""
    if not interleaved:
        return first + second
    return [member for pair in zip(first, second, strict=True) for member in pair]


@torch.compiler.assume_constant_result
def phase_steps(base: float, head_dim: int, pairs: int) -> tuple[int, ...]:
    """F_j = base^(-2j / head_dim) / (2 pi) * 2^64 modulo 2^64, as signed 64-bit integers, j = 0 .. pairs - 1."""
    return _phase_steps(base, head_dim, pairs)


@lru_cache(maxsize=256)
def _phase_steps(base: float, head_dim: int, pairs: int) -> tuple[int, ...]:
    with localcontext() as context:
        context.prec = _DIGITS
        log_base = Decimal(base).ln()
        unit = Decimal(2) ** 64 / (2 * _pi())
        turns = (unit * (log_base * (-2 * j) / head_dim).exp() for j in range(pairs))
        return tuple((int(turn.to_integral_value()) + 2**63) % 2**64 - 2**63 for turn in turns)


def _pi() -> Decimal:
    """Pi to the precision of the context, by Machin's formula: 16 atan(1/5) - 4 atan(1/239)."""

    def atan_of_inverse(n: int) -> Decimal:
        power = total = Decimal(1) / n
        k = 1
        while abs(power) > Decimal(10) ** -(_DIGITS + 2):
            power /= -n * n
            k += 2
            total += power / k
        return total

    return 16 * atan_of_inverse(5) - 4 * atan_of_inverse(239)


def _rotate(x: Tensor, own: Tensor, other: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs of x [B, T, H, D]: (j, j + D/2), or (2j, 2j + 1) where interleaved."""
    partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(x * own, partner, other)


def _norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _norm_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """The gradient of `_norm` at x."""
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    y = x * scale
    return scale * (grad - y * (grad * y).mean(-1, keepdim=True))
