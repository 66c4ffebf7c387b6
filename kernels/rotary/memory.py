"""Whether two tensors may be written in place, one after the other: no element twice, no element of the other's."""

from __future__ import annotations

import torch
from torch import _C, Tensor


def check_memory(q: Tensor, k: Tensor) -> None:
    """Refuse q and k that overlap, themselves or each other, and what is a negative view, which no kernel writes.

    The checks are sound and not complete: a layout that only a search would show to be free of overlaps is refused.
    Slices of packed projections pass, whichever dimension they are packed along.
    """
    # A traced graph has symbols for strides and no memory yet.  A guard for each comparison of them would compile anew
    # with every layout, so what overlaps there, other than by expansion, is not found.
    traced = torch.compiler.is_compiling()
    for name, x in (("q", q), ("k", k)):
        if not traced and x.is_neg():
            raise ValueError(f"{name} must not have the negative bit set to be rotated in place: use resolve_neg()")
        expanded = any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True))
        if expanded or (not traced and _span(_by_stride(x), 1) is None):
            raise ValueError(
                f"{name} must not be expanded or overlap itself to be rotated in place, "
                f"got shape {tuple(x.shape)} with strides {x.stride()}"
            )
    if not traced and _C._is_alias_of(q, k) and not _apart(q, k):  # type: ignore[attr-defined]
        raise ValueError("k must not share memory with q to be rotated in place, got overlapping views of one tensor")


def _by_stride(x: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions longer than 1, innermost first."""
    return sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1)


def _span(dims: list[tuple[int, int]], span: int) -> int | None:
    """How many elements blocks of `span` reach over when repeated along `dims`; None where they might overlap."""
    for stride, size in dims:
        if stride < span:
            return None
        span += stride * (size - 1)
    return span


def _apart(q: Tensor, k: Tensor) -> bool:
    """Whether q and k, each free of overlaps, have no element in common.

    They may interleave: the outer dimensions they share step over a block of each, and it is enough that those two
    blocks lie side by side, and that one step of the outer dimensions is wider than both.
    """
    if not q.numel() or not k.numel():
        return True
    offset = int(k.storage_offset() - q.storage_offset())
    q_dims, k_dims = _by_stride(q), _by_stride(k)
    outer: list[tuple[int, int]] = []
    while True:
        q_block, k_block = _span(q_dims, 1) or 0, _span(k_dims, 1) or 0
        both = max(q_block, offset + k_block) - min(0, offset)
        if both >= q_block + k_block and _span(outer, both) is not None:
            return True
        if not q_dims or not k_dims or q_dims[-1] != k_dims[-1]:
            return False
        outer.insert(0, q_dims.pop())
        k_dims.pop()
