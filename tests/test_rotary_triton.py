"""The Triton kernel of the rotary embedding against the float64 reference: in the interpreter, or on a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from megactx import kernels
from megactx.kernels import _library

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
pytestmark = [
    pytest.mark.interp,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRETED and not _library._INTERPRETING, reason="no GPU, and TRITON_INTERPRET is not set"),
]

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"sigma": "none", "conjugate": True},
    {"sigma": "power", "block_size": 2},
    {"sigma": "power", "block_size": 3, "lod_pairs": 2, "base": 500.0},
    {"block_size": 10, "lod_pairs": 4, "conjugate": True, "base": 0.25},
    {"interleaved": True, "block_size": 2},
    {"interleaved": True, "lod_pairs": 1, "conjugate": True},
    {"qk_norm_eps": 1e-5, "block_size": 2},
    {"qk_norm_eps": 1e-2, "norm_after": True, "block_size": 2, "conjugate": True},
    {"qk_norm_eps": 1e-5, "interleaved": True, "lod_pairs": 2, "sigma": "power"},
    {"qk_norm_eps": 1e-5, "norm_after": True, "interleaved": True},
]


def inputs(
    dtype: torch.dtype = torch.float32, dim: int = 8, heads: tuple[int, int] = (5, 2), batch: int = 2, length: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, length, h, dim, generator=generator).to(DEVICE, dtype) for h in heads)
    positions = torch.randint(-(10**9), 10**9, (batch, length), generator=generator).to(DEVICE)
    positions.view(-1)[:2] = torch.tensor([0, 10**12])
    lods = torch.arange(-1, batch * length - 1, device=DEVICE).view(batch, length) % 8 - 1
    return q, k, positions, lods


def triton(*args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    with kernels.use_backend("triton"):
        return kernels.gaussian_rope(*args, **settings)


def truth(q: Tensor, k: Tensor, *args: Any, **settings: Any) -> tuple[Tensor, Tensor]:
    with kernels.use_backend("reference"):
        return kernels.gaussian_rope(q.double(), k.double(), *args, **settings)


def assert_rounded(got: Tensor, exact: Tensor, floor: float = 2e-6) -> None:
    """One float32 computation and one rounding; the interpreter's rounding to bfloat16 cuts off."""
    assert ((got.double() - exact).abs() <= torch.finfo(got.dtype).eps * exact.abs() + floor).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_values_and_gradients_are_those_of_the_reference(settings: dict[str, Any]) -> None:
    q, k, positions, lods = inputs()
    for lod in (lods, None):
        grads = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            a, b = (x.to(dtype).requires_grad_() for x in (q, k))
            with kernels.use_backend(backend):
                y = kernels.gaussian_rope(a, b, positions, lod, **settings)
            grads.append((*y, *torch.autograd.grad(y[0].sin().sum() + y[1].cos().sum(), (a, b))))
        for got, exact in zip(*grads, strict=True):
            assert_rounded(got, exact)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dim", [2, 6, 16, 80, 256])
def test_every_dtype_and_head_dimension(dim: int, dtype: torch.dtype) -> None:
    q, k, positions, lods = inputs(dtype, dim)
    for settings in ({}, {"qk_norm_eps": 1e-5, "norm_after": True, "interleaved": True}):
        grads = (torch.randn_like(q), torch.randn_like(k))
        a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
        y = triton(a, b, positions, lods, **settings)
        c, d = q.double().requires_grad_(), k.double().requires_grad_()
        exact = truth(c, d, positions, lods, **settings)
        assert [x.dtype for x in y] == [dtype, dtype]
        for got, expected in zip(y, exact, strict=True):
            assert_rounded(got, expected)
        for got, expected in zip(
            torch.autograd.grad(y, (a, b), grads),
            torch.autograd.grad(exact, (c, d), [g.double() for g in grads]),
            strict=True,
        ):
            assert_rounded(got, expected, 1e-5)


@pytest.mark.parametrize("heads", [(1, 1), (12, 12), (9, 1), (0, 3), (3, 0)])
def test_any_number_of_heads(heads: tuple[int, int]) -> None:
    q, k, positions, lods = inputs(dim=16, heads=heads, length=5)
    for got, exact in zip(triton(q, k, positions, lods), truth(q, k, positions, lods), strict=True):
        assert_rounded(got, exact)


def exact_angle(position: int, exponent: Decimal, base: float) -> float:
    """position * base^exponent modulo 2 pi, carried out in 70 decimal digits."""
    with localcontext() as context:
        context.prec = 70
        return float(position * (Decimal(base).ln() * exponent).exp() % (2 * PI))


def unit_pairs(tokens: int, dim: int) -> Tensor:
    """Heads whose rotation is (cos, sin)."""
    x = torch.zeros(1, tokens, 1, dim, device=DEVICE)
    x[..., : dim // 2] = 1.0
    return x


@pytest.mark.parametrize("base", [10000.0, 500.0])
def test_cosines_stay_within_4e_7_to_ten_to_the_twelfth(base: float) -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(-(10**12), 10**12, (60,), generator=generator).tolist()
    positions = [0, 1, 2, 3, 1000, 10**6, 16_777_217, 10**9 + 7, 10**12, -(10**12), -1, 2**31, -(2**31) - 5, *drawn]
    dim = 32
    x = unit_pairs(len(positions), dim)
    y, _ = triton(x, x, torch.tensor(positions, device=DEVICE), sigma="none", base=base)
    angles = [[exact_angle(p, Decimal(-2 * j) / dim, base) for j in range(dim // 2)] for p in positions]
    exact = torch.tensor([[f(a) for f in (math.cos, math.sin) for a in row] for row in angles], dtype=torch.float64)
    assert (y[0, :, 0].cpu().double() - exact).abs().max() <= 4e-7


@pytest.mark.parametrize("block_size", [1, 2, 3, 10, 32, 1000])
@pytest.mark.parametrize("sigma", ["uniform", "power"])
def test_damped_cosines_stay_within_4e_7(sigma: str, block_size: int) -> None:
    lods = torch.arange(-2, 7, device=DEVICE).repeat(6)
    positions = torch.arange(54, device=DEVICE) * 12_345 - 300_000
    x = unit_pairs(54, 64)
    settings: dict[str, Any] = {"sigma": sigma, "block_size": block_size}
    exact, _ = truth(x, x, positions, lods, **settings)
    got, _ = triton(x, x, positions, lods, **settings)
    assert (got.double() - exact).abs().max() <= 4e-7
    if sigma == "uniform":  # single tokens, and what lies below them, are plain rotations to the last bit
        plain, _ = triton(x, x, positions, None, sigma="none")
        assert torch.equal(got[:, lods <= 0], plain[:, lods <= 0])


@pytest.mark.parametrize("shift", [10**9, -(10**15)])
def test_a_shift_of_all_positions_changes_no_logit(shift: int) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 16, 2, 32).to(DEVICE) for _ in range(2))
    positions = torch.arange(16, device=DEVICE)

    def logits(offset: int) -> Tensor:
        return torch.einsum("bqhd,bkhd->bhqk", *triton(q, k, positions + offset))

    torch.testing.assert_close(logits(shift), logits(0), rtol=0, atol=2e-5)


@pytest.mark.parametrize("settings", [{"block_size": 2}, {"qk_norm_eps": 1e-5, "lod_pairs": 2}], ids=str)
def test_a_batch_is_each_sample_alone_bit_by_bit(settings: dict[str, Any]) -> None:
    """Whatever else is in the batch, however many tokens follow, and however many programs share the heads."""
    q, k, positions, lods = inputs(torch.bfloat16, dim=16, heads=(9, 2), batch=3, length=5)
    together = triton(q, k, positions, lods, **settings)
    for b in range(3):
        alone = triton(q[b : b + 1], k[b : b + 1], positions[b], lods[b : b + 1].squeeze(0), **settings)
        shorter = triton(q[b : b + 1, :1], k[b : b + 1, :1], positions[b, :1], lods[b, :1], **settings)
        for whole, one, first in zip(together, alone, shorter, strict=True):
            assert torch.equal(whole[b], one[0])
            assert torch.equal(whole[b, :1], first[0])


def test_programs_that_share_the_heads_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    from megactx.kernels.rotary import launch

    q, k, positions, lods = inputs(dim=16, heads=(9, 5))
    choose = launch.choose
    results = []
    for programs in (1, 2, 1000):
        monkeypatch.setattr(launch, "choose", lambda *args, n=programs: dataclasses.replace(choose(*args), programs=n))
        results.append(triton(q, k, positions, lods, qk_norm_eps=1e-5))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("arch", [89, 90])
def test_tokens_fill_the_gpu_before_heads_are_shared(arch: int) -> None:
    from megactx.kernels.rotary.config import choose

    config = choose(arch, torch.bfloat16, 64, 12, 12)
    assert config.groups(1, 12, 12) == 24 // config.block_h
    assert config.groups(10**6, 12, 12) == 1
    assert choose(arch, torch.float32, 80, 1, 1).pairs == 64
    for dtype in (torch.float16, torch.bfloat16, torch.float32):  # whatever fits has a configuration
        for dim in range(2, 257, 2):
            for heads in (1, 2, 3, 64):
                assert choose(arch, dtype, dim, heads, 1).block_t >= 1


@pytest.mark.parametrize("sigma", ["uniform", "power"])
@pytest.mark.parametrize("level", [20, 2**40])
def test_underflowing_damping_gives_zeros_never_nan(sigma: str, level: int) -> None:
    for base, lod_pairs in ((10000.0, 0), (10000.0, 1), (1e-30, 0), (1e30, 1)):
        q, k, positions, lods = inputs()
        q = q.requires_grad_()
        lods = torch.full_like(lods, level)
        out, _ = triton(q, k, positions, lods, sigma=sigma, lod_pairs=lod_pairs, base=base)
        (grad,) = torch.autograd.grad(out.sum(), q)
        exact, _ = truth(q.detach(), k, positions, lods, sigma=sigma, lod_pairs=lod_pairs, base=base)
        zero = exact == 0
        assert zero.any()
        assert (out[zero] == 0).all()
        assert (grad[zero] == 0).all()
        assert torch.isfinite(out).all()
        assert torch.isfinite(grad).all()


def test_huge_negative_levels_are_points() -> None:
    q, k, positions, lods = inputs()
    lods = torch.full_like(lods, -(2**62))
    plain = triton(q, k, positions, sigma="none")
    for sigma in ("uniform", "power"):
        for got, exact in zip(triton(q, k, positions, lods, sigma=sigma), plain, strict=True):
            assert torch.equal(got, exact)


def test_strided_sliced_expanded_and_size_one_inputs() -> None:
    q, k, positions, lods = inputs()
    expected = triton(q, k, positions, lods)
    packed = torch.cat((q, k, k), dim=2)
    results = [
        triton(packed[:, :, :5], packed[:, :, 5:7], positions.T.contiguous().T, lods.int()),
        triton(q.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(0, 3).contiguous().transpose(0, 3),
               positions.repeat_interleave(2, 1)[:, ::2], lods),
        triton(torch.cat((q, q), dim=3)[..., 8:], torch.cat((k, k), dim=3)[..., 1::2].repeat(1, 1, 1, 1), positions,
               lods)[:1],
    ]  # fmt: skip
    for got in results:
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(got, expected, strict=False))
    one = triton(q[:, :1, :1].expand(2, 3, 4, 8), k, positions, lods)
    assert torch.equal(one[0], triton(q[:, :1, :1].repeat(1, 3, 4, 1), k, positions, lods)[0])
    near = positions % 1000  # int32
    assert torch.equal(triton(q, k, near.int(), lods)[0], triton(q, k, near, lods.int())[0])
    shared = triton(q, k, positions[0], lods[0])
    wide = triton(q, k, positions[:1].expand(2, 3), lods[:1].expand(2, 3))
    assert all(torch.equal(a, b) for a, b in zip(shared, wide, strict=True))
    (grad,) = torch.autograd.grad(triton(q.requires_grad_(), k, positions, lods)[0].sum(), q)  # an expanded gradient
    exact = torch.autograd.grad(truth(q, k, positions, lods)[0].sum(), q)[0]
    assert_rounded(grad, exact)


@pytest.mark.parametrize("shape", [(0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8), (2, 3, 4, 0)])
def test_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    q = torch.zeros(shape, device=DEVICE, requires_grad=True)
    out = triton(q, q, torch.zeros(shape[:2], dtype=torch.int64, device=DEVICE))
    assert [x.shape for x in out] == [shape, shape]
    assert torch.autograd.grad(out[0].sum(), q)[0].shape == shape
    with kernels.use_backend("triton"):
        kernels.gaussian_rope_(q.detach(), torch.zeros(shape, device=DEVICE), torch.arange(shape[1], device=DEVICE))


@pytest.mark.parametrize("eps", [None, 1e-5])
@pytest.mark.parametrize("order", ["BTHD", "BHTD", "HBTD", "BTDH"])
def test_in_place_is_the_copy_and_counts_as_a_write(order: str, eps: float | None) -> None:
    """q, k and v side by side along the heads, wherever the heads lie in memory; v stays as it is."""
    packed = torch.randn(2, 3, 8, 6).to(DEVICE)
    _, _, positions, lods = inputs()
    expected = triton(packed[:, :, :4], packed[:, :, 4:6], positions, lods, qk_norm_eps=eps)
    layout = ["BTHD".index(name) for name in order]
    stored = packed.permute(layout).contiguous().permute(torch.tensor(layout).argsort().tolist())
    version = stored._version
    with kernels.use_backend("triton"):
        kernels.gaussian_rope_(stored[:, :, :4], stored[:, :, 4:6], positions, lods, qk_norm_eps=eps)
    assert stored._version > version
    assert torch.equal(stored[:, :, 6:], packed[:, :, 6:])
    # Compiled for another layout, the sum of a norm may be taken in another order.
    rounding = 0.0 if eps is None or INTERPRETED else 1e-6
    torch.testing.assert_close(stored[:, :, :6], torch.cat(expected, dim=2), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("settings", [{}, {"qk_norm_eps": 1e-5}, {"qk_norm_eps": 1e-5, "norm_after": True}], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_in_place_has_the_gradient_of_the_copy(settings: dict[str, Any], compiled: bool) -> None:
    q, k, positions, lods = inputs()
    leaves = [x.requires_grad_() for x in (q, k)]

    def in_place(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.gaussian_rope_(q * 1, k * 1, positions, lods, **settings)

    if compiled:
        torch._dynamo.reset()
        in_place = torch.compile(in_place, backend="aot_eager", fullgraph=True)
    grads = []
    for function in (lambda q, k: kernels.gaussian_rope(q, k, positions, lods, **settings), in_place):
        with kernels.use_backend("triton"):
            out = function(q, k)
            grads.append(torch.autograd.grad(out[0].sin().sum() + out[1].cos().sum(), leaves))
    torch.testing.assert_close(grads[1], grads[0])


def test_a_value_that_autograd_saved_is_not_overwritten_in_silence() -> None:
    q, k, positions, lods = inputs()
    saved = q.requires_grad_().exp()  # exp keeps its result
    with kernels.use_backend("triton"), torch.no_grad():
        kernels.gaussian_rope_(saved, k, positions, lods)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()
    with kernels.use_backend("triton"):
        in_place = kernels.gaussian_rope_(q * 1, k * 1, positions, lods)
        copied = kernels.gaussian_rope(q, k, positions, lods)
    grads = [torch.autograd.grad(y[0].sin().sum(), q)[0] for y in (in_place, copied)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_made_of_a_frozen_input_needs_no_gradient(frozen: int) -> None:
    q, k, positions, lods = inputs()
    pair = [x.clone().requires_grad_(i != frozen) for i, x in enumerate((q, k))]
    out = triton(*pair, positions, lods, qk_norm_eps=1e-5)
    assert [x.requires_grad for x in out] == [i != frozen for i in range(2)]
    other = 1 - frozen
    (grad,) = torch.autograd.grad(out[other].sin().sum(), pair[other])
    both = [x.double().requires_grad_() for x in (q, k)]
    exact = truth(*both, positions, lods, qk_norm_eps=1e-5)
    assert_rounded(grad, torch.autograd.grad(exact[other].sin().sum(), both[other])[0])


@pytest.mark.parametrize("name", ["gaussian_rope", "gaussian_rope_", "gaussian_rope_backward"])
def test_the_operators_pass_opcheck(name: str) -> None:
    q, k, positions, lods = inputs(dim=4, heads=(2, 1))
    settings = (32, 10000.0, "uniform", 1, False, False, 1e-6, False)
    namespace = torch.ops.megactx_interpreted if INTERPRETED else torch.ops.megactx
    grads = (torch.randn_like(q), torch.randn_like(k)) if name.endswith("_backward") else ()
    differentiable = name == "gaussian_rope"
    q, k = q.requires_grad_(differentiable), k.requires_grad_(differentiable)
    torch.library.opcheck(getattr(namespace, name).default, (*grads, q, k, positions, lods, *settings))


def test_compiles_to_one_graph_with_the_eager_result() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(q: Tensor, k: Tensor, positions: Tensor, lods: Tensor) -> tuple[Tensor, Tensor]:
        q, k = kernels.gaussian_rope(q, k, positions, lods, qk_norm_eps=1e-5)
        return kernels.gaussian_rope_(q * 2, k * 2, positions, lods, sigma="power")

    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    graphs = 0
    for length in (3, 5, 9):
        q, k, positions, lods = inputs(length=length)
        results = []
        for each in (function, compiled):
            a, b = q.clone().requires_grad_(), k.clone().requires_grad_()
            with kernels.use_backend("triton"):
                y = each(a, b, positions, lods)
                results.append((*y, *torch.autograd.grad(y[0].sin().sum() + y[1].sum(), (a, b))))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


def test_what_does_not_fit_is_refused_by_name_and_goes_to_the_reference_otherwise() -> None:
    q, k, positions, lods = inputs(torch.float64)
    message = 'backend "triton" cannot run megactx::gaussian_rope: it takes float16, bfloat16 and float32, got torch.fl'
    with pytest.raises(ValueError, match=message):
        triton(q, k, positions, lods)
    wide = torch.zeros(1, 1, 1, 258, device=DEVICE)
    with pytest.raises(ValueError, match="it takes head dimensions up to 256, got 258"):
        triton(wide, wide, positions[:1, :1])
    settings = (32, 10000.0, "uniform", 0, False, False, None, False)
    launched = _library.OPERATORS["gaussian_rope"]._launch(q, k, positions, lods, *settings)
    assert all(torch.equal(a, b) for a, b in zip(launched, truth(q, k, positions, lods), strict=True))


OUT_OF_BOUNDS: list[tuple[dict[str, Any], str]] = [
    ({"q": torch.zeros(2, 3, 40)}, r"q must have four dimensions, the last of them even, got \(2, 3, 40\)"),
    ({"q": torch.zeros(2, 3, 5, 7)}, r"q must have four dimensions, the last of them even, got \(2, 3, 5, 7\)"),
    ({"k": torch.zeros(2, 3, 8)}, "k must have the shape of q but for the heads"),
    ({"k": torch.zeros(1, 3, 2, 8)}, r"k must have the shape of q but for the heads, got \(1, 3, 2, 8\)"),
    ({"k": torch.zeros(2, 1, 2, 8)}, "k must have the shape of q but for the heads"),
    ({"k": torch.zeros(2, 3, 2, 6)}, "k must have the shape of q but for the heads"),
    ({"k": torch.zeros(2, 3, 2, 8).half()}, "k must have dtype torch.float32 on .* as q, got torch.float16"),
    ({"positions": torch.zeros(3)}, "positions must be int32 or int64 on .*, got torch.float32"),
    ({"positions": torch.arange(2)}, r"positions must have shape \[3\] or \[2, 3\], got \(2,\)"),
    ({"positions": torch.zeros(2, 2, dtype=torch.int64)}, "positions must have shape"),
    ({"positions": torch.zeros(2, 3, 1, dtype=torch.int64)}, "positions must have shape"),
    ({"lods": torch.zeros(1, 3, dtype=torch.int64)}, r"lods must have shape .* got \(1, 3\)"),
    ({"lods": torch.zeros(3, dtype=torch.int16)}, "lods must be int32 or int64 on .*, got torch.int16"),
    ({"sigma": "gauss"}, "sigma must be one of none, uniform, power, got 'gauss'"),
    ({"block_size": 0}, "block_size must be >= 1, got 0"),
    ({"base": 0.0}, "base must be positive and finite, got 0.0"),
    ({"base": math.nan}, "base must be positive and finite, got nan"),
    ({"lod_pairs": 5}, r"lod_pairs must be in \[0, 4\], got 5"),
    ({"lod_pairs": -1}, r"lod_pairs must be in \[0, 4\], got -1"),
]


@pytest.mark.parametrize(("change", "message"), OUT_OF_BOUNDS)
def test_a_call_past_the_public_function_reads_nothing_out_of_bounds(change: dict[str, Any], message: str) -> None:
    namespace = torch.ops.megactx_interpreted if INTERPRETED else torch.ops.megactx
    good = {"q": torch.zeros(2, 3, 5, 8), "k": torch.zeros(2, 3, 2, 8), "positions": torch.arange(3), "lods": None}
    settings = {"block_size": 32, "base": 10000.0, "sigma": "uniform", "lod_pairs": 0}
    values = (good | settings | change).values()
    arguments = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in values]
    rest = (False, False, 1e-5, False)
    with pytest.raises(ValueError, match=f"gaussian_rope: {message}"):
        namespace.gaussian_rope(*arguments, *rest)
    with pytest.raises(ValueError, match=f"gaussian_rope: {message}"):
        namespace.gaussian_rope_(*arguments, *rest)
    with pytest.raises(ValueError, match=f"gaussian_rope: {message}"):
        namespace.gaussian_rope_backward(*arguments[:2], *arguments[:2], *arguments[2:], *rest)


def test_what_was_normalised_must_match_its_gradient() -> None:
    namespace = torch.ops.megactx_interpreted if INTERPRETED else torch.ops.megactx
    q, k, positions, lods = inputs()
    rest = (positions, lods, 32, 10000.0, "uniform", 0, False, False, 1e-5, False)
    for bad in (q[:, :2], q[..., :4], q.double(), q[0]):
        with pytest.raises(ValueError, match="q must have the shape, dtype and device of its gradient"):
            namespace.gaussian_rope_backward(q, k, bad, k, *rest)
        with pytest.raises(ValueError, match="k must have the shape, dtype and device of its gradient"):
            namespace.gaussian_rope_backward(k, q, k, bad, *rest)


def test_launches_from_many_threads_do_not_meet() -> None:
    """The interpreter keeps the program that runs in globals."""
    q, k, positions, lods = inputs(heads=(3, 1))
    samples = [(q * scale, k, positions + scale, lods) for scale in range(8)]
    expected = [triton(*sample) for sample in samples]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(2):
            got = list(threads.map(lambda sample: triton(*sample), samples))
            assert all(torch.equal(a, b) for x, y in zip(got, expected, strict=True) for a, b in zip(x, y, strict=True))


def test_offsets_past_two_to_the_31() -> None:
    """Strides that are int32 themselves, of each dimension in turn.  Only the pages that are touched exist."""
    step = 2**30 + 64
    memory = torch.empty(2 * step + 1024, dtype=torch.bfloat16, device=DEVICE)
    q, k, positions, lods = inputs(torch.bfloat16, dim=16, heads=(3, 3))
    q = torch.cat((q, q[:1]))
    k, positions, lods = (torch.cat((x, x[:1])) for x in (k, positions, lods))
    expected = triton(q, k, positions, lods)[0]
    for stride in ((step, 48, 16, 1), (48, step, 16, 1), (48, 16, step, 1)):
        spread = memory.as_strided(q.shape, stride)
        spread.copy_(q)
        assert torch.equal(triton(spread, k, positions, lods)[0], expected)
        with kernels.use_backend("triton"):
            kernels.gaussian_rope_(spread, k.clone(), positions, lods)
        assert torch.equal(spread, expected)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_a_cuda_graph_replays_it() -> None:
    q, k, positions, lods = inputs(torch.bfloat16, dim=64, heads=(12, 4), length=100)
    expected = triton(q, k, positions, lods)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = triton(q, k, positions, lods)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
