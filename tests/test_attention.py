"""ALiBi attention: the formula row by row, masks and sinks, containment of NaN, and the gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megactx import kernels
from megactx.kernels import alibi_attention, alibi_slopes

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, DIM = 2, 5, 7, 4, 2, 6


def naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions_q: Tensor,
    positions_k: Tensor,
    slopes: Tensor | None = None,
    *,
    sinks: Tensor | None = None,
    causal: bool = True,
    key_padding_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One softmax per row in Python floats."""
    out = torch.zeros_like(q, dtype=torch.float64)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    positions_q, positions_k = positions_q.expand(q.shape[0], -1), positions_k.expand(q.shape[0], -1)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            for h in range(q.shape[2]):
                g = h // (q.shape[2] // k.shape[2])
                weights: dict[int, float] = {}
                for j in range(k.shape[1]):
                    if causal and j > i + k.shape[1] - q.shape[1]:
                        continue
                    if key_padding_mask is not None and not key_padding_mask[b, j]:
                        continue
                    score = scale * float(q[b, i, h].double() @ k[b, j, g].double())
                    if slopes is not None:
                        score -= float(slopes[h]) * abs(int(positions_q[b, i]) - int(positions_k[b, j]))
                    weights[j] = math.exp(score)
                total = sum(weights.values()) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
                for j, weight in weights.items():
                    out[b, i, h] += weight / total * v[b, j, g].double()
    return out


def inputs(dtype: torch.dtype = torch.float64, queries: int = QUERIES) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = torch.rand(BATCH, KEYS, generator=generator) > 0.3
    mask[0, : KEYS - QUERIES + 1] = False  # the first query of the first sample has nothing to see when causal
    return {
        "q": x(BATCH, queries, HEADS, DIM).to(dtype),
        "k": x(BATCH, KEYS, KV_HEADS, DIM).to(dtype),
        "v": x(BATCH, KEYS, KV_HEADS, DIM).to(dtype),
        "positions_q": torch.tensor([[100, 3, 7, 8, -2], [5, 6, 7, 8, 2]])[:, :queries],
        "positions_k": torch.arange(KEYS) * 2,
        "slopes": alibi_slopes(HEADS),
        "sinks": x(HEADS).float(),
        "key_padding_mask": mask,
    }


SETTINGS: list[dict[str, Any]] = [
    {},
    {"causal": False},
    {"slopes": None},
    {"sinks": None},
    {"key_padding_mask": None, "scale": 0.7},
    {"sinks": None, "slopes": None, "key_padding_mask": None},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(map(str, s)))
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_matches_the_formula(settings: dict[str, Any], backend: str) -> None:
    arguments = inputs() | settings
    with kernels.use_backend(backend):
        torch.testing.assert_close(alibi_attention(**arguments), naive(**arguments))


def test_slopes_follow_their_rules() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(3, "geometric").tolist() == [1.0, 0.5, 0.25]
    torch.testing.assert_close(alibi_slopes(6), torch.tensor([2 ** (-8 * (h + 1) / 6) for h in range(6)]))
    with pytest.raises(ValueError, match="rule must be one of 'press', 'geometric', got 'linear'"):
        alibi_slopes(4, "linear")
    with pytest.raises(ValueError, match="num_heads must be >= 1, got 0"):
        alibi_slopes(0)
    with pytest.raises(TypeError, match=r"num_heads must be an integer, got 2\.5"):
        alibi_slopes(2.5)  # type: ignore[arg-type]


def test_with_slopes_of_zero_it_is_torch_attention() -> None:
    a = inputs(torch.float32)
    out = alibi_attention(a["q"], a["k"], a["v"], a["positions_q"], a["positions_k"], torch.zeros(4), causal=False)
    q, k, v = (a[name].transpose(1, 2) for name in "qkv")
    theirs = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, theirs)


def test_only_distances_count() -> None:
    a = inputs()
    expected = alibi_attention(**a)
    for shift in (1, -(10**15), 2**61):
        moved = {"positions_q": a["positions_q"] + shift, "positions_k": a["positions_k"] + shift}
        assert torch.equal(alibi_attention(**(a | moved)), expected)


def test_a_sink_is_a_key_without_value() -> None:
    a = inputs() | {"slopes": None, "key_padding_mask": None, "causal": False}
    out = alibi_attention(**a)
    q, k, v = (a[name].transpose(1, 2) for name in "qkv")
    scores = q @ k.repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(DIM)
    column = a["sinks"].double()[None, :, None, None].expand(BATCH, HEADS, QUERIES, 1)
    p = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out, (p @ v.repeat_interleave(2, 1)).transpose(1, 2))
    # A very low sink is none; a very high one takes everything.
    none = alibi_attention(**(a | {"sinks": None}))
    torch.testing.assert_close(alibi_attention(**(a | {"sinks": torch.full((HEADS,), -1e4)})), none)
    assert alibi_attention(**(a | {"sinks": torch.full((HEADS,), 1e4)})).abs().max() == 0


@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_query_with_nothing_to_see_is_zero_with_zero_gradients(with_sinks: bool) -> None:
    a = inputs(torch.float32) | ({} if with_sinks else {"sinks": None})
    leaves = [a[name].requires_grad_() for name in "qkv"]
    out = alibi_attention(**a)
    assert (out[0, 0] == 0).all()
    grads = torch.autograd.grad(out.square().sum() + out.sum(), leaves)
    assert (grads[0][0, 0] == 0).all()
    assert all(torch.isfinite(g).all() for g in grads)
    nothing = a | {"key_padding_mask": torch.zeros(BATCH, KEYS, dtype=torch.bool)}
    out = alibi_attention(**nothing)
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), leaves))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_query_with_nothing_to_see_poisons_nobody(backend: str) -> None:
    """Neither by what stands in it nor by the gradient that arrives for it, with sinks of -inf as with any other."""
    a = inputs(torch.float32)
    for sinks in (a["sinks"], torch.full((HEADS,), -math.inf)):
        results = []
        for value in (0.0, math.nan):
            leaves = [a["q"].clone(), a["k"].clone(), a["v"].clone(), sinks.clone()]
            leaves[0][0, 0] = value
            q, k, v, sink = (leaf.requires_grad_() for leaf in leaves)
            with kernels.use_backend(backend):
                out = alibi_attention(**(a | {"q": q, "k": k, "v": v, "sinks": sink}))
            upstream = out.detach().cos()
            upstream[0, 0] = value
            results.append((out, *torch.autograd.grad(out, (q, k, v, sink), upstream)))
        torch.testing.assert_close(results[1], results[0])
        assert all(torch.isfinite(x).all() for x in results[1])


@pytest.mark.parametrize("poison", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("names", ["k", "v", "kv"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_masked_keys_never_leak(poison: float, names: str, backend: str) -> None:
    """Not by padding and not by causality, not forward and not backward, nor where a finite product overflows."""
    with kernels.use_backend(backend):
        a = inputs(torch.float32)
        hidden = ~a["key_padding_mask"]
        clean, bad = a, dict(a)
        for name in names:
            bad[name] = a[name].masked_fill(hidden[:, :, None, None], poison)
        results = []
        for case in (clean, bad):
            leaves = [case[name].clone().requires_grad_() for name in "qkv"]
            out = alibi_attention(**(case | dict(zip("qkv", leaves, strict=True))))
            results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
        torch.testing.assert_close(results[1], results[0])
        assert all((grad[hidden] == 0).all() for grad in results[1][2:])

        # The last key is seen by the last query alone.
        future = inputs(torch.float32) | {"key_padding_mask": None}
        for name in names:
            future[name] = future[name].clone()
            future[name][:, -1] = poison
        q = future["q"].clone().requires_grad_()
        out = alibi_attention(**(future | {"q": q}))
        assert torch.isfinite(out[:, :-1]).all()
        assert torch.isnan(out[:, -1]).all() or math.isfinite(poison)
        (grad,) = torch.autograd.grad(out[:, :-1].sum(), q)
        assert torch.isfinite(grad[:, :-1]).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(map(str, s)))
def test_the_reference_has_first_and_second_derivatives(settings: dict[str, Any]) -> None:
    a = inputs(queries=3) | settings
    a = {n: (x[:1] if n in ("q", "k", "v") and isinstance(x, Tensor) else x) for n, x in a.items()}
    a["positions_q"] = a["positions_q"][:1]
    if a["key_padding_mask"] is not None:
        a["key_padding_mask"] = a["key_padding_mask"][:1]
    leaves = {name: a[name][..., :2].clone().requires_grad_() for name in "qkv"}
    if a["sinks"] is not None:
        leaves["sinks"] = a["sinks"].double().requires_grad_()
    with kernels.use_backend("reference"):

        def function(*tensors: Tensor) -> Tensor:
            return alibi_attention(**(a | dict(zip(leaves, tensors, strict=True))))

        assert torch.autograd.gradcheck(function, tuple(leaves.values()))
        assert torch.autograd.gradgradcheck(function, tuple(leaves.values()))


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: " ".join(map(str, s)))
def test_the_operator_has_the_gradient_of_the_reference(settings: dict[str, Any]) -> None:
    a = inputs() | settings
    names = [n for n in ("q", "k", "v", "sinks") if a[n] is not None]
    grads = []
    for backend in ("reference", "auto"):
        leaves = [(a[n].double() if n == "sinks" else a[n]).clone().requires_grad_() for n in names]
        with kernels.use_backend(backend):
            out = alibi_attention(**(a | dict(zip(names, leaves, strict=True))))
            grads.append(torch.autograd.grad((out.sin() * torch.arange(1, DIM + 1)).sum(), leaves))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_at_most_that_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 64, 4, 32).to(dtype).requires_grad_() for _ in range(3))
    positions = torch.arange(64)

    def torch_attention(*x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in x), is_causal=True).transpose(1, 2)

    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = torch_attention(*doubles)
    truth = [exact, *torch.autograd.grad(exact.sum(), doubles)]
    errors = []
    for out in (alibi_attention(q, k, v, positions, slopes=torch.zeros(4)), torch_attention(q, k, v)):
        results = [out, *torch.autograd.grad(out.sum(), (q, k, v))]
        pairs = zip(results, truth, strict=True)
        errors.append([((r.double() - t).abs().max() / t.abs().max()).item() for r, t in pairs])
    floor = 2 * torch.finfo(dtype).eps
    assert all(ours <= theirs + floor for ours, theirs in zip(*errors, strict=True)), errors


def test_strided_expanded_and_empty_inputs() -> None:
    a = inputs()
    expected = alibi_attention(**a)
    strided = {n: a[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "qkv"}
    torch.testing.assert_close(alibi_attention(**(a | strided)), expected)
    assert alibi_attention(**(a | strided)).is_contiguous()
    one_head = {n: a[n][:, :, :1] for n in "kv"}
    shared = {n: x.expand(-1, -1, HEADS, -1) for n, x in one_head.items()}
    torch.testing.assert_close(alibi_attention(**(a | one_head)), alibi_attention(**(a | shared)))
    ints = {"positions_q": a["positions_q"].int(), "positions_k": a["positions_k"].int()}
    assert torch.equal(alibi_attention(**(a | ints)), expected)
    empty = a | {"q": a["q"][:, :0], "positions_q": a["positions_q"][:, :0]}
    assert alibi_attention(**empty).shape == (BATCH, 0, HEADS, DIM)
    no_keys = {n: a[n][:, :0] for n in "kv"} | {"positions_k": a["positions_k"][:0], "key_padding_mask": None}
    assert (alibi_attention(**(a | no_keys | {"causal": False})) == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"k": torch.zeros(BATCH, KEYS, 3, DIM).double(), "v": torch.zeros(BATCH, KEYS, 3, DIM).double()},
            "q must have a multiple of k's 3 heads, got 4",
        ),
        ({"v": torch.zeros(BATCH, KEYS, KV_HEADS, DIM)}, "v must have the dtype of q"),
        ({"v": torch.zeros(BATCH, 3, KV_HEADS, DIM).double()}, r"v must have shape \(2, 7, 2, 6\), got \(2, 3, 2, 6\)"),
        ({"positions_k": None}, "positions_k must be given where k is not as long as q, got 5 and 7"),
        ({"positions_q": torch.zeros(5)}, "positions_q must be int32 or int64"),
        ({"positions_q": torch.arange(4)}, r"positions_q must have shape \(5,\), got \(4,\)"),
        ({"slopes": torch.zeros(3)}, r"slopes must have shape \(4,\), got \(3,\)"),
        ({"slopes": torch.zeros(4, requires_grad=True)}, "slopes must not require a gradient"),
        ({"sinks": torch.zeros(4, dtype=torch.int64)}, "sinks must be float16"),
        ({"scale": "x"}, "scale must be a finite number, got 'x'"),
        ({"scale": math.nan}, "scale must be a finite number, got nan"),
        ({"causal": 1}, "causal must be True or False, got 1"),
        ({"key_padding_mask": torch.ones(BATCH, KEYS)}, r"key_padding_mask must be bool \(True = attend\)"),
        ({"key_padding_mask": torch.ones(BATCH, 3).bool()}, "key_padding_mask must have shape"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        alibi_attention(**(inputs() | change))


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("slopes", [None, alibi_slopes(HEADS)], ids=["plain", "slopes"])
@pytest.mark.parametrize(("queries", "causal"), [(1, True), (KEYS, True), (KEYS, False)])
def test_a_scale_need_not_be_positive(scale: float, slopes: Tensor | None, queries: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, HEADS, DIM, generator=generator) for n in (queries, KEYS, KEYS))
    results = []
    for backend in ("auto", "reference"):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with kernels.use_backend(backend):
            positions = torch.arange(KEYS)
            out = alibi_attention(*leaves, positions[-queries:], positions, slopes, causal=causal, scale=scale)
        results.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    torch.testing.assert_close(results[0], results[1])


def test_more_queries_than_keys_cannot_be_causal() -> None:
    q, kv = torch.zeros(1, 4, 1, 2), torch.zeros(1, 3, 1, 2)
    with pytest.raises(ValueError, match="q must not be longer than k when causal: got 4 queries and 3 keys"):
        alibi_attention(q, kv, kv, torch.arange(4), torch.arange(3))
    assert alibi_attention(q, kv, kv, torch.arange(4), torch.arange(3), causal=False).shape == q.shape
