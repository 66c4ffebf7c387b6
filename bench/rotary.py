"""Times `gaussian_rope` against PyTorch with precomputed tables, eager and compiled, and against Liger's kernel.

    python bench/rotary.py [--device auto|cpu|cuda] [--rounds N] [--threads N] [--case NAME] [--json FILE]

Every provider must first agree with the float64 reference.  Tables are prepared outside of what is timed; `auto`
computes its angles inside.  Times are medians of rounds in which the providers take turns, GB/s are the case's
declared bytes over the time, and the copy they are held against moves 256 MiB in the same rounds, so that a case
whose tensors stay in a CPU's caches can pass it.
"""

from __future__ import annotations

import measure
import providers
from cases import ROTARY

if __name__ == "__main__":
    measure.main("rotary", __doc__, ROTARY, providers.rotary(), lambda device: providers.runs("gaussian_rope", device))
