"""Launch sizes of the cross-entropy: how many rows of logits exist at a time, and the blocks of the row kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from .. import _tune

_CUDA_LOGITS = 256 << 20  # bytes of one chunk of logits
_CPU_LOGITS = 80 << 20
WIDTHS = (256, 1024, 4096)  # largest vocabularies that have a configuration of their own


def chunk_rows(rows: int, vocab: int, width: int, itemsize: int, device_type: str) -> int:
    """How many rows the linear loss takes at a time: its workspace is that many rows of `vocab` logits.

    Every chunk reads the weights and, with a gradient, reads and writes the float32 sum of theirs, so few rows cost
    bandwidth: 8 V E bytes of sum for 6 R V E operations.  On a GPU that asks for 1024 rows and more; on a CPU some
    hundred do, and the workspace is what makes the loss small; there the sum of a weight's gradient needs the logits of
    the chunk in float32 too.  The rows are dealt out evenly, so that the last chunk is no small one, in multiples of
    what a matrix product has in a tile.
    """
    if device_type == "cpu":
        least, most, tile, budget = 64, 4096, 16, _CPU_LOGITS // max(itemsize, 4)
    else:
        least, most, tile, budget = 1024, 4096, 128, _CUDA_LOGITS // itemsize
    limit = min(max(budget // vocab, least), most)
    chunks = max(1, -(-rows // limit))
    even = -(-rows // chunks)
    return max(1, min(-(-even // tile) * tile, limit))


@dataclass(frozen=True)
class RowsConfig:
    """The row kernels.

    A row is swept twice, so the rows that are under way should fit the second-level cache together: two programs of
    many warps on a multiprocessor, not many of a few.
    """

    part: int  # logits that are summed up before they are joined with others, whether one program has them or several
    elements: int  # of a tile, per thread
    num_warps: int
    programs: int  # as many as keep the GPU busy: with fewer rows and contexts, the parts have programs of their own

    def tile(self, vec: int) -> dict[str, int]:
        """A tile of GROUP times THREADS loads of VEC logits."""
        return {"GROUP": self.elements // vec, "THREADS": 32 * self.num_warps, "VEC": vec}


@cache
def choose_rows(arch: int, itemsize: int, widest: int, softcap: bool) -> RowsConfig:
    """By the largest vocabulary, never by the number of rows: a row's bits would depend on its company."""
    entries = _tune.table(arch)["mtp.rows"]
    key = f"{8 * itemsize}-bit {next((width for width in WIDTHS if widest <= width), 'wide')}"
    return RowsConfig(**(entries.get(f"{key} softcap", entries[key]) if softcap else entries[key]))


def row_parts(vocab_sizes: Sequence[int], part: int) -> list[int]:
    """The context of each part, in order; a part never reaches from one context into the next."""
    return [context for context, size in enumerate(vocab_sizes) for _ in range(-(-size // part))]
