"""Who is measured: the operators on each of their backends, and what one would use without them.

Each provider has one interface on the CPU and on CUDA.  It says why it does not take a case on a device, and builds
from a case's inputs a call that returns what the truth returns: outputs, then gradients where there is a backward.
Whatever can be prepared once (tables, masks) is prepared outside of the call, and its size is reported.

Rivals: PyTorch with precomputed cosines and sines, eager and compiled, and Liger's kernel, for the rotation;
FlexAttention with the same bias, PyTorch's attention with the bias as a materialised mask, and as a floor PyTorch's
attention with no bias at all, for the attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from cases import DTYPES, NO_BIAS, AttentionCase, Case, RotaryCase
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megactx import kernels
from megactx.kernels import _library
from megactx.kernels.rotary.reference import Settings, rotation

Inputs = dict[str, Tensor]
Call = Callable[[], tuple[Tensor, ...]]
LARGEST_REFERENCE = 2**26  # bytes of one [B, H, Tq, Tk] tensor, of which the reference holds several


def _always(case: Any, device: str) -> str:
    return ""


@dataclass(frozen=True)
class Provider:
    name: str
    build: Callable[[Any, Inputs], tuple[Call, tuple[Tensor, ...]]]  # the call, and the tensors prepared for it
    why_not: Callable[[Any, str], str] = _always  # of a case and a device: the empty string where it runs
    plain: str = ""  # what it computes instead, for a floor or a yardstick that is no rival: of the case's truth
    rounds_mean: bool = False  # it returns a mean in the type of its inputs, and is held to that type's precision


def runs(operator: str, device: str) -> str:
    """Which implementation `auto` takes for an operator on a device."""
    found = kernels.backends()[operator]
    for backend, place in (("triton", "cuda"), ("cpp", "cpu")):
        if device == place and found[backend] == "live":
            return backend
    taken = _library.OPERATORS[operator].fallback or _library.OPERATORS[operator].reference
    return taken.__module__.rpartition(".")[2]  # the file it is in: "reference", or the name of something better


def rotary(compiler: str = "inductor") -> list[Provider]:
    """Providers of a `RotaryCase`; `compiler` is the backend of `torch.compile`."""

    def ours(case: RotaryCase, inputs: Inputs, backend: str = "auto") -> tuple[Call, tuple[Tensor, ...]]:
        options = (inputs["positions"], inputs.get("lods"))

        def call(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return kernels.gaussian_rope(q, k, *options, qk_norm_eps=case.qk_norm_eps)

        return _rotating(case, inputs, _on(backend, call)), ()

    def in_place(case: RotaryCase, inputs: Inputs) -> tuple[Call, tuple[Tensor, ...]]:
        q, k, positions = inputs["q"], inputs["k"], inputs["positions"]
        return lambda: kernels.gaussian_rope_(q, k, positions, inputs.get("lods"), qk_norm_eps=case.qk_norm_eps), ()

    def eager(case: RotaryCase, inputs: Inputs) -> tuple[Call, tuple[Tensor, ...]]:
        tables = _tables(case, inputs)
        return _rotating(case, inputs, lambda q, k: _eager_rope(q, k, *tables, case.qk_norm_eps)), tables

    def compiled(case: RotaryCase, inputs: Inputs) -> tuple[Call, tuple[Tensor, ...]]:
        tables = _tables(case, inputs)
        function = torch.compile(_eager_rope, dynamic=False, fullgraph=True, backend=compiler)
        return _rotating(case, inputs, lambda q, k: function(q, k, *tables, case.qk_norm_eps)), tables

    def no_liger(case: RotaryCase, device: str) -> str:
        if device != "cuda":
            return "needs a CUDA device"
        if case.norm:
            return "it does not normalise"
        return "" if find_spec("liger_kernel") else "liger_kernel is not installed"

    def liger(case: RotaryCase, inputs: Inputs) -> tuple[Call, tuple[Tensor, ...]]:
        from liger_kernel.ops.rope import LigerRopeFunction  # type: ignore[import-not-found]

        tables = tuple(table[..., 0, :].reshape(-1, case.tokens, case.head_dim) for table in _tables(case, inputs))

        def call(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            q, k, *_ = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), *tables)  # in place
            return q.transpose(1, 2), k.transpose(1, 2)

        return _rotating(case, inputs, call), tables

    def no_place(case: RotaryCase, device: str) -> str:
        if case.backward:
            return "under autograd it is the copying function and a copy"
        return "each call would rotate what the last one left, and damping shrinks it to nothing" if case.lods else ""

    return [
        *_ours("gaussian_rope", ours),
        Provider("auto, in place", in_place, no_place),
        Provider("eager", eager),
        Provider("compiled", compiled),
        Provider("Liger", liger, no_liger),
    ]


def attention(compiler: str = "inductor") -> list[Provider]:
    """Providers of an `AttentionCase`; `compiler` is the backend of `torch.compile`."""

    def ours(case: AttentionCase, inputs: Inputs, backend: str = "auto") -> tuple[Call, tuple[Tensor, ...]]:
        options = (inputs["positions_q"], inputs["positions_k"], inputs["slopes"])
        call = _on(backend, lambda q, k, v: kernels.alibi_attention(q, k, v, *options))
        return _attending(case, inputs, call), ()

    def no_flex(case: AttentionCase, device: str) -> str:
        return "FlexAttention has no backward on the CPU" if case.backward and device == "cpu" else ""

    def no_floor(case: AttentionCase, device: str) -> str:
        if 1 < case.queries < case.keys:
            return "its is_causal lines up the first query with the first key"
        return ""

    def no_flash(case: AttentionCase, device: str) -> str:
        return no_floor(case, device) if device == "cuda" else "what PyTorch takes on the CPU anyway"

    return [
        *_ours("alibi_attention", ours, _too_large),
        Provider("FlexAttention", lambda case, inputs: _flex(case, inputs, compiler), no_flex),
        Provider("SDPA, mask", _masked),
        Provider("SDPA, no bias", _floor, no_floor, plain=NO_BIAS),
        Provider("SDPA flash, no bias", lambda case, inputs: _floor(case, inputs, flash=True), no_flash, plain=NO_BIAS),
    ]


def _ours(
    operator: str,
    build: Callable[..., tuple[Call, tuple[Tensor, ...]]],
    too_large: Callable[[Any, str], str] = _always,
) -> Iterator[Provider]:
    """`auto`, and each backend by its name where that is another one."""
    yield Provider("auto", build)

    def forced(backend: str) -> Provider:
        def why_not(case: Any, device: str) -> str:
            if runs(operator, device) == backend:
                return "what auto runs"
            if backend == "triton" and device == "cpu":
                return "needs a CUDA device"  # its interpreter, where that is on, is no measure of anything
            if backend == "reference":
                return too_large(case, device)
            return _library.why_not(operator, backend, device)

        return Provider(backend, lambda case, inputs: build(case, inputs, backend), why_not)

    yield from map(forced, ("cpp", "triton", "reference"))


def _on(backend: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call` under a backend; as it is under `auto`, whose time is not to hold that of entering a block."""
    if backend == "auto":
        return call

    def run(*args: Tensor) -> Any:
        with kernels.use_backend(backend):
            return call(*args)

    return run


def _rotating(case: RotaryCase, inputs: Inputs, call: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Call:
    return _run(case, call, [inputs["q"], inputs["k"]], [inputs[n] for n in ("grad_q", "grad_k") if n in inputs])


def _attending(case: AttentionCase, inputs: Inputs, call: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    upstream = [inputs["grad_out"]] if case.backward else []
    return _run(case, lambda *x: (call(*x),), [inputs[name] for name in "qkv"], upstream)


def _run(
    case: Case,
    call: Callable[..., tuple[Tensor, ...]],
    tensors: list[Tensor],
    upstream: list[Tensor],
) -> Call:
    """The forward under no_grad, or the forward and the gradients of `tensors`; no `upstream` for a scalar."""
    if not case.backward:

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return call(*tensors)

        return forward
    leaves = [x.requires_grad_() for x in tensors]

    def both() -> tuple[Tensor, ...]:
        out = call(*leaves)
        return *out, *torch.autograd.grad(out, leaves, upstream or None)

    return both


def _tables(case: RotaryCase, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Damped cosines and sines [T or B T, 1, D] for `_eager_rope`: from float64, rounded to the dtype of q."""
    settings = Settings(32, 10000.0, "uniform", 0, False, False, None, False)
    own, other = rotation(inputs["positions"], inputs.get("lods"), case.head_dim, settings, torch.float64)
    half = case.head_dim // 2
    sine = torch.cat((other[..., half:], other[..., half:]), dim=-1)  # `other` is negative for the first of a pair
    dtype = DTYPES[case.dtype]
    return own.to(dtype).contiguous(), sine.to(dtype).contiguous()


def _eager_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, norm_eps: float | None) -> tuple[Tensor, Tensor]:
    """What models do: x cos + rotate_half(x) sin, in the dtype of x."""

    def turned(x: Tensor) -> Tensor:
        if norm_eps is not None:
            x = F.rms_norm(x, (x.shape[-1],), eps=norm_eps)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return turned(q), turned(k)


def _too_large(case: AttentionCase, device: str) -> str:
    scores = case.batch * case.heads * case.queries * case.keys * 4
    if scores > LARGEST_REFERENCE:
        return f"it holds several [B, H, Tq, Tk] tensors of {1e-6 * scores:,.0f} MB"
    return ""


def _flex(case: AttentionCase, inputs: Inputs, compiler: str) -> tuple[Call, tuple[Tensor, ...]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    positions_q, positions_k, slopes = inputs["positions_q"], inputs["positions_k"], inputs["slopes"]
    offset = case.keys - case.queries

    def bias(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score - slopes[h] * (positions_q[b, i] - positions_k[b, j]).abs()

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i + offset >= j

    blocks = create_block_mask(seen, None, None, case.queries, case.keys, device=inputs["q"].device)
    function = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=compiler)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = function(q, k, v, score_mod=bias, block_mask=blocks, enable_gqa=case.heads != case.kv_heads)
        return out.transpose(1, 2)

    prepared = tuple(x for x in blocks.as_tuple() if isinstance(x, Tensor))
    return _attending(case, inputs, call), prepared


def _masked(case: AttentionCase, inputs: Inputs) -> tuple[Call, tuple[Tensor, ...]]:
    """The bias and the causal mask as one tensor [B, H, Tq, Tk]."""
    distance = (inputs["positions_q"][:, :, None] - inputs["positions_k"][:, None, :]).abs()
    future = torch.ones(case.queries, case.keys, dtype=torch.bool, device=distance.device)
    future = future.triu(case.keys - case.queries + 1)
    mask = torch.empty(
        case.batch, case.heads, case.queries, case.keys, dtype=DTYPES[case.dtype], device=distance.device
    )
    for head, slope in enumerate(inputs["slopes"].tolist()):
        mask[:, head] = (-slope * distance.float()).masked_fill(future, -math.inf)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _sdpa(case, q, k, v, attn_mask=mask)

    return _attending(case, inputs, call), (mask,)


def _floor(case: AttentionCase, inputs: Inputs, flash: bool = False) -> tuple[Call, tuple[Tensor, ...]]:
    """Causal attention without a bias; one query may see every key."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not flash:
            return _sdpa(case, q, k, v, is_causal=case.queries > 1)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return _sdpa(case, q, k, v, is_causal=case.queries > 1)

    return _attending(case, inputs, call), ()


def _sdpa(case: AttentionCase, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options["enable_gqa"] = case.heads != case.kv_heads
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)
