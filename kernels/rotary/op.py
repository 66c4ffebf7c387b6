"""`gaussian_rope` and `gaussian_rope_`: rotate queries and keys by positions and levels of detail, without tables."""

from typing import Any

import torch
from torch import Tensor

from .. import _library
from .._runtime import (
    check_bool,
    check_choice,
    check_float,
    check_int,
    check_integer,
    check_like,
    check_number,
    check_shape,
)
from . import reference
from .memory import check_memory
from .reference import SIGMAS

_BASES = (1e-30, 1e30)  # of a base far below these the phase constants have more digits than are computed
_SMALLEST_EPS = torch.finfo(torch.float32).tiny  # less may be flushed to 0, and zeros become NaN


def gaussian_rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    lods: Tensor | None = None,
    *,
    block_size: int = 32,
    base: float = 10000.0,
    sigma: str = "uniform",
    lod_pairs: int = 0,
    interleaved: bool = False,
    conjugate: bool = False,
    qk_norm_eps: float | None = None,
    norm_after: bool = False,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021) whose pairs also shrink with the span a token stands for.

    `q` [B, T, Hq, D] and `k` [B, T, Hk, D] of one float dtype, D even.  `positions` int32 or int64, [T] or [B, T],
    anything in (-2^62, 2^62): phases are exact to 4e-7 up to 10^12.  `lods` integers of the same shape, the level of
    detail of each token, None for all zero.  Returns rotated copies in the dtype of the inputs.

    Pair j turns by `position * f_j`, f_j = base^(-2j / D), and shrinks by exp(-(s f_j)^2 / 2), where `sigma` is
    `"none"`: s = 0, plain RoPE; `"uniform"`: s = sqrt((w^2 - 1) / 12), w = block_size^lod, the standard deviation of a
    span of w tokens, so that single tokens are plain RoPE; `"power"`: s = w, which damps level 0 too.

    `lod_pairs=m` turns the last m pairs by the level instead, undamped: `lod * base^(-i / m)`.  `interleaved` pairs
    (2j, 2j + 1) instead of (j, j + D / 2).  `conjugate` turns the other way.  `qk_norm_eps` RMS-normalises each head
    of q and k, without a weight, before the rotation; `norm_after` after it, which takes the damping back.

    `base` lies in [1e-30, 1e30], and `qk_norm_eps` is at least 1.2e-38, the smallest normal float32.

    Raises `ValueError` or `TypeError` naming the argument.
    """
    options = _checked(
        q,
        k,
        positions,
        lods,
        (block_size, base, sigma, lod_pairs, interleaved, conjugate, qk_norm_eps, norm_after),
    )
    return _ROPE(q, k, *options)


def gaussian_rope_(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    lods: Tensor | None = None,
    *,
    block_size: int = 32,
    base: float = 10000.0,
    sigma: str = "uniform",
    lod_pairs: int = 0,
    interleaved: bool = False,
    conjugate: bool = False,
    qk_norm_eps: float | None = None,
    norm_after: bool = False,
) -> tuple[Tensor, Tensor]:
    """`gaussian_rope` in place: q and k are overwritten and returned.

    Under autograd this is the copying function followed by a copy, since a damped rotation cannot be undone to get
    the input back: it saves no memory there, and is right.

    q and k may be slices of one packed tensor.  Overlapping memory, within one of them or between the two, tensors with
    the negative bit set, and leaves that require a gradient are refused before anything is written.  Code that
    `torch.compile` traces has no memory to look at: it refuses expanded tensors, and memory that overlaps in another
    way is undefined there.
    """
    options = _checked(
        q,
        k,
        positions,
        lods,
        (block_size, base, sigma, lod_pairs, interleaved, conjugate, qk_norm_eps, norm_after),
    )
    check_memory(q, k)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        for name, x in (("q", q), ("k", k)):
            origin = x if x._base is None else x._base
            if origin.is_leaf and origin.requires_grad:
                raise ValueError(f"{name} must not be a leaf that requires a gradient, or a view of one")
        normalised = options[-2] is not None  # then the derivative needs what is about to be overwritten
        new_q, new_k = _ROPE(*((q.clone(), k.clone()) if normalised else (q, k)), *options)
        q.copy_(new_q)
        k.copy_(new_k)
    else:
        _ROPE_(q, k, *options)
    return q, k


def _checked(
    q: Tensor, k: Tensor, positions: Tensor, lods: Tensor | None, settings: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Everything behind q and k, checked, in the order of the schema."""
    block_size, base, sigma, lod_pairs, interleaved, conjugate, qk_norm_eps, norm_after = settings
    check_float("q", q, 4)
    check_like("k", check_float("k", k, 4), "q", q)
    batch, length, _, head_dim = q.shape
    if head_dim % 2:
        raise ValueError(f"q must have an even head dimension, got shape {tuple(q.shape)}")
    if k.shape[0] != batch or k.shape[1] != length or k.shape[3] != head_dim:
        raise ValueError(f"k must have shape [{batch}, {length}, Hk, {head_dim}] as q, got {tuple(k.shape)}")
    check_integer("positions", positions, (1, 2))
    check_shape("positions", positions, (batch, length) if positions.ndim == 2 else (length,))
    check_like("positions", positions, "q", q, dtype=False)
    if lods is not None:
        check_integer("lods", lods, (1, 2))
        check_shape("lods", lods, positions.shape)
        check_like("lods", lods, "q", q, dtype=False)
    block_size = check_int("block_size", block_size)
    if block_size < 1:
        raise ValueError(f"block_size must be >= 1, got {block_size!r}")
    base = float(check_number("base", base, "positive and finite"))
    if not _BASES[0] <= base <= _BASES[1]:
        raise ValueError(f"base must be in [{_BASES[0]}, {_BASES[1]}], got {base!r}")
    check_choice("sigma", sigma, SIGMAS)
    lod_pairs = check_int("lod_pairs", lod_pairs)
    if not 0 <= lod_pairs <= head_dim // 2:
        raise ValueError(f"lod_pairs must be in [0, {head_dim // 2}], got {lod_pairs!r}")
    for name, value in (("interleaved", interleaved), ("conjugate", conjugate), ("norm_after", norm_after)):
        check_bool(name, value)
    if qk_norm_eps is not None:
        qk_norm_eps = check_number("qk_norm_eps", qk_norm_eps, "None or positive and finite")
        if qk_norm_eps < _SMALLEST_EPS:
            raise ValueError(f"qk_norm_eps must be None or at least {_SMALLEST_EPS:.1e}, got {qk_norm_eps!r}")
    return (positions, lods, block_size, base, sigma, lod_pairs, interleaved, conjugate, qk_norm_eps, norm_after)


def _fake(q: Tensor, k: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _backward_fake(grad_q: Tensor, grad_k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, positions, lods, *settings = inputs
    normalised = settings[-2] is not None
    # One of the two may be frozen: what was made of it alone needs no gradient either.
    ctx.mark_non_differentiable(*(y for y, needed in zip(output, ctx.needs_input_grad, strict=False) if not needed))
    ctx.save_for_backward(q if normalised else None, k if normalised else None, positions, lods)
    ctx.settings = settings


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Any, ...]:
    q, k, positions, lods = ctx.saved_tensors
    # What is frozen goes in without heads, which is no work.
    if not ctx.needs_input_grad[0]:
        grad_q, q = grad_q[:, :, :0], None if q is None else q[:, :, :0]
    if not ctx.needs_input_grad[1]:
        grad_k, k = grad_k[:, :, :0], None if k is None else k[:, :, :0]
    grads = _ROPE_BACKWARD.derivative(grad_q, grad_k, q, k, positions, lods, *ctx.settings)
    needed = zip(grads, ctx.needs_input_grad, strict=False)
    return (*(grad if is_needed else None for grad, is_needed in needed), *(None,) * 10)


_ROPE = _library.register(
    "gaussian_rope",
    reference=reference.gaussian_rope,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_ROPE_ = _library.register("gaussian_rope_", reference=reference.gaussian_rope_, fake=lambda q, k, *options: None)
_ROPE_BACKWARD = _library.register(
    "gaussian_rope_backward", reference=reference.gaussian_rope_backward, fake=_backward_fake
)
for _name in ("gaussian_rope", "gaussian_rope_", "gaussian_rope_backward"):
    _library.triton(_name, ".rotary.launch")
