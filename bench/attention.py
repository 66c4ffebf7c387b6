"""Times `alibi_attention` against FlexAttention with the same bias and PyTorch's attention with a mask or no bias.

    python bench/attention.py [--device auto|cpu|cuda] [--rounds N] [--threads N] [--case NAME] [--json FILE]

Every provider must first agree with the float64 reference.  Masks are prepared outside of what is timed, and counted
in a column of their own.  "no bias" computes less than the case asks for: a floor, not a rival.  Times are medians of
rounds in which the providers take turns; TFLOP/s are the operations causality leaves, over the time.
"""

from __future__ import annotations

import measure
import providers
from cases import ATTENTION

if __name__ == "__main__":
    measure.main(
        "attention", __doc__, ATTENTION, providers.attention(), lambda device: providers.runs("alibi_attention", device)
    )
