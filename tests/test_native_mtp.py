"""The C++ row primitives of the multi-token loss against float64 autograd: values, gradients, layouts, odd values."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megactx import kernels

pytestmark = pytest.mark.skipif(
    kernels.backends()["mtp_rows"]["cpp"] != "live", reason="the C++ extension was not built"
)
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SIZES = [[1], [2], [3], [7], [17], [255], [257], [1024], [1025], [5003], [3, 1, 700, 64], [1, 2, 33, 2], [50257]]
INF, NAN = math.inf, math.nan
Columns = tuple[Tensor, Tensor, Tensor]


class Case(NamedTuple):
    """What the three operators take."""

    logits: Tensor
    targets: Tensor
    weights: Tensor
    vocab_sizes: list[int]
    ignore_index: int = -1
    softcap: float | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0


class Truth(NamedTuple):
    log_p: Tensor
    mean_log_p: Tensor
    lse: Tensor
    grad: Tensor


def case(
    vocab_sizes: list[int],
    rows: int = 5,
    steps: int = 3,
    dtype: torch.dtype = torch.float32,
    spread: float = 3.0,
    seed: int = 0,
    **options: float | None,
) -> Case:
    """Random logits; a fifth of the targets is ignored, and some repeat one another."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, sum(vocab_sizes), generator=generator) * spread).to(dtype)
    shape = (rows, steps)
    targets = torch.stack([torch.randint(size, shape, generator=generator) for size in vocab_sizes], 1)
    targets = torch.where(torch.rand(targets.shape, generator=generator) < 0.2, -1, targets)
    repeats = torch.rand(rows, 1, 1, generator=generator) < 0.3
    targets = torch.where(repeats, targets[..., :1], targets)
    weights = torch.rand(targets.shape, generator=generator)
    return Case(logits, targets, weights, vocab_sizes, **options)  # type: ignore[arg-type]


def forward(c: Case) -> Columns:
    mean = c.label_smoothing > 0
    return torch.ops.megactx.mtp_rows(c.logits, c.targets, c.vocab_sizes, c.ignore_index, c.softcap, mean)


def backward(c: Case, columns: Columns | None = None) -> Tensor:
    log_p, _, lse = columns or forward(c)
    return torch.ops.megactx.mtp_rows_backward(c.logits, c.targets, log_p, lse, *c[2:])


def in_place(c: Case, logits: Tensor | None = None) -> tuple[Columns, Tensor]:
    logits = c.logits.clone() if logits is None else logits
    columns = torch.ops.megactx.mtp_rows_(logits, *c[1:])
    return columns, logits


def truth(c: Case) -> Truth:
    """The definition, by autograd in float64. Targets must be inside their vocabularies or ignored."""
    logits = c.logits.double().clone().requires_grad_()
    z = logits if c.softcap is None else c.softcap * torch.tanh(logits / c.softcap)
    valid = c.targets != c.ignore_index
    found = []
    for context, segment in enumerate(z.split(c.vocab_sizes, dim=1)):
        log_softmax = torch.log_softmax(segment, -1)
        log_p = log_softmax.gather(1, c.targets[:, context].where(valid[:, context], 0))
        found.append((log_p, log_softmax.mean(-1), segment.logsumexp(-1)))
    log_p, mean, lse = (torch.stack(column, 1) for column in zip(*found, strict=True))
    entry = -(1 - c.label_smoothing) * log_p - c.label_smoothing * mean[..., None] + c.z_loss * lse[..., None] ** 2
    (entry * c.weights.double()).where(valid, 0).sum().backward()
    assert logits.grad is not None
    any_valid = valid.any(-1)
    columns = (log_p.where(valid, 0), mean.where(any_valid, 0), lse.where(any_valid, 0))
    return Truth(*(column.detach() for column in columns), logits.grad)


def close(got: Tensor, wanted: Tensor, relative: float, absolute: float) -> None:
    torch.testing.assert_close(got.double(), wanted.detach().double(), rtol=relative, atol=absolute)


def check(c: Case) -> None:
    """All three operators: the first three columns to a few ulp, the gradient rounded once."""
    wanted, columns = truth(c), forward(c)
    wide = c.logits.dtype == torch.float64
    accumulated = torch.float64 if wide else torch.float32
    unit = 1e-13 if wide else 4e-7
    largest = max(1.0, float(c.logits.abs().max()) if c.softcap is None else c.softcap)
    for got, exact in zip(columns, wanted, strict=False):
        assert got.dtype == accumulated
        if got.numel():
            close(got, exact, unit, unit * (1 if c.softcap is None else largest))
    assert columns[1].shape == (c.targets.shape[:2] if c.label_smoothing > 0 else (0,))
    grad = backward(c, columns)
    assert grad.dtype == c.logits.dtype
    assert grad.shape == c.logits.shape
    scale = float(c.weights.sum(-1).max()) * (1 + 2 * c.z_loss * float(wanted.lse.abs().max()))
    error = 2e-13 if wide else 6e-7
    rounding = 0.5 * torch.finfo(c.logits.dtype).eps
    smallest = torch.finfo(c.logits.dtype).smallest_normal * torch.finfo(c.logits.dtype).eps
    close(grad, wanted.grad, rounding + error, error * scale * (1 if c.softcap is None else largest) + smallest)
    again, written = in_place(c)
    assert torch.equal(written, grad)
    assert all(torch.equal(x, y) for x, y in zip(again, columns, strict=True))


OPTIONS = [
    dict(zip(("softcap", "label_smoothing", "z_loss"), values, strict=True))
    for values in itertools.product((None, 5.0), (0.0, 0.1), (0.0, 1e-2))
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients_are_the_definition(dtype: torch.dtype, sizes: list[int]) -> None:
    for i, options in enumerate(OPTIONS):
        check(case(sizes, dtype=dtype, seed=i, **options))


@pytest.mark.parametrize("steps", range(1, 9))
def test_any_number_of_targets(steps: int) -> None:
    for sizes in ([40], [2, 300]):
        check(case(sizes, rows=20, steps=steps, label_smoothing=0.1, z_loss=1e-3))
        check(case(sizes, rows=20, steps=steps, dtype=torch.bfloat16))


def test_one_target_is_the_cross_entropy_of_pytorch() -> None:
    logits = torch.randn(9, 1000, requires_grad=True)
    targets = torch.randint(1000, (9,))
    loss = torch.nn.functional.cross_entropy(logits, targets)
    loss.backward()
    c = Case(logits.detach(), targets[:, None, None], torch.full((9, 1, 1), 1 / 9), [1000])
    close(-forward(c)[0].mean(), loss, 1e-6, 0)
    assert logits.grad is not None
    close(backward(c), logits.grad, 1e-6, 1e-8)


def test_equal_targets_add_up() -> None:
    c = case([50], steps=4)
    targets = torch.tensor([3, 7, 3, 3]).expand(5, 1, 4)
    merged = torch.stack((c.weights[..., [0, 2, 3]].sum(-1), c.weights[..., 1]), -1)
    grads = [backward(c._replace(targets=targets)), backward(c._replace(targets=targets[..., :2], weights=merged))]
    close(grads[0], grads[1], 1e-6, 1e-7)
    assert (grads[0][:, [3, 7]] < 0).all()


def test_the_gradient_is_linear_in_the_weights() -> None:
    c = case([300], steps=3, label_smoothing=0.1, z_loss=0.01)
    parts = sum(backward(c._replace(weights=c.weights * (torch.arange(3) == k))).double() for k in range(3))
    assert isinstance(parts, Tensor)
    close(backward(c), parts, 1e-6, 1e-7)


@pytest.mark.parametrize("ignore_index", [-100, 0, 3, 10**15])
def test_ignored_targets_may_lie_inside_the_vocabulary(ignore_index: int) -> None:
    c = case([7, 12], rows=30)
    c = c._replace(targets=torch.where(c.targets == -1, ignore_index, c.targets), ignore_index=ignore_index)
    check(c)
    nothing = c._replace(targets=torch.full_like(c.targets, ignore_index), logits=torch.full_like(c.logits, NAN))
    columns, grad = in_place(nothing)
    assert not any(x.any() for x in (*columns, grad, backward(nothing)))  # not looked at, and exactly 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_context_without_targets_is_not_read_beside_one_that_has_some(dtype: torch.dtype) -> None:
    c = case([5, 600, 2], dtype=dtype, label_smoothing=0.1)
    c.targets[:, 0], c.targets[:, 2] = -1, 0
    c.targets[2] = -1
    clean = backward(c)
    c.logits[:, :5], c.logits[2] = NAN, INF
    assert torch.equal(backward(c), clean)
    (log_p, mean, lse), grad = in_place(c)
    assert torch.equal(grad, clean)
    assert not any(x[2].any() or x[:, 0].any() for x in (log_p, mean, lse))
    assert not grad[:, :5].any()


def test_a_bad_target_is_nan_and_stays_in_its_row_and_context() -> None:
    for bad in (7, -2, -100, 2**40, -(2**63), 2**63 - 1):
        c = case([7, 12], rows=4)
        c.targets[:] = 1
        expected, clean = backward(c), forward(c)
        c.targets[1, 0, 1] = bad
        (log_p, _, lse), grad = in_place(c)
        assert log_p.isnan().sum() == 1
        assert log_p[1, 0, 1].isnan()
        log_p[1, 0, 1] = clean[0][1, 0, 1]
        assert torch.equal(log_p, clean[0])
        assert torch.equal(lse, clean[2])
        for result in (grad, backward(c)):
            assert result[1, :7].isnan().all()
            result[1, :7] = expected[1, :7]
            assert torch.equal(result, expected)
        c.targets[1, 0] = torch.tensor([-1, bad, -1])  # nothing else beside it
        assert backward(c)[1, :7].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gap", [1.0, 10.0, 17.0, 25.0, 70.0])
def test_a_certain_target_keeps_its_digits(dtype: torch.dtype, gap: float) -> None:
    """log p and p - 1 are as exact as they are small; lse - z would be 0 or rounding."""
    for softcap, eps in ((None, 0.0), (100.0, 0.0)):
        c = case([2000], dtype=dtype, spread=0.5, softcap=softcap, label_smoothing=eps)
        c.targets[:] = 1234
        c.logits[:, 1234] = gap + 5
        c = c._replace(targets=c.targets[..., :1], weights=c.weights[..., :1] + 0.5)
        z = c.logits.double() if softcap is None else softcap * torch.tanh(c.logits.double() / softcap)
        others = (z - z[:, 1234:1235]).exp().index_fill(1, torch.tensor([1234]), 0.0).sum(1)
        relative = (2e-6 if softcap is None else 5e-5) if dtype == torch.float32 else 1e-11
        (log_p, _, _), grad = in_place(c)
        close(log_p[:, 0, 0], -others.log1p(), relative, 0)
        slope = 1 if softcap is None else 1 - (z[:, 1234] / softcap) ** 2
        close(grad[:, 1234], -c.weights[:, 0, 0].double() * others / (1 + others) * slope, relative, 0)


def test_the_other_targets_of_a_certain_symbol_keep_their_gradients() -> None:
    """With one of two targets certain, the gradients are a_2 (p, -1), without the rounding of a_1 (p - 1)."""
    c = case([500], steps=2, spread=0.1)
    c.targets[:] = torch.tensor([7, 8])
    c.logits[:, 7] = 30.0
    weights = torch.tensor([1e4, 1e-4]).expand(5, 1, 2)
    exact = truth(c._replace(weights=weights)).grad
    close(backward(c._replace(weights=weights))[:, [7, 8]], exact[:, [7, 8]], 1e-5, 0)


def test_exponentials_are_within_3_ulp_down_to_the_smallest_normal_number() -> None:
    """p of the symbol at -x beside one at 0 that has nearly all."""
    x = torch.linspace(0, 86.9, 40_001)
    logits = torch.stack((torch.zeros_like(x), -x), 1)
    c = Case(logits, torch.zeros(len(x), 1, 1, dtype=torch.int64), torch.ones(len(x), 1, 1), [2])
    exact = torch.softmax(logits.double(), 1)[:, 1]
    for grad in (backward(c)[:, 1], -backward(c)[:, 0]):
        assert ((grad.double() - exact).abs() / exact).max() <= 3 * 2**-24 * 2
    gone = backward(c._replace(logits=torch.stack((torch.zeros_like(x), -88 - x), 1)))
    assert not gone.any()


@pytest.mark.parametrize("cap", [0.5, 5.0, 30.0, 1e4])
def test_the_soft_cap_keeps_its_slope_where_it_is_flat(cap: float) -> None:
    """1 - tanh^2 would be 0, or rounding, from 9 caps on."""
    x = torch.linspace(-12, 12, 4001) * cap
    logits = torch.stack((x, torch.zeros_like(x)), 1)
    targets, weights = torch.ones(len(x), 1, 1, dtype=torch.int64), torch.ones(len(x), 1, 1)
    c = Case(logits, targets, weights, [2], softcap=cap)
    slope = torch.cosh(x.double() / cap) ** -2
    p = torch.softmax(torch.stack((cap * torch.tanh(x.double() / cap), torch.zeros_like(x).double()), 1), 1)[:, 0]
    close(backward(c)[:, 0], p * slope, 3e-6 * max(1.0, cap / 5), 2e-38)


@pytest.mark.parametrize("scale", [1e4, 1e30, 1e38])
def test_large_logits(scale: float) -> None:
    """Sizes at which lse is rounded by more than 1: the probabilities are those of the differences."""
    logits = torch.randn(6, 300).clamp(-1, 1) * scale
    logits[0] = scale + torch.arange(300) * float(torch.tensor(scale).nextafter(torch.tensor(INF)) - scale)
    c = case([300], rows=6)._replace(logits=logits)
    wanted = truth(c)
    close(forward(c)[0], wanted.log_p, 1e-6, 1e-6)
    close(backward(c), wanted.grad, 1e-6, 1e-6)
    capped = c._replace(softcap=20.0)
    close(backward(capped), truth(capped).grad, 1e-5, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 31, 64, 65, 97, 256, 1030, 2100])
def test_the_largest_logit_is_found_wherever_it_is(dtype: torch.dtype, size: int) -> None:
    """It alone has log p = -log1p(the others), to more digits than 1 + that has; of several, each has its share."""
    logits = torch.full((size, size), -30.0, dtype=dtype)
    logits.fill_diagonal_(0.0)
    certain = torch.arange(size)[:, None, None]
    c = Case(logits, certain, torch.ones(size, 1, 1), [size])
    rest = (size - 1) * math.exp(-30)
    close(forward(c)[0], torch.full_like(certain, -math.log1p(rest), dtype=torch.float64), 1e-6, 0)
    if size > 2 and dtype != torch.float16:  # whose gradients of 1e-13 are 0
        close(backward(c).diag(), torch.full((size,), -rest), 5e-3 if dtype.itemsize == 2 else 1e-6, 0)
    tied = c._replace(logits=logits.where(torch.rand(size, size) < 0.9, 0.0).fill_diagonal_(0.0))
    close(forward(tied)[0], truth(tied).log_p, 1e-6, 1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_logits_have_no_probability_and_no_gradient(dtype: torch.dtype) -> None:
    c = case([90, 1100], rows=8, dtype=dtype)
    hidden = torch.rand(c.logits.shape) < 0.5
    for offset, context in ((0, 0), (90, 1)):  # no target among them
        hidden.scatter_(1, (c.targets[:, context].clamp(min=0) + offset), False)
    c.logits.masked_fill_(hidden, -INF)
    check(c)
    assert not backward(c)[hidden].any()
    c.targets[0, 0] = torch.tensor([4, 5, -1])
    c.logits[0, 4], c.logits[0, 5] = -INF, 1.0
    (log_p, _, lse), grad = in_place(c)
    assert log_p[0, 0, 0] == -INF
    assert log_p[0, 0, 1].isfinite()
    close(grad[0, 4], -c.weights[0, 0, 0], 4e-3 if dtype.itemsize == 2 else 1e-6, 0)
    close(lse, truth(c).lse, 1e-6, 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_values_that_are_no_numbers_stay_in_their_row_and_context(dtype: torch.dtype, softcap: float | None) -> None:
    c = case([40, 2600], rows=12, dtype=dtype, softcap=softcap, label_smoothing=0.1)
    c.targets[:] = 1
    clean, columns = backward(c), forward(c)
    nan_rows = [1, 3, 5, 6, 7]
    c.logits[1, 40 + 17] = NAN
    c.logits[3, 40 + 2599] = -torch.tensor(NAN)
    c.logits[5, 40:] = NAN
    c.logits[6, 40 : 40 + 1024] = NAN
    c.logits[7, 41] = NAN  # the target itself
    if softcap is None:
        c.logits[8, 41], c.logits[10, 40:] = INF, -INF
        nan_rows += [8, 10]  # as PyTorch's log_softmax has it
        assert torch.log_softmax(c.logits[[8, 10], 40:].float(), 1)[:, 1].isnan().all()
    got, grad = in_place(c)
    for result in (grad, backward(c)):
        assert result[nan_rows, 40:].isnan().all()
        result[nan_rows, 40:] = clean[nan_rows, 40:]
        assert torch.equal(result, clean)
    for column, expected in zip(got, columns, strict=True):
        assert column[nan_rows, 1].isnan().all()
        column[nan_rows, 1] = expected[nan_rows, 1]
        assert torch.equal(column, expected)


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_vocabulary_of_one_symbol_is_certain_unless_it_is_no_number(softcap: float | None) -> None:
    c = Case(torch.tensor([[2.5], [NAN]]), torch.zeros(2, 1, 1, dtype=torch.int64), torch.ones(2, 1, 1), [1])
    c = c._replace(softcap=softcap)
    for result in (forward(c)[0].view(2), backward(c).view(2)):
        assert result[0] == 0
        assert result[1].isnan()


def test_a_soft_cap_makes_infinite_logits_finite() -> None:
    c = case([300], softcap=4.0)
    c.logits[0, :5], c.logits[1, 3:9], c.logits[2] = INF, -INF, -INF
    saturated = c._replace(logits=c.logits.clamp(-1e4, 1e4))
    assert torch.equal(backward(c), backward(saturated))
    assert all(torch.equal(x, y) for x, y in zip(forward(c), forward(saturated), strict=True))


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory; the rest of that memory is NaN (or a bad target)."""
    filler = NAN if x.is_floating_point() else 2**50
    if layout == "transposed":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "shifted":
        return torch.cat((x.new_full((1,), filler), x.flatten()))[1:].view(x.shape)
    if layout == "padded rows":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 5), filler)
        return wide[..., 2:-3].copy_(x)
    wide = x.new_full((x.shape[0] * 2, *x.shape[1:-1], x.shape[-1] * 3), filler)
    return wide[1::2, ..., 1::3].copy_(x)


@pytest.mark.parametrize("layout", ["transposed", "shifted", "padded rows", "every third"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_changes_no_bit(dtype: torch.dtype, layout: str) -> None:
    for options in OPTIONS:
        c = case([1500, 9], dtype=dtype, **options)
        other = c._replace(**{name: laid_out(getattr(c, name), layout) for name in ("logits", "targets", "weights")})
        for got, wanted in zip((*forward(other), backward(other)), (*forward(c), backward(c)), strict=True):
            assert torch.equal(got, wanted)
            assert got.is_contiguous()
        columns, grad = in_place(other, other.logits)
        assert torch.equal(grad, backward(c))
        assert all(torch.equal(x, y) for x, y in zip(columns, forward(c), strict=True))


def test_memory_around_a_view_is_left_alone() -> None:
    for dtype in DTYPES:
        around = torch.randn(9, 140).to(dtype)
        before = around.clone()
        c = case([70, 50], rows=4, dtype=dtype)
        view = around[1::2, 7:127]
        in_place(c, view.copy_(c.logits))
        assert torch.equal(view, backward(c))
        view.copy_(before[1::2, 7:127])
        assert torch.equal(around, before)


def test_expanded_and_overlapping_arguments() -> None:
    c = case([33], rows=6, steps=4)
    stream = torch.randint(33, (6 + 3,))
    windows = stream.as_strided((6, 1, 4), (1, 0, 1))  # K targets without K copies
    weights = torch.tensor([1.0, 0.5, 0.25, 0.125]).expand(6, 1, 4)
    shared = c._replace(targets=windows, weights=weights)
    copied = c._replace(targets=windows.contiguous(), weights=weights.contiguous())
    assert torch.equal(backward(shared), backward(copied))
    assert torch.equal(forward(shared)[0], forward(copied)[0])
    one = c.logits[:1].expand(6, 33)
    assert torch.equal(backward(shared._replace(logits=one)), backward(copied._replace(logits=one.contiguous())))
    for overlapping in (one, c.logits[:, :1].expand(6, 33), torch.randn(50).as_strided((6, 33), (2, 1))):
        with pytest.raises(RuntimeError, match="mtp_rows_: logits must not overlap itself"):
            in_place(shared, overlapping)
    for fine in (one[:1], torch.randn(33, 6).t(), torch.randn(6, 66)[:, ::2]):
        in_place(shared._replace(targets=windows[: len(fine)], weights=weights[: len(fine)]), fine)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_row_alone(dtype: torch.dtype) -> None:
    """Not on the rows around it, its place in memory, or the number of threads."""
    c = case([1, 3000, 40], rows=37, dtype=dtype, softcap=8.0, label_smoothing=0.1, z_loss=1e-3)
    columns, grad = in_place(c)
    for rows in (slice(17, 18), slice(0, 5), slice(20, 37)):
        part = c._replace(logits=c.logits[rows], targets=c.targets[rows], weights=c.weights[rows])
        found, part_grad = in_place(part)
        assert torch.equal(part_grad, grad[rows])
        assert all(torch.equal(x, y[rows]) for x, y in zip(found, columns, strict=True))
    alone = Case(c.logits[:, 1:3001], c.targets[:, 1:2], c.weights[:, 1:2], [3000], *c[4:])  # nor on other contexts
    assert torch.equal(backward(alone), grad[:, 1:3001])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(in_place(c)[1], grad)
            assert torch.equal(backward(c), grad)
    finally:
        torch.set_num_threads(threads)


def test_many_equal_logits_are_summed_without_drift() -> None:
    """300,000 float terms in one running sum would be off by 1e-4."""
    c = Case(torch.full((1, 300_000), 3.25), torch.tensor([[[5]]]), torch.ones(1, 1, 1), [300_000], label_smoothing=0.1)
    log_p, mean, lse = forward(c)
    for column in (-log_p, -mean, lse - 3.25):
        close(column, torch.full_like(column, math.log(300_000), dtype=torch.float64), 1.5e-7, 0)


@pytest.mark.parametrize("shape", [(0, 1, 1, 5), (3, 1, 0, 5), (0, 2, 3, 5), (0, 0, 1, 0), (3, 0, 1, 0)])
def test_empty_inputs_give_empty_results(shape: tuple[int, int, int, int]) -> None:
    rows, contexts, steps, size = shape
    logits, targets = torch.randn(rows, contexts * size), torch.zeros(rows, contexts, steps, dtype=torch.int64)
    c = Case(logits, targets, torch.ones(targets.shape), [size] * contexts, label_smoothing=0.1)
    columns, grad = in_place(c)
    assert [x.shape for x in columns] == [(rows, contexts, steps), (rows, contexts), (rows, contexts)]
    assert grad.shape == logits.shape == backward(c).shape
    assert not grad.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    ops = torch.ops.megactx
    for options in (OPTIONS[0], OPTIONS[-1]):
        c = case([7, 30], dtype=dtype, **options)
        log_p, _, lse = forward(c)
        for mean in (False, True):
            torch.library.opcheck(ops.mtp_rows.default, (c.logits, c.targets, c.vocab_sizes, -1, c.softcap, mean))
        torch.library.opcheck(ops.mtp_rows_.default, tuple(c))
        torch.library.opcheck(ops.mtp_rows_backward.default, (c.logits, c.targets, log_p, lse, *c[2:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(10)}, "logits must have two dimensions"),
        ({"logits": torch.zeros(2, 10, dtype=torch.int64)}, "logits must be float16, bfloat16, float32 or float64"),
        ({"vocab_sizes": [4, 7]}, "logits has 10 columns, vocab_sizes add up to 11"),
        ({"vocab_sizes": [10, 0]}, "vocab_sizes must be positive"),
        ({"vocab_sizes": [2**62, 2**62]}, r"vocab_sizes must be positive and below 2\^31"),
        ({"targets": torch.zeros(2, 1, 3, dtype=torch.int64)}, r"targets must be int64 of shape \[2, 2, K\]"),
        ({"targets": torch.zeros(2, 2, 3, dtype=torch.int32)}, "targets must be int64"),
        ({"targets": torch.zeros(2, 2, dtype=torch.int64)}, "targets must be int64"),
        ({"weights": torch.zeros(2, 2, 2)}, r"weights must be float32 or float64 of shape \[2, 2, 3\]"),
        ({"weights": torch.zeros(2, 2, 3).half()}, "weights must be float32 or float64"),
        ({"softcap": 0.0}, "softcap must be positive, got 0"),
    ],
)
def test_what_could_be_read_out_of_bounds_is_refused(change: dict[str, object], message: str) -> None:
    good = Case(torch.zeros(2, 10), torch.zeros(2, 2, 3, dtype=torch.int64), torch.zeros(2, 2, 3), [4, 6])
    bad = good._replace(**change)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=message):
        in_place(bad)
    with pytest.raises(RuntimeError, match=message):
        backward(bad, (torch.zeros(2, 2, 3), torch.zeros(0), torch.zeros(2, 2)))
