"""The C++ rotary operators against the float64 reference: values, gradients, layouts, dtypes, odd values, and bits."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megactx import kernels
from megactx.kernels.rotary import reference

pytestmark = pytest.mark.skipif(
    kernels.backends()["gaussian_rope"]["cpp"] != "live", reason="the C++ extension was not built"
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
FLOOR = {torch.float64: 1e-13}  # of the error, which is one rounding of the result otherwise; 2e-6 for the other dtypes


class Settings(NamedTuple):
    """What follows `lods` in the schemas."""

    block_size: int = 32
    base: float = 10000.0
    sigma: str = "uniform"
    lod_pairs: int = 0
    interleaved: bool = False
    conjugate: bool = False
    qk_norm_eps: float | None = None
    norm_after: bool = False


def every_setting(head_dim: int) -> list[Settings]:
    sigmas = [("none", 32), ("uniform", 3), ("power", 2)]
    norms = [(None, False), (1e-5, False), (1e-2, True)]
    return [
        Settings(block_size, 500.0, sigma, lod_pairs, interleaved, conjugate, eps, after)
        for (sigma, block_size), lod_pairs, interleaved, conjugate, (eps, after) in itertools.product(
            sigmas, (0, head_dim // 5), (False, True), (False, True), norms
        )
    ]


def inputs(
    dtype: torch.dtype = torch.float32, head_dim: int = 32, batch: int = 2, length: int = 5, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q with 3 heads, k with 2, positions near and far, levels."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, length, 3, head_dim, generator=generator).to(dtype)
    k = torch.randn(batch, length, 2, head_dim, generator=generator).to(dtype)
    far = torch.randint(-(10**12), 10**12, (batch, length), generator=generator)
    near = torch.randint(-5, 1000, (batch, length), generator=generator)
    positions = torch.where(torch.rand(batch, length, generator=generator) < 0.5, far, near)
    return q, k, positions, torch.randint(-1, 7, (batch, length), generator=generator)


def rope(*arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.megactx.gaussian_rope(*arguments)


def rope_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return torch.ops.megactx.gaussian_rope_backward(*arguments)


def double(*tensors: Tensor) -> list[Tensor]:
    return [x.double() for x in tensors]


def assert_one_rounding(got: tuple[Tensor, ...], exact: tuple[Tensor, ...], what: object) -> None:
    for y, truth in zip(got, exact, strict=True):
        assert y.shape == truth.shape
        assert y.is_contiguous()
        allowed = 0.5 * torch.finfo(y.dtype).eps * truth.abs() + FLOOR.get(y.dtype, 2e-6)
        assert ((y.double() - truth).abs() <= allowed).all(), what


def equal(got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))


@pytest.mark.parametrize("head_dim", [2, 10, 32, 64, 88])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_the_exact_ones_rounded_once(dtype: torch.dtype, head_dim: int) -> None:
    q, k, positions, lods = inputs(dtype, head_dim)
    grads = [torch.randn_like(x) for x in (q, k)]
    for settings in every_setting(head_dim):
        for levels in (lods, None):
            rest = (positions, levels, *settings)
            assert_one_rounding(rope(q, k, *rest), reference.gaussian_rope(*double(q, k), *rest), settings)
            saved = (q, k) if settings.qk_norm_eps is not None else (None, None)
            exact = reference.gaussian_rope_backward(*double(*grads, q, k), *rest)
            assert_one_rounding(rope_backward(*grads, *saved, *rest), exact, settings)


def test_the_gradient_of_one_input_alone_passes_its_norm_alone() -> None:
    q, k, positions, lods = inputs(torch.float64)
    rest = (positions, lods, *Settings(qk_norm_eps=1e-5))
    got, wanted = (f(q, k, q * 2, None, *rest) for f in (rope_backward, reference.gaussian_rope_backward))
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("after", [False, True])
def test_the_gradient_of_a_norm_overflows_no_sooner_than_its_terms(after: bool) -> None:
    """The product of a large gradient and a large head is no part of the result."""
    q, k, positions, _ = inputs()
    rest = (positions, None, *Settings(qk_norm_eps=1e-5, norm_after=after))
    arguments = q * 1e20, k * 1e20, q * 1e18, k * 1e18
    exact = reference.gaussian_rope_backward(*double(*arguments), *rest)
    for got, wanted in zip(rope_backward(*arguments, *rest), exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("base", [10000.0, 500000.0, 1.0, 0.25, 1e-20, 7.3, 1e300])
@pytest.mark.parametrize("head_dim", [2, 6, 64, 130])
def test_phase_constants_are_those_of_the_reference_to_the_last_bit(base: float, head_dim: int) -> None:
    """At the position 2^k the phase is the constant shifted by k bits: a difference in bit 0 is half a turn at 2^63."""
    powers = torch.tensor([2**k for k in range(63)] + [-(2**63)])
    q = torch.randn(1, 64, 1, head_dim, dtype=torch.float64)
    for lod_pairs in (0, head_dim // 2, head_dim // 3):
        settings = Settings(base=base, sigma="none", lod_pairs=lod_pairs)
        got = rope(q, q, powers, powers, *settings)
        torch.testing.assert_close(got, reference.gaussian_rope(q, q, powers, powers, *settings), rtol=0, atol=1e-13)


def test_float32_cosines_are_within_1e_7_of_the_phase() -> None:
    positions = torch.randint(-(2**62), 2**62, (40_000,))
    positions[:8] = torch.tensor([0, 1, -1, 2, 2**61, -(2**61), 2**62 - 1, 3])
    q = torch.zeros(1, len(positions), 1, 32)
    q[..., :16] = 1.0  # y = (cos, sin)
    rest = (positions, None, *Settings(sigma="none"))
    error = (rope(q, q, *rest)[0].double() - reference.gaussian_rope(q.double(), q.double(), *rest)[0]).abs().max()
    assert error <= 1.2e-7
    assert torch.equal(rope(q, q, *rest)[0][:, 0], q[:, 0])  # position 0 turns nothing


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory; the rest of that memory is NaN."""
    if layout == "expanded":
        return x[:1, :1].clone().expand(x.shape)
    if layout == "shifted":  # by one element: not aligned to a word
        return torch.cat((x.new_full((1,), math.nan), x.flatten()))[1:].view(x.shape)
    if layout == "sliced":
        wide = x.new_full((x.shape[0], x.shape[1] + 1, x.shape[2] + 2, x.shape[3] + 4), math.nan)
        view = wide[:, 1:, 1:-1, 2:-2]
        return view.copy_(x)
    if layout == "every other channel":
        view = x.new_full((*x.shape[:3], 2 * x.shape[3]), math.nan)[..., ::2]
        return view.copy_(x)
    order = ["BTHD".index(name) for name in layout]
    return x.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())


LAYOUTS = ["expanded", "shifted", "sliced", "every other channel", "BHTD", "BTDH", "HTBD", "DHTB"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_changes_no_bit(dtype: torch.dtype, layout: str) -> None:
    for head_dim, interleaved, eps in itertools.product((8, 64), (False, True), (None, 1e-5)):
        q, k, positions, lods = inputs(dtype, head_dim)
        rest = (positions, lods, *Settings(interleaved=interleaved, qk_norm_eps=eps))
        if layout == "expanded":
            q, k = q[:1, :1].repeat(2, 5, 1, 1), k[:1, :1].repeat(2, 5, 1, 1)
        others = laid_out(q, layout), laid_out(k, layout)
        expected = rope(q, k, *rest)
        got = rope(*others, *rest)
        assert equal(got, expected)
        assert all(x.is_contiguous() for x in got)
        assert equal(rope_backward(*others, *others, *rest), rope_backward(q, k, q, k, *rest))
        if layout != "expanded":
            torch.ops.megactx.gaussian_rope_(*others, *rest)
            assert equal(others, expected)


def test_memory_around_views_is_left_alone() -> None:
    for dtype, head_dim in itertools.product(DTYPES, (10, 32)):
        packed = torch.randn(2, 4, 7, head_dim + 3).to(dtype)
        before = packed.clone()
        q, k = packed[:, 1:3, :3, 1:-2], packed[:, 1:3, 4:6, 1:-2]
        expected = rope(q, k, torch.arange(2), None, *Settings())
        torch.ops.megactx.gaussian_rope_(q, k, torch.arange(2), None, *Settings())
        assert equal((q, k), expected)
        q.copy_(before[:, 1:3, :3, 1:-2])
        k.copy_(before[:, 1:3, 4:6, 1:-2])
        assert torch.equal(packed, before)


def test_positions_and_levels_of_either_type_shape_and_stride() -> None:
    q, k, _, lods = inputs()
    positions = torch.randint(-(2**31), 2**31, (2, 5))
    expected = rope(q, k, positions, lods, *Settings(lod_pairs=3))
    for pair in (
        (positions.int(), lods),
        (positions, lods.int()),
        (positions.T.contiguous().T, torch.stack((lods, lods), -1)[..., 1]),
    ):
        assert equal(rope(q, k, *pair, *Settings(lod_pairs=3)), expected)
    shared = rope(q, k, positions[0], lods[1].int(), *Settings(lod_pairs=3))
    repeated = rope(q, k, positions[:1].expand(2, 5), lods[1:].expand(2, 5), *Settings(lod_pairs=3))
    assert equal(shared, repeated)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_token_alone(dtype: torch.dtype) -> None:
    """Not on the batch around it, nor on the number of threads."""
    q, k, positions, lods = inputs(dtype, head_dim=64, batch=3, length=150)
    threads = torch.get_num_threads()
    for settings in (Settings(), Settings(qk_norm_eps=1e-5, lod_pairs=5)):
        whole = rope(q, k, positions, lods, *settings)
        grads = rope_backward(q, k, q, k, positions, lods, *settings)
        for b in range(3):
            one = [x[b : b + 1] for x in (q, k, positions, lods)]
            assert equal(rope(*one, *settings), tuple(x[b : b + 1] for x in whole))
        token = [x[1:2, 77:78] for x in (q, k, positions, lods)]
        assert equal(rope(*token, *settings), tuple(x[1:2, 77:78] for x in whole))
        try:
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                assert equal(rope(q, k, positions, lods, *settings), whole)
                assert equal(rope_backward(q, k, q, k, positions, lods, *settings), grads)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flush", [False, True])
def test_every_16_bit_number_is_read_and_written_as_it_is(dtype: torch.dtype, flush: bool) -> None:
    """Turned by nothing; also where the thread flushes subnormal float32 numbers to zero."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    q = torch.zeros(1, 2048, 1, 64, dtype=dtype)
    q[..., :32] = numbers.view(1, 2048, 1, 32)
    if flush and dtype == torch.bfloat16:
        pytest.skip("a subnormal bfloat16 is a subnormal float32")
    for interleaved in (False, True):
        x = torch.stack((q[..., :32], q[..., 32:]), -1).flatten(-2) if interleaved else q
        supported = torch.set_flush_denormal(flush)
        try:
            y, _ = rope(x, x, torch.zeros(2048, dtype=torch.int64), None, *Settings(interleaved=interleaved))
        finally:
            torch.set_flush_denormal(False)
        if flush and not supported:
            pytest.skip("this processor cannot flush subnormal numbers")
        y = y[..., ::2] if interleaved else y[..., :32]
        assert torch.equal(y.isnan(), q[..., :32].isnan())
        assert torch.equal(y.nan_to_num(0.0, math.inf, -math.inf), q[..., :32].nan_to_num(0.0, math.inf, -math.inf))


@pytest.mark.parametrize("head_dim", [10, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_head_and_overflow_is_infinite(dtype: torch.dtype, head_dim: int) -> None:
    q, k, positions, lods = inputs(dtype, head_dim)
    half = head_dim // 2
    q[0, 1, 0, 3], q[1, 0, 2, half + 4], k[0, 0, 1, 2] = math.nan, math.inf, -math.inf
    q[1, 4, 1, 3], q[1, 4, 1, half + 3] = torch.finfo(dtype).max, torch.finfo(dtype).max
    for settings in (Settings(), Settings(lod_pairs=half), Settings(qk_norm_eps=1e-5)):
        rest = (positions, lods, *settings)
        for y, wanted in zip(rope(q, k, *rest), reference.gaussian_rope(q, k, *rest), strict=True):
            torch.testing.assert_close(y, wanted, equal_nan=True)
        grads = torch.ones_like(q), torch.ones_like(k)
        expected = reference.gaussian_rope_backward(*grads, q, k, *rest)
        for y, wanted in zip(rope_backward(*grads, q, k, *rest), expected, strict=True):
            torch.testing.assert_close(y, wanted, equal_nan=True)


@pytest.mark.parametrize("name", ["gaussian_rope", "gaussian_rope_", "gaussian_rope_backward"])
def test_opcheck(name: str) -> None:
    overload = getattr(torch.ops.megactx, name).default
    for dtype, eps in itertools.product(DTYPES, (None, 1e-5)):
        q, k, positions, lods = inputs(dtype)
        saved = (q, k) if name.endswith("backward") else ()
        torch.library.opcheck(overload, (q, k, *saved, positions, lods, *Settings(qk_norm_eps=eps)))


@pytest.mark.parametrize("shape", [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)])
def test_empty_inputs_give_empty_results(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape)
    for eps in (None, 1e-5):
        rest = (torch.zeros(shape[1], dtype=torch.int64), None, *Settings(qk_norm_eps=eps))
        for out in (*rope(x, x, *rest), *rope_backward(x, x, x, x, *rest)):
            assert out.shape == shape
        torch.ops.megactx.gaussian_rope_(x, x.clone(), *rest)
    q, k, positions, lods = inputs()
    one, none = rope(q, k[:, :, :0], positions, lods, *Settings())
    assert torch.equal(one, rope(q, k, positions, lods, *Settings())[0])
    assert none.shape == (2, 5, 0, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, "q and k must have four dimensions"),
        ({"q": torch.zeros(2, 3, 4, 7), "k": torch.zeros(2, 3, 2, 7)}, "q must have an even head dimension, got 7"),
        ({"k": torch.zeros(2, 4, 2, 8)}, r"k must have shape \[2, 3, Hk, 8\] as q"),
        ({"k": torch.zeros(2, 3, 2, 8, dtype=torch.float64)}, "k must have the dtype of q"),
        (
            {"q": torch.zeros(2, 3, 4, 8, dtype=torch.int64), "k": torch.zeros(2, 3, 2, 8, dtype=torch.int64)},
            "q and k must be float16, bfloat16, float32 or float64",
        ),
        ({"positions": torch.zeros(3)}, "positions must be int32 or int64"),
        ({"positions": torch.arange(4)}, r"positions must have shape \[3\] or \[2, 3\]"),
        ({"positions": torch.arange(3)[None, None]}, "positions must have shape"),
        ({"lods": torch.arange(2)}, "lods must have shape"),
        ({"lods": torch.zeros(3, 3, dtype=torch.int64)}, "lods must have shape"),
        ({"block_size": 0}, "block_size must be >= 1, got 0"),
        ({"base": 0.0}, "base must be positive and finite, got 0"),
        ({"base": math.nan}, "base must be positive and finite"),
        ({"sigma": "gauss"}, "sigma must be none, uniform or power, got gauss"),
        ({"lod_pairs": 5}, r"lod_pairs must be in \[0, 4\], got 5"),
        ({"lod_pairs": -1}, r"lod_pairs must be in \[0, 4\], got -1"),
    ],
)
def test_arguments_that_could_not_be_read_are_refused(change: dict[str, Any], message: str) -> None:
    good = {"q": torch.zeros(2, 3, 4, 8), "k": torch.zeros(2, 3, 2, 8), "positions": torch.arange(3), "lods": None}
    arguments = good | Settings()._asdict() | change
    with pytest.raises(RuntimeError, match=message):
        rope(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        torch.ops.megactx.gaussian_rope_(*arguments.values())
    q, k, *rest = arguments.values()
    with pytest.raises(RuntimeError, match=message):
        rope_backward(q, k, None, None, *rest)


def test_what_was_normalised_must_match_its_gradient() -> None:
    q, k, positions, lods = inputs()
    rest = (positions, lods, *Settings(qk_norm_eps=1e-5))
    for bad in (q[:, :4], q[..., :16], q.double(), q[0]):
        with pytest.raises(RuntimeError, match="q and k must have the shapes and the dtype of their gradients"):
            rope_backward(q, k, bad, k, *rest)
        with pytest.raises(RuntimeError, match="q and k must have the shapes and the dtype of their gradients"):
            rope_backward(k, q, k, bad, *rest)
