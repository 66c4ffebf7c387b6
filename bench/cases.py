"""What is measured: sizes, inputs, and the bytes and operations a case cannot do without.

A case declares `bytes`, each input read once and each output written once, and `flops`.  What a provider reads besides
(tables, masks, intermediate results) is its own affair: the declared numbers are the same for all of them, so that
GB/s and TFLOP/s compare as times do.

Each case also knows the truth, its results in float64, which every provider must meet before it is timed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megactx import kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# ||out - truth|| / ||truth|| of a right result: some roundings in bf16 and fp16, the order of sums in fp32.
TOLERANCES = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2.5e-3}
# Of one number that is a float32 mean over positions: what the logits were rounded by averages out, to 3e-4 with 40
# positions of bf16 and 3e-5 with 2,048. Targets of another step make 1e-2.
MEAN_TOLERANCES = {"fp32": 1e-5, "bf16": 5e-4}
NO_BIAS = "no bias"  # attention without the case's slopes
LONGEST_BLOCK = 256  # queries at a time in float64, so that the truth fits in memory at any length


class Case(Protocol):
    @property
    def dtype(self) -> str: ...

    @property
    def backward(self) -> bool:
        """Forward and backward, or the forward alone under no_grad."""
        ...

    @property
    def graph(self) -> bool:
        """On CUDA: replayed as a CUDA graph, since launching it takes longer than running it."""
        ...

    @property
    def name(self) -> str: ...

    @property
    def bytes(self) -> int: ...

    @property
    def flops(self) -> int: ...

    def inputs(self, device: str) -> dict[str, Tensor]:
        """Random tensors; those whose name begins with "grad" are the gradients that arrive from above."""
        ...

    def truth(self, inputs: dict[str, Tensor], plain: str) -> tuple[Tensor, ...]:
        """Outputs, then gradients where there is a backward, in float64; `plain` names what is computed instead."""
        ...


def describe(case: Case) -> dict[str, Any]:
    """A case as JSON has it."""
    return {"name": case.name, **asdict(case), "bytes": case.bytes, "flops": case.flops}  # type: ignore[call-overload]


@dataclass(frozen=True)
class RotaryCase:
    """`gaussian_rope` of q [batch, tokens, heads, head_dim] and k [batch, tokens, kv_heads, head_dim]."""

    batch: int
    tokens: int
    heads: int = 12
    kv_heads: int = 12
    head_dim: int = 64
    dtype: str = "bf16"
    backward: bool = False
    per_sample: bool = False  # positions [B, T] instead of [T]
    lods: bool = False  # levels of detail 0, 1, 2, which damp
    norm: bool = False  # RMS norm of q and k before the rotation
    graph: bool = False

    NORM_EPS = 1e-6

    @property
    def name(self) -> str:
        extras = [word for word, on in (("per sample", self.per_sample), ("LOD", self.lods), ("norm", self.norm)) if on]
        return _name(f"B{self.batch} T{self.tokens}", self, extras)

    @property
    def _elements(self) -> int:
        return self.batch * self.tokens * (self.heads + self.kv_heads) * self.head_dim

    @property
    def bytes(self) -> int:
        """q, k and the integers of each token in, q and k out; backward the same, and q and k again to normalise."""
        tokens = self.tokens * (self.batch if self.per_sample else 1)
        integers = 8 * tokens * (2 if self.lods else 1)
        tensors = 2 * self._elements * DTYPES[self.dtype].itemsize
        backward = (tensors * 3 // 2 if self.norm else tensors) + integers if self.backward else 0
        return tensors + integers + backward

    @property
    def flops(self) -> int:
        """Three an element to rotate (y1 = x1 c - x2 s), three to normalise; backward to rotate, and five for the norm.

        The angles are left out: they are shared by all heads, and a provider with tables has none.
        """
        forward = 6 if self.norm else 3
        backward = (8 if self.norm else 3) if self.backward else 0
        return self._elements * (forward + backward)

    @property
    def qk_norm_eps(self) -> float | None:
        return self.NORM_EPS if self.norm else None

    def inputs(self, device: str) -> dict[str, Tensor]:
        def x(heads: int) -> Tensor:
            return torch.randn(self.batch, self.tokens, heads, self.head_dim, device=device, dtype=DTYPES[self.dtype])

        made = {"q": x(self.heads), "k": x(self.kv_heads)}
        if self.backward:
            made |= {"grad_q": x(self.heads), "grad_k": x(self.kv_heads)}
        positions = torch.arange(self.tokens, device=device)
        if self.per_sample:
            positions = positions + torch.randint(1000, (self.batch, 1), device=device)
        made["positions"] = positions
        if self.lods:
            made["lods"] = torch.randint(3, positions.shape, device=device)
        return made

    def truth(self, inputs: dict[str, Tensor], plain: str = "") -> tuple[Tensor, ...]:
        q, k = (inputs[name].detach().double().requires_grad_(self.backward) for name in "qk")
        with kernels.use_backend("reference"):
            out = kernels.gaussian_rope(q, k, inputs["positions"], inputs.get("lods"), qk_norm_eps=self.qk_norm_eps)
        if not self.backward:
            return out
        upstream = [inputs["grad_q"].double(), inputs["grad_k"].double()]
        return *(y.detach() for y in out), *torch.autograd.grad(out, (q, k), upstream)


@dataclass(frozen=True)
class AttentionCase:
    """Causal `alibi_attention` of q [batch, queries, heads, head_dim] over k, v [batch, keys, kv_heads, head_dim].

    Every sample has positions of its own, as in a batch of packed or summarised texts.
    """

    batch: int
    queries: int
    keys: int
    heads: int = 12
    kv_heads: int = 12
    head_dim: int = 64
    dtype: str = "bf16"
    backward: bool = False
    graph: bool = False

    @property
    def name(self) -> str:
        length = f"T{self.keys}" if self.queries == self.keys else f"Tq{self.queries} Tk{self.keys}"
        return _name(f"B{self.batch} {length}", self, [])

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Elements of q, elements of k and v together, rows of the softmax."""
        rows = self.batch * self.heads * self.queries
        return rows * self.head_dim, 2 * self.batch * self.kv_heads * self.keys * self.head_dim, rows

    @property
    def bytes(self) -> int:
        """q, k, v, positions and slopes in, out and the logsumexp out; backward those and grad_out in, three out."""
        q, kv, rows = self._sizes
        item, integers = DTYPES[self.dtype].itemsize, 8 * self.batch * (self.queries + self.keys) + 4 * self.heads
        forward = item * (2 * q + kv) + integers + (4 * rows if self.backward else 0)
        backward = item * (4 * q + 2 * kv) + integers + 4 * rows if self.backward else 0
        return forward + backward

    @property
    def flops(self) -> int:
        """Two products over the pairs that causality leaves, five backward, two operations to an element of each."""
        pairs = self.queries * (self.keys - self.queries) + self.queries * (self.queries + 1) // 2
        return 2 * self.batch * self.heads * self.head_dim * pairs * (7 if self.backward else 2)

    def inputs(self, device: str) -> dict[str, Tensor]:
        def x(length: int, heads: int) -> Tensor:
            return torch.randn(self.batch, length, heads, self.head_dim, device=device, dtype=DTYPES[self.dtype])

        made = {"q": x(self.queries, self.heads), "k": x(self.keys, self.kv_heads), "v": x(self.keys, self.kv_heads)}
        if self.backward:
            made["grad_out"] = x(self.queries, self.heads)
        positions = torch.arange(self.keys, device=device) + torch.randint(1000, (self.batch, 1), device=device)
        made |= {"positions_k": positions, "positions_q": positions[:, self.keys - self.queries :].contiguous()}
        made["slopes"] = kernels.alibi_slopes(self.heads, device=device)
        return made

    def truth(self, inputs: dict[str, Tensor], plain: str = "") -> tuple[Tensor, ...]:
        """Some queries at a time, each with the keys it may see; gradients of the keys add up."""
        q, k, v = (inputs[name].detach().double().requires_grad_(self.backward) for name in "qkv")
        slopes = None if plain == NO_BIAS else inputs["slopes"]
        out = torch.empty_like(q, requires_grad=False)
        for start in range(0, self.queries, LONGEST_BLOCK):
            rows = slice(start, min(start + LONGEST_BLOCK, self.queries))
            seen = self.keys - self.queries + rows.stop
            positions = inputs["positions_q"][:, rows], inputs["positions_k"][:, :seen]
            with kernels.use_backend("reference"):
                block = kernels.alibi_attention(q[:, rows], k[:, :seen], v[:, :seen], *positions, slopes)
            out[:, rows] = block.detach()
            if self.backward:
                block.backward(inputs["grad_out"][:, rows].double())
        grads = (q.grad, k.grad, v.grad) if self.backward else ()
        return out, *(grad for grad in grads if grad is not None)


def _name(shape: str, case: RotaryCase | AttentionCase, extras: list[str]) -> str:
    heads = f"H{case.heads}" if case.heads == case.kv_heads else f"H{case.heads}/{case.kv_heads}"
    words = [shape, heads, f"D{case.head_dim}", case.dtype, *extras, "fwd+bwd" if case.backward else "fwd"]
    return " ".join(words)


ROTARY = {
    "cpu": (
        RotaryCase(4, 1024),
        RotaryCase(4, 1024, dtype="fp32"),
        RotaryCase(4, 1024, backward=True),
        RotaryCase(4, 1024, dtype="fp32", backward=True),
        RotaryCase(4, 1024, kv_heads=4),
        RotaryCase(4, 1024, per_sample=True, lods=True),
        RotaryCase(4, 1024, norm=True),
        RotaryCase(4, 1024, norm=True, backward=True),
        RotaryCase(8, 1, per_sample=True),
    ),
    "cuda": (
        RotaryCase(16, 1024),
        RotaryCase(16, 1024, backward=True),
        RotaryCase(16, 1024, dtype="fp32"),
        RotaryCase(16, 1024, kv_heads=4),
        RotaryCase(1, 16384),
        RotaryCase(4, 4096, heads=32, kv_heads=8, head_dim=128),
        RotaryCase(16, 1024, per_sample=True, lods=True),
        RotaryCase(16, 1024, per_sample=True, lods=True, backward=True),
        RotaryCase(16, 1024, norm=True),
        RotaryCase(16, 1024, norm=True, backward=True),
        RotaryCase(8, 1, per_sample=True, graph=True),
    ),
}
ATTENTION = {
    "cpu": (
        *(
            AttentionCase(batch, length, length, dtype=dtype, backward=backward)
            for batch, length in ((4, 1024), (1, 4096))
            for dtype in ("fp32", "bf16")
            for backward in (False, True)
        ),
        AttentionCase(16, 256, 256, heads=4, kv_heads=4, head_dim=32, dtype="fp32"),
        AttentionCase(16, 256, 256, heads=4, kv_heads=4, head_dim=32, dtype="fp32", backward=True),
        AttentionCase(1, 1, 4096, dtype="fp32"),
        AttentionCase(1, 1, 4096),
    ),
    "cuda": (
        *(
            AttentionCase(4, length, length, backward=backward)
            for backward in (True, False)
            for length in (1024, 2048, 4096, 8192)
        ),
        AttentionCase(4, 4096, 4096, kv_heads=4, backward=True),
        AttentionCase(4, 4096, 4096, heads=6, kv_heads=6, head_dim=128, backward=True),
        AttentionCase(1, 1, 4096, graph=True),
        AttentionCase(8, 1, 4096, graph=True),
        AttentionCase(8, 1, 16384, kv_heads=4, graph=True),
    ),
}
