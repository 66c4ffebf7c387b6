"""The rotary kernel as it is shipped: what the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from .._tune import Variant
from .config import choose
from .kernel import rotary_kernel

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_PLAIN = {"LOD_PAIRS": 0, "SIGMA": "uniform", "INTERLEAVED": False, "NORM": "none"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"SIGMA": "none"},
    "power levels": {"SIGMA": "power", "LOD_PAIRS": 8},
    "interleaved": {"INTERLEAVED": True},
    "norm before": {"NORM": "before"},
    "norm after": {"NORM": "after"},
    "norm before backward": {"NORM": "before"},
    "norm after backward": {"NORM": "after"},
    "norm after interleaved backward": {"NORM": "after", "INTERLEAVED": True},
    "in place": {},
}


def variants(arch: int) -> Iterator[Variant]:
    for dtype in _DTYPES:
        for head_dim in (16, 32, 64, 80, 96, 128, 256):
            yield _variant(arch, dtype, head_dim, "", {})
    for options, constexprs in _OPTIONS.items():
        yield _variant(arch, "bf16", 64, options, constexprs)
    for dtype, head_dim in (("bf16", 128), ("bf16", 256), ("fp32", 64), ("fp32", 256)):
        yield _variant(arch, dtype, head_dim, "norm after backward", {"NORM": "after"})


def _variant(arch: int, dtype: str, head_dim: int, options: str, constexprs: dict[str, Any]) -> Variant:
    """With 12 heads, densely packed: the strides of the channels are 1, the others multiples of 16."""
    config = choose(arch, _DTYPES[dtype], head_dim, 12, 12)
    signature = {"positions_ptr": "*i64", "lods_ptr": "*i64", "table_ptr": "*i64", "eps": "fp32"}
    signature |= dict.fromkeys(("tokens", "length", "heads_q", "heads_k"), "i32")
    signature |= dict.fromkeys(("stride_pb", "stride_pt", "stride_lb", "stride_lt"), "i32")
    tensors = ["q", "k"]
    if options.endswith("backward"):
        tensors += ["q_at", "k_at"]
    aligned = [f"stride_{tensor.replace('_at', 'a')}{dim}" for tensor in tensors for dim in "bth"]
    if options != "in place":
        tensors += ["q_out", "k_out"]
    signature |= {f"{tensor}_ptr": f"*{dtype}" for tensor in tensors} | dict.fromkeys(aligned, "i32")
    sizes = {"HALF": head_dim // 2, "PAIRS": config.pairs, "BLOCK_T": config.block_t, "BLOCK_H": config.block_h}
    unit = [f"stride_{tensor}d" for tensor in ("q", "k", "qa", "ka")]
    absent = [name for name in rotary_kernel.arg_names if name.endswith("_ptr") and name not in signature]
    absent += [name for name in rotary_kernel.arg_names if name.startswith("stride_") and name not in signature]
    return Variant(
        name=f"rotary {dtype} {head_dim} {options}".rstrip(),
        kernel=rotary_kernel,
        signature=signature,
        constexprs=dict.fromkeys(absent) | dict.fromkeys(unit, 1) | _PLAIN | constexprs | sizes,
        num_warps=config.num_warps,
        num_stages=1,
        aligned=tuple(aligned),
    )
