"""Attention on the CPU: the compiled operator and the blocked PyTorch form against the reference in float64, what
either may never allocate, and what PyTorch's own attention is used for."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megactx import kernels
from megactx.kernels import alibi_attention, alibi_slopes
from megactx.kernels.attention import blocked, reference

BUILT = kernels.backends()["alibi_attention"]["cpp"] == "live"


class Arguments(NamedTuple):
    """What both operators take after q, k and v."""

    positions_q: Tensor
    positions_k: Tensor
    slopes: Tensor | None
    sinks: Tensor | None
    causal: bool
    mask: Tensor | None
    scale: float


class Case(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    rest: Arguments
    upstream: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        return self._replace(**{name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "upstream")})


def case(
    queries: int,
    keys: int | None = None,
    *,
    batch: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 10,
    slopes: bool = True,
    sinks: bool = True,
    causal: bool = True,
    mask: bool = True,
) -> Case:
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(queries * 1000 + keys)

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shown = torch.rand(batch, keys, generator=generator) > 0.3
    shown[-1, : keys - queries + 2] = False  # some queries have nothing to see
    positions = torch.cumsum(torch.randint(-1, 4, (batch, max(queries, keys)), generator=generator), 1)
    rest = Arguments(
        positions[:, -queries:],
        positions[:, -keys:],
        alibi_slopes(heads) if slopes else None,
        x(heads).float() if sinks else None,
        causal,
        shown if mask else None,
        0.3,
    )
    shape_k = (batch, keys, kv_heads, dim)
    q, upstream = x(batch, queries, heads, dim), x(batch, queries, heads, dim)
    return Case(q, x(*shape_k), x(*shape_k), rest, upstream)


CASES = {
    "one": case(1),
    "block borders": case(63, 64),
    "over the border": case(65, 129),
    "blocks": case(130),
    "without a bias": case(70, slopes=False, sinks=False),
    "everything is seen": case(66, mask=False, sinks=False),
    "not causal": case(67, 131, causal=False),
    "more queries than keys": case(80, 3, causal=False, mask=False),
    "one head of keys": case(5, 200, heads=6, kv_heads=1),
    "every head its keys": case(5, 70, kv_heads=4, dim=64),
    "decode": case(1, 300, heads=8, kv_heads=2, dim=33),
    "wide": case(9, 70, dim=144),
    "a single channel": case(40, dim=1),
}

Forward = Callable[..., tuple[Tensor, Tensor]]


class Implementation(NamedTuple):
    forward: Forward
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]

    def __call__(self, c: Case) -> list[Tensor]:
        """out, lse and the gradients of q, k, v and the sinks."""
        out, lse = self.forward(c.q, c.k, c.v, *c.rest)
        return [out, lse, *self.backward(c.upstream, c.q, c.k, c.v, out, lse, *c.rest)]


def of_blocks(size: int) -> Implementation:
    return Implementation(
        lambda *a: blocked.alibi_attention(*a, block=size),
        lambda *a: blocked.alibi_attention_backward(*a, block=size),
    )


REFERENCE = Implementation(reference.alibi_attention, reference.alibi_attention_backward)
OPERATOR = Implementation(torch.ops.megactx.alibi_attention, torch.ops.megactx.alibi_attention_backward)
IMPLEMENTATIONS = [
    pytest.param(of_blocks(32), id="blocks of 32"),
    pytest.param(of_blocks(7), id="blocks of 7"),
    pytest.param(Implementation(blocked.alibi_attention, blocked.alibi_attention_backward), id="blocked"),
    pytest.param(OPERATOR, id="cpp", marks=pytest.mark.skipif(not BUILT, reason="the C++ extension was not built")),
]
everywhere = pytest.mark.parametrize("run", IMPLEMENTATIONS)


def largest(x: Tensor) -> float:
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


@everywhere
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(run: Implementation, name: str) -> None:
    """Across block borders; what is nothing in the reference, 0 or -inf in lse, is exactly that here."""
    truth = REFERENCE(CASES[name])
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-6)):
        for result, expected in zip(run(CASES[name].to(dtype)), REFERENCE(CASES[name].to(dtype)), strict=True):
            assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
            assert result.is_contiguous()
        for part, result, expected in zip("olqkvs", run(CASES[name].to(dtype)), truth, strict=True):
            # A query that sees one key alone has a zero gradient too, but as a difference.
            exact = (truth[0] if part == "q" else expected) == 0
            exact |= expected.isinf()
            assert torch.equal(result[exact].double(), expected[exact]), part
            error = (result.double() - expected)[~exact]
            assert largest(error) <= tolerance * max(1.0, largest(expected)), part


@everywhere
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(run: Implementation, dtype: torch.dtype) -> None:
    """The arithmetic is that of float32: what is left is the rounding of the results, and of `out` in delta."""
    c = case(100, sinks=True).to(dtype)
    out, *_ = run(c)
    truth = REFERENCE(c.to(torch.float64))
    eps = torch.finfo(dtype).eps
    assert ((out.double() - truth[0]).abs() <= 0.51 * eps * truth[0].abs() + 1e-6).all()
    for result, expected in zip(run(c), truth, strict=True):
        exact = expected.isinf()
        assert largest((result.double() - expected)[~exact]) <= 2 * eps * max(1.0, largest(expected))


@everywhere
def test_a_sample_has_the_bits_it_has_alone(run: Implementation) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        c = case(70, 130, batch=3, dim=16).to(dtype)
        together = run(c)[:5]
        for b in range(3):
            part = slice(b, b + 1)
            rest = c.rest._replace(
                positions_q=c.rest.positions_q[part],
                positions_k=c.rest.positions_k[b],
                mask=c.rest.mask[part] if c.rest.mask is not None else None,
            )
            alone = run(Case(c.q[part], c.k[part], c.v[part], rest, c.upstream[part]))[:5]
            assert all(torch.equal(x[part], y) for x, y in zip(together, alone, strict=True))


@everywhere
def test_runs_repeat_bit_by_bit_whatever_the_threads(run: Implementation) -> None:
    c = case(200, batch=2, heads=8, kv_heads=4, dim=32).to(torch.float32)
    threads = torch.get_num_threads()
    first = run(c)
    if run is OPERATOR:
        torch.set_num_threads(2)
    try:
        assert all(torch.equal(x, y) for x, y in zip(first, run(c), strict=True))
    finally:
        torch.set_num_threads(threads)


@everywhere
@pytest.mark.parametrize("spread", [1, 10**6, 10**12])
def test_a_common_shift_changes_no_bit(run: Implementation, spread: int) -> None:
    """Differences are taken between integers, so float32 is exact far from zero; also where they are far apart."""
    c = case(70, 90).to(torch.float32)
    wide = {name: getattr(c.rest, name) * spread for name in ("positions_q", "positions_k")}
    base = c.rest._replace(slopes=alibi_slopes(4) / spread, **wide)
    plain = run(c._replace(rest=base))
    for shift in (10**9, -(10**15), 2**61):
        moved = base._replace(positions_q=base.positions_q + shift, positions_k=base.positions_k + shift)
        assert all(torch.equal(x, y) for x, y in zip(plain, run(c._replace(rest=moved)), strict=True))
    truth = REFERENCE(c._replace(rest=base).to(torch.float64))
    for result, expected in zip(plain, truth, strict=True):
        finite = expected.isfinite()
        assert largest((result - expected)[finite]) <= 5e-6 * max(1.0, largest(expected))


@everywhere
def test_int32_positions_and_strided_tensors(run: Implementation) -> None:
    c = case(70, 90).to(torch.float32)
    expected = run(c)
    narrow = c.rest._replace(positions_q=c.rest.positions_q.int(), positions_k=c.rest.positions_k.int())
    assert all(torch.equal(x, y) for x, y in zip(expected, run(c._replace(rest=narrow)), strict=True))
    double = {name: getattr(c, name).repeat_interleave(2, -1)[..., ::2] for name in ("q", "k", "v", "upstream")}
    heads_first = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in double.items()}
    rest = c.rest._replace(
        slopes=torch.stack((alibi_slopes(4),) * 2, 1)[:, 0],
        mask=c.rest.mask.t().contiguous().t() if c.rest.mask is not None else None,
        positions_k=c.rest.positions_k.t().contiguous().t(),
    )
    for tensors in (double, heads_first):
        assert all(torch.equal(x, y) for x, y in zip(expected, run(Case(**tensors, rest=rest)), strict=True))
    one = c._replace(q=c.q[:, :, :1].expand(-1, -1, 4, -1), upstream=c.upstream[:, :1].expand(-1, 70, -1, -1))
    copied = one._replace(q=one.q.contiguous(), upstream=one.upstream.contiguous())
    assert all(torch.equal(x, y) for x, y in zip(run(copied), run(one), strict=True))


EMPTY = [(0, 3, 3, 4, 2, 8), (2, 0, 3, 4, 2, 8), (2, 3, 0, 4, 2, 8), (2, 0, 0, 4, 2, 8), (2, 3, 3, 0, 2, 8)]


@everywhere
@pytest.mark.parametrize("sizes", [*EMPTY, (2, 3, 3, 4, 2, 0)])
def test_empty_tensors(run: Implementation, sizes: tuple[int, ...]) -> None:
    batch, queries, keys, heads, kv_heads, dim = sizes
    q, k = torch.randn(batch, queries, heads, dim), torch.randn(batch, keys, kv_heads, dim)
    rest = Arguments(torch.arange(queries), torch.arange(keys), torch.ones(heads), None, False, None, 0.3)
    for sinks in (None, torch.zeros(heads)):
        c = Case(q, k, k, rest._replace(sinks=sinks), torch.randn_like(q))
        for result, expected in zip(run(c), REFERENCE(c), strict=True):
            torch.testing.assert_close(result, expected)


@everywhere
@pytest.mark.parametrize("poison", [math.nan, math.inf, 3e38])
def test_what_is_hidden_stays_hidden(run: Implementation, poison: float) -> None:
    """Padding, later keys, and queries that see nothing, across blocks; a key that is seen shows."""
    c = case(100, 130, sinks=True).to(torch.float32)
    assert c.rest.mask is not None
    clean = run(c)
    hidden = (~c.rest.mask)[:, :, None, None]
    blind = torch.isneginf(run(c._replace(rest=c.rest._replace(sinks=None)))[1]).transpose(1, 2)[..., None]
    assert blind.any()
    assert not blind.all()
    bad = c._replace(
        q=c.q.masked_fill(blind, poison),
        k=c.k.masked_fill(hidden, poison),
        v=c.v.masked_fill(hidden, poison),
        upstream=c.upstream.masked_fill(blind, poison),
    )
    assert all(torch.equal(x, y) for x, y in zip(clean, run(bad), strict=True))

    open_case = c._replace(rest=c.rest._replace(mask=None))
    late = open_case._replace(k=c.k.clone(), v=c.v.clone(), upstream=c.upstream.clone())
    late.k[:, 97:], late.v[:, 97:] = poison, poison  # the queries from 97 - 30 on see it
    late.upstream[:, 67:] = 0
    out, lse, grad_q, *_ = run(late)
    expected = run(open_case._replace(upstream=late.upstream))
    assert torch.equal(out[:, :67], expected[0][:, :67])
    assert torch.equal(lse[:, :, :67], expected[1][:, :, :67])
    assert torch.equal(grad_q[:, :67], expected[2][:, :67])
    assert math.isfinite(poison) or (out[:, 67:].isnan().all() and lse[:, :, 67:].isnan().all())


@everywhere
def test_a_key_out_of_reach_of_the_bias_weighs_nothing_and_its_nan_shows(run: Implementation) -> None:
    """Far blocks may be skipped only where every weight is exactly zero and every key is finite."""
    steep = case(260, mask=False, sinks=False).to(torch.float32)
    steep = steep._replace(rest=steep.rest._replace(slopes=torch.tensor([8.0, 2.0, 0.5, 0.0])))
    truth = REFERENCE(steep.to(torch.float64))
    results = run(steep)
    for result, expected in zip(results, truth, strict=True):
        assert largest(result - expected) <= 2e-6 * max(1.0, largest(expected))
    assert (results[0] != 0).all()
    broken = steep._replace(v=steep.v.clone())
    broken.v[:, 0, 0, 0] = math.nan
    out = run(broken)[0]
    assert out[:, :, :2].isnan().all()
    assert not out[:, :, 2:].isnan().any()
    rising = steep._replace(rest=steep.rest._replace(slopes=torch.tensor([-0.1, 0.0, 0.1, -0.01])))
    for result, expected in zip(run(rising), REFERENCE(rising.to(torch.float64)), strict=True):
        assert largest(result - expected) <= 1e-5 * max(1.0, largest(expected))


def agrees_with_the_reference(run: Implementation, c: Case) -> list[Tensor]:
    """The results, each NaN and infinite exactly where the reference is."""
    results = run(c)
    for part, result, expected in zip("olqkvs", results, REFERENCE(c), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=lambda m, p=part: p + m)
    return results


@everywhere
@pytest.mark.parametrize("sinks", [None, "finite", "-inf"])
@pytest.mark.parametrize("slopes", [True, False])
def test_a_query_whose_every_logit_overflows_is_zero(run: Implementation, sinks: str | None, slopes: bool) -> None:
    c = case(70, 90, sinks=sinks is not None, slopes=slopes).to(torch.float32)
    if sinks == "-inf":
        c = c._replace(rest=c.rest._replace(sinks=torch.full((4,), -math.inf)))
    large = torch.where(torch.arange(70)[:, None, None] % 3 == 0, 1e20, 1e-20)
    c = c._replace(q=c.q.abs() * large, k=-c.k.abs() * 1e20)
    out, lse, grad_q, *_ = run(c)
    assert (out[:, ::3] == 0).all()
    assert (grad_q[:, ::3] == 0).all()
    assert sinks == "finite" or (lse[:, :, ::3] == -math.inf).all()
    assert out[0, 1::3].any()
    truth = REFERENCE(c)
    for result, expected in zip(run(c), truth, strict=True):
        assert torch.equal(result.isnan(), expected.isnan())
        assert not result.isnan().any()
        assert largest(result[result.isfinite()] - expected[result.isfinite()]) <= 1e-4 * max(1.0, largest(expected))


@everywhere
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_sink_that_is_not_finite(run: Implementation, value: float) -> None:
    """+inf and NaN spoil the rows of their head that see a key, and no other; -inf is no sink at all."""
    c = case(70, 90).to(torch.float32)
    assert c.rest.sinks is not None
    sinks = c.rest.sinks.clone()
    sinks[1] = value
    out, *_ = agrees_with_the_reference(run, c._replace(rest=c.rest._replace(sinks=sinks)))
    assert not out[:, :, [0, 2, 3]].isnan().any()
    assert out[0, :, 1].isnan().any() == (value != -math.inf)


@everywhere
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, -1e38])
def test_no_slope_brings_padding_back(run: Implementation, value: float) -> None:
    """Nor at a distance of 0, where the bias is NaN; a key that is seen there shows."""
    c = case(70, 90, batch=1).to(torch.float32)
    slopes = alibi_slopes(4)
    slopes[2] = value
    rest = c.rest._replace(slopes=slopes, positions_q=torch.arange(20, 90), positions_k=torch.arange(90))
    seen = torch.arange(90)[None] % 7 == 0
    results = agrees_with_the_reference(run, c._replace(rest=rest._replace(mask=seen)))
    hidden = (~seen)[:, :, None, None]
    assert all((grad.masked_select(hidden) == 0).all() for grad in results[3:5])
    if value == math.inf:
        assert torch.equal(results[0][0, :, 2, 0].isnan(), seen[0, 20:])


@everywhere
def test_a_scale_of_zero_lets_a_nan_through(run: Implementation) -> None:
    c = case(70, 90, mask=False, sinks=False).to(torch.float32)
    c.q[0, 10, 1, 2] = math.nan
    out, *_ = run(c._replace(rest=c.rest._replace(scale=0.0)))
    assert torch.equal(out.isnan().any(-1).nonzero(), torch.tensor([[0, 10, 1]]))


@everywhere
def test_differences_of_positions_wrap_as_integers_do(run: Implementation) -> None:
    """Beyond (-2^62, 2^62): what a difference is then is of no use, but it is the same everywhere."""
    c = case(70, 90, mask=False, sinks=False).to(torch.float32)
    ends = torch.tensor([2**63 - 1, -(2**63), 0, -(2**62), 5])
    rest = c.rest._replace(positions_q=ends[torch.arange(70) % 5], positions_k=ends[torch.arange(90) % 3])
    out, lse, *_ = REFERENCE(c._replace(rest=rest))
    torch.testing.assert_close(run(c._replace(rest=rest))[:2], [out, lse])


@everywhere
@pytest.mark.parametrize("keys", [1, 8, 15, 16, 17, 33, 48, 49, 64, 65])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_many_short_samples(run: Implementation, keys: int, kv_heads: int) -> None:
    """Fewer keys than are packed together, whole vectors of them or not."""
    c = case(keys, keys, batch=3, kv_heads=kv_heads, dim=17)
    truth = REFERENCE(c)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
        for result, expected in zip(run(c.to(dtype)), truth, strict=True):
            finite = expected.isfinite()
            assert torch.equal(result[~finite].double(), expected[~finite])
            assert largest((result - expected)[finite]) <= tolerance * max(1.0, largest(expected))


@pytest.mark.skipif(not BUILT, reason="the C++ extension was not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_is_well_formed(dtype: torch.dtype) -> None:
    c = case(3, 5).to(dtype)
    q, k, v = (x.clone().requires_grad_() for x in c[:3])
    torch.library.opcheck(torch.ops.megactx.alibi_attention.default, (q, k, v, *c.rest))
    out, lse = OPERATOR.forward(*c[:3], *c.rest)
    torch.library.opcheck(torch.ops.megactx.alibi_attention_backward.default, (c.upstream, *c[:3], out, lse, *c.rest))


@pytest.mark.skipif(not BUILT, reason="the C++ extension was not built")
@pytest.mark.parametrize(
    "change",
    [
        {"k": torch.zeros(2, 5, 3, 10)},
        {"v": torch.zeros(2, 4, 2, 10)},
        {"k": torch.zeros(2, 5, 2, 10, dtype=torch.float64)},
        {"positions_q": torch.zeros(4, dtype=torch.int64)},
        {"positions_k": torch.zeros(5)},
        {"slopes": torch.zeros(3)},
        {"sinks": torch.zeros(4, dtype=torch.int64)},
        {"mask": torch.zeros(2, 4, dtype=torch.bool)},
        {"q": torch.zeros(2, 6, 4, 10), "positions_q": torch.zeros(6, dtype=torch.int64)},
        {"q": torch.zeros(2, 3, 4, 10, dtype=torch.int32)},
    ],
)
def test_wrong_shapes_are_refused_and_not_read(change: dict[str, Tensor]) -> None:
    """By the compiled operator too, which a caller can reach without the checks of the public function."""
    c = case(3, 5).to(torch.float32)
    arguments = {"q": c.q, "k": c.k, "v": c.v} | c.rest._asdict() | change
    with pytest.raises(RuntimeError, match="alibi_attention"):
        torch.ops.megactx.alibi_attention(*arguments.values())


@pytest.mark.skipif(not BUILT, reason="the C++ extension was not built")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_backward_pass_reads_only_what_the_forward_pass_returned(dtype: torch.dtype) -> None:
    c = case(3, 5).to(dtype)
    out, lse = OPERATOR.forward(*c[:3], *c.rest)
    other = torch.float32 if dtype == torch.float64 else torch.float64
    wrong: dict[str, list[Tensor]] = {
        "lse": [lse.to(x) for x in (other, torch.float16, torch.bfloat16, torch.int8, torch.bool)],
        "out": [out[:1], out[..., :-1], out[0], out.to(torch.float16)],
        "grad_out": [c.upstream[:, :2], c.upstream.transpose(1, 2), c.upstream.to(torch.float16)],
    }
    wrong["lse"] += [lse.transpose(1, 2), lse.reshape(1, 1, -1), lse.reshape(1, -1), lse[:1], lse[:, :, :-1]]
    for name, tensors in wrong.items():
        for x in tensors:
            given = {"grad_out": c.upstream, "q": c.q, "k": c.k, "v": c.v, "out": out, "lse": lse, name: x}
            with pytest.raises(RuntimeError, match=f"alibi_attention: {name} "):
                OPERATOR.backward(*given.values(), *c.rest)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.numel() == x.untyped_storage().nbytes() // x.element_size():
                self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("function", ["blocked", "sdpa"])
def test_no_tensor_is_as_large_as_all_scores(function: str) -> None:
    length, heads = 2048, 4
    q, k, v = (torch.randn(1, length, heads, 16).requires_grad_() for _ in range(3))
    positions = torch.arange(length)
    rest = Arguments(positions, positions, alibi_slopes(heads), torch.zeros(heads), True, None, 0.25)
    with Largest() as seen:
        if function == "blocked":
            with torch.no_grad():
                out, lse = blocked.alibi_attention(q, k, v, *rest)
                blocked.alibi_attention_backward(out, q, k, v, out, lse, *rest)
        else:
            alibi_attention(q, k, v, positions).sum().backward()
    assert q.numel() <= seen.numel <= length * heads * 128  # a block of at most 128 queries
    assert seen.numel < length * length


MEMORY = """
import resource, torch
from megactx.kernels import alibi_attention, alibi_slopes
torch.set_num_threads(1)
length, heads = 4096, 4
q, k, v = (torch.randn(1, length, heads, 32).requires_grad_() for _ in range(3))
positions = torch.arange(length)
alibi_attention(q[:, :64], k[:, :64], v[:, :64], positions[:64], slopes=alibi_slopes(heads)).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
alibi_attention(q, k, v, positions, slopes=alibi_slopes(heads)).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    """All scores of 4,096 positions and 4 heads are 256 MiB; forward and backward take a small part of that."""
    run = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 64 * 1024  # KiB


@contextmanager
def counted() -> Iterator[mock.Mock]:
    """PyTorch's attention, counting its calls."""
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as attention:
        yield attention


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize(("queries", "keys", "causal"), [(6, 6, True), (6, 6, False), (6, 9, False), (1, 9, True)])
def test_without_bias_torch_attends(queries: int, keys: int, causal: bool, kv_heads: int) -> None:
    c = case(queries, keys, kv_heads=kv_heads)
    tensors = [x.requires_grad_() for x in c[:3]]
    arguments = (*tensors, c.rest.positions_q, c.rest.positions_k)
    results = []
    for backend, calls in (("auto", 1), ("reference", 0)):
        with counted() as attention, kernels.use_backend(backend):
            out = alibi_attention(*arguments, causal=causal, scale=0.3)
        assert attention.call_count == calls
        assert out.is_contiguous()
        results.append([out, *torch.autograd.grad(out, tensors, c.upstream)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    "change",
    [
        {"slopes": alibi_slopes(4)},
        {"sinks": torch.zeros(4)},
        {"key_padding_mask": torch.ones(2, 6, dtype=torch.bool)},
        {"queries": 5},
        {"backend": "reference"},
        pytest.param({"backend": "cpp"}, marks=pytest.mark.skipif(not BUILT, reason="the C++ extension was not built")),
    ],
    ids=lambda change: next(iter(change)),
)
def test_anything_else_is_ours(change: dict[str, Any]) -> None:
    c = case(change.pop("queries", 6), 6)
    with counted() as attention, kernels.use_backend(change.pop("backend", "auto")):
        alibi_attention(c.q, c.k, c.v, c.rest.positions_q, c.rest.positions_k, **change)
    assert attention.call_count == 0


@pytest.mark.parametrize("slopes", [None, alibi_slopes(4)], ids=["torch", "ours"])
def test_compiled_is_eager_in_one_graph_and_autocast_changes_nothing(slopes: Tensor | None) -> None:
    c = case(6).to(torch.float32)
    positions = c.rest.positions_k

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return alibi_attention(q, k, v, positions, slopes=slopes)

    results = []
    for function in (attend, torch.compile(attend, backend="aot_eager", fullgraph=True)):
        tensors = [x.clone().requires_grad_() for x in c[:3]]
        out = function(*tensors)
        results.append([out, *torch.autograd.grad(out, tensors, c.upstream)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attend(*c[:3]), results[0][0])


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("slopes", [None, alibi_slopes(4)], ids=["torch", "ours"])
@pytest.mark.parametrize(
    ("kv_heads", "lengths"),
    [
        (4, [(9, 9), (17, 17), (33, 33), (1, 1)]),
        (2, [(9, 9), (17, 17), (33, 33)]),
        (2, [(1, 9), (1, 17), (1, 33)]),
        (4, [(9, 9), (3, 12), (4, 16), (1, 20), (40, 40)]),
    ],
    ids=["same length", "grouped", "decode", "mixed"],
)
def test_lengths_may_be_dynamic(
    dynamic: bool | None, slopes: Tensor | None, kv_heads: int, lengths: list[tuple[int, int]]
) -> None:
    """One graph each, also once a compiler takes lengths for symbols."""
    torch.compiler.reset()

    def attend(q: Tensor, k: Tensor, v: Tensor, positions_q: Tensor, positions_k: Tensor) -> Tensor:
        return alibi_attention(q, k, v, positions_q, positions_k, slopes)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for queries, keys in lengths:
        c = case(queries, keys, kv_heads=kv_heads).to(torch.float32)
        arguments = (*c[:3], torch.arange(keys - queries, keys), torch.arange(keys))
        torch.testing.assert_close(compiled(*arguments), attend(*arguments))
