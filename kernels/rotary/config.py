"""Launch sizes of the rotary kernel.

They follow from the dtype, the head dimension and the numbers of heads, never from the number of tokens: a sum over a
head is taken in the order of the tile, and the copying operator must give a token the same bits alone and in any batch.
That order is also the compiler's choice, for each alignment of the inputs and for writing in place: there a normalised
head may differ by a rounding from the copying operator's.  What is not normalised is the same to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .. import _tune

MAX_HEAD_DIM = 256
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class RotaryConfig:
    pairs: int  # half a head, padded to a power of two
    block_t: int  # tokens a program makes cosines for
    block_h: int  # heads it turns at a time
    num_warps: int
    programs: int  # as many as keep the GPU busy

    def groups(self, tokens: int, heads_q: int, heads_k: int) -> int:
        """How many programs share the heads of a token: one, unless tokens are too few to fill the GPU."""
        blocks = -(-tokens // self.block_t)
        chunks = -(-heads_q // self.block_h) - (-heads_k // self.block_h)
        return max(1, min(chunks, self.programs // blocks))


@cache
def choose(arch: int, dtype: torch.dtype, head_dim: int, heads_q: int, heads_k: int) -> RotaryConfig:
    padded = _power_of_two(head_dim)
    sizes = _tune.table(arch)["rotary"][f"{_NAMES[dtype]} {max(16, padded)}"]
    block_h = min(sizes["block_h"], _power_of_two(max(heads_q, heads_k)))
    block_t = sizes["rows"] // block_h  # a tile has as many rows whatever the number of heads
    return RotaryConfig(padded // 2, block_t, block_h, sizes["num_warps"], sizes["programs"])


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()
