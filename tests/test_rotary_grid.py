"""Gaussian rotary embedding against float64 over a grid drawn at random: every backend, values and gradients.

The bound is an error analysis, element by element.  A result may be off by its one rounding to the dtype, and by 5e-7
of what went into it, |x_1| + |x_2| of its pair times the damping: 4e-7 for cosine and sine, and the rest for float32
arithmetic, a damping exp(-e) being off by e roundings.  PyTorch's own arithmetic in the dtype rounds three times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megactx import kernels
from megactx.kernels import _library
from megactx.kernels.rotary.reference import Settings, rotation

RESULTS = ("q", "k", "gradient of q", "gradient of k")
LAYOUTS = ("contiguous", "heads first", "packed", "wider", "every other", "one sample", "one head")
POSITIONS = (0, 1, 10**6, 2**31 - 1, 10**9 + 7, 10**12)


@dataclass(frozen=True)
class Case:
    batch: int
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    dtype: torch.dtype
    layout: str
    upstream: str
    positions: str
    start: int
    narrow: bool  # positions and lods int32
    lods: bool
    options: dict[str, Any]
    seed: int


@st.composite
def cases(draw: st.DrawFn, tokens: int = 40, dims: int = 32, double: bool = True) -> Case:
    dtypes = [torch.bfloat16, torch.float16, torch.float32, *([torch.float64] if double else [])]
    dim = 2 * draw(st.integers(1, dims))
    norm = draw(st.sampled_from((None, None, 1e-6, 1e-2)))
    options = {
        "block_size": draw(st.sampled_from((32, 1, 2, 3))),
        "base": draw(st.sampled_from((10000.0, 500.0, 1e6))),
        "sigma": draw(st.sampled_from(("uniform", "none", "power"))),
        "lod_pairs": draw(st.sampled_from((0, 0, 1, dim // 2))),
        "interleaved": draw(st.booleans()),
        "conjugate": draw(st.booleans()),
        "qk_norm_eps": norm,
        "norm_after": norm is not None and draw(st.booleans()),
    }
    start = draw(st.sampled_from((1, -1))) * draw(st.sampled_from(POSITIONS))
    return Case(
        batch=draw(st.integers(1, 3)),
        tokens=draw(st.integers(1, tokens)),
        heads=draw(st.integers(1, 4)),
        kv_heads=draw(st.integers(1, 3)),
        dim=dim,
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        upstream=draw(st.sampled_from(("contiguous", "heads first", "one sample", "one head"))),
        positions=draw(st.sampled_from(("[T]", "[B, T]", "[1, T] expanded"))),
        start=start,
        narrow=abs(start) < 2**31 - 100 and draw(st.booleans()),
        lods=draw(st.booleans()),
        options=options,
        seed=draw(st.integers(0, 99)),
    )


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x [B, T, H, D], or values of it repeated, in another layout."""
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":
        return torch.cat((torch.full_like(x, math.nan), x, torch.full_like(x, math.nan)), dim=2).chunk(3, dim=2)[1]
    if layout == "wider":
        return torch.cat((x, torch.full_like(x[..., :1], math.nan)), dim=-1)[..., :-1]
    if layout == "every other":
        return torch.stack((x, torch.full_like(x, math.nan)), dim=-1)[..., 0]
    if layout == "one sample":
        return x[:1].expand(x.shape)
    if layout == "one head":
        return x[:, :, :1].expand(x.shape)
    return x


@dataclass
class Drawn:
    """The tensors of a case."""

    tensors: dict[str, Tensor]  # q, k and the gradients that arrive for their results
    positions: Tensor
    lods: Tensor | None
    options: dict[str, Any]

    def run(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Rotated q and k, and their gradients, on the backend in force."""
        q, k, grad_q, grad_k = (x.to(dtype or x.dtype).detach() for x in self.tensors.values())
        q, k = q.requires_grad_(), k.requires_grad_()
        out = kernels.gaussian_rope(q, k, self.positions, self.lods, **self.options)
        return [*(y.detach() for y in out), *torch.autograd.grad(out, (q, k), (grad_q, grad_k))]

    def sample(self, b: int) -> Drawn:
        tensors = {name: x[b : b + 1] for name, x in self.tensors.items()}
        positions, lods = (x[b : b + 1] if x is not None and x.ndim == 2 else x for x in (self.positions, self.lods))
        assert positions is not None
        return Drawn(tensors, positions, lods, self.options)


def draw_tensors(case: Case, device: str) -> Drawn:
    generator = torch.Generator().manual_seed(case.seed)

    def x(heads: int, layout: str) -> Tensor:
        made = torch.randn(case.batch, case.tokens, heads, case.dim, generator=generator, dtype=torch.float64)
        return laid_out(made.to(case.dtype).to(device), layout)

    def integers(low: int, high: int) -> Tensor:
        shape = (case.tokens,) if case.positions == "[T]" else (1 if "1" in case.positions else case.batch, case.tokens)
        made = torch.randint(low, high, shape, generator=generator).to(torch.int32 if case.narrow else torch.int64)
        return (made.expand(case.batch, -1) if case.positions == "[1, T] expanded" else made).to(device)

    tensors = {
        "q": x(case.heads, case.layout),
        "k": x(case.kv_heads, case.layout),
        "grad_q": x(case.heads, case.upstream),
        "grad_k": x(case.kv_heads, case.upstream),
    }
    positions = integers(case.start - 50, case.start + 50)
    return Drawn(tensors, positions, integers(0, 7) if case.lods else None, case.options)


def partner(x: Tensor, interleaved: bool) -> Tensor:
    """For each channel the other one of its pair."""
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if interleaved else x.roll(x.shape[-1] // 2, -1)


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def floors(drawn: Drawn, unit: float) -> list[Tensor]:
    """How far each result and gradient may be off before it is rounded; `unit` as in the module's docstring."""
    s = Settings(**drawn.options)
    own, other = rotation(drawn.positions, drawn.lods, drawn.tensors["q"].shape[-1], s, torch.float64)
    damping = torch.hypot(own, other)
    weight = damping - torch.xlogy(damping, damping)

    def turned(x: Tensor, sine: Tensor) -> Tensor:
        return x * own + partner(x, s.interleaved) * sine

    def off_turned(x: Tensor, off: Tensor) -> Tensor:
        """How far x, itself off by `off`, is off when it is rotated."""
        both = unit * x.abs() + off
        return weight * (both + partner(both, s.interleaved))

    def both(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        exact = torch.zeros_like(x)
        if s.qk_norm_eps is None:
            return off_turned(x, exact), off_turned(g, exact)
        u, off_u = (turned(x, other), off_turned(x, exact)) if s.norm_after else (x, exact)
        d, off_d = (g, exact) if s.norm_after else (turned(g, -other), off_turned(g, exact))
        r = torch.rsqrt(mean(u.square()) + s.qk_norm_eps)
        y = u * r
        off_r = r * r * mean(u.abs() * off_u) + unit  # relative
        off_y = r * off_u + y.abs() * off_r
        dot, off_dot = mean((d * y).abs()), mean(off_d * y.abs() + d.abs() * off_y)
        size = r * (d.abs() + y.abs() * dot)  # of the normalisation's gradient, r (d - y mean(d y))
        off = r * (off_d + off_y * dot + y.abs() * off_dot) + size * (off_r + 2 * unit)
        return (off_y, off_turned(size, off)) if s.norm_after else (off_turned(y, off_y), off)

    q, k, grad_q, grad_k = (x.double() for x in drawn.tensors.values())
    (off_q, off_grad_q), (off_k, off_grad_k) = both(q, grad_q), both(k, grad_k)
    return [off_q, off_k, off_grad_q, off_grad_k]


def check(case: Case, backend: str, device: str = "cpu") -> None:
    drawn = draw_tensors(case, device)
    with kernels.use_backend("reference"):
        truth = drawn.run(torch.float64)
    with kernels.use_backend(backend):
        results = drawn.run()
        alone = drawn.sample(case.batch - 1).run()
    unit = 1e-13 if case.dtype == torch.float64 else 5e-7
    numbers = torch.finfo(case.dtype)
    rounding = numbers.eps * (1.0 if backend == "triton" and device == "cpu" else 0.5)  # the interpreter truncates
    smallest = max(1e-30, numbers.smallest_normal * numbers.eps)  # flushed to zero, or a step of what is denormal
    for name, got, exact, floor in zip(RESULTS, results, truth, floors(drawn, unit), strict=True):
        assert got.dtype == case.dtype
        allowed = rounding * (exact.abs() + floor) + floor + smallest
        excess = (got.double() - exact).abs() / allowed
        assert (excess <= 1).all(), f"{name} is off by {excess.nan_to_num(math.inf).max():.3g} times what is allowed"
    for name, got, one in zip(RESULTS, results, alone, strict=True):
        assert torch.equal(got[-1:], one), f"{name} of a sample depends on the rest of the batch"
    if case.layout not in ("one sample", "one head"):
        check_in_place(case, backend, device, results)


def check_in_place(case: Case, backend: str, device: str, results: list[Tensor]) -> None:
    """The same bits written over q and k, and nothing beside them."""
    drawn = draw_tensors(case, device)
    q, k = drawn.tensors["q"], drawn.tensors["k"]
    memory = [x if x._base is None else x._base for x in (q, k)]
    beside = [x.isnan() for x in memory]
    with kernels.use_backend(backend):
        kernels.gaussian_rope_(q, k, drawn.positions, drawn.lods, **drawn.options)
    assert torch.equal(q, results[0])
    assert torch.equal(k, results[1])
    assert all(torch.equal(x.isnan(), before) for x, before in zip(memory, beside, strict=True))


GRID = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow], print_blob=False
)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@GRID
@given(case=cases())
def test_values_and_gradients_on_the_cpu(backend: str, case: Case) -> None:
    check(case, backend)


@pytest.mark.interp
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy speaks up where a GPU makes an infinity or a NaN
@settings(GRID, max_examples=12)
@given(case=cases(tokens=9, dims=16, double=False))
def test_values_and_gradients_of_the_triton_kernels(case: Case) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reason := _library.why_not("gaussian_rope", "triton", device):
        pytest.skip(reason)
    check(case, "triton", device)
