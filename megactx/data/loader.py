"""Random training windows, shared by all contexts, as a function of the batch number alone.

There is no state to save: a run that resumes at step n asks for batch n and gets what it would have got. The starts
come from a counter-based generator (Philox) keyed by the seed, with the batch number in an upper word of the counter.
In the lowest word it would make the streams of neighbouring batches overlap, because the generator counts there
itself.

Several processes share one stream of windows: batch n is `batch_size * world_size` of them, of which each process takes
its own slice, so that together they read what one process with that batch would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megactx.data.bundle import SPLITS, Bundle, Split
from megactx.data.shard_file import ShardedTokens
from megactx.errors import MegactxError


class WindowLoader:
    """Windows of `block_size` tokens at starts drawn uniformly over `split`, with replacement.

    `steps`: how many targets a position has, 1 to `steps` tokens ahead. `rank`, `world_size`: which slice of each batch
    this process takes. `delimiters`: the symbols of the first context that stand between documents: one can be a
    target, but what lies beyond it is none (-1) for a position before it. seed: 0 <= seed < 2^64.

    Raises MegactxError where the split is shorter than block_size + steps tokens, or steps is more than block_size.
    """

    def __init__(
        self,
        bundle: Bundle,
        split: Split,
        batch_size: int,
        block_size: int,
        seed: int,
        *,
        steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        delimiters: Sequence[int] = (),
    ) -> None:
        for name, value in (("batch_size", batch_size), ("block_size", block_size), ("steps", steps)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must lie in 0..2^64-1, got {seed}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in 0..world_size - 1 = {world_size - 1}, got {rank}")
        if steps > block_size:
            raise MegactxError(f"steps must be at most block_size = {block_size}, got {steps}")
        self.length = bundle.length(split)
        if self.length < block_size + steps:
            raise MegactxError(
                f"the {split} split of {bundle.path} has {self.length} tokens per context, a block_size of "
                f"{block_size} needs at least {block_size + steps}"
            )
        self.batch_size, self.block_size, self.seed, self.steps = batch_size, block_size, seed, steps
        self._slice = slice(rank * batch_size, (rank + 1) * batch_size)
        self._global_size = batch_size * world_size
        self._delimiters = tuple(delimiters)
        self._stream = SPLITS.index(split)
        self._contexts = bundle.contexts
        self._parts = [_windows_of(ids, block_size + steps) for ids in bundle.split(split)]

    def starts(self, index: int) -> np.ndarray:
        """First positions of this process's windows of batch `index`, int64 [batch_size] in
        [0, length - block_size - steps]."""
        if index < 0:
            raise ValueError(f"batch index must be at least 0, got {index}")
        # The four words of the counter: its own, the batch number (two), the split.
        counter = [0, index & 0xFFFFFFFFFFFFFFFF, index >> 64, self._stream]
        words = np.random.Philox(key=self.seed, counter=counter).random_raw(self._global_size)[self._slice]
        # Raw words and one multiplication, not Generator.integers, whose stream numpy may change between versions.
        unit = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (unit * (self.length - self.block_size - self.steps + 1)).astype(np.int64)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs int64 [B, T, C] and targets of batch `index`, contexts in bundle order. Targets are [B, T, C], one
        token ahead, where `steps` is 1; else [B, T, C, steps], entry k - 1 being k tokens ahead, or -1."""
        rows = np.empty((self.batch_size, self.block_size + self.steps, len(self._parts)), np.int64)
        starts = self.starts(index)
        for c, part in enumerate(self._parts):
            if isinstance(part, ShardedTokens):
                for row, start in zip(rows, starts.tolist(), strict=True):
                    row[:, c] = part[start : start + len(row)]
                self._refuse_unknown(part, rows[:, :, c], starts, c)
            else:
                rows[:, :, c] = part[starts]
        x = np.ascontiguousarray(rows[:, : self.block_size])
        if self.steps == 1:
            return torch.from_numpy(x), torch.from_numpy(np.ascontiguousarray(rows[:, 1:]))
        y = np.lib.stride_tricks.sliding_window_view(rows[:, 1:], self.steps, axis=1).copy()
        self._mask_next_documents(rows[:, :, 0], y)
        return torch.from_numpy(x), torch.from_numpy(y)

    def _refuse_unknown(self, part: ShardedTokens, ids: np.ndarray, starts: np.ndarray, c: int) -> None:
        """An id outside the vocabulary would be read out of bounds on a GPU, and no header tells of it."""
        context = self._contexts[c]
        largest, size = int(ids.max()), context.vocab_size
        if largest >= size:
            row, column = np.unravel_index(int(ids.argmax()), ids.shape)
            raise MegactxError(
                f"shard {part.shard_at(int(starts[row] + column)).path} holds id {largest}, outside the vocabulary of "
                f"{size} (context {context.name!r})"
            )

    def _mask_next_documents(self, ids: np.ndarray, y: np.ndarray) -> None:
        """-1 for target k of a position p that has a delimiter strictly between p and p + k."""
        if not self._delimiters:
            return
        ends = np.isin(ids, self._delimiters)
        if not ends.any():
            return
        hidden = np.zeros(y.shape[:2], bool)
        for k in range(1, self.steps):
            hidden |= ends[:, k : k + self.block_size]
            y[..., k][hidden] = -1


def _windows_of(ids: Any, size: int) -> Any:
    """Views of every possible window: indexing them with the starts copies whole rows, without a Python loop. Shards
    stay what they are. They are no array, and as one would fill the memory with the whole corpus."""
    return ids if isinstance(ids, ShardedTokens) else np.lib.stride_tricks.sliding_window_view(np.asarray(ids), size)
