"""Launchers of the attention kernels: memory for the results, sizes and strides, and which kernels run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _tune
from . import config
from .decode import combine_kernel, decode_kernel
from .forward import forward_kernel
from .grad_kv import grad_kv_kernel
from .grad_q import grad_q_kernel
from .prepare import prepare_kernel

_LOG2E = math.log2(math.e)
BLOCK_SCAN = 1024  # keys of the padding mask looked at in one go


def unfit(name: str, *args: Any) -> str:
    """Why the kernels do not take these arguments: the empty string where they do."""
    q: Tensor = args[1 if name == "alibi_attention_backward" else 0]
    if q.dtype not in config.WIDTHS:
        return f"q must be float16, bfloat16 or float32, got {q.dtype}"
    if not 1 <= q.shape[-1] <= config.MAX_HEAD_DIM:
        return f"q must have a head dimension from 1 to {config.MAX_HEAD_DIM}, got {q.shape[-1]}"
    return ""


@dataclass(frozen=True)
class _Shape:
    """The sizes of one call, and what all its kernels are compiled for."""

    batch: int
    queries: int
    heads: int
    head_dim: int
    keys: int
    kv_heads: int
    dtype: torch.dtype
    device: torch.device
    padded: bool
    causal: bool
    scale: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float) -> _Shape:
        batch, queries, heads, head_dim = q.shape
        _, keys, kv_heads, _ = k.shape
        padded = mask is not None
        return cls(batch, queries, heads, head_dim, keys, kv_heads, q.dtype, q.device, padded, causal, scale)

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    @property
    def which(self) -> tuple[torch.dtype, int, int, bool]:
        """What decides about a configuration."""
        general = self.padded or self.group > 1 or not self.causal
        return self.dtype, self.head_dim, _tune.arch_of(self.device), general

    @property
    def constants(self) -> dict[str, Any]:
        block_d = config.padded_head_dim(self.head_dim)
        return {"CAUSAL": self.causal, "HEAD_DIM": self.head_dim, "BLOCK_D": block_d, **_FUSED}

    @property
    def upcast(self) -> dict[str, bool]:
        return {"UPCAST": self.device.type == "cpu"}

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)


_FUSED = {"enable_fp_fusion": True}  # a b + c in one rounding, which Triton is about to stop assuming


def alibi_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions_q: Tensor,
    positions_k: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [B, Tq, Hq, D], lse [B, Hq, Tq])."""
    shape = _Shape.of(q, k, key_padding_mask, causal, scale)
    q, k, v, slopes, sinks = _near(q), _near(k), _near(v), _dense(slopes), _dense(sinks)
    positions_q, positions_k, mask = _integers(positions_q), _integers(positions_k), _widened(key_padding_mask)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = shape.floats(shape.batch, shape.heads, shape.queries)
    if not out.numel():
        return out, lse
    inputs = (q, k, v, positions_q, positions_k, slopes)
    strides = _strides(q, k, v) + _per_token(positions_q, positions_k, mask)
    chunks = config.decode(*shape.which)
    with torch.cuda.device_of(q):
        if config.splits(shape.queries, shape.keys, chunks.chunk) > 1:
            _decode(shape, chunks, inputs, strides, sinks, mask, out, lse)
        else:
            _forward(shape, inputs, strides, sinks, mask, out, lse)
    return out, lse


def _forward(
    shape: _Shape,
    inputs: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    sinks: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    tiles = config.forward(*shape.which)
    batch_heads = shape.batch * shape.heads
    forward_kernel[(_ceil(shape.queries, tiles.block_m) * batch_heads,)](
        *inputs,
        sinks,
        mask,
        out,
        lse,
        *strides,
        batch_heads,
        shape.heads,
        shape.group,
        shape.queries,
        shape.keys,
        shape.scale * _LOG2E,
        EDGE_STAGES=tiles.edge_stages,
        **_blocks(tiles),
        **shape.constants,
        **shape.upcast,
    )


def _decode(
    shape: _Shape,
    chunks: config.Chunks,
    inputs: tuple[Tensor | None, ...],
    strides: tuple[int, ...],
    sinks: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> None:
    rows, kv_heads = shape.queries * shape.group, shape.batch * shape.kv_heads
    splits = config.splits(shape.queries, shape.keys, chunks.chunk)
    block_m = config.decode_rows(rows, chunks)
    # Tensors of their own, since a part of one may begin where no 16 bytes do, for which kernels are compiled again.
    partial = (
        shape.floats(kv_heads * rows, splits, shape.head_dim),
        shape.floats(kv_heads * rows, splits),
        shape.floats(kv_heads * rows, splits),
    )
    decode_kernel[(_ceil(rows, block_m) * splits * kv_heads,)](
        *inputs,
        mask,
        *partial,
        *strides,
        kv_heads,
        shape.kv_heads,
        shape.group,
        shape.queries,
        shape.keys,
        splits,
        shape.scale * _LOG2E,
        CHUNK=chunks.chunk,
        BLOCK_M=block_m,
        BLOCK_N=chunks.block_n,
        num_warps=chunks.num_warps,
        num_stages=chunks.num_stages,
        **shape.constants,
        **shape.upcast,
    )
    combined = config.combine(*shape.which)
    sizes = {name: value for name, value in shape.constants.items() if name != "CAUSAL"}
    combine_kernel[(kv_heads * rows,)](
        *partial,
        sinks,
        out,
        lse,
        shape.heads,
        shape.group,
        shape.queries,
        splits,
        BLOCK_S=combined.block,
        num_warps=combined.num_warps,
        **sizes,
    )


def alibi_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    positions_q: Tensor,
    positions_k: Tensor,
    slopes: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    key_padding_mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the sinks (empty without sinks)."""
    shape = _Shape.of(q, k, key_padding_mask, causal, scale)
    q, k, v, slopes, sinks = _near(q), _near(k), _near(v), _dense(slopes), _dense(sinks)
    positions_q, positions_k, mask = _integers(positions_q), _integers(positions_k), _widened(key_padding_mask)
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not (q.numel() and k.numel()):
        grad_sinks = q.new_empty(0) if sinks is None else torch.zeros_like(sinks)
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), grad_sinks
    grad_out = _near(grad_out.to(q.dtype))
    strides = _strides(q, k, v, grad_out) + _per_token(positions_q, positions_k, mask)
    with torch.cuda.device_of(q):
        lse2, delta, first_row, sink_sums = _prepare(shape, grad_out, out, lse, sinks, mask)
        grad_sinks = q.new_empty(0) if sinks is None else sink_sums.sum(1).to(sinks.dtype)
        inputs = (q, k, v, grad_out, lse2, delta)
        rest = (positions_q, positions_k, slopes, mask)
        _grad_kv(shape, (*inputs, first_row, *rest, grad_k, grad_v), strides)
        _grad_q(shape, (*inputs, *rest, grad_q), strides)
    return grad_q, grad_k, grad_v, grad_sinks


def _grad_kv(shape: _Shape, tensors: tuple[Tensor | None, ...], strides: tuple[int, ...]) -> None:
    tiles = config.grad_kv(*shape.which)
    kv_heads = shape.batch * shape.kv_heads
    grad_kv_kernel[(_ceil(shape.keys, tiles.block_n) * kv_heads,)](
        *tensors,
        *strides,
        kv_heads,
        shape.heads,
        shape.queries,
        shape.keys,
        shape.scale,
        shape.scale * _LOG2E,
        GROUP=shape.group,
        **_blocks(tiles),
        **shape.constants,
        **shape.upcast,
    )


def _grad_q(shape: _Shape, tensors: tuple[Tensor | None, ...], strides: tuple[int, ...]) -> None:
    tiles = config.grad_q(*shape.which)
    batch_heads = shape.batch * shape.heads
    grad_q_kernel[(_ceil(shape.queries, tiles.block_m) * batch_heads,)](
        *tensors,
        *strides,
        batch_heads,
        shape.heads,
        shape.group,
        shape.queries,
        shape.keys,
        shape.scale,
        shape.scale * _LOG2E,
        EDGE_STAGES=tiles.edge_stages,
        **_blocks(tiles),
        **shape.constants,
        **shape.upcast,
    )


def _prepare(
    shape: _Shape, grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lse log2(e), delta, first row that sees a key, partial sums of the sinks' gradient) for the two kernels."""
    lse, rows = lse.contiguous(), config.prepare(*shape.which)
    tiles = _ceil(shape.queries, rows.block)
    lse2, delta = torch.empty_like(lse), torch.empty_like(lse)
    first_row = torch.empty(shape.batch, dtype=torch.int32, device=shape.device)
    sink_sums = shape.floats(shape.heads, 0 if sinks is None else shape.batch * tiles)
    batch_heads = shape.batch * shape.heads
    prepare_kernel[(tiles * batch_heads,)](
        grad_out,
        out.contiguous(),
        lse,
        sinks,
        mask,
        lse2,
        delta,
        first_row,
        sink_sums,
        *_strides(grad_out),
        *_per_token(mask),
        batch_heads,
        shape.heads,
        shape.queries,
        shape.keys,
        BLOCK_M=rows.block,
        BLOCK_SCAN=BLOCK_SCAN,
        num_warps=rows.num_warps,
        **shape.constants,
    )
    return lse2, delta, first_row, sink_sums


def _blocks(tiles: config.Tiles) -> dict[str, int]:
    return {
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_EDGE": tiles.block_edge,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
    }


def _widened(mask: Tensor | None) -> Tensor | None:
    """The mask as int32: where Triton finds a load of 8 bits behind a product's operand, it lays it out for 8 bits."""
    return None if mask is None else mask.to(torch.int32, memory_format=torch.contiguous_format)


def _dense(per_head: Tensor | None) -> Tensor | None:
    """Slopes and sinks, one next to the other: one sink for all heads comes expanded."""
    return None if per_head is None else per_head.contiguous()


def _near(x: Tensor) -> Tensor:
    """x, copied where the kernels would not read it as they are meant to: 16 bytes at a time, at 32-bit offsets.

    That takes dimensions next to each other, and strides that are multiples of 16 (to Triton nothing less counts) where
    a dense x has them.  Against T^2 a copy costs nothing.
    """
    strides = _strides(x)
    odd = x.shape[-1] % 16 == 0 and any(stride % 16 for stride in strides[:3])
    return x.contiguous() if odd or x.stride(-1) != 1 or strides[1] >= 1 << 23 else x


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    """Those of [B, T, H, D] tensors, 0 for a dimension of one, where PyTorch leaves in what happens to be there."""
    strides: tuple[int, ...] = ()
    for x in tensors:
        strides += (*(s if n > 1 else 0 for s, n in zip(x.stride()[:3], x.shape[:3], strict=True)), 1)
    return strides


def _integers(positions: Tensor) -> Tensor:
    """As int64, next to each other: so few that kernels of their own for all that comes would not pay."""
    positions = positions.to(torch.int64)
    return positions if positions.stride(-1) == 1 else positions.contiguous()


def _per_token(*tensors: Tensor | None) -> tuple[int, ...]:
    """The strides by sample and by token of dense [B, T] or [T] tensors: what all samples share has a stride of 0."""
    strides: tuple[int, ...] = ()
    for x in tensors:
        strides += (0, 1) if x is None else (x.stride(0) if x.ndim == 2 and x.shape[0] > 1 else 0, 1)
    return strides


def _ceil(length: int, block: int) -> int:
    return -(-length // block)
