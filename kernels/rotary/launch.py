"""Launches of the rotary kernel: the operators of the family, by name."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _tune
from .._runtime import kept
from .config import MAX_HEAD_DIM, choose
from .kernel import rotary_kernel
from .reference import SIGMAS, Settings, phase_steps

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTEGERS = (torch.int64, torch.int32)
_UNIT = 2**32  # of the logarithms in the table
_NEVER = -(2**62)  # the logarithm of nothing: no level makes a spread of it, and no sum with a level wraps
_LOG2_E = math.log2(math.e)


def unfit(name: str, *args: Any) -> str:
    q = args[0]
    if q.dtype not in _DTYPES:
        return f"it takes float16, bfloat16 and float32, got {q.dtype}"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"it takes head dimensions up to {MAX_HEAD_DIM}, got {q.shape[-1]}"
    if q.shape[0] * q.shape[1] >= 2**31:
        return f"it takes fewer than 2^31 tokens, got {q.shape[0]} * {q.shape[1]}"
    if name == "gaussian_rope_backward" and (args[2] is None) != (args[3] is None):
        return "it takes both q and k, or neither"
    return ""


def gaussian_rope(
    q: Tensor, k: Tensor, positions: Tensor, lods: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch((q, k), out, (None, None), positions, lods, Settings(*settings))
    return out


def gaussian_rope_(q: Tensor, k: Tensor, positions: Tensor, lods: Tensor | None, *settings: Any) -> None:
    _launch((q, k), (None, None), (None, None), positions, lods, Settings(*settings))


def gaussian_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor | None,
    k: Tensor | None,
    positions: Tensor,
    lods: Tensor | None,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    s = Settings(*settings)
    out = grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)
    if q is None or k is None or s.qk_norm_eps is None:  # the transpose of a rotation turns the other way
        s = s._replace(conjugate=not s.conjugate, qk_norm_eps=None)
        _launch((grad_q, grad_k), out, (None, None), positions, lods, s)
    else:
        _launch((grad_q, grad_k), out, (q, k), positions, lods, s)
    return out


_Pair = tuple[Tensor, Tensor] | tuple[None, None]


def _launch(
    inputs: tuple[Tensor, Tensor], out: _Pair, at: _Pair, positions: Tensor, lods: Tensor | None, s: Settings
) -> None:
    q, k = inputs
    _check(q, k, at, positions, lods, s)
    batch, length, heads_q, head_dim = q.shape
    heads_k, tokens = k.shape[2], batch * length
    if not tokens * head_dim * (heads_q + heads_k):
        return
    if s.sigma == "none" and not s.lod_pairs:
        lods = None
    damped = s.sigma if s.sigma == "power" or lods is not None else "none"  # at level 0 a uniform span is a point
    config = choose(_tune.arch_of(q.device), q.dtype, head_dim, heads_q, heads_k)
    with _on(q.device):
        rotary_kernel[-(-tokens // config.block_t), config.groups(tokens, heads_q, heads_k)](
            q,
            k,
            *out,
            *at,
            positions,
            lods,
            _table(head_dim, s, q.device),
            *q.stride(),
            *k.stride(),
            *(x_stride for x in at for x_stride in (x.stride() if x is not None else (None,) * 4)),
            *_token_strides(positions),
            *(_token_strides(lods) if lods is not None else (None, None)),
            tokens,
            length,
            heads_q,
            heads_k,
            s.qk_norm_eps,
            HALF=head_dim // 2,
            PAIRS=config.pairs,
            BLOCK_T=config.block_t,
            BLOCK_H=config.block_h,
            LOD_PAIRS=s.lod_pairs,
            SIGMA=damped,
            INTERLEAVED=s.interleaved,
            NORM="none" if s.qk_norm_eps is None else "after" if s.norm_after else "before",
            num_warps=config.num_warps,
            num_stages=1,
            enable_fp_fusion=True,
        )


def _check(q: Tensor, k: Tensor, at: _Pair, positions: Tensor, lods: Tensor | None, s: Settings) -> None:
    """Refuse what a kernel would read or write out of bounds: not all calls come through the public functions."""
    shape, dtype, device = q.shape, q.dtype, q.device
    if len(shape) != 4 or shape[3] % 2:
        raise ValueError(f"gaussian_rope: q must have four dimensions, the last of them even, got {tuple(shape)}")
    if len(k.shape) != 4 or k.shape[:2] != shape[:2] or k.shape[3] != shape[3]:
        raise ValueError(f"gaussian_rope: k must have the shape of q but for the heads, got {tuple(k.shape)}")
    if k.dtype != dtype or k.device != device:
        raise ValueError(f"gaussian_rope: k must have dtype {dtype} on {device} as q, got {k.dtype} on {k.device}")
    for name, x in (("positions", positions), ("lods", lods)):
        if x is None:
            continue
        if x.dtype not in _INTEGERS or x.device != device:
            raise ValueError(f"gaussian_rope: {name} must be int32 or int64 on {device}, got {x.dtype} on {x.device}")
        if x.shape != shape[1:2] and x.shape != shape[:2]:
            raise ValueError(
                f"gaussian_rope: {name} must have shape [{shape[1]}] or [{shape[0]}, {shape[1]}], got {tuple(x.shape)}"
            )
    for name, x, grad in (("q", at[0], q), ("k", at[1], k)):
        if x is not None and (x.shape != grad.shape or x.dtype != dtype or x.device != device):
            raise ValueError(f"gaussian_rope: {name} must have the shape, dtype and device of its gradient")
    if s.sigma not in SIGMAS:
        raise ValueError(f"gaussian_rope: sigma must be one of {', '.join(SIGMAS)}, got {s.sigma!r}")
    if s.block_size < 1:
        raise ValueError(f"gaussian_rope: block_size must be >= 1, got {s.block_size}")
    if not 0 < s.base < math.inf:
        raise ValueError(f"gaussian_rope: base must be positive and finite, got {s.base}")
    if not 0 <= s.lod_pairs <= shape[3] // 2:
        raise ValueError(f"gaussian_rope: lod_pairs must be in [0, {shape[3] // 2}], got {s.lod_pairs}")


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _token_strides(x: Tensor) -> tuple[int, int]:
    """Strides over samples and tokens of [T] or [B, T]."""
    return (0, x.stride(0)) if x.ndim == 1 else (x.stride(0), x.stride(1))


def _table(head_dim: int, s: Settings, device: torch.device) -> Tensor:
    """int64 [D + 1]: what each pair turns by, in units of 2^-64 turns; the logarithm of its damping; its growth.

    At a level `lod` with w = block_size^lod, (s f_j)^2 / 2 * log2(e) is 2^(lod * growth + logarithm), in units of
    2^-32, but for a factor of 1 - w^-2 of the uniform spread.
    """

    def make() -> tuple[Tensor, ...]:
        pairs = head_dim // 2 - s.lod_pairs
        steps = phase_steps(s.base, head_dim, pairs) + phase_steps(s.base, 2 * s.lod_pairs, s.lod_pairs)
        if s.conjugate:
            steps = tuple((2**63 - step) % 2**64 - 2**63 for step in steps)
        scale = math.log2(_LOG2_E / (24 if s.sigma == "uniform" else 2))
        slope = -4 * math.log2(s.base) / head_dim  # of the logarithm of a squared frequency
        logarithms = [round((slope * j + scale) * _UNIT) for j in range(pairs)] + [_NEVER] * s.lod_pairs
        growth = round(2 * math.log2(s.block_size) * _UNIT)
        return (torch.tensor([*steps, *logarithms, growth], dtype=torch.int64, device=device),)

    return kept(("rope steps", head_dim, *s[:4], s.conjugate), make, device)[0]
