"""Rotary embedding from positions and levels of detail as a module: five kinds of `gaussian_rope`, one interface.

A kind says what a level of detail does to an entry. Nothing is stored per position: phases are computed where they are
needed, so one module serves any position, and a checkpoint holds nothing of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from megactx.kernels import alibi_slopes, gaussian_rope

KINDS = ("simple", "gaussian", "gaussian_alibi", "gaussian_lod2d", "gaussian_lod2d_alibi")
SIGMAS = ("uniform", "power")


class GaussianRoPE(nn.Module):
    """Turns q and k by the position of each token, and lets its level of detail (LOD) have a say.

    `kind`:
      `"simple"`: plain RoPE. LODs are accepted and mean nothing, so that models can be compared on one batch.
      `"gaussian"`: a token of LOD l stands for `block_size ** l` tokens, and every pair shrinks by what is left of its
        rotation on average over that span: exp(-(s f)^2 / 2). The spread s follows `sigma`: `"uniform"`, that of an
        even span, 0 at LOD 0, so that plain tokens are plain RoPE; `"power"`, s = `block_size ** l`.
      `"gaussian_lod2d"`: the same, but of the D / 2 pairs of a head the last `lod_pairs` (default D / 8, at least one)
        turn by the LOD instead of the position, and never shrink.
      `..._alibi`: the same again, and `slopes` for `alibi_attention`, one per query head, by `slopes_rule` (`"press"`
        or `"geometric"`, see `alibi_slopes`). The other kinds have `slopes` None.

    `qk_norm_eps`, `norm_after`, `interleaved`, `conjugate` and `base` are those of `megactx.kernels.gaussian_rope`.
    """

    slope_bits: Tensor | None

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
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even and at least 2, got {head_dim}")
        if sigma not in SIGMAS:
            raise ValueError(f'sigma must be one of {", ".join(SIGMAS)} (kind "simple" has none), got {sigma!r}')
        by_level = "lod2d" in kind
        if lod_pairs is not None and not by_level:
            raise ValueError(f"lod_pairs must be None for kind {kind!r}, got {lod_pairs}")
        if lod_pairs is None:
            lod_pairs = max(1, head_dim // 8) if by_level else 0
        elif not 1 <= lod_pairs <= head_dim // 2:
            raise ValueError(f"lod_pairs must be in [1, {head_dim // 2}], got {lod_pairs}")
        self.kind, self.head_dim, self.n_head = kind, head_dim, n_head
        self.settings: dict[str, Any] = {
            "block_size": block_size,
            "base": base,
            "sigma": "none" if kind == "simple" else sigma,
            "lod_pairs": lod_pairs,
            "interleaved": interleaved,
            "conjugate": conjugate,
        }
        self.norm: dict[str, Any] = {"qk_norm_eps": qk_norm_eps, "norm_after": norm_after}
        slopes = alibi_slopes(n_head, slopes_rule) if kind.endswith("_alibi") else None
        # float32 bits under an integer dtype, so that module.bfloat16() does not round the slopes
        self.register_buffer("slope_bits", None if slopes is None else slopes.view(torch.int32), persistent=False)

    @property
    def slopes(self) -> Tensor | None:
        """float32 `[n_head]` for the kinds with ALiBi, whatever the type of the module; None for the others."""
        return None if self.slope_bits is None else self.slope_bits.view(torch.float32)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor, lods: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Turned copies of `q [B, T, Hq, D]` and `k [B, T, Hk, D]`.

        `positions`, `lods`: int32 or int64, `[T]` for all samples alike or `[B, T]`; no `lods` is LOD 0 everywhere.
        ValueError or TypeError names the argument.
        """
        positions, lods = _alike(positions, lods)
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


def _alike(positions: Tensor, lods: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both `[B, T]` where one of them is: the operator takes them in one shape, and refuses whatever else is wrong."""
    if isinstance(lods, Tensor) and isinstance(positions, Tensor):
        if (positions.ndim, lods.ndim) == (1, 2):
            positions = positions.expand(lods.shape[0], -1)
        elif (positions.ndim, lods.ndim) == (2, 1):
            lods = lods.expand(positions.shape[0], -1)
    return positions, lods
