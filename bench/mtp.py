"""Times `mtp_cross_entropy` and `linear_mtp_cross_entropy` against what one would use without them.

    python bench/mtp.py [--device auto|cpu|cuda] [--rounds N] [--threads N] [--case NAME] [--json FILE]

Every provider must first agree with the float64 reference.  The mean over all rows is taken, K targets a row with the
weights (1, w/(K-1), ...); forward and backward ends in the gradients of hidden and weight, or of the given logits.
"GEMMs" are the matrix products alone, and "auto, K = 1" the loss of the first target alone, timed in the same rounds:
floors, not rivals.  On the CPU the memory of the largest cases is measured in a process of its own for each provider.
"""

from __future__ import annotations

import measure
import mtp_providers
import torch
from mtp_cases import MTP, MTPCase
from providers import Call
from timing import alone


def call_of(case: MTPCase, name: str, threads: int) -> Call:
    """What a provider of this name runs, in a process of its own."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    (provider,) = (found for found in mtp_providers.mtp() if found.name == name)
    return provider.build(case, case.inputs("cpu"))[0]


def peak(case: MTPCase, name: str, call: Call, device: str) -> int | None:
    if device == "cpu" and case.alone and name not in YARDSTICKS:
        return alone(call_of, case, name, torch.get_num_threads())
    return measure.peak(case, name, call, device)


YARDSTICKS = {provider.name for provider in mtp_providers.mtp() if provider.plain}

if __name__ == "__main__":
    measure.main("mtp", __doc__, MTP, mtp_providers.mtp(), mtp_providers.operator, peak)
