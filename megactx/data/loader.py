"""Random training windows, shared by all contexts, as a function of the batch number alone.

There is no state to save: a run that resumes at step n asks for batch n and gets what it would have got. The starts
come from a counter-based generator (Philox) keyed by the seed, with the batch number in an upper word of the counter.
In the lowest word it would make the streams of neighbouring batches overlap, because the generator counts there
itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megactx.data.bundle import SPLITS, Bundle, Split
from megactx.errors import MegactxError


class WindowLoader:
    """Windows of `block_size` tokens at starts drawn uniformly over `split`, with replacement.

    seed: 0 <= seed < 2^64. Raises MegactxError where the split is shorter than block_size + 1 tokens.
    """

    def __init__(self, bundle: Bundle, split: Split, batch_size: int, block_size: int, seed: int) -> None:
        for name, value in (("batch_size", batch_size), ("block_size", block_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= seed < 1 << 64:
            raise ValueError(f"seed must lie in 0..2^64-1, got {seed}")
        self.length = bundle.length(split)
        if self.length < block_size + 1:
            raise MegactxError(
                f"the {split} split of {bundle.path} has {self.length} tokens per context, a block_size of "
                f"{block_size} needs at least {block_size + 1}"
            )
        self.batch_size, self.block_size, self.seed = batch_size, block_size, seed
        self._stream = SPLITS.index(split)
        # Views of every possible window; indexing one with the starts copies whole rows, without a Python loop.
        self._windows = [
            np.lib.stride_tricks.sliding_window_view(np.asarray(ids), block_size + 1) for ids in bundle.split(split)
        ]

    def starts(self, index: int) -> np.ndarray:
        """First positions of the windows of batch `index`, int64 [batch_size] in [0, length - block_size)."""
        if index < 0:
            raise ValueError(f"batch index must be at least 0, got {index}")
        # The four words of the counter: its own, the batch number (two), the split.
        counter = [0, index & 0xFFFFFFFFFFFFFFFF, index >> 64, self._stream]
        words = np.random.Philox(key=self.seed, counter=counter).random_raw(self.batch_size)
        # Raw words and one multiplication, not Generator.integers, whose stream numpy may change between versions.
        unit = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (unit * (self.length - self.block_size)).astype(np.int64)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of batch `index`: int64 [B, T, C] each, contexts in bundle order, targets one token
        ahead."""
        starts = self.starts(index)
        shape = (self.batch_size, self.block_size, len(self._windows))
        x, y = np.empty(shape, np.int64), np.empty(shape, np.int64)
        for c, windows in enumerate(self._windows):
            rows = windows[starts]
            x[:, :, c] = rows[:, :-1]
            y[:, :, c] = rows[:, 1:]
        return torch.from_numpy(x), torch.from_numpy(y)
