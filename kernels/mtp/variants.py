"""The row kernels as they are shipped: what the ahead-of-time gate compiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .._tune import Variant
from .config import WIDTHS, choose_rows
from .kernel import combine_kernel, gradient_kernel, parts_kernel, rows_kernel
from .scale import BLOCK, NUM_WARPS, scale_kernel

_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
_STEPS = 4
_STRIDES = ("stride_n", "stride_gn", "stride_tn", "stride_tc", "stride_tk", "stride_wn", "stride_wc", "stride_wk")
_INTEGERS = (*_STRIDES, "contexts", "steps", "width", "ignore_index")


def variants(arch: int) -> Iterator[Variant]:
    for dtype in _SIZES:
        types = {"x_ptr": f"*{dtype}", "factor_ptr": "*fp32", "size": "i32"}
        yield Variant(f"mtp scale {dtype}", scale_kernel, types, {"BLOCK": BLOCK}, NUM_WARPS, 1, aligned=("size",))
        for width in (*WIDTHS, 50304):
            for name in ("rows", "rows in place", "backward"):
                yield _variant(arch, name, dtype, width, {"aligned"})
    for dtype in ("bf16", "fp32"):
        for width in (WIDTHS[0], 50304):
            for options in ({"softcap", "mean", "aligned"}, {"contexts"}, {"contexts", "softcap", "mean"}):
                for name in ("rows", "rows in place", "backward"):
                    yield _variant(arch, name, dtype, width, options)
        for options in ({"aligned"}, {"contexts", "softcap", "mean"}):
            for name in ("parts", "combine", "split backward"):
                yield _variant(arch, name, dtype, 50304, options)


def _variant(arch: int, name: str, dtype: str, width: int, options: set[str]) -> Variant:
    """One context, or several that begin anywhere; aligned rows, or rows at any stride."""
    kernel: Any = {"parts": parts_kernel, "combine": combine_kernel}.get(
        name, gradient_kernel if name.endswith("backward") else rows_kernel
    )
    config = choose_rows(arch, _SIZES[dtype], width, "softcap" in options)
    vec = 16 // _SIZES[dtype] if "aligned" in options else 1
    sizes = config.tile(vec) | {"STEPS": _STEPS, "PART": config.part, "ALIGN": vec, "MEAN": "mean" in options}
    tensors = {"logits_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}", "targets_ptr": "*i64"}
    tensors |= dict.fromkeys(("weights_ptr", "log_p_ptr", "mean_ptr", "lse_ptr", "states_ptr", "softmax_ptr"), "*fp32")
    absent = set() if "softcap" in options else {"softcap", "inverse"}
    absent |= set() if "mean" in options else {"mean_ptr"}
    absent |= {"weights_ptr", "stride_wn", "stride_wc", "stride_wk"} if name == "rows" else set()
    absent |= {"softmax_ptr"} if name == "backward" else set()
    if "contexts" in options:
        tensors["layout_ptr"] = "*i32"
    else:
        absent.add("layout_ptr")
    signature = tensors | dict.fromkeys(_INTEGERS, "i32")
    signature |= dict.fromkeys(("softcap", "inverse", "smoothing", "z_loss"), "fp32")
    names = set(kernel.arg_names)
    constexprs: dict[str, Any] = {key: value for key, value in sizes.items() if key in names}
    constexprs |= dict.fromkeys(absent & names)
    return Variant(
        name=f"mtp {name} {dtype} {width} {' '.join(sorted(options))}".rstrip(),
        kernel=kernel,
        signature={key: value for key, value in signature.items() if key in names and key not in constexprs},
        constexprs=constexprs,
        num_warps=1 if name == "combine" else config.num_warps,
        num_stages=1,
        aligned=("stride_n", "stride_gn", "width") if "aligned" in options else (),
    )
