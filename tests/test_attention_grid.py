"""Attention with a bias from positions against float64 over a random grid: every backend, values and gradients.

The bound is an error analysis, element by element.  With P the float64 probabilities, each product may be off by
`ROUNDINGS` roundings to the dtype of what it adds up in absolute values (P |V| for the output), since a fused kernel
rounds the operands of its matrix products, and every entry of P by `ROUNDINGS_32` float32 roundings of the scores it
was made of, which counts for float32 inputs alone.  PyTorch's own attention in the dtype needs as much.

Where nothing is seen, results are exactly zero; where the kernels are ours, a sample has the same bits in any batch,
at any shift of the positions and whatever stands in padded keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from megactx import kernels
from megactx.kernels import _library

RESULTS = ("out", "gradient of q", "gradient of k", "gradient of v", "gradient of the sinks")
LAYOUTS = ("contiguous", "heads first", "packed", "wider", "every other", "one sample", "one head", "one token")
PADDINGS = (None, None, "left", "right", "random", "a sample", "all")
ROUNDINGS, ROUNDINGS_32 = 1.5, 4.0


@dataclass(frozen=True)
class Case:
    batch: int
    queries: int
    keys: int
    kv_heads: int
    group: int
    dim: int
    dtype: torch.dtype
    layout: str
    upstream: str
    causal: bool
    slopes: str | None
    sinks: bool
    padding: str | None
    poison: float | None  # what stands in padded keys
    per_sample: bool
    spacing: str
    shift: int
    narrow: bool
    scale: float | None
    seed: int


@st.composite
def cases(draw: st.DrawFn, interpreted: bool = False) -> Case:
    length, most = (draw(st.sampled_from((20, 70))), 2) if interpreted else (70, 3)
    causal = draw(st.booleans())
    dtypes = [torch.bfloat16, torch.float16, torch.float32, *([] if interpreted else [torch.float64])]
    keys = draw(st.integers(1, length))
    queries = draw(st.one_of(st.just(keys), st.integers(1, keys if causal else length)))
    shift = draw(st.sampled_from((1, -1))) * draw(st.sampled_from((0, 0, 2**31 - 10**5, 10**9, 10**12)))
    return Case(
        batch=draw(st.integers(1, most)),
        queries=queries,
        keys=keys,
        kv_heads=draw(st.integers(1, most)),
        group=draw(st.integers(1, most)),
        dim=draw(st.sampled_from((2, 3, 8, 15, 16, 17, 31, 32, 33, 40))),
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(LAYOUTS)),
        upstream=draw(st.sampled_from(("contiguous", "heads first", "one token"))),
        causal=causal,
        slopes=draw(st.sampled_from(("press", "geometric", "some zero", None))),
        sinks=draw(st.booleans()),
        padding=draw(st.sampled_from(PADDINGS)),
        poison=draw(st.sampled_from((None, math.nan, math.inf))),
        per_sample=draw(st.booleans()),
        spacing=draw(st.sampled_from(("one by one", "spans", "shuffled"))),
        shift=shift,
        narrow=abs(shift) < 2**31 and draw(st.booleans()),
        scale=draw(st.sampled_from((None, 0.1, 1.0))),
        seed=draw(st.integers(0, 99)),
    )


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x [B, T, H, D], or values of it repeated, in another layout."""
    nan = torch.full_like(x, math.nan)
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "packed":
        return torch.cat((nan, x, nan), dim=2).chunk(3, dim=2)[1]
    if layout == "wider":
        return torch.cat((x, nan[..., :1]), dim=-1)[..., :-1]
    if layout == "every other":
        return torch.stack((x, nan), dim=-1)[..., 0]
    if layout.startswith("one"):
        return x.narrow(("one sample", "one token", "one head").index(layout), 0, 1).expand(x.shape)
    return x


@dataclass
class Drawn:
    """The tensors of a case."""

    tensors: dict[str, Tensor]  # q, k, v, and grad_out
    sinks: Tensor | None
    options: dict[str, Any]

    def run(self, exact: bool = False) -> list[Tensor]:
        """The output and the gradients of q, k, v and the sinks, on the backend in force."""
        *inputs, grad_out = (x.double() if exact else x for x in self.tensors.values())
        sinks = self.sinks.double() if exact and self.sinks is not None else self.sinks
        leaves = [x.detach().requires_grad_() for x in (*inputs, sinks) if x is not None]
        out = kernels.alibi_attention(*leaves[:3], sinks=leaves[3] if len(leaves) > 3 else None, **self.options)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]

    def poisoned(self, value: float) -> Drawn:
        """With `value` in the keys and values that are padded."""
        mask = self.options["key_padding_mask"]
        hidden = (~mask)[:, :, None, None]
        return Drawn(
            {**self.tensors, **{n: self.tensors[n].masked_fill(hidden, value) for n in "kv"}}, self.sinks, self.options
        )

    def sample(self, b: int) -> Drawn:
        def one(x: Any) -> Any:
            return x[b : b + 1] if isinstance(x, Tensor) and x.ndim > 1 else x

        tensors, options = ({n: one(x) for n, x in found.items()} for found in (self.tensors, self.options))
        return Drawn(tensors, self.sinks, options)


def draw_tensors(case: Case, device: str) -> Drawn:
    generator = torch.Generator().manual_seed(case.seed)
    heads = case.kv_heads * case.group

    def x(length: int, heads: int, layout: str = case.layout) -> Tensor:
        made = torch.randn(case.batch, length, heads, case.dim, generator=generator, dtype=torch.float64)
        return laid_out(made.to(case.dtype).to(device), layout)

    def positions(length: int, ahead: int) -> Tensor:
        shape = (case.batch, length) if case.per_sample else (length,)
        steps = {"one by one": 1, "spans": torch.randint(0, 33, shape, generator=generator), "shuffled": 1}
        made = (torch.ones(shape, dtype=torch.int64) * steps[case.spacing]).cumsum(-1) + ahead
        if case.spacing == "shuffled":
            made = made[..., torch.randperm(length, generator=generator)]
        return (made + case.shift).to(torch.int32 if case.narrow else torch.int64).to(device)

    mask = torch.ones(case.batch, case.keys, dtype=torch.bool)
    first = torch.randint(0, case.keys, (case.batch, 1), generator=generator)
    mask = {
        None: mask,
        "left": torch.arange(case.keys) >= first,
        "right": torch.arange(case.keys) <= first,
        "random": torch.rand(case.batch, case.keys, generator=generator) < 0.7,
        "a sample": mask & (torch.arange(case.batch)[:, None] > 0),
        "all": ~mask,
    }[case.padding]
    slopes = None
    if case.slopes:
        slopes = kernels.alibi_slopes(heads, "press" if case.slopes == "some zero" else case.slopes, device=device)
        slopes = slopes * (torch.arange(heads, device=device) % 2) if case.slopes == "some zero" else slopes
    same = case.queries == case.keys and case.spacing == "one by one"
    options = {
        "positions_q": positions(case.queries, max(case.keys - case.queries, 0)),
        "positions_k": None if same else positions(case.keys, 0),
        "slopes": slopes,
        "causal": case.causal,
        "key_padding_mask": mask.to(device) if case.padding else None,
        "scale": case.scale,
    }
    tensors = {"q": x(case.queries, heads), "k": x(case.keys, case.kv_heads), "v": x(case.keys, case.kv_heads)}
    tensors["grad_out"] = x(case.queries, heads, case.upstream)
    sinks = torch.randn(heads, generator=generator).to(device) if case.sinks else None
    return Drawn(tensors, sinks, options)


def scores_and_sizes(drawn: Drawn, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """[B, H, Tq, Tk]: which pairs count, their scores, and the sum of the absolute values these are made of."""
    o = drawn.options
    positions_k = o["positions_q"] if o["positions_k"] is None else o["positions_k"]
    distance = (o["positions_q"].long()[..., :, None] - positions_k.long()[..., None, :]).abs().double()
    distance = distance if distance.ndim == 3 else distance[None]
    bias = 0.0 if o["slopes"] is None else o["slopes"].double()[:, None, None] * distance[:, None]
    allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    if o["causal"]:
        allowed = allowed.tril(k.shape[2] - q.shape[2])
    if o["key_padding_mask"] is not None:
        allowed = allowed & o["key_padding_mask"][:, None, None, :]
    return allowed, (q @ k.mT * scale - bias).masked_fill(~allowed, -math.inf), q.abs() @ k.abs().mT * scale + bias


def floors(drawn: Drawn, dtype: torch.dtype) -> list[Tensor]:
    """How far each result may be off, by the analysis in the module's docstring, all in float64."""
    eps = torch.finfo(dtype).eps
    step = max(1e-300, torch.finfo(dtype).smallest_normal * eps)  # between the numbers next to zero
    q, k, v, grad = (x.double().transpose(1, 2) for x in drawn.tensors.values())
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scale = drawn.options["scale"] if drawn.options["scale"] is not None else q.shape[-1] ** -0.5
    allowed, scores, size = scores_and_sizes(drawn, q, k, scale)
    sinks = scores.new_full((q.shape[1], 1), -math.inf) if drawn.sinks is None else drawn.sinks.double()[:, None]
    column = sinks[:, None].expand(*scores.shape[:-1], 1)
    weights = torch.cat((scores, column), dim=-1).softmax(-1).nan_to_num(0.0)
    p, p_sink = weights[..., :-1], weights[..., -1:]

    # How far a probability is off, relative: by its own score, by those of its row, through the sum and the largest,
    # and by the length of the sums.
    of_row = (p * size).sum(-1, keepdim=True) + (p_sink * column.abs()).nan_to_num(0.0)
    of_row = of_row + scores.amax(-1, keepdim=True).abs().nan_to_num(0.0, posinf=0.0)
    of_row = of_row + 1 + max(k.shape[2], q.shape[2] * group) / 4
    eps_32 = min(eps, torch.finfo(torch.float32).eps)
    p_off = p * (ROUNDINGS * eps + ROUNDINGS_32 * eps_32 * (size + of_row)) + step * allowed
    sink_off = p_sink * (ROUNDINGS * eps + ROUNDINGS_32 * eps_32 * (sinks[:, None].abs() + of_row))
    d_p = grad.abs() @ v.abs().mT
    delta, delta_off = ((x * d_p).sum(-1, keepdim=True) for x in (p, p_off))
    d_s = p_off * (d_p + delta) + p * delta_off + step * allowed

    def summed(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2).transpose(1, 2)

    found = [
        (p_off @ v.abs()).transpose(1, 2),
        (d_s @ k.abs() * scale).transpose(1, 2),
        summed(d_s.mT @ q.abs() * scale),
        summed(p_off.mT @ grad.abs()),
    ]
    if drawn.sinks is not None:
        found.append((sink_off * delta + p_sink * delta_off).sum((0, 2, 3)))
    return found


def check(case: Case, backend: str, device: str = "cpu") -> None:
    drawn = draw_tensors(case, device)
    with kernels.use_backend("reference"):
        truth = drawn.run(exact=True)
    given = drawn.poisoned(case.poison) if case.padding and case.poison is not None else drawn
    with kernels.use_backend(backend):
        results = given.run()
        alone = given.sample(case.batch - 1).run()
        unmoved = draw_tensors(replace(case, shift=0), device).run()
    for name, got, exact, floor in zip(RESULTS, results, truth, floors(drawn, case.dtype), strict=False):
        numbers = torch.finfo(got.dtype)
        rounding = numbers.eps * (1.0 if backend == "triton" and device == "cpu" else 0.5)  # the interpreter truncates
        allowed = rounding * (exact.abs() + floor) + floor + max(1e-30, numbers.smallest_normal * numbers.eps)
        excess = (got.double() - exact).abs() / allowed
        assert (excess <= 1).all(), f"{name} is off by {excess.nan_to_num(math.inf).max():.3g} times what is allowed"
        assert (got[floor == 0] == 0).all(), f"{name} is not exactly zero where nothing is seen"
    plain = not (case.slopes or case.sinks or case.padding)
    if backend != "triton" and (plain or _library.why_not("alibi_attention", "cpp", "cpu") or backend == "reference"):
        return  # what PyTorch's matrix products and its own attention give changes with the alignment of their inputs
    for name, got, one, other in zip(RESULTS[:4], results, alone, unmoved, strict=False):
        assert torch.equal(got[-1:], one), f"{name} of a sample depends on the rest of the batch"
        assert torch.equal(got, other), f"{name} depends on a shift of all positions, or on padded keys"


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
@settings(GRID, max_examples=10)
@given(case=cases(interpreted=True))
def test_values_and_gradients_of_the_triton_kernels(case: Case) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reason := _library.why_not("alibi_attention", "triton", device):
        pytest.skip(reason)
    check(case, "triton", device)
