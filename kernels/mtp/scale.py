"""A tensor times a number that lies on the device, without waiting for it."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device

BLOCK = 4096
NUM_WARPS = 4


@triton.jit
def scale_kernel(x_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    """x *= factor, in float32 and rounded once; nothing is read or written where the factor is 1, as it is for a loss.

    Grid: a program for each BLOCK elements of x, float16, bfloat16 or float32 without gaps; factor is a float32 scalar.
    """
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < size, other=0.0).to(tl.float32)
        tl.store(x_ptr + index, (x * factor).to(x_ptr.dtype.element_ty), mask=index < size)


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """`x.mul_(factor)` for a scalar `factor` on the same device; no host sync, and no memory traffic for a 1."""
    if x.dtype == torch.float64 or not x.is_contiguous() or x.numel() > BLOCK * (2**31 - 1):
        return x.mul_(factor)
    if x.numel():
        with on_device(x.device):
            scale_kernel[triton.cdiv(x.numel(), BLOCK),](
                x, factor, x.numel(), BLOCK=BLOCK, num_warps=NUM_WARPS, num_stages=1
            )
    return x
