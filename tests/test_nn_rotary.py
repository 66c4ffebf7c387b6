"""`GaussianRoPE`: five kinds that are what they say, per sample, at any position, and nothing stored for it."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from megactx.config import AlibiRule, Position, Sigma
from megactx.nn import GaussianRoPE
from megactx.nn.attention import UNTURNED
from megactx.nn.rotary import KINDS, SIGMAS, SLOPES_RULES

HEADS, WIDTH = 3, 16


def inputs(batch: int = 2, length: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (torch.randn(batch, length, heads, WIDTH, dtype=dtype) for heads in (HEADS, 1))  # type: ignore[return-value]


def places(batch: int = 2, length: int = 7) -> tuple[Tensor, Tensor]:
    """Positions and levels that differ from sample to sample."""
    return torch.randint(-(10**5), 10**5, (batch, length)), torch.randint(0, 4, (batch, length))


def turned(x: Tensor, positions: Tensor, lods: Tensor, kind: str, **options: Any) -> Tensor:
    """The kinds written out, one pair of one token after the other, in Python's floats."""
    base, block, lod_pairs = options.get("base", 10000.0), options.get("block_size", 32), options.get("lod_pairs", 2)
    half = WIDTH // 2
    pairs = half - lod_pairs if "lod2d" in kind else half
    out = torch.empty_like(x)
    for b, t in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(x.shape[1])).tolist():
        for j in range(half):
            if j < pairs:
                frequency = base ** (-2 * j / WIDTH)
                angle, span = positions[b, t].item() * frequency, block ** lods[b, t].item()
                spread = span if options.get("sigma") == "power" else math.sqrt((span**2 - 1) / 12)
                damping = 1.0 if kind == "simple" else math.exp(-((spread * frequency) ** 2) / 2)
            else:
                angle, damping = lods[b, t].item() * base ** (-(j - pairs) / lod_pairs), 1.0
            first, second = x[b, t, :, j], x[b, t, :, j + half]
            cos, sin = damping * math.cos(angle), damping * math.sin(angle)
            out[b, t, :, j], out[b, t, :, j + half] = first * cos - second * sin, first * sin + second * cos
    return out


def test_the_kinds_of_the_config_are_those_of_the_modules() -> None:
    assert sorted(Position.__args__) == sorted((*KINDS, *UNTURNED))
    assert Sigma.__args__ == SIGMAS
    assert AlibiRule.__args__ == SLOPES_RULES
    for rule in SLOPES_RULES:
        GaussianRoPE(WIDTH, HEADS, "gaussian_alibi", slopes_rule=rule)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"sigma": "power", "block_size": 2}, {"base": 500.0, "block_size": 5}], ids=["", "power", "base"]
)
def test_every_kind_is_what_it_says(kind: str, options: dict[str, Any]) -> None:
    q, k = inputs(dtype=torch.float64)
    positions, lods = places()
    got = GaussianRoPE(WIDTH, HEADS, kind, **options)(q, k, positions, lods)
    for found, x in zip(got, (q, k), strict=True):
        torch.testing.assert_close(found, turned(x, positions, lods, kind, **options), rtol=0, atol=1e-9)
    single = GaussianRoPE(WIDTH, HEADS, kind, **options)(q.float(), k.float(), positions.int(), lods.int())
    torch.testing.assert_close(single, tuple(x.float() for x in got), rtol=0, atol=4e-6)


def test_the_number_of_pairs_that_turn_by_the_level_can_be_chosen() -> None:
    q, k = inputs(dtype=torch.float64)
    positions, lods = places()
    for lod_pairs in (1, 5, WIDTH // 2 - 1):
        got, _ = GaussianRoPE(WIDTH, HEADS, "gaussian_lod2d", lod_pairs=lod_pairs)(q, k, positions, lods)
        torch.testing.assert_close(got, turned(q, positions, lods, "gaussian_lod2d", lod_pairs=lod_pairs))
    assert GaussianRoPE(64, 1, "gaussian_lod2d").settings["lod_pairs"] == 8
    assert GaussianRoPE(4, 1, "gaussian_lod2d").settings["lod_pairs"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_tokens_are_plain_rope_to_the_bit(dtype: torch.dtype) -> None:
    q, k = inputs(dtype=dtype)
    positions, lods = places()
    expected = GaussianRoPE(WIDTH, HEADS, "simple", qk_norm_eps=1e-6)(q, k, positions)
    for kind in ("simple", "gaussian", "gaussian_alibi"):
        rope = GaussianRoPE(WIDTH, HEADS, kind, qk_norm_eps=1e-6)
        for level in (None, torch.zeros_like(lods)):
            assert all(map(torch.equal, rope(q, k, positions, level), expected)), kind
    simple = GaussianRoPE(WIDTH, HEADS, "simple", qk_norm_eps=1e-6)
    assert all(map(torch.equal, simple(q, k, positions, lods), expected))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_the_same_in_any_batch_to_the_bit(kind: str) -> None:
    rope = GaussianRoPE(WIDTH, HEADS, kind, qk_norm_eps=1e-6)
    q, k = inputs(batch=3)
    positions, lods = places(batch=3)
    together = rope(q, k, positions, lods)
    for b in range(3):
        alone = rope(q[b : b + 1], k[b : b + 1], positions[b], lods[b])
        assert all(torch.equal(one[b], other[0]) for one, other in zip(together, alone, strict=True))


def test_what_is_shared_by_the_batch_may_be_given_once() -> None:
    rope = GaussianRoPE(WIDTH, HEADS, "gaussian_lod2d")
    q, k = inputs()
    positions, lods = places()
    positions[1] = positions[0]
    assert all(map(torch.equal, rope(q, k, positions[0], lods), rope(q, k, positions, lods)))
    lods[1] = lods[0]
    assert all(map(torch.equal, rope(q, k, positions, lods[0]), rope(q, k, positions, lods)))
    assert all(map(torch.equal, rope(q, k, positions[0], lods[0]), rope(q, k, positions, lods)))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_the_distance_alone(kind: str) -> None:
    rope = GaussianRoPE(WIDTH, HEADS, kind)
    q, k = inputs()
    positions, lods = places()
    scores = []
    for shift in (0, 10**9, -(10**12)):
        turned_q, turned_k = rope(q, k, positions + shift, lods)
        scores.append(torch.einsum("bihd,bjgd->bhij", turned_q, turned_k))
    torch.testing.assert_close(scores[1], scores[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(scores[2], scores[0], rtol=0, atol=2e-5)


def test_a_span_of_any_width_fades_to_zero_and_never_to_nan() -> None:
    q, k = inputs(batch=1)
    for sigma in SIGMAS:
        for kind in ("gaussian", "gaussian_lod2d"):
            got, _ = GaussianRoPE(WIDTH, HEADS, kind, sigma=sigma)(q, k, torch.arange(7), torch.full((7,), 1000))
            pairs = got.unflatten(-1, (2, WIDTH // 2)).transpose(-1, -2)
            kept = 2 if kind == "gaussian_lod2d" else 0
            assert not pairs[..., : WIDTH // 2 - kept, :].any()
            assert got.isfinite().all()
            assert pairs[..., WIDTH // 2 - kept :, :].all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("conjugate", [False, True])
def test_the_tables_turn_as_the_module_does(kind: str, interleaved: bool, conjugate: bool) -> None:
    options = {"interleaved": interleaved, "conjugate": conjugate}
    rope = GaussianRoPE(WIDTH, HEADS, kind, qk_norm_eps=1e-6, **options)  # type: ignore[arg-type]
    q, k = inputs()
    positions, lods = places()
    cos, sin, slopes = rope.tables(positions, lods)
    assert cos.shape == sin.shape == (2, 7, 1, WIDTH // 2)
    assert cos.dtype == sin.dtype == torch.float32
    assert (slopes is None) == (rope.slopes is None)
    x, y = (q[..., ::2], q[..., 1::2]) if interleaved else q.chunk(2, -1)
    parts = (x * cos - y * sin, x * sin + y * cos)
    expected = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    plain = GaussianRoPE(WIDTH, HEADS, kind, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(plain(q, k, positions, lods)[0], expected, rtol=0, atol=1e-6)
    assert rope.tables(positions[0])[0].shape == (1, 7, 1, WIDTH // 2)
    assert rope.tables(positions[0], lods)[0].shape == (2, 7, 1, WIDTH // 2)


def test_slopes_are_float32_in_a_module_of_any_type_and_nothing_is_saved() -> None:
    for kind in KINDS:
        rope = GaussianRoPE(WIDTH, 6, kind)
        assert list(rope.state_dict()) == []
        assert list(rope.parameters()) == []
        if not kind.endswith("_alibi"):
            assert rope.slopes is None
            continue
        expected = torch.tensor([2 ** (-8 * (h + 1) / 6) for h in range(6)])
        for module in (rope, rope.bfloat16(), rope.half(), rope.double(), rope.float()):
            assert module.slopes is not None
            assert module.slopes.dtype == torch.float32
            torch.testing.assert_close(module.slopes, expected, rtol=1e-7, atol=0)
    geometric = GaussianRoPE(WIDTH, 4, "gaussian_lod2d_alibi", slopes_rule="geometric")
    assert geometric.slopes is not None
    assert geometric.slopes.tolist() == [1.0, 0.5, 0.25, 0.125]


def test_slopes_survive_a_module_that_was_made_without_memory() -> None:
    expected = GaussianRoPE(WIDTH, HEADS, "gaussian_alibi").slopes
    assert expected is not None
    with torch.device("meta"):
        rope = GaussianRoPE(WIDTH, HEADS, "gaussian_alibi").half()
    assert rope.slopes is not None
    assert rope.slopes.device.type == "meta"
    assert torch.equal(rope.to_empty(device="cpu").slopes, expected)
    assert torch.equal(copy.deepcopy(rope).to(torch.bfloat16).slopes, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_rotation_written_out(kind: str) -> None:
    positions, lods = places()
    q, k = (x.requires_grad_() for x in inputs(dtype=torch.float64))
    rope = GaussianRoPE(WIDTH, HEADS, kind)
    weights = [torch.randn_like(x) for x in (q, k)]
    sum((y * w).sum() for y, w in zip(rope(q, k, positions, lods), weights, strict=True)).backward()  # type: ignore[union-attr]
    for x, w in zip((q, k), weights, strict=True):
        copy = x.detach().clone().requires_grad_()
        (turned(copy, positions, lods, kind) * w).sum().backward()
        torch.testing.assert_close(x.grad, copy.grad, rtol=0, atol=1e-9)


def test_compiles_to_one_graph_over_changing_lengths() -> None:
    rope = GaussianRoPE(WIDTH, HEADS, "gaussian_lod2d", qk_norm_eps=1e-6)
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(rope, backend=graphs, fullgraph=True, dynamic=True)
    compiled_after = []
    for length in (5, 8, 13):
        q, k = inputs(length=length)
        positions, lods = places(length=length)
        torch.testing.assert_close(compiled(q, k, positions, lods), rope(q, k, positions, lods))
        compiled_after.append(graphs.frame_count)
    assert len(set(compiled_after)) == 1  # the first length's graph served them all


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "alibi"}, "kind must be one of 'simple', 'gaussian', .*, got 'alibi'"),
        ({"head_dim": 15}, "head_dim must be even and at least 2, got 15"),
        ({"head_dim": 0}, "head_dim must be even and at least 2, got 0"),
        ({"sigma": "none"}, "sigma must be one of 'uniform', 'power', got 'none'"),
        ({"lod_pairs": 2}, "lod_pairs must be None for kind 'gaussian', got 2"),
        ({"kind": "gaussian_lod2d", "lod_pairs": 9}, r"lod_pairs must be in \[1, 7\] for heads of 16, got 9"),
        ({"kind": "gaussian_lod2d", "lod_pairs": 8}, r"lod_pairs must be in \[1, 7\] for heads of 16, got 8"),
        ({"kind": "gaussian_lod2d", "lod_pairs": 0}, r"lod_pairs must be in \[1, 7\] for heads of 16, got 0"),
        ({"kind": "gaussian_lod2d", "head_dim": 2}, "head_dim must be at least 4 for kind 'gaussian_lod2d': .*, got 2"),
        ({"slopes_rule": "linear"}, "slopes_rule must be one of 'press', 'geometric', got 'linear'"),
        ({"n_head": 0}, "n_head must be at least 1, got 0"),
        ({"block_size": 0}, "block_size must be at least 1, got 0"),
        ({"block_size": 2**63}, "block_size must be an integer of 64 bits"),
        ({"base": 1e31}, r"base must be positive and finite, in \[1e-30, 1e30\], got 1e\+31"),
        ({"base": math.inf}, "base must be positive and finite, got inf"),
        ({"qk_norm_eps": 0.0}, r"qk_norm_eps must be positive and finite, in \[1e-30, 1e30\], got 0.0"),
        ({"qk_norm_eps": math.nan}, "qk_norm_eps must be positive and finite, got nan"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaussianRoPE(**{"head_dim": WIDTH, "n_head": HEADS, "kind": "gaussian", **arguments})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("head_dim", 16.0),
        ("n_head", 2.5),
        ("n_head", True),
        ("block_size", 32.0),
        ("lod_pairs", 1.5),
        ("base", "1e4"),
        ("qk_norm_eps", "small"),
        ("norm_after", 1),
        ("interleaved", None),
        ("conjugate", "no"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(argument: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{argument} must be"):
        GaussianRoPE(**{"head_dim": WIDTH, "n_head": HEADS, "kind": "gaussian_lod2d", argument: value})


def test_wrong_inputs_are_named() -> None:
    rope = GaussianRoPE(WIDTH, HEADS)
    q, k = inputs()
    positions, lods = places()
    with pytest.raises(ValueError, match="lods must have shape"):
        rope(q, k, positions, lods[:, :5])
    with pytest.raises(ValueError, match="lods must have shape"):
        rope(q, k, positions, lods[0, :5])
    with pytest.raises(ValueError, match="positions must have shape"):
        rope(q, k, positions[:, :5])
    with pytest.raises(TypeError, match="positions must be int32 or int64"):
        rope(q, k, positions.float())
    with pytest.raises(TypeError, match=r"lods must be a torch\.Tensor"):
        rope(q, k, positions, 1)
    with pytest.raises(ValueError, match="q must have the head_dim of the module, 32, got shape"):
        GaussianRoPE(32, HEADS)(q, k, positions)
    for call in (rope.tables, lambda *where: rope(q, k, *where)):
        for wrong in (lods[:, :5], lods[0, :5], lods[:1]):
            with pytest.raises(ValueError, match="lods must have shape"):
                call(positions, wrong)
        with pytest.raises(TypeError, match=r"positions must be a torch\.Tensor, got list"):
            call([0, 1, 2, 3, 4, 5, 6])
        with pytest.raises(TypeError, match=r"lods must be a torch\.Tensor, got list"):
            call(positions, [0] * 7)
        with pytest.raises(TypeError, match="lods must be int32 or int64"):
            call(positions[0], lods.float())
    with pytest.raises(ValueError, match="positions must have shape"):  # and not the lods, which are right
        rope(q, k, positions[:, :5], lods)
