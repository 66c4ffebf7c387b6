"""Rotary embedding from positions and levels of detail as a module: five kinds of `gaussian_rope`, one interface.

A kind says what a level of detail does to an entry. Nothing is stored per position: phases are computed where they are
needed, so one module serves any position, and a checkpoint holds nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megactx.kernels import alibi_slopes, gaussian_rope
from megactx.kernels._runtime import (
    check_bool,
    check_choice,
    check_int,
    check_integer,
    check_number,
    check_shape,
    check_tensor,
)
from megactx.nn.constants import WithConstants

KINDS = ("simple", "gaussian", "gaussian_alibi", "gaussian_lod2d", "gaussian_lod2d_alibi")
SIGMAS = ("uniform", "power")
SLOPES_RULES = ("press", "geometric")


class GaussianRoPE(WithConstants):
    """Turns q and k by the position of each token, and lets its level of detail (LOD) have a say.

    `kind`:
      `"simple"`: plain RoPE. LODs are accepted and mean nothing, so that models can be compared on one batch.
      `"gaussian"`: a token of LOD l stands for `block_size ** l` tokens, and every pair shrinks by what is left of its
        rotation on average over that span: exp(-(s f)^2 / 2). The spread s follows `sigma`: `"uniform"`, that of an
        even span, 0 at LOD 0, so that plain tokens are plain RoPE; `"power"`, s = `block_size ** l`.
      `"gaussian_lod2d"`: the same, but of the D / 2 pairs of a head the last `lod_pairs` (default D / 8, at least one;
        one is always left for the position) turn by the LOD instead of the position, and never shrink.
      `..._alibi`: the same again, and `slopes` for `alibi_attention`, one per query head, by `slopes_rule` (`"press"`
        or `"geometric"`, see `alibi_slopes`): float32 `[n_head]`, whatever the type of the module. The other kinds
        have `slopes` None.

    `qk_norm_eps`, `norm_after`, `interleaved`, `conjugate` and `base` are those of `megactx.kernels.gaussian_rope`.
    What could never run is refused here, with a ValueError or TypeError naming the argument; settings that a kind
    makes nothing of are accepted, so that kinds can be compared, but for `lod_pairs`.
    """

    slopes: Tensor | None

    def __init__(
        self,
        head_dim: int,
        n_head: int,
        kind: str = "gaussian",
        *,
        block_size: int = 32,
        base: float = 10000.0,
        sigma: str = "uniform",
        lod_pairs: int | None = None,
        qk_norm_eps: float | None = None,
        norm_after: bool = False,
        interleaved: bool = False,
        conjugate: bool = False,
        slopes_rule: str = "press",
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        head_dim = check_int("head_dim", head_dim)
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even and at least 2, got {head_dim}")
        check_choice("sigma", sigma, SIGMAS)
        check_choice("slopes_rule", slopes_rule, SLOPES_RULES)
        if qk_norm_eps is not None:
            qk_norm_eps = check_positive("qk_norm_eps", qk_norm_eps)
        self.kind, self.head_dim, self.n_head = kind, head_dim, check_count("n_head", n_head)
        self.slopes_rule = slopes_rule
        self.settings: dict[str, Any] = {
            "block_size": check_count("block_size", block_size),
            "base": check_positive("base", base),
            "sigma": "none" if kind == "simple" else sigma,
            "lod_pairs": _checked_lod_pairs(kind, head_dim, lod_pairs),
            "interleaved": check_bool("interleaved", interleaved),
            "conjugate": check_bool("conjugate", conjugate),
        }
        self.norm: dict[str, Any] = {"qk_norm_eps": qk_norm_eps, "norm_after": check_bool("norm_after", norm_after)}
        self.set_constants()

    def constants(self, device: torch.device | None) -> dict[str, Tensor | None]:
        alibi = self.kind.endswith("_alibi")
        return {"slopes": alibi_slopes(self.n_head, self.slopes_rule, device=device) if alibi else None}

    def forward(self, q: Tensor, k: Tensor, positions: Tensor, lods: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Turned copies of `q [B, T, Hq, D]` and `k [B, T, Hk, D]`, D = `head_dim`.

        `positions`, `lods`: int32 or int64, `[T]` for all samples alike or `[B, T]`; no `lods` is LOD 0 everywhere.
        ValueError or TypeError names the argument.
        """
        check_tensor("q", q, 4)
        if q.shape[-1] != self.head_dim:
            raise ValueError(f"q must have the head_dim of the module, {self.head_dim}, got shape {tuple(q.shape)}")
        positions, lods = _alike(positions, lods, q.shape[:2])
        return gaussian_rope(q, k, positions, lods, **self.settings, **self.norm)

    def tables(self, positions: Tensor, lods: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same as tables, for models that take them: cos and sin, damped, float32 `[B, T, 1, D / 2]`, and `slopes`.

        B is 1 where neither `positions` nor `lods` has rows. Of a pair (x, y) the tables make
        (x cos - y sin, x sin + y cos); the QK-norm is left to the model. They are read off the operator, by turning
        the unit vector of every pair.
        """
        positions, lods = _alike(positions, lods)
        halves = (slice(0, None, 2), slice(1, None, 2))
        if not self.settings["interleaved"]:
            halves = (slice(None, self.head_dim // 2), slice(self.head_dim // 2, None))
        unit = torch.zeros(self.head_dim, device=positions.device)
        unit[halves[0]] = 1.0
        rows = positions if positions.ndim == 2 else positions[None]
        unit = unit.expand(*rows.shape, 1, -1)
        turned, _ = gaussian_rope(unit, unit, positions, lods, **self.settings)
        return turned[..., halves[0]], turned[..., halves[1]], self.slopes

    def extra_repr(self) -> str:
        return f"{self.head_dim}, {self.n_head}, kind={self.kind!r}, " + ", ".join(
            f"{name}={value!r}" for name, value in {**self.settings, **self.norm}.items()
        )


def check_count(name: str, value: Any) -> int:
    value = check_int(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def check_positive(name: str, value: Any) -> float:
    """Within the range that `gaussian_rope` takes a base from; what it takes for an epsilon is wider."""
    value = float(check_number(name, value, "positive and finite"))
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"{name} must be positive and finite, in [1e-30, 1e30], got {value!r}")
    return value


def check_positions(positions: Tensor, shape: Sequence[int]) -> None:
    """int32 or int64 in `shape`, which is `[B, T]`, or in its `[T]`."""
    check_integer("positions", positions, (1, 2))
    check_shape("positions", positions, shape[-positions.ndim :])


def _checked_lod_pairs(kind: str, head_dim: int, lod_pairs: int | None) -> int:
    """How many pairs turn by the LOD. Were it all of them, the position would have no say."""
    if "lod2d" not in kind:
        if lod_pairs is not None:
            raise ValueError(f"lod_pairs must be None for kind {kind!r}, got {lod_pairs!r}")
        return 0
    largest = head_dim // 2 - 1
    if largest < 1:
        raise ValueError(f"head_dim must be at least 4 for kind {kind!r}: a pair is for the position, got {head_dim}")
    if lod_pairs is None:
        return max(1, head_dim // 8)
    if not 1 <= check_int("lod_pairs", lod_pairs) <= largest:
        raise ValueError(f"lod_pairs must be in [1, {largest}] for heads of {head_dim}, got {lod_pairs}")
    return int(lod_pairs)


def _alike(
    positions: Tensor, lods: Tensor | None, shape: Sequence[int] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Both `[B, T]` where one of them is: the operator takes them in one shape. `shape` is `[B, T]` where it is known,
    else the positions' own, for which the lods may bring the B."""
    if shape is None:
        check_integer("positions", positions, (1, 2))
    else:
        check_positions(positions, shape)
    if lods is None:
        return positions, None
    check_integer("lods", lods, (1, 2))
    if shape is None:
        shape = (positions if positions.ndim >= lods.ndim else lods).shape[:-1] + positions.shape[-1:]
    check_shape("lods", lods, shape[-lods.ndim :])
    if positions.ndim == lods.ndim:
        return positions, lods
    return positions.expand(*shape), lods.expand(*shape)
