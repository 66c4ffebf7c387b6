"""`CausalSelfAttention`: every kind of position, with sinks, padding and levels of detail, against the formula."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from megactx.kernels import backends, use_backend
from megactx.nn import CausalSelfAttention, GaussianRoPE
from megactx.nn.rotary import KINDS

EMBD, HEADS = 64, 4
POSITIONS = (*KINDS, "learned", "none")
SINKS = (None, "layer", "head", "fixed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(position: str = "simple", **options: Any) -> CausalSelfAttention:
    """An attention that attends: sharp scores, and sinks that take a share."""
    if options.get("sinks") == "fixed":
        options = {"log_const": 1.5} | options
    attention = CausalSelfAttention(EMBD, HEADS, position=position, **options)
    with torch.no_grad():
        attention.qkv.weight.mul_(4)
        if attention.log_const is not None:
            attention.log_const.uniform_(-1, 3)
    return attention


def places(position: str, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Positions and levels that differ from sample to sample, as a working context has them."""
    steps = torch.randint(1, 40, (batch, length))
    found = {"positions": steps.cumsum(1) + torch.randint(0, 1000, (batch, 1))}
    return found | {"lods": torch.randint(0, 3, (batch, length))} if position in KINDS else found


def formula(
    attention: CausalSelfAttention,
    x: Tensor,
    positions: Tensor,
    lods: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention as a textbook writes it, [B, H, T, T] and all, in the type of x. The rotation is the module's,
    which has tests of its own."""
    heads, kv_heads, width = attention.n_head, attention.n_kv_head, attention.head_dim
    q, k, v = (x @ attention.qkv.weight.to(x.dtype).T).split((heads * width, kv_heads * width, kv_heads * width), -1)
    q, k, v = (u.unflatten(-1, (-1, width)) for u in (q, k, v))
    if attention.qk_norm_eps is not None:
        q, k = (u / (u.square().mean(-1, keepdim=True) + attention.qk_norm_eps).sqrt() for u in (q, k))
    if attention.rope is not None:
        cos, sin, _ = attention.rope.tables(positions, lods)
        halves = (u.chunk(2, -1) for u in (q, k))
        q, k = (torch.cat((a * cos - b * sin, a * sin + b * cos), -1) for a, b in halves)
    k, v = (u.repeat_interleave(heads // kv_heads, 2) for u in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(width)
    if attention.rope is not None and attention.rope.slopes is not None:
        positions = positions.expand(x.shape[:2])
        distance = (positions[:, None, :, None] - positions[:, None, None, :]).abs()
        scores = scores - attention.rope.slopes.to(x.dtype)[:, None, None] * distance
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    if key_padding_mask is not None:
        seen = seen & key_padding_mask[:, None, None, :]
    weights = scores.exp() * seen
    constant = torch.zeros(heads) if attention.sinks is None else attention.sinks.exp()
    weights = weights / (constant.to(x.dtype)[:, None, None] + weights.sum(-1, keepdim=True))
    return torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2) @ attention.out.weight.to(x.dtype).T


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("n_kv_head", [None, 2])
def test_every_kind_is_the_formula(position: str, sinks: Any, n_kv_head: int | None) -> None:
    attention = make(position, sinks=sinks, n_kv_head=n_kv_head, qk_norm=n_kv_head is None)
    x, where = torch.randn(2, 9, EMBD), places(position)
    expected = formula(attention, x.double(), **where)
    torch.testing.assert_close(attention(x, **where), expected.float(), rtol=0, atol=5e-6)


def test_farther_is_lower() -> None:
    attention = make("gaussian_alibi", qk_norm=False)
    with torch.no_grad():
        attention.qkv.weight[: 2 * EMBD] = 0  # queries and keys say nothing: the distance decides alone
        attention.qkv.weight[2 * EMBD :] = torch.eye(EMBD)
        attention.out.weight.copy_(torch.eye(EMBD))
    x = torch.zeros(1, 6, EMBD)
    for head in range(HEADS):
        x[0, :, 16 * head : 16 * head + 6] = torch.eye(6)
    positions = torch.tensor([3, 4, 8, 9, 12, 100])
    weights = attention(x, positions).unflatten(-1, (HEADS, -1))[0, -2, :, :5]
    slopes = torch.tensor([2**-2.0, 2**-4, 2**-6, 2**-8])
    expected = (-slopes[:, None] * (12 - positions[:5])).softmax(-1)
    torch.testing.assert_close(weights, expected)
    assert (weights.diff(dim=-1) > 0).all()


@pytest.mark.parametrize("position", ["simple", "gaussian_alibi", "none"])
def test_a_sink_is_a_constant_in_the_denominator_and_hides_no_one(position: str) -> None:
    attention = make(position, sinks="head", qk_norm=False)
    x = torch.randn(1, 1, EMBD)
    q, k, v = attention.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
    own = ((q * k).sum(-1, keepdim=True) / 4).exp()  # the first token sees itself, and only itself
    constant = attention.log_const.exp()[:, None]
    torch.testing.assert_close(attention(x), attention.out((own / (constant + own) * v).flatten(2)))
    x = torch.randn(2, 9, EMBD)
    without = make(position, qk_norm=False)
    without.load_state_dict({name: w for name, w in attention.state_dict().items() if name != "log_const"})
    with torch.no_grad():
        attention.log_const.fill_(-200.0)
    torch.testing.assert_close(attention(x), without(x))


@pytest.mark.parametrize("position", POSITIONS)
def test_a_sample_is_the_same_in_any_batch(position: str) -> None:
    attention = make(position, sinks="head")
    x, where = torch.randn(3, 9, EMBD), places(position, batch=3)
    together = attention(x, **where)
    for b in range(3):
        alone = attention(x[b : b + 1], **{name: value[b] for name, value in where.items()})
        torch.testing.assert_close(alone[0], together[b], rtol=0, atol=2e-6)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("sinks", SINKS)
def test_between_the_projections_a_sample_is_the_same_in_any_batch_to_the_bit(position: str, sinks: Any) -> None:
    """Not so the projections: a CPU's matrix product sums in an order that depends on how many rows it has."""
    attention = make(position, sinks=sinks, n_kv_head=2)
    attention.qkv, attention.out = torch.nn.Identity(), torch.nn.Identity()  # type: ignore[assignment]
    heads, where = torch.randn(3, 9, 2 * EMBD), places(position, batch=3)
    mask = torch.rand(3, 9) > 0.2
    for padding in ({}, {"key_padding_mask": mask}):
        together = attention(heads, **where, **padding)
        for b in range(3):
            own = {name: value[b : b + 1] for name, value in padding.items()}
            alone = attention(heads[b : b + 1], **{name: value[b] for name, value in where.items()}, **own)
            assert torch.equal(alone[0], together[b])


@pytest.mark.parametrize("position", KINDS)
@pytest.mark.parametrize("sinks", [None, "head"])
def test_a_common_shift_of_all_positions_changes_nothing(position: str, sinks: Any) -> None:
    attention = make(position, sinks=sinks)
    x, where = torch.randn(2, 9, EMBD), places(position)
    expected = attention(x, **where)
    for shift in (10**9, -(10**9)):
        shifted = attention(x, where["positions"] + shift, where["lods"])
        torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("sinks", [None, "layer"])
@pytest.mark.parametrize("left", [False, True])
def test_a_padded_batch_is_the_shorter_samples(position: str, sinks: Any, left: bool) -> None:
    attention = make(position, sinks=sinks)
    x, where = torch.randn(2, 9, EMBD), places(position)
    lengths = (9, 5)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if left else mask
    x = torch.where(mask[..., None], x, torch.nan).requires_grad_()  # not even a NaN gets through
    padded = attention(x, **where, key_padding_mask=mask)
    zeros = attention(torch.where(mask[..., None], x, 0.0), **where, key_padding_mask=mask)
    assert torch.equal(padded, zeros)
    weight = torch.where(mask[..., None], torch.randn(2, 9, EMBD), 0.0)
    (padded * weight).sum().backward()
    got = {name: p.grad for name, p in [("x", x), *attention.named_parameters()]}
    assert not got["x"][~mask].any()
    x.grad = None
    attention.zero_grad()
    for b in range(2):
        alone = attention(x[b][mask[b]][None], **{name: value[b][mask[b]] for name, value in where.items()})
        torch.testing.assert_close(padded[b][mask[b]], alone[0], rtol=0, atol=2e-6)
        (alone * weight[b][mask[b]]).sum().backward()
    expected = {name: p.grad for name, p in [("x", x), *attention.named_parameters()]}
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("sinks", ["layer", "head", "fixed"])
def test_gradients_are_those_of_the_formula(position: str, sinks: Any) -> None:
    attention = make(position, sinks=sinks, n_kv_head=2)
    x, where = torch.randn(2, 9, EMBD), places(position)
    weight = torch.randn(2, 9, EMBD)
    found = []
    for run in (lambda u: attention(u, **where).double(), lambda u: formula(attention, u.double(), **where)):
        attention.zero_grad()
        u = x.clone().requires_grad_()
        (run(u) * weight).sum().backward()
        found.append([u.grad, *(p.grad.clone() for p in attention.parameters())])
        assert all(g.any() for g in found[-1])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.interp
@pytest.mark.parametrize("sinks", ["layer", "head", "fixed"])
@pytest.mark.parametrize("position", ["simple", "gaussian_lod2d_alibi"])
def test_the_triton_kernels_train_it_as_the_reference_does(position: str, sinks: Any) -> None:
    """The one constant of a layer is seen by the kernels as all heads' own: a tensor of stride 0."""
    if (reason := backends()["alibi_attention"]["triton"]) != "live":
        pytest.skip(reason)
    attention = make(position, sinks=sinks, n_kv_head=2).to(DEVICE)
    x = torch.randn(2, 5, EMBD, device=DEVICE)
    where = {name: value.to(DEVICE) for name, value in places(position, length=5).items()}
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2], device=DEVICE)
    found = []
    for backend in ("triton", "reference"):
        attention.zero_grad()
        u = x.clone().requires_grad_()
        with use_backend(backend):
            y = attention(u, **where, key_padding_mask=mask)
        y.square().sum().backward()
        found.append({"y": y.detach(), "x": u.grad, **{name: p.grad for name, p in attention.named_parameters()}})
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert sinks == "fixed" or found[0]["log_const"].all()


def test_a_fixed_constant_is_not_trained_not_saved_and_not_rounded() -> None:
    attention = CausalSelfAttention(EMBD, HEADS, sinks="fixed", log_const=-1.3)
    assert {name for name, _ in attention.named_parameters()} == {"qkv.weight", "out.weight"}
    assert set(attention.state_dict()) == {"qkv.weight", "out.weight"}
    with torch.device("meta"):
        meta = CausalSelfAttention(EMBD, HEADS, sinks="fixed", log_const=-1.3)
    for module in (attention, attention.bfloat16(), attention.double(), meta.half().to_empty(device="cpu")):
        assert torch.equal(module.sinks, torch.full((HEADS,), -1.3))
        assert not module.sinks.requires_grad


def test_the_settings_of_the_rotation_are_those_of_the_module_that_turns() -> None:
    own, turns = (inspect.signature(cls).parameters for cls in (CausalSelfAttention, GaussianRoPE))
    given = {"head_dim", "n_head", "kind", "qk_norm_eps"}
    assert {name: own[name].default for name in turns.keys() - given} == {
        name: turns[name].default for name in turns.keys() - given
    }
    options = {"block_size": 7, "base": 50.0, "sigma": "power", "lod_pairs": 3, "slopes_rule": "geometric"}
    options |= {"interleaved": True, "conjugate": True, "norm_after": True}
    rope = make("gaussian_lod2d_alibi", **options).rope
    expected = GaussianRoPE(EMBD // HEADS, HEADS, "gaussian_lod2d_alibi", qk_norm_eps=1e-6, **options)  # type: ignore[arg-type]
    assert repr(rope) == repr(expected)
    assert torch.equal(rope.slopes, expected.slopes)


def test_a_state_dict_holds_weights_and_sinks_and_no_table() -> None:
    for position in POSITIONS:
        assert set(make(position).state_dict()) == {"qkv.weight", "out.weight"}
        for sinks, shape in (("layer", (1,)), ("head", (HEADS,))):
            attention = CausalSelfAttention(EMBD, HEADS, position=position, sinks=sinks, log_const=-0.5)  # type: ignore[arg-type]
            state = attention.state_dict()
            assert set(state) == {"qkv.weight", "out.weight", "log_const"}
            assert state["log_const"].tolist() == [-0.5] * shape[0]


@pytest.mark.parametrize("position", ["gaussian", "gaussian_lod2d_alibi", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_module_of_another_type_runs_and_keeps_its_slopes(position: str, dtype: torch.dtype) -> None:
    attention = make(position, sinks="head")
    x, where = torch.randn(2, 9, EMBD), places(position)
    expected, slopes = attention(x, **where), attention.rope.slopes if attention.rope else None
    got = attention.to(dtype)(x.to(dtype), **where)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.05)
    if slopes is not None:
        assert torch.equal(attention.rope.slopes, slopes)
    got.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in attention.parameters())


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("sinks", [None, "head"])
def test_autocast_runs_every_kind(position: str, sinks: Any) -> None:
    attention = make(position, sinks=sinks)
    x, where = torch.randn(2, 9, EMBD), places(position)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(x, **where)
    got.float().sum().backward()
    torch.testing.assert_close(got.float(), attention(x, **where), rtol=0, atol=0.05)


def test_compiles_to_one_graph_over_changing_lengths() -> None:
    attention = make("gaussian_lod2d_alibi", sinks="head", n_kv_head=2)
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend=graphs, fullgraph=True, dynamic=True)
    compiled_after = []
    for length in (5, 8, 13):
        x, where = torch.randn(2, length, EMBD), places("gaussian_lod2d_alibi", length=length)
        mask = torch.rand(2, length) > 0.2
        results = []
        for forward in (compiled, attention):
            attention.zero_grad()
            y = forward(x, **where, key_padding_mask=mask)
            y.square().sum().backward()
            results.append([y.detach(), *(p.grad for p in attention.parameters())])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        compiled_after.append(graphs.frame_count)
    assert len(set(compiled_after)) == 1  # the first length's graph served them all


def test_dropout_drops_weights_only_where_sdpa_has_them() -> None:
    x = torch.randn(2, 64, EMBD)
    for options, drops_weights in (({}, True), ({"position": "gaussian_alibi"}, False), ({"sinks": "layer"}, False)):
        attention = make(dropout=0.5, **options)  # type: ignore[arg-type]
        expected = attention.eval()(x)
        got = attention.train()(x)
        kept = got != 0
        assert 0.45 < kept.float().mean() < 0.55
        assert torch.allclose(got[kept], 2 * expected[kept], atol=1e-5) != drops_weights


def test_it_is_a_drop_in() -> None:
    attention = CausalSelfAttention(EMBD, HEADS)
    x = torch.randn(2, 9, EMBD)
    assert torch.equal(attention(x), attention(x, torch.arange(9), torch.zeros(9, dtype=torch.int32)))
    plain = CausalSelfAttention(EMBD, HEADS, position="none", qk_norm=False)
    q, k, v = (u.unflatten(-1, (HEADS, -1)).transpose(1, 2) for u in plain.qkv(x).chunk(3, -1))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    torch.testing.assert_close(plain(x), plain.out(expected))
    assert attention(x[:0]).shape == (0, 9, EMBD)


def test_wrong_use_is_named() -> None:
    with pytest.raises(ValueError, match="n_embd must be a multiple of n_head, got 64 and 5"):
        CausalSelfAttention(64, 5)
    with pytest.raises(ValueError, match="n_head must be a multiple of n_kv_head, got 4 and 3"):
        CausalSelfAttention(64, 4, 3)
    with pytest.raises(ValueError, match=r"position must be one of 'simple', .*, 'learned', 'none', got 'rotary'"):
        make("rotary")
    with pytest.raises(ValueError, match="sinks must be 'layer', 'head', 'fixed' or None, got 'all'"):
        make(sinks="all")
    with pytest.raises(ValueError, match=r"base must be 10000\.0 for position 'none', where nothing is turned"):
        make("none", base=500.0)
    with pytest.raises(TypeError, match=r"CausalSelfAttention.* unexpected keyword argument 'rope_base'"):
        make(rope_base=500.0)
    x = torch.randn(2, 9, EMBD)
    for position in ("learned", "none"):
        with pytest.raises(ValueError, match="lods must be None"):
            make(position)(x, lods=torch.zeros(2, 9, dtype=torch.int64))
    for position in POSITIONS:
        for wrong in (torch.arange(8), torch.arange(9).expand(3, 9)):
            with pytest.raises(ValueError, match="positions must have shape"):
                make(position)(x, wrong)
        with pytest.raises(TypeError, match="positions must be int32 or int64"):
            make(position)(x, torch.arange(9.0))
        with pytest.raises(TypeError, match=r"positions must be a torch\.Tensor, got list"):
            make(position)(x, [*range(9)])
    with pytest.raises(ValueError, match="x must have 3 dimensions"):
        make()(x[0])
    with pytest.raises(ValueError, match="key_padding_mask must have shape"):
        make("gaussian")(x, key_padding_mask=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match="key_padding_mask must be bool"):
        make("gaussian")(x, key_padding_mask=torch.ones(2, 9))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_head": 0}, "n_head must be at least 1, got 0"),
        ({"n_kv_head": 0}, "n_kv_head must be at least 1, got 0"),
        ({"n_embd": 60}, "n_embd / n_head must be even for position 'simple', got 15"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": math.nan}, r"dropout must be in \[0, 1\), got nan"),
        ({"norm_eps": 0.0}, r"norm_eps must be positive and finite, in \[1e-30, 1e30\], got 0.0"),
        ({"norm_eps": -1.0, "qk_norm": False}, r"norm_eps must be positive and finite, in \[1e-30, 1e30\], got -1.0"),
        ({"log_const": math.inf, "sinks": "head"}, "log_const must be a finite number, got inf"),
        ({"log_const": 1.0}, "log_const must be 0 without sinks, got 1.0"),
        ({"norm_after": True, "qk_norm": False}, "norm_after must be False without qk_norm, got True"),
        ({"sigma": "even"}, "sigma must be one of"),
        ({"slopes_rule": "linear"}, "slopes_rule must be one of"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"lod_pairs": 3}, "lod_pairs must be None for kind 'simple'"),
        ({"lod_pairs": 8, "position": "gaussian_lod2d"}, r"lod_pairs must be in \[1, 7\]"),
    ],
)
def test_what_can_never_run_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CausalSelfAttention(**{"n_embd": EMBD, "n_head": HEADS, **options})


@pytest.mark.parametrize(
    ("argument", "value"), [("n_embd", 64.0), ("n_head", 4.0), ("n_kv_head", "2"), ("qk_norm", 1), ("dropout", None)]
)
def test_an_argument_of_the_wrong_type_is_named(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{argument} must be"):
        CausalSelfAttention(**{"n_embd": EMBD, "n_head": HEADS, argument: value})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("sinks", SINKS)
def test_a_gpu_gives_what_the_cpu_gives(position: str, sinks: Any) -> None:
    attention = make(position, sinks=sinks, n_kv_head=2)
    x, where = torch.randn(2, 9, EMBD), places(position) | {"key_padding_mask": torch.rand(2, 9) > 0.2}
    found = []
    for device in ("cpu", "cuda"):
        attention.to(device).zero_grad()
        y = attention(x.to(device), **{name: value.to(device) for name, value in where.items()})
        y.square().sum().backward()
        found.append([y.detach().cpu(), *(p.grad.cpu() for p in attention.parameters())])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
