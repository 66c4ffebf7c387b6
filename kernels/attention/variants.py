"""Every shipped configuration of the attention kernels, for the ahead-of-time gate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from .. import _tune
from . import config
from .decode import combine_kernel, decode_kernel
from .forward import forward_kernel
from .grad_kv import grad_kv_kernel
from .grad_q import grad_q_kernel
from .launch import BLOCK_SCAN
from .prepare import prepare_kernel

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_INPUTS = ("q_ptr", "k_ptr", "v_ptr", "grad_ptr", "out_ptr", "grad_q_ptr", "grad_k_ptr", "grad_v_ptr")
_POINTERS = {
    "positions_q_ptr": "*i64",
    "positions_k_ptr": "*i64",
    "slopes_ptr": "*fp32",
    "mask_ptr": "*i32",
    "first_row_ptr": "*i32",
}
# What a call may bring along, each of which changes the code of the kernels.
_TRAINING = {"CAUSAL": True, "slopes": True, "padding": False, "sinks": False, "group": 1}
_SETTINGS = {
    "causal bias": _TRAINING,
    "causal": _TRAINING | {"slopes": False},
    "causal bias shared": _TRAINING | {"group": 4},
    "bias": _TRAINING | {"CAUSAL": False},
    "bias padding": _TRAINING | {"CAUSAL": False, "padding": True},
    "causal bias padding sinks shared": _TRAINING | {"padding": True, "sinks": True, "group": 4},
}


def variants(arch: int) -> Iterator[_tune.Variant]:
    """All dtypes and head dimensions in the usual setting, the other settings at some of them.

    Those with padding ask for most registers, and most so where the head dimension is large.
    """
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (16, 32, 64, 128):
            yield from _kernels(arch, dtype, head_dim, "causal bias")
        for setting in ("bias padding", "causal bias padding sinks shared"):
            yield from _kernels(arch, dtype, 128, setting)
    for setting in _SETTINGS:
        yield from _kernels(arch, torch.float16, 64, setting)
    yield from _kernels(arch, torch.bfloat16, 96, "causal bias padding sinks shared")


def _kernels(arch: int, dtype: torch.dtype, head_dim: int, setting: str) -> Iterator[_tune.Variant]:
    given: dict[str, Any] = _SETTINGS[setting]
    which = (dtype, head_dim, arch, given["padding"] or given["group"] > 1 or not given["CAUSAL"])
    words = f"{_TYPES[dtype]} {head_dim} {setting}"
    sizes = {"HEAD_DIM": head_dim, "BLOCK_D": config.padded_head_dim(head_dim)}
    usual = sizes | {"CAUSAL": given["CAUSAL"], "UPCAST": False}
    for name, kernel in (("forward", forward_kernel), ("grad_kv", grad_kv_kernel), ("grad_q", grad_q_kernel)):
        tiles: config.Tiles = getattr(config, name)(*which)
        blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_EDGE": tiles.block_edge}
        blocks |= {"EDGE_STAGES": tiles.edge_stages, "GROUP": given["group"]}
        yield _variant(f"attention.{name} {words}", kernel, dtype, given, usual | blocks, tiles)
    chunks = config.decode(*which)
    blocks = {"CHUNK": chunks.chunk, "BLOCK_N": chunks.block_n}
    for rows in {16, chunks.max_rows} if given["padding"] else {16}:
        constants = usual | blocks | {"BLOCK_M": rows}
        yield _variant(f"attention.decode {words} {rows} rows", decode_kernel, dtype, given, constants, chunks)
    if given["padding"]:
        block = config.prepare(*which)
        constants = usual | {"BLOCK_M": block.block, "BLOCK_SCAN": BLOCK_SCAN}
        yield _variant(f"attention.prepare {words}", prepare_kernel, dtype, given, constants, block)
        block = config.combine(*which)
        constants = sizes | {"BLOCK_S": block.block}
        yield _variant(f"attention.combine {words}", combine_kernel, dtype, given, constants, block)


def _variant(
    name: str,
    kernel: Any,
    dtype: torch.dtype,
    given: dict[str, Any],
    constants: dict[str, Any],
    chosen: config.Tiles | config.Chunks | config.Rows,
) -> _tune.Variant:
    """The kernel as contiguous inputs, with everything but the lengths a multiple of 16, have it compiled."""
    absent = [f"{n}_ptr" for n in ("slopes", "sinks") if not given[n]] + ([] if given["padding"] else ["mask_ptr"])
    signature, constexprs = {}, {}
    for argument in kernel.arg_names:
        if argument in constants:
            constexprs[argument] = constants[argument]
        elif argument in absent:
            constexprs[argument] = None
        elif argument in ("stride_pqt", "stride_pkt", "stride_mt") or re.fullmatch("stride_.d", argument):
            constexprs[argument] = 1
        elif argument in _INPUTS:
            signature[argument] = f"*{_TYPES[dtype]}"
        elif argument.endswith("_ptr"):
            signature[argument] = _POINTERS.get(argument, "*fp32")
        else:
            signature[argument] = "fp32" if argument.startswith("scale") else "i32"
    return _tune.Variant(
        name,
        kernel,
        signature,
        constexprs,
        chosen.num_warps,
        getattr(chosen, "num_stages", 1),
        matrix=dtype != torch.float32 and "BLOCK_M" in constants and "BLOCK_SCAN" not in constants,
        aligned=tuple(n for n in signature if n.startswith("stride_") and n not in kernel.do_not_specialize),
    )
