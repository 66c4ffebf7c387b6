"""Gaussian rotary embedding: exact phases, the damping rules, and the gradients of the registered operator."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megactx import kernels
from megactx.kernels.rotary.reference import phase_steps

PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


def exact_angle(position: int, frequency_exponent: Decimal, base: float) -> float:
    """position * base^exponent modulo 2 pi, carried out in 70 decimal digits."""
    with localcontext() as context:
        context.prec = 70
        angle = position * (Decimal(base).ln() * frequency_exponent).exp()
        return float(angle % (2 * PI))


def naive(
    x: Tensor,
    positions: Tensor,
    lods: Tensor | None,
    *,
    block_size: int = 32,
    base: float = 10000.0,
    sigma: str = "uniform",
    lod_pairs: int = 0,
    interleaved: bool = False,
    conjugate: bool = False,
    qk_norm_eps: float | None = None,
    norm_after: bool = False,
) -> Tensor:
    """The formula, pair by pair, in float64 with complex numbers."""
    batch, length, _, dim = x.shape
    x = x.double()
    positions = positions.expand(batch, length)
    lods = torch.zeros_like(positions) if lods is None else lods.expand(batch, length)

    def norm(t: Tensor) -> Tensor:
        return t / (t.pow(2).mean(-1, keepdim=True) + qk_norm_eps).sqrt()

    if qk_norm_eps is not None and not norm_after:
        x = norm(x)
    y = x.clone()
    pairs = dim // 2
    for b in range(batch):
        for t in range(length):
            position, lod = int(positions[b, t]), int(lods[b, t])
            for j in range(pairs):
                i = j - (pairs - lod_pairs)
                if i >= 0:
                    angle, damping = exact_angle(lod, Decimal(-i) / lod_pairs, base), 1.0
                else:
                    f, w = base ** (-2 * j / dim), float(block_size) ** lod
                    s2 = {"none": 0.0, "uniform": max(w * w - 1, 0) / 12, "power": w * w}[sigma]
                    angle, damping = exact_angle(position, Decimal(-2 * j) / dim, base), math.exp(-s2 * f * f / 2)
                turn = damping * complex(math.cos(angle), -math.sin(angle) if conjugate else math.sin(angle))
                a, c = (2 * j, 2 * j + 1) if interleaved else (j, j + pairs)
                y[b, t, :, a] = x[b, t, :, a] * turn.real - x[b, t, :, c] * turn.imag
                y[b, t, :, c] = x[b, t, :, c] * turn.real + x[b, t, :, a] * turn.imag
    return norm(y) if qk_norm_eps is not None and norm_after else y


def inputs(dtype: torch.dtype = torch.float64, dim: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 3, 4, dim, generator=generator, dtype=torch.float64).to(dtype)
    k = torch.randn(2, 3, 2, dim, generator=generator, dtype=torch.float64).to(dtype)
    return q, k, torch.tensor([[0, 5, 123456], [-7, 10**12, 3]]), torch.tensor([[0, 1, 2], [0, 3, -1]])


SETTINGS: list[dict[str, Any]] = [
    {},
    {"sigma": "none"},
    {"sigma": "power", "block_size": 2},
    {"lod_pairs": 2},
    {"lod_pairs": 4, "conjugate": True},
    {"interleaved": True, "block_size": 3},
    {"interleaved": True, "lod_pairs": 1, "conjugate": True},
    {"base": 500.0, "conjugate": True},
    {"base": 0.25},
    {"qk_norm_eps": 1e-5, "block_size": 2},
    {"qk_norm_eps": 1e-2, "norm_after": True, "block_size": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_matches_the_formula(settings: dict[str, Any], backend: str) -> None:
    q, k, positions, lods = inputs()
    with kernels.use_backend(backend):
        for lod in (lods, None):
            got = kernels.gaussian_rope(q, k, positions, lod, **settings)
            for y, x in zip(got, (q, k), strict=True):
                # The fixed-point phase is off by position * 2^-65 turns: 2e-7 at 10^12.
                torch.testing.assert_close(y, naive(x, positions, lod, **settings), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_small_positions_are_exact_in_float64(settings: dict[str, Any]) -> None:
    q, k, _, _ = inputs()
    positions, lods = torch.tensor([0, 3, 1000]), torch.tensor([0, 1, 2])
    q_out, _ = kernels.gaussian_rope(q, k, positions, lods, **settings)
    torch.testing.assert_close(q_out, naive(q, positions, lods, **settings), rtol=1e-12, atol=1e-12)


def test_cosines_stay_within_4e_7_to_ten_to_the_twelfth() -> None:
    positions = [0, 1, 1000, 10**6, 16_777_217, 10**9 + 7, 10**12, -(10**12), -1, 2**31, -(2**31) - 5]
    dim = 16
    ones = torch.zeros(1, len(positions), 1, dim)
    ones[..., : dim // 2] = 1.0  # y = (cos, sin)
    y, _ = kernels.gaussian_rope(ones, ones, torch.tensor(positions), sigma="none")
    for t, position in enumerate(positions):
        for j in range(dim // 2):
            angle = exact_angle(position, Decimal(-2 * j) / dim, 10000.0)
            assert abs(y[0, t, 0, j].item() - math.cos(angle)) <= 4e-7
            assert abs(y[0, t, 0, j + dim // 2].item() - math.sin(angle)) <= 4e-7


def test_the_phase_constants_are_rounded_frequencies() -> None:
    assert getcontext().prec == 28
    steps = phase_steps(10000.0, 64, 32)
    assert getcontext().prec == 28  # the caller's decimal context is left alone
    for j, step in enumerate(steps):
        exact = Decimal(2) ** 64 * exact_frequency(j) / (2 * PI)
        assert abs(step - exact) <= Decimal("0.5000001")


def exact_frequency(j: int) -> Decimal:
    with localcontext() as context:
        context.prec = 70
        return (Decimal(10000).ln() * Decimal(-2 * j) / 64).exp()


@pytest.mark.parametrize("shift", [1, 10**9, -(10**15), 2**61])
def test_a_shift_of_all_positions_changes_no_logit(shift: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 16, 2, 32), torch.randn(1, 16, 2, 32)
    positions = torch.arange(16)

    def logits(offset: int) -> Tensor:
        a, b = kernels.gaussian_rope(q, k, positions + offset)
        return torch.einsum("bqhd,bkhd->bhqk", a, b)

    torch.testing.assert_close(logits(shift), logits(0), rtol=0, atol=2e-5)


def test_single_tokens_are_plain_rope_and_wide_spans_fade() -> None:
    q, k, positions, _ = inputs()
    plain, _ = kernels.gaussian_rope(q, k, positions, sigma="none")
    for lods in (None, torch.zeros_like(positions)):
        assert torch.equal(kernels.gaussian_rope(q, k, positions, lods)[0], plain)
    assert not torch.equal(kernels.gaussian_rope(q, k, positions, None, sigma="power")[0], plain)
    levels = torch.arange(3).expand(2, 3)
    faded, _ = kernels.gaussian_rope(q, k, positions, levels, block_size=4)
    assert (faded.norm(dim=-1) <= q.norm(dim=-1) + 1e-12).all()
    assert (faded[:, 2].norm(dim=-1) < q[:, 2].norm(dim=-1)).all()


@pytest.mark.parametrize("sigma", ["uniform", "power"])
@pytest.mark.parametrize("lod_pairs", [0, 1])
def test_underflowing_damping_gives_zeros_never_nan(sigma: str, lod_pairs: int) -> None:
    q, k, positions, _ = inputs(torch.float32)
    q, k = q.requires_grad_(), k.requires_grad_()
    lods = torch.full_like(positions, 2**40)
    out, _ = kernels.gaussian_rope(q, k, positions, lods, sigma=sigma, lod_pairs=lod_pairs)
    (grad,) = torch.autograd.grad(out.sum(), q)
    dim = q.shape[-1]
    kept = [c for j in range(dim // 2 - lod_pairs, dim // 2) for c in (j, j + dim // 2)]
    damped = [c for c in range(dim) if c not in kept]
    assert (out[..., damped] == 0).all()
    assert (grad[..., damped] == 0).all()
    assert torch.isfinite(out).all()
    assert torch.isfinite(grad).all()


def test_conjugate_turns_back_and_the_norm_is_kept() -> None:
    q, k, positions, _ = inputs()
    for interleaved in (False, True):
        ahead = kernels.gaussian_rope(q, k, positions, interleaved=interleaved)
        back = kernels.gaussian_rope(*ahead, positions, interleaved=interleaved, conjugate=True)
        torch.testing.assert_close(back, (q, k))
        torch.testing.assert_close(ahead[0].norm(dim=-1), q.norm(dim=-1))


def test_normalising_before_or_after_agrees_without_damping_only() -> None:
    q, k, positions, lods = inputs()
    before, after = (
        kernels.gaussian_rope(q, k, positions, qk_norm_eps=1e-9, norm_after=late)[0] for late in (False, True)
    )
    torch.testing.assert_close(before, after)
    wide_before, wide_after = (
        kernels.gaussian_rope(q, k, positions, lods, qk_norm_eps=1e-9, norm_after=late)[0] for late in (False, True)
    )
    assert (wide_before[0, 2].norm(dim=-1) < wide_after[0, 2].norm(dim=-1)).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_reference_has_first_and_second_derivatives(settings: dict[str, Any]) -> None:
    q, k, positions, lods = inputs(dim=8)
    q, k = q[:, :2, :1].requires_grad_(), k[:, :2, :1].requires_grad_()
    with kernels.use_backend("reference"):

        def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return kernels.gaussian_rope(a, b, positions[:, :2], lods[:, :2], **settings)

        assert torch.autograd.gradcheck(function, (q, k))
        assert torch.autograd.gradgradcheck(function, (q, k))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_operator_has_the_gradient_of_the_reference(settings: dict[str, Any]) -> None:
    q, k, positions, lods = inputs()
    q, k = q.requires_grad_(), k.requires_grad_()
    grads = []
    for backend in ("reference", "auto"):
        with kernels.use_backend(backend):
            a, b = kernels.gaussian_rope(q, k, positions, lods, **settings)
            grads.append(torch.autograd.grad((a.sin().sum() + b.cos().sum()), (q, k)))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_one_rounding(dtype: torch.dtype) -> None:
    """Upcast, one float32 computation, one rounding: the rotated value is within an ulp of the exact one."""
    q, k, positions, lods = inputs(dtype, dim=32)
    out, _ = kernels.gaussian_rope(q, k, positions, lods, qk_norm_eps=1e-6)
    assert out.dtype == dtype
    exact = naive(q, positions, lods, qk_norm_eps=1e-6)
    error = (out.double() - exact).abs()
    assert (error <= torch.finfo(dtype).eps * exact.abs() + 2e-6).all()


def test_strided_sliced_expanded_and_size_one_inputs() -> None:
    q, k, positions, lods = inputs()
    expected = kernels.gaussian_rope(q, k, positions, lods)
    packed = torch.cat((q, k), dim=2)
    strided = kernels.gaussian_rope(packed[:, :, :4], packed[:, :, 4:], positions.T.contiguous().T, lods.int())
    transposed = kernels.gaussian_rope(q.transpose(1, 2).contiguous().transpose(1, 2), k, positions, lods)
    torch.testing.assert_close(strided, expected, rtol=0, atol=0)
    torch.testing.assert_close(transposed, expected, rtol=0, atol=0)
    assert strided[0].is_contiguous()
    one = kernels.gaussian_rope(q[:, :1].expand(2, 3, 4, 8), k, positions, lods)
    torch.testing.assert_close(one[0], kernels.gaussian_rope(q[:, :1].repeat(1, 3, 1, 1), k, positions, lods)[0])
    shared = kernels.gaussian_rope(q, k, positions[0], lods[0])
    torch.testing.assert_close(shared, kernels.gaussian_rope(q, k, positions[:1].expand(2, 3), lods[:1].expand(2, 3)))
    assert kernels.gaussian_rope(q[:, :0], k[:, :0], positions[:, :0])[0].shape == (2, 0, 4, 8)


def test_in_place_overwrites_counts_as_a_write_and_has_the_gradient() -> None:
    q, k, positions, lods = inputs(torch.float32)
    expected = kernels.gaussian_rope(q, k, positions, lods)
    packed = torch.cat((q, k), dim=2)
    views = packed[:, :, :4], packed[:, :, 4:]
    version = packed._version
    returned = kernels.gaussian_rope_(*views, positions, lods)
    assert returned[0] is views[0]
    assert returned[1] is views[1]
    assert packed._version > version
    assert torch.equal(packed, torch.cat(expected, dim=2))

    q, k = q.requires_grad_(), k.requires_grad_()
    functional = torch.autograd.grad(sum(x.sin().sum() for x in kernels.gaussian_rope(q, k, positions, lods)), (q, k))
    in_place = torch.autograd.grad(
        sum(x.sin().sum() for x in kernels.gaussian_rope_(q * 1, k * 1, positions, lods)), (q, k)
    )
    torch.testing.assert_close(in_place, functional)
    saved = (q * 1).exp()  # exp keeps its result, which the rotation then overwrites
    kernels.gaussian_rope_(saved, k * 1, positions, lods)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


@pytest.mark.parametrize("settings", [{}, {"qk_norm_eps": 1e-5}, {"qk_norm_eps": 1e-5, "norm_after": True}], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("frozen", [None, 0, 1])
def test_in_place_has_the_gradient_of_the_copy(
    settings: dict[str, Any], compiled: bool, backend: str, frozen: int | None
) -> None:
    """Of a normalised head it is taken at a value that was overwritten."""
    q, k, positions, lods = inputs(torch.float32)
    pair = [x.requires_grad_(i != frozen) for i, x in enumerate((q, k))]
    trained = [x for x in pair if x.requires_grad]

    def in_place(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.gaussian_rope_(q * 1, k * 1, positions, lods, **settings)

    if compiled:
        torch._dynamo.reset()
        in_place = torch.compile(in_place, backend="aot_eager", fullgraph=True)
    grads = []
    with kernels.use_backend(backend):
        for function in (lambda q, k: kernels.gaussian_rope(q, k, positions, lods, **settings), in_place):
            out = function(*pair)
            grads.append(torch.autograd.grad(out[0].sin().sum() + out[1].cos().sum(), trained))
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("order", ["BTHD", "BHTD", "HBTD", "BTDH"])
def test_in_place_takes_slices_of_a_packed_projection(order: str) -> None:
    """q, k and v side by side along the heads, wherever the heads lie in memory."""
    packed = torch.randn(2, 3, 6, 8)
    expected = kernels.gaussian_rope(packed[:, :, :2].clone(), packed[:, :, 2:4].clone(), torch.arange(3))
    layout = ["BTHD".index(name) for name in order]
    stored = packed.permute(layout).contiguous().permute(torch.tensor(layout).argsort().tolist())
    kernels.gaussian_rope_(stored[:, :, :2], stored[:, :, 2:4], torch.arange(3))
    assert torch.equal(stored, torch.cat((*expected, packed[:, :, 4:]), dim=2))


@pytest.mark.parametrize("grad", [False, True])
def test_in_place_refuses_memory_that_overlaps(grad: bool) -> None:
    positions = torch.arange(3)
    x = torch.randn(2, 3, 6, 8)
    x = x.requires_grad_() * 1 if grad else x
    before = x.detach().clone()
    for q, k, name in (
        (x[:, :1, :4].expand(2, 3, 4, 8), x[:, :, 4:], "q"),
        (x[:, :, :2], x.as_strided((2, 3, 2, 8), (144, 48, 4, 1), 32), "k"),
        (x[:, :, :4], x[:, :, :4], "k"),
        (x[:, :, :4], x[:, :, 3:], "k"),
        (x[..., :4], x[..., 2:6], "k"),
    ):
        with pytest.raises(ValueError, match=rf"{name} must not (be expanded or overlap itself|share memory with q)"):
            kernels.gaussian_rope_(q, k, positions)
    assert torch.equal(x, before)


def test_in_place_refuses_negative_views_before_it_writes_anything() -> None:
    q, k, positions, _ = inputs()
    negative = torch.complex(k, k).conj().imag
    assert negative.is_neg()
    before = q.clone(), negative.clone()
    with pytest.raises(ValueError, match="k must not have the negative bit set"):
        kernels.gaussian_rope_(q, negative, positions)
    with pytest.raises(ValueError, match="q must not have the negative bit set"):
        kernels.gaussian_rope_(negative, q, positions)
    assert torch.equal(q, before[0])
    assert torch.equal(negative, before[1])


def test_in_place_refuses_leaves_before_it_writes_anything() -> None:
    q, k, positions, _ = inputs()
    before = q.clone()
    for leaf in (k.clone().requires_grad_(), k.clone().requires_grad_()[:]):
        with pytest.raises(ValueError, match="k must not be a leaf that requires a gradient, or a view of one"):
            kernels.gaussian_rope_(q, leaf, positions)
    assert torch.equal(q, before)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("frozen", [0, 1])
def test_what_is_made_of_a_frozen_input_needs_no_gradient(frozen: int, backend: str) -> None:
    q, k, positions, lods = inputs()
    with kernels.use_backend(backend):
        pair = [x.clone().requires_grad_(i != frozen) for i, x in enumerate((q, k))]
        out = kernels.gaussian_rope(*pair, positions, lods, qk_norm_eps=1e-5)
        assert [x.requires_grad for x in out] == [i != frozen for i in range(2)]
        both = [x.clone().requires_grad_() for x in (q, k)]
        expected = kernels.gaussian_rope(*both, positions, lods, qk_norm_eps=1e-5)
        other = 1 - frozen
        (grad,) = torch.autograd.grad(out[other].sin().sum(), pair[other])
        torch.testing.assert_close(grad, torch.autograd.grad(expected[other].sin().sum(), both[other])[0])
        # A frozen leaf beside a trained one may be written in place.
        in_place = [pair[i] * 1 if i != frozen else pair[i].detach() for i in range(2)]
        assert kernels.gaussian_rope_(*in_place, positions, lods)[frozen].requires_grad is False


@pytest.mark.parametrize("settings", [{}, {"qk_norm_eps": 1e-5}], ids=str)
def test_what_is_frozen_is_not_turned_back(settings: dict[str, Any]) -> None:
    heads: list[tuple[int, int]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.megactx.gaussian_rope_backward.default:
                heads.append((args[0].shape[2], args[1].shape[2]))
            return function(*args, **(kwargs or {}))

    q, k, positions, lods = inputs()
    for needs in ((True, True), (True, False), (False, True)):
        pair = [x.clone().requires_grad_(needed) for x, needed in zip((q, k), needs, strict=True)]
        with kernels.use_backend("auto"):
            out = kernels.gaussian_rope(*pair, positions, lods, **settings)
        with Recorder():
            sum(y.sum() for y in out).backward()
        assert [x.grad is not None for x in pair] == list(needs)
    assert heads == [(4, 2), (4, 0), (0, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4, 7), "k": torch.zeros(2, 3, 2, 7)}, "q must have an even head dimension"),
        ({"q": torch.zeros(2, 3, 8)}, "q must have 4 dimensions, got shape"),
        ({"k": torch.zeros(2, 4, 2, 8)}, r"k must have shape \[2, 3, Hk, 8\] as q, got \(2, 4, 2, 8\)"),
        ({"k": torch.zeros(2, 3, 2, 8, dtype=torch.float64)}, "k must have the dtype of q"),
        ({"positions": torch.zeros(3)}, "positions must be int32 or int64, got torch.float32"),
        ({"positions": torch.arange(4)}, r"positions must have shape \(3,\), got \(4,\)"),
        ({"positions": [0, 1, 2]}, "positions must be a torch.Tensor, got list"),
        ({"lods": torch.zeros(2, 3, dtype=torch.int64)}, "lods must have shape"),
        ({"sigma": "gauss"}, "sigma must be one of 'none', 'uniform', 'power', got 'gauss'"),
        ({"lod_pairs": 5}, r"lod_pairs must be in \[0, 4\], got 5"),
        ({"base": -1.0}, r"base must be in \[1e-30, 1e\+30\], got -1.0"),
        ({"base": 1e-31}, r"base must be in \[1e-30, 1e\+30\], got 1e-31"),
        ({"base": 1e31}, r"base must be in \[1e-30, 1e\+30\], got 1e\+31"),
        ({"base": "1"}, "base must be positive and finite, got '1'"),
        ({"base": math.inf}, "base must be positive and finite, got inf"),
        ({"lod_pairs": 1.5}, "lod_pairs must be an integer, got 1.5"),
        ({"interleaved": "no"}, "interleaved must be True or False, got 'no'"),
        ({"conjugate": 0}, "conjugate must be True or False, got 0"),
        ({"norm_after": None}, "norm_after must be True or False, got None"),
        ({"block_size": None}, "block_size must be an integer, got None"),
        ({"block_size": 2.5}, "block_size must be an integer, got 2.5"),
        ({"block_size": 2**63}, "block_size must be an integer of 64 bits, got"),
        ({"qk_norm_eps": "a"}, "qk_norm_eps must be None or positive and finite, got 'a'"),
        ({"block_size": 0}, "block_size must be >= 1, got 0"),
        ({"qk_norm_eps": 0.0}, "qk_norm_eps must be None or at least 1.2e-38, got 0.0"),
        ({"qk_norm_eps": 1e-38}, "qk_norm_eps must be None or at least 1.2e-38, got 1e-38"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"q": torch.zeros(2, 3, 4, 8), "k": torch.zeros(2, 3, 2, 8), "positions": torch.arange(3)}
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.gaussian_rope(**(good | change))
