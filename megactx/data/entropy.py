"""Plug-in entropies of a token stream: the yardsticks a training run is read against.

The unigram entropy `H(x)` is what the best constant prediction costs, the bigram entropy `H(x_t | x_{t-1})` what the
best table of pairs costs on the same data, in nats per token. Both are estimates from counts: with a large vocabulary
and little text the bigram figure is far too low (most pairs are seen once), so it is a yardstick there, not a bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CHUNK = 1 << 22
_DENSE_PAIRS = 1 << 22


def entropies(ids: NDArray[Any], vocab_size: int) -> dict[str, float]:
    """Unigram and bigram entropy of `ids` [n] in nats and bits; the bigram one over the n - 1 adjacent pairs."""
    unigram = _entropy(_counts(ids, vocab_size))
    pairs = ids.size - 1
    if pairs < 1:
        bigram = 0.0
    else:
        joint = _entropy(_pair_counts(ids, vocab_size))
        bigram = max(0.0, joint - _entropy(_counts(ids[:-1], vocab_size)))
    bits = 1.0 / math.log(2.0)
    return {"unigram": unigram, "bigram": bigram, "unigram_bits": unigram * bits, "bigram_bits": bigram * bits}


def _entropy(counts: NDArray[np.int64]) -> float:
    counts = counts[counts > 0].astype(np.float64)
    total = counts.sum()
    if total == 0:
        return 0.0
    # log(n) - sum(c log c)/n loses nothing here and needs no division per symbol; exact zero for a constant stream
    return max(0.0, float(math.log(total) - (counts * np.log(counts)).sum() / total))


def _counts(ids: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    total = np.zeros(vocab_size, np.int64)
    for start in range(0, ids.size, _CHUNK):
        total += np.bincount(ids[start : start + _CHUNK], minlength=vocab_size)
    return total


def _pair_codes(ids: NDArray[Any], vocab_size: int) -> Iterator[NDArray[np.int64]]:
    for start in range(0, ids.size - 1, _CHUNK):
        part = ids[start : start + _CHUNK + 1].astype(np.int64)
        yield part[:-1] * vocab_size + part[1:]


def _pair_counts(ids: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    """Counts of the pairs that occur. A dense table where it is small; else sorted codes, merged chunk by chunk."""
    if vocab_size * vocab_size <= _DENSE_PAIRS:
        table = np.zeros(vocab_size * vocab_size, np.int64)
        for codes in _pair_codes(ids, vocab_size):
            table += np.bincount(codes, minlength=table.size)
        return table
    seen = np.empty(0, np.int64)
    counts = np.empty(0, np.int64)
    for codes in _pair_codes(ids, vocab_size):
        new, new_counts = np.unique(codes, return_counts=True)
        merged, place = np.unique(np.concatenate([seen, new]), return_inverse=True)
        total = np.zeros(merged.size, np.int64)
        np.add.at(total, place, np.concatenate([counts, new_counts]))
        seen, counts = merged, total
    return counts
