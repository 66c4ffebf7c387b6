"""The Triton attention kernels against the float64 reference: on a GPU where there is one, else in the interpreter.

Lengths are tiny, so the tiles are too: `small_tiles` makes several of them meet in each direction.  The shipped sizes
run once each.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megactx import kernels
from megactx.kernels import _tune, alibi_attention, alibi_slopes
from megactx.kernels.attention import config
from megactx.kernels.attention.reference import alibi_attention as reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs triton", allow_module_level=True)
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

pytestmark = [
    pytest.mark.interp,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy's, of infinities that are meant
]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPERATORS = torch.ops.megactx if DEVICE.type == "cuda" else torch.ops.megactx_interpreted
NAMES = ("q", "k", "v")
CHUNK = 16  # of the decode path, in these tests


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 16 rows and 16 or 32 columns, in steps of 16 at the causal edge, and chunks of 16 keys."""
    for name in ("forward", "grad_kv", "grad_q"):
        shipped = getattr(config, name)
        by_key = name == "grad_kv"
        small = {"block_m": 32 if by_key else 16, "block_n": 16 if by_key else 32, "block_edge": 16}
        monkeypatch.setattr(config, name, lambda *which, f=shipped, s=small: replace(f(*which), **s))
    prepare, decode = config.prepare, config.decode
    monkeypatch.setattr(config, "prepare", lambda *which: replace(prepare(*which), block=16))
    monkeypatch.setattr(config, "decode", lambda *which: replace(decode(*which), chunk=CHUNK, block_n=16))


def inputs(
    batch: int = 2,
    queries: int = 20,
    keys: int = 52,
    heads: int = 2,
    kv_heads: int = 1,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    padding: bool = False,
    sinks: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, keys, generator=g) > 0.3
    mask[:1, : keys - queries + min(3, queries)] = False  # when causal, some first queries have nothing to see
    a = {
        "q": torch.randn(batch, queries, heads, dim, generator=g).to(dtype),
        "k": torch.randn(batch, keys, kv_heads, dim, generator=g).to(dtype),
        "v": torch.randn(batch, keys, kv_heads, dim, generator=g).to(dtype),
        "positions_q": torch.arange(keys)[max(keys - queries, 0) :][:queries],
        "positions_k": torch.arange(keys),
        "slopes": alibi_slopes(heads),
        "sinks": torch.randn(heads, generator=g) if sinks else None,
        "key_padding_mask": mask if padding else None,
    }
    return {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in a.items()}


def run(a: dict[str, Any], backend: str = "triton", upstream: Tensor | None = None) -> list[Tensor]:
    """(out, gradients of q, k, v and the sinks); under the reference all of it in float64."""
    exact = backend == "reference"
    leaves = {
        n: (a[n].double() if exact else a[n]).detach().requires_grad_() for n in (*NAMES, "sinks") if a[n] is not None
    }
    with kernels.use_backend(backend):
        out = alibi_attention(**(a | leaves))
    if upstream is None:
        g = torch.Generator().manual_seed(1)
        upstream = torch.randn(out.shape, generator=g).to(DEVICE, a["q"].dtype)
    return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype))]


def check(a: dict[str, Any], slack: float = 1.0) -> None:
    """As good as rounding to the dtype allows, relative to the largest value of each result."""
    dtype = a["q"].dtype
    # Of bfloat16 and float16 the interpreter's stores truncate, one unit more.
    bound = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype] * slack
    for name, ours, exact in zip(("out", *NAMES, "sinks"), run(a), run(a, "reference"), strict=False):
        assert ours.shape == exact.shape
        assert ours.is_contiguous()
        error = (ours.double() - exact).abs().max() if exact.numel() else torch.zeros(())
        assert error <= bound * max(1.0, exact.abs().max().item() if exact.numel() else 0.0), (name, error)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "dim", "padding", "sinks"),
    [
        (1, 1, 2, 2, 16, False, True),
        (5, 5, 4, 1, 20, True, True),
        (33, 70, 2, 1, 64, True, True),
        (33, 70, 1, 1, 17, False, False),
        (18, 18, 2, 1, 96, True, False),
        (130, 130, 1, 1, 16, False, True),
    ],
)
@pytest.mark.usefixtures("small_tiles")
def test_it_is_the_reference(
    causal: bool, queries: int, keys: int, heads: int, kv_heads: int, dim: int, padding: bool, sinks: bool
) -> None:
    a = inputs(1 if queries > 100 else 2, queries, keys, heads, kv_heads, dim, padding=padding, sinks=sinks)
    check(a | {"causal": causal})
    if queries < 20:
        check(a | {"causal": causal, "slopes": None, "scale": -0.3, "sinks": None})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("small_tiles")
def test_half_precision(dtype: torch.dtype) -> None:
    check(inputs(1, 20, 36, dtype=dtype, dim=32, padding=True, sinks=True))
    check(inputs(1, 5, 36, dtype=dtype, padding=True, sinks=True))


@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 64), (torch.float32, 128)])
def test_shipped_configurations(dtype: torch.dtype, dim: int) -> None:
    check(inputs(1, 40, 150, 1, dim=dim, dtype=dtype, padding=True, sinks=True))
    keys = config.decode(dtype, dim, _tune.arch_of(DEVICE), False).chunk + 3
    check(inputs(1, 3, keys, 1, dim=dim, dtype=dtype))


@pytest.mark.usefixtures("small_tiles")
def test_more_queries_than_keys_and_no_keys() -> None:
    check(inputs(2, 40, 7) | {"causal": False, "positions_q": torch.arange(40, device=DEVICE)})
    a = inputs(2, 9, 0, sinks=True) | {"causal": False, "positions_q": torch.arange(9, device=DEVICE)}
    out, *grads = run(a)
    assert (out == 0).all()
    assert all((g == 0).all() for g in grads)


@pytest.mark.usefixtures("small_tiles")
def test_empty_inputs() -> None:
    for a in (inputs(0), inputs(2, 0, 0) | {"positions_q": torch.arange(0, device=DEVICE)}, inputs(2, 0, 5)):
        a["positions_q"] = a["positions_q"][: a["q"].shape[1]]
        results = run(a)
        assert results[0].shape == a["q"].shape
        assert [g.shape for g in results[1:]] == [a[n].shape for n in NAMES]
        assert all((g == 0).all() for g in results[1:])


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("queries", [20, 3])
@pytest.mark.usefixtures("small_tiles")
def test_lse_is_that_of_the_reference(queries: int, sinks: bool) -> None:
    """With the sinks; for a query that sees nothing that is the sink, and -inf without."""
    a = inputs(queries=queries, padding=True, sinks=sinks)
    args = [a[n] for n in (*NAMES, "positions_q", "positions_k", "slopes", "sinks")]
    tail = (True, a["key_padding_mask"], 0.25)
    lse = OPERATORS.alibi_attention(*args, *tail)[1]
    exact = reference(*(x.double() if i < 3 else x for i, x in enumerate(args)), *tail)[1]
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, exact.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("queries", [20, 3])
@pytest.mark.usefixtures("small_tiles")
def test_positions_of_any_size(queries: int) -> None:
    """Differences are those of integers: shifted far away, spread out within one tile, of any sign and order."""
    g = torch.Generator().manual_seed(0)
    keys = 40
    near, steps = torch.arange(keys), 32 ** torch.randint(0, 9, (keys,), generator=g)
    cases = {
        "shifted": near + 10**15,
        "gists": 7 - near * 32**5,
        "two places": torch.cat((near[:25], near[25:] + 2**61)),
        "mixed": torch.cumsum(steps, 0) - 10**13,
        "per sample": torch.stack((torch.randperm(keys, generator=g) * 2**23, near * 10**12 + 1)),
    }
    for name, positions in cases.items():
        positions = positions.to(DEVICE)
        a = inputs(positions.ndim, queries, keys)
        a |= {"positions_q": positions[..., -queries:], "positions_k": positions}
        # One head feels its neighbours, the other the whole: both have the differences right.
        a |= {"slopes": torch.tensor([0.3, 0.3 * keys / (positions.max() - positions.min())], device=DEVICE)}
        check(a)
        if name == "shifted":
            back = {n: a[n] - 10**15 for n in ("positions_q", "positions_k")}
            assert all(torch.equal(x, y) for x, y in zip(run(a), run(a | back), strict=True))


@pytest.mark.usefixtures("small_tiles")
def test_strides_and_integer_types() -> None:
    a = inputs(2, 20, 36, padding=True, sinks=True)
    expected = run(a)
    other = dict(a)
    other["q"] = a["q"].transpose(1, 2).contiguous().transpose(1, 2)
    other["k"] = torch.cat((a["k"], a["v"]), -1)[..., :16]
    other["v"] = a["v"].permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    other["positions_q"] = a["positions_q"].int().repeat_interleave(3)[::3]
    other["positions_k"] = a["positions_k"][None].expand(2, -1).int()
    other["key_padding_mask"] = torch.stack((a["key_padding_mask"],) * 2, -1)[..., 1]
    other["slopes"] = a["slopes"].repeat_interleave(2)[::2]
    other["sinks"] = a["sinks"].repeat_interleave(3)[::3]
    upstream = torch.ones(1, device=DEVICE).expand(a["q"].shape)
    assert all(torch.equal(x, y) for x, y in zip(run(other), expected, strict=True))
    dense = run(a, upstream=upstream.contiguous())
    assert all(torch.equal(x, y) for x, y in zip(run(a, upstream=upstream), dense, strict=True))
    one = a["sinks"][:1]
    assert torch.equal(run(a | {"sinks": one.expand(2)})[0], run(a | {"sinks": one.repeat(2)})[0])
    repeated = {n: a[n].expand(-1, -1, 2, -1) for n in ("k", "v")}
    assert torch.equal(run(a | repeated)[0], expected[0])


@pytest.mark.parametrize("sink", [math.nan, math.inf])
@pytest.mark.parametrize("queries", [20, 3])
@pytest.mark.usefixtures("small_tiles")
def test_a_query_that_sees_nothing_is_zero_whatever_its_sink_is(queries: int, sink: float) -> None:
    a = inputs(1, queries, 36, padding=True) | {"sinks": torch.tensor([sink, 0.5], device=DEVICE)}
    out = run(a)[0]
    assert (out[0, :2] == 0).all()
    assert torch.equal(torch.isnan(out), torch.isnan(run(a, "reference")[0]))


@pytest.mark.parametrize("sinks", [None, 0.5, -math.inf])
@pytest.mark.parametrize("queries", [20, 3])
@pytest.mark.usefixtures("small_tiles")
def test_a_query_that_sees_nothing_is_zero_and_poisons_nobody(queries: int, sinks: float | None) -> None:
    """By what stands in it or by the gradient that arrives for it."""
    a = inputs(1, queries, 36, padding=True)
    if sinks is not None:
        a["sinks"] = torch.full((2,), sinks, device=DEVICE)
    results = []
    for value in (0.0, math.nan):
        q, upstream = a["q"].clone(), torch.ones_like(a["q"])
        q[0, :2] = upstream[0, :2] = value
        results.append(run(a | {"q": q}, upstream=upstream))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert all(torch.isfinite(x).all() for x in results[1])
    assert all((x[0, :2] == 0).all() for x in results[1][:2])


@pytest.mark.parametrize(
    ("poison", "names"), [(math.nan, "k"), (math.nan, "v"), (math.inf, "v"), (3e38, "k"), (3e38, "v"), (math.inf, "kv")]
)
@pytest.mark.parametrize("queries", [20, 3])
@pytest.mark.usefixtures("small_tiles")
def test_masked_keys_never_leak(queries: int, poison: float, names: str) -> None:
    """Not by padding and not by causality, not forward and not backward, nor where a finite product overflows."""
    a = inputs(1, queries, 36, 1, padding=True)
    hidden = ~a["key_padding_mask"]
    bad = a | {n: a[n].masked_fill(hidden[:, :, None, None], poison) for n in names}
    results = [run(a), run(bad)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert all((g[hidden] == 0).all() for g in results[1][2:])

    # The last key is seen by the last query alone.
    future = inputs(1, queries, 36, 1)
    upstream = torch.ones_like(future["q"])
    upstream[:, -1] = 0
    clean = run(future, upstream=upstream)
    for name in names:
        future[name] = future[name].clone()
        future[name][:, -1] = poison
    out, grad, *_ = run(future, upstream=upstream)
    assert torch.equal(out[:, :-1], clean[0][:, :-1])
    assert torch.equal(grad[:, :-1], clean[1][:, :-1])
    assert torch.isnan(out[:, -1]).all() or math.isfinite(poison)


@pytest.mark.parametrize(("name", "key"), [("k", 3), ("v", 3), ("v", 20), ("k", 35), ("v", 35)])
@pytest.mark.parametrize("queries", [20, 3])
@pytest.mark.usefixtures("small_tiles")
def test_a_visible_nan_shows(queries: int, name: str, key: int) -> None:
    """In whole tiles and at the causal edge: the rows that see such a key are NaN all through, the others are not."""
    a = inputs(1, queries, 36, 1)
    a[name] = a[name].clone()
    a[name][0, key, 0, 5] = math.nan
    sees = (torch.arange(queries) + 36 - queries >= key).to(DEVICE)
    for result in run(a)[:2]:
        assert torch.equal(torch.isnan(result)[0, :, 0], sees[:, None].expand(-1, 16))


@pytest.mark.usefixtures("small_tiles")
def test_a_query_that_is_nan_shows_in_the_values_it_sees_alone() -> None:
    a = inputs(1, 36, 36, 1)
    clean = run(a)[3]
    a["q"] = a["q"].clone()
    a["q"][0, 20, :, 3] = math.nan
    grad_v = run(a)[3]
    assert torch.isnan(grad_v[:, :21]).all()
    assert torch.equal(grad_v[:, 21:], clean[:, 21:])


@pytest.mark.parametrize("shift", [10**9 + 7, 3_141_592_653, 10**15 + 1])
@pytest.mark.usefixtures("small_tiles")
def test_weights_stay_below_one_where_all_keys_are_far_away(shift: int) -> None:
    """There the logits are so large that the float32 logsumexp of a row is off by more than 1."""
    a = inputs(1, 36, 36, 2, 2) | {"causal": False, "slopes": torch.tensor([1.0, 0.37], device=DEVICE)}
    a["positions_q"] = a["positions_q"] + shift
    upstream = torch.randn_like(a["q"])
    grad_v = run(a, upstream=upstream)[3]
    assert (grad_v.abs() <= 1.0001 * upstream.abs().sum(1, keepdim=True)).all()


@pytest.mark.usefixtures("small_tiles")
def test_what_is_read_as_it_lies_gives_the_bits_of_a_copy() -> None:
    """Heads cut out of a joint projection, keys out of a longer cache, and strides that no wide load takes."""
    a = inputs(2, 20, 36)
    expected = run(a)
    g = torch.Generator().manual_seed(0)
    for spare in (16, 5):
        other = dict(a)
        for name in NAMES:
            batch, length, heads, dim = a[name].shape
            room = torch.randn(batch, length + 3, heads, dim + spare, generator=g).to(DEVICE)
            other[name] = room[:, :length, :, :dim].copy_(a[name])
            assert not other[name].is_contiguous()
        assert all(torch.equal(x, y) for x, y in zip(run(other), expected, strict=True))


@pytest.mark.parametrize(("queries", "heads", "kv_heads"), [(1, 2, 1), (2, 2, 2), (5, 4, 1), (16, 2, 1)])
@pytest.mark.usefixtures("small_tiles")
def test_the_decode_path_is_the_other_path(
    queries: int, heads: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = inputs(2, queries, 3 * CHUNK + 5, heads, kv_heads, 20, padding=True, sinks=True)
    assert config.splits(queries, 3 * CHUNK + 5, CHUNK) == 4
    with kernels.use_backend("triton"):
        decoded = alibi_attention(**a)
        monkeypatch.setattr(config, "splits", lambda *_: 1)
        torch.testing.assert_close(decoded, alibi_attention(**a), rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("small_tiles")
def test_keys_to_come_change_no_bit_of_the_decode_path() -> None:
    """A cache with room for more keys, masked away, gives what its filled part gives."""
    a = inputs(2, 1, 3 * CHUNK)
    longer = dict(a)
    for name in ("k", "v"):
        longer[name] = torch.cat((a[name], torch.full_like(a[name][:, : CHUNK + 3], math.nan)), 1)
    longer["positions_k"] = torch.arange(longer["k"].shape[1], device=DEVICE)
    longer["key_padding_mask"] = (longer["positions_k"] < 3 * CHUNK)[None].expand(2, -1)
    with kernels.use_backend("triton"):
        assert torch.equal(alibi_attention(**longer), alibi_attention(**a))


@pytest.mark.parametrize("queries", [20, 4])
@pytest.mark.usefixtures("small_tiles")
def test_a_sample_is_computed_as_it_is_alone_and_as_before(queries: int) -> None:
    a = inputs(2, queries, 36, padding=True, sinks=True)
    upstream = torch.randn_like(a["q"])
    together, again = run(a, upstream=upstream), run(a, upstream=upstream)
    assert all(torch.equal(x, y) for x, y in zip(together, again, strict=True))
    alone = {n: x[1:] if n in (*NAMES, "key_padding_mask") else x for n, x in a.items()}
    for x, y in zip(run(alone, upstream=upstream[1:])[:4], together, strict=False):
        assert torch.equal(x[0], y[1])


@pytest.mark.parametrize(("padding", "sinks"), [(False, True), (True, False)])
@pytest.mark.usefixtures("small_tiles")
def test_the_operators_keep_their_contract(padding: bool, sinks: bool) -> None:
    a = inputs(1, 5, 9, 1, padding=padding, sinks=sinks)
    leaves = [a[n].requires_grad_() for n in NAMES]
    args = (*leaves, a["positions_q"], a["positions_k"], a["slopes"], a["sinks"], True, a["key_padding_mask"], 0.25)
    torch.library.opcheck(OPERATORS.alibi_attention.default, args)


def test_what_does_not_fit_says_why() -> None:
    with kernels.use_backend("triton"):
        a = inputs(1, 5, 5)
        doubles = a | {n: a[n].double() for n in NAMES}
        with pytest.raises(ValueError, match=r"q must be float16, bfloat16 or float32, got torch\.float64"):
            alibi_attention(**doubles)
        with pytest.raises(ValueError, match="q must have a head dimension from 1 to 128, got 130"):
            alibi_attention(**inputs(1, 5, 5, dim=130))


def test_error_is_at_most_that_of_torch() -> None:
    """In float32, to a floor of 2 eps: the products are not rounded to tf32."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 64, 2, 32, generator=g).to(DEVICE).requires_grad_() for _ in range(3))
    positions = torch.arange(64, device=DEVICE)
    slopes = torch.zeros(2, device=DEVICE)

    def torch_attention(*x: Tensor) -> Tensor:
        heads = (t.transpose(1, 2) for t in x)
        return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)

    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = torch_attention(*doubles)
    truth = [exact, *torch.autograd.grad(exact.sum(), doubles)]
    with kernels.use_backend("triton"):
        ours = alibi_attention(q, k, v, positions, slopes=slopes)
    errors = []
    for out in (ours, torch_attention(q, k, v)):
        results = [out, *torch.autograd.grad(out.sum(), (q, k, v))]
        pairs = zip(results, truth, strict=True)
        errors.append([((r.double() - t).abs().max() / t.abs().max()).item() for r, t in pairs])
    floor = 2 * torch.finfo(torch.float32).eps
    assert all(a <= b + floor for a, b in zip(*errors, strict=True)), errors


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
def test_no_memory_grows_with_the_product_of_lengths() -> None:
    a = inputs(1, 8192, 8192, dim=64, dtype=torch.bfloat16)
    run(a)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(a)
    assert torch.cuda.max_memory_allocated() - before < 16 * a["q"].numel() * 2
