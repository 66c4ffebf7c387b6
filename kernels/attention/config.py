"""Launch configurations of the attention kernels, and when the decode path is taken.

The numbers are in `kernels/tuned`, by the width of the dtype and the padded head dimension.  An entry marked "general"
is for what is not the usual call, with padding, with key heads that several query heads share, or not causal, where the
kernels need more registers.  Nothing may depend on the batch or on the number of heads: a row's bits would then depend
on what it is computed beside.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import _tune

WIDTHS = {torch.bfloat16: "16-bit", torch.float16: "16-bit", torch.float32: "32-bit"}
MAX_HEAD_DIM = 128
MAX_DECODE_QUERIES = 16


@dataclass(frozen=True)
class Tiles:
    """A kernel over tiles of BLOCK_M queries and BLOCK_N keys.

    Where a tile is crossed by the causal boundary, the side its program walks along comes in steps of BLOCK_EDGE.
    There the loads of a step run EDGE_STAGES - 1 steps ahead (by queries: the gradients of keys pipeline both alike).
    One stage keeps that loop simple: with more, sm_90 waits for each matrix instruction of the whole kernel in turn.
    """

    block_m: int
    block_n: int
    block_edge: int
    edge_stages: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Chunks:
    """The decode kernel: one program takes `chunk` keys, BLOCK_N at a time, for up to `max_rows` rows."""

    chunk: int
    max_rows: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Rows:
    """A kernel that reads tiles of `block` rows and multiplies nothing."""

    block: int
    num_warps: int


def padded_head_dim(head_dim: int) -> int:
    """The power of two the kernels compute with: at least 16, which a matrix instruction takes."""
    return max(16, 1 << (head_dim - 1).bit_length())


def decode_rows(rows: int, chunks: Chunks) -> int:
    """The rows of one tile of the decode kernel: at least the 16 of a matrix instruction; too many make more tiles."""
    return min(max(16, 1 << (rows - 1).bit_length()), chunks.max_rows)


def forward(dtype: torch.dtype, head_dim: int, arch: int, general: bool) -> Tiles:
    return Tiles(**_entry("attention.forward", dtype, head_dim, arch, general))


def grad_kv(dtype: torch.dtype, head_dim: int, arch: int, general: bool) -> Tiles:
    return Tiles(**_entry("attention.grad_kv", dtype, head_dim, arch, general))


def grad_q(dtype: torch.dtype, head_dim: int, arch: int, general: bool) -> Tiles:
    return Tiles(**_entry("attention.grad_q", dtype, head_dim, arch, general))


def prepare(dtype: torch.dtype, head_dim: int, arch: int, general: bool) -> Rows:
    return Rows(**_entry("attention.prepare", dtype, head_dim, arch, general))


def decode(dtype: torch.dtype, head_dim: int, arch: int, general: bool) -> Chunks:
    return Chunks(**_entry("attention.decode", dtype, head_dim, arch, general))


def combine(dtype: torch.dtype, head_dim: int, arch: int, general: bool) -> Rows:
    return Rows(**_entry("attention.combine", dtype, head_dim, arch, general))


def splits(queries: int, keys: int, chunk: int) -> int:
    """Into how many chunks the keys are split: 1, and no decode path, where there are many queries or few keys."""
    return -(-keys // chunk) if queries <= MAX_DECODE_QUERIES and keys > chunk else 1


def _entry(kernel: str, dtype: torch.dtype, head_dim: int, arch: int, general: bool) -> dict[str, int]:
    entries, key = _tune.table(arch)[kernel], f"{WIDTHS[dtype]} {padded_head_dim(head_dim)}"
    return dict(entries.get(f"{key} general", entries[key]) if general else entries[key])
