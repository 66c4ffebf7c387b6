"""Launch configurations: which one a kernel gets on which GPU, and what a shipped configuration is.

`tuned/sm_89.json` and `tuned/sm_90.json` hold, per kernel ("attention.forward") and key ("bf16 64": what decides about
the configuration), the sizes of a launch.  A family's `config.py` turns an entry into its frozen dataclass.  A GPU of
another generation takes the file of the nearest older one; what fits sm_89 (99 KiB of shared memory a block) fits all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

TUNED = Path(__file__).parent / "tuned"
ARCHITECTURES = (89, 90)  # compute capability times ten, ascending
SHARED_LIMIT = 101_376  # bytes of shared memory a block may ask for on sm_89


@cache
def table(arch: int) -> Mapping[str, Mapping[str, Mapping[str, int]]]:
    """`{kernel: {key: {size: value}}}` of the shipped configurations for `arch`, one of `ARCHITECTURES`."""
    data = json.loads((TUNED / f"sm_{arch}.json").read_text(encoding="utf-8"))
    return MappingProxyType(data["configs"])


@cache
def arch_of(device: torch.device) -> int:
    """The architecture whose configurations `device` gets; the first one on the CPU, for the interpreter."""
    if device.type != "cuda" or torch.version.hip:
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 12:  # consumer Blackwell has the shared memory of sm_89
        return 89
    return max((arch for arch in ARCHITECTURES if arch <= 10 * major + minor), default=ARCHITECTURES[0])


@dataclass(frozen=True)
class Variant:
    """One kernel as it is shipped: what the ahead-of-time gate compiles."""

    name: str  # "attention.forward bf16 64 causal bias"
    kernel: Any  # the `triton.jit` function
    signature: Mapping[str, str]  # of the arguments that are not constexprs: "*bf16", "i32", "i64", "fp32"
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool = False  # its products must be matrix instructions
    aligned: tuple[str, ...] = field(default=())  # integer arguments that are multiples of 16, as in the usual call
