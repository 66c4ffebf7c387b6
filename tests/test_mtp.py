"""Cross-entropy against K targets: the formula entry by entry, torch's own loss at K = 1, and the gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megactx import kernels
from megactx.kernels import MTPLoss, mtp_cross_entropy
from megactx.kernels.mtp import reference, rows

SIZES = (5, 9)
STEPS = (1.0, 0.5, 0.25)


def naive(
    logits: Tensor,
    targets: Tensor,
    sizes: tuple[int, ...] = SIZES,
    *,
    step_weights: Any = STEPS,
    context_weights: Any = None,
    ignore_index: int = -1,
    reduction: str = "mean",
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The contract, one entry at a time, in float64: (loss, per_step)."""
    rows, contexts, steps = targets.shape
    context_weights = context_weights or [1 / contexts] * contexts
    entries = torch.zeros(rows, contexts, steps, dtype=torch.float64)
    for n in range(rows):
        start = 0
        for c, size in enumerate(sizes):
            z = logits[n, start : start + size].double()
            start += size
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            lse = math.log(sum(math.exp(value) for value in z.tolist()))
            for k in range(steps):
                y = int(targets[n, c, k])
                if y != ignore_index:
                    sharp, flat = lse - z[y], lse - z.mean()
                    entries[n, c, k] = (1 - label_smoothing) * sharp + label_smoothing * flat + z_loss * lse**2
    counts = (targets != ignore_index).sum(0)
    per_step = entries.sum(0) / counts.clamp(min=1)
    weights = torch.tensor(context_weights)[:, None].double() * torch.tensor(step_weights)
    if reduction == "none":
        return entries * weights, per_step
    return ((per_step if reduction == "mean" else entries.sum(0)) * weights).sum(), per_step


def inputs(dtype: torch.dtype = torch.float64, rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, sum(SIZES), generator=generator, dtype=torch.float64)
    targets = torch.stack([torch.randint(-1, size, (rows, len(STEPS)), generator=generator) for size in SIZES], dim=1)
    return logits.to(dtype), targets


def multi(logits: Tensor, targets: Tensor, **options: Any) -> MTPLoss:
    return mtp_cross_entropy(logits, targets, **({"vocab_sizes": SIZES, "step_weights": STEPS} | options))


OPTIONS: list[dict[str, Any]] = [
    {},
    {"context_weights": (0.3, 2.0)},
    {"label_smoothing": 0.2},
    {"z_loss": 0.05},
    {"softcap": 2.5},
    {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.01, "context_weights": (1.0, 0.0)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_matches_the_formula(options: dict[str, Any], reduction: str, backend: str) -> None:
    logits, targets = inputs()
    with kernels.use_backend(backend):
        loss, per_step = multi(logits, targets, reduction=reduction, **options)
    expected, expected_per_step = naive(logits, targets, reduction=reduction, **options)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(per_step, expected_per_step)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_target_is_torch_cross_entropy(reduction: str, smoothing: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(20, 11, requires_grad=True)
    targets = torch.randint(0, 11, (20,))
    targets[3:6] = -1
    ours = mtp_cross_entropy(logits, targets[:, None], reduction=reduction, label_smoothing=smoothing)
    theirs = F.cross_entropy(logits, targets, ignore_index=-1, reduction=reduction, label_smoothing=smoothing)
    loss = ours.loss.squeeze(1) if reduction == "none" else ours.loss
    torch.testing.assert_close(loss, theirs)
    upstream = torch.randn_like(theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, upstream)[0] for x in (loss, theirs)))


def test_shapes_of_one_context_and_of_several() -> None:
    logits, targets = torch.randn(4, 6), torch.zeros(4, 2, dtype=torch.int64)
    one = mtp_cross_entropy(logits, targets, step_weights=(1.0, 1.0), reduction="none")
    assert one.loss.shape == (4, 2)
    assert one.per_step.shape == (1, 2)
    same = mtp_cross_entropy(logits, targets[:, None], step_weights=(1.0, 1.0), reduction="none")
    assert same.loss.shape == (4, 1, 2)
    for backend in ("reference", "auto"):
        with kernels.use_backend(backend):
            trained = mtp_cross_entropy(logits.clone().requires_grad_(), targets, step_weights=(1.0, 1.0))
        assert trained.loss.requires_grad
        assert not trained.per_step.requires_grad


def test_the_parts_sum_to_the_whole() -> None:
    logits, targets = inputs()
    total = multi(logits, targets, reduction="sum").loss
    torch.testing.assert_close(multi(logits, targets, reduction="none").loss.sum(), total)
    loss, per_step = multi(logits, targets, context_weights=(0.2, 0.8))
    torch.testing.assert_close(loss, (per_step * torch.tensor([[0.2], [0.8]]).double() * torch.tensor(STEPS)).sum())
    # Context by context, each alone.
    alone = [
        mtp_cross_entropy(z, targets[:, c], step_weights=STEPS).loss for c, z in enumerate(logits.split(SIZES, dim=1))
    ]
    torch.testing.assert_close(loss, 0.2 * alone[0] + 0.8 * alone[1])


def test_duplicate_targets_add_and_steps_commute() -> None:
    logits, targets = inputs()
    logits.requires_grad_()

    def gradient(t: Tensor, weights: tuple[float, ...]) -> Tensor:
        return torch.autograd.grad(multi(logits, t, step_weights=weights).loss, logits)[0]

    doubled = targets[:, :, :1].expand(-1, -1, 3)
    torch.testing.assert_close(gradient(doubled, (1.0, 0.5, 0.25)), gradient(targets[:, :, :1], (1.75,)))
    torch.testing.assert_close(gradient(targets.flip(-1), STEPS[::-1]), gradient(targets, STEPS))
    # Linear in the weights.
    parts = [gradient(targets, tuple(w * (i == k) for i, w in enumerate(STEPS))) for k in range(3)]
    torch.testing.assert_close(sum(parts), gradient(targets, STEPS))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_ignored_entries_are_zero_without_a_sign(backend: str) -> None:
    logits, targets = inputs()
    with kernels.use_backend(backend):
        loss = multi(logits, targets, reduction="none").loss
    assert (loss[targets == -1] == 0).all()
    assert not loss.signbit().any()


def test_ignored_rows_contribute_nothing() -> None:
    logits, targets = inputs()
    logits.requires_grad_()
    tail = torch.full((5, 2, 3), -1)
    longer = torch.cat((logits, 100 * torch.randn(5, 14, dtype=torch.float64)))
    padded, plain = multi(longer, torch.cat((targets, tail))), multi(logits, targets)
    torch.testing.assert_close(padded, plain)
    grads = [torch.autograd.grad(x.loss, logits)[0] for x in (padded, plain)]
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("rows", [0, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_valid_target_is_zero_with_zero_gradients(rows: int, reduction: str) -> None:
    logits = torch.randn(rows, 14, requires_grad=True)
    loss, per_step = multi(logits, torch.full((rows, 2, 3), -1), reduction=reduction, z_loss=0.1, label_smoothing=0.1)
    assert (loss == 0).all()
    assert (per_step == 0).all()
    assert not loss.signbit().any()
    loss.sum().backward()
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_ignore_index_may_be_any_number() -> None:
    logits, targets = inputs()
    expected = multi(logits, targets)
    for index in (-100, 10**6):
        torch.testing.assert_close(multi(logits, targets.where(targets >= 0, index), ignore_index=index), expected)
    kept, _ = naive(logits, targets.clamp(min=0), ignore_index=0)
    torch.testing.assert_close(multi(logits, targets.clamp(min=0), ignore_index=0).loss, kept)


def test_weights_may_be_tensors_that_change() -> None:
    logits, targets = inputs()
    steps, contexts = torch.tensor(STEPS), torch.tensor([0.3, 2.0], dtype=torch.float64)
    got = multi(logits, targets, step_weights=steps, context_weights=contexts)
    torch.testing.assert_close(got, multi(logits, targets, context_weights=(0.3, 2.0)))
    steps.mul_(2)
    torch.testing.assert_close(multi(logits, targets, step_weights=steps, context_weights=contexts).loss, 2 * got.loss)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_reference_has_first_and_second_derivatives(options: dict[str, Any], reduction: str) -> None:
    logits, targets = inputs(rows=4)
    logits.requires_grad_()
    with kernels.use_backend("reference"):

        def function(z: Tensor) -> Tensor:
            return multi(z, targets, reduction=reduction, **options).loss

        assert torch.autograd.gradcheck(function, (logits,))
        assert torch.autograd.gradgradcheck(function, (logits,))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_the_operator_has_the_gradient_of_the_reference(
    options: dict[str, Any], reduction: str, chunk: int, monkeypatch: Any
) -> None:
    for module in (reference, rows):
        monkeypatch.setattr(module, "_CHUNK_LOGITS", chunk)
    logits, targets = inputs()
    logits.requires_grad_()
    grads = []
    for backend in ("reference", "auto"):
        with kernels.use_backend(backend):
            loss = multi(logits, targets, reduction=reduction, **options).loss
            grads.append(torch.autograd.grad(loss.square().sum(), logits)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-10, atol=1e-12)


def test_the_parts_of_a_batch_add_up_to_it_with_the_counts_of_the_whole() -> None:
    """Gradient accumulation and data parallelism: every share divides by the same counts, whole or fractional."""
    logits, targets = inputs()
    logits.requires_grad_()
    whole = multi(logits, targets)
    (wanted,) = torch.autograd.grad(whole.loss, logits)
    counts = (targets != -1).sum(0)
    for backend in ("reference", "auto"):
        for given, factor in ((counts, 1), (counts.float() / 8, 1 / 8)):  # the mean over 8 ranks is taken by others
            with kernels.use_backend(backend):
                shares = [multi(logits[part], targets[part], counts=given) for part in (slice(0, 3), slice(3, 12))]
            torch.testing.assert_close(sum(s.loss for s in shares) * factor, whole.loss)
            torch.testing.assert_close(sum(s.per_step for s in shares) * factor, whole.per_step)
            torch.testing.assert_close(torch.autograd.grad(sum(s.loss for s in shares) * factor, logits)[0], wanted)


def test_a_count_of_zero_is_for_nothing_valid_and_shows_where_that_is_not_so() -> None:
    logits, targets = inputs(torch.float32)
    targets[:, 1] = -1
    counts = (targets != -1).sum(0)
    assert (counts[1] == 0).all()
    torch.testing.assert_close(multi(logits, targets, counts=counts), multi(logits, targets))
    assert multi(logits, targets, counts=torch.zeros(2, 3)).loss == math.inf


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_at_most_that_of_torch(dtype: torch.dtype) -> None:
    """Loss in float32 whatever the input; the gradient no worse than torch's in the same dtype."""
    torch.manual_seed(0)
    logits = (5 * torch.randn(64, 50)).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (64,))
    exact_input = logits.detach().double().requires_grad_()
    exact = F.cross_entropy(exact_input, targets)
    theirs = F.cross_entropy(logits, targets)
    ours = mtp_cross_entropy(logits, targets[:, None]).loss
    assert ours.dtype == torch.float32
    assert abs(ours.item() - exact.item()) <= abs(theirs.item() - exact.item()) + 1e-6
    (truth,) = torch.autograd.grad(exact, exact_input)
    errors = [(torch.autograd.grad(x, logits)[0].double() - truth).abs() for x in (ours, theirs)]
    floor = torch.finfo(dtype).eps * truth.abs() + torch.finfo(dtype).smallest_normal + 1e-9
    assert (errors[0] <= errors[1].max() + floor).all()


def test_a_certain_prediction_keeps_its_small_loss() -> None:
    logits = torch.tensor([[30.0, 0.0, 0.0], [1e4, 1e4 - 12, -1e4], [0.0, -math.inf, 1.0]], requires_grad=True)
    targets = torch.tensor([[0], [0], [2]])
    loss, _ = mtp_cross_entropy(logits, targets, reduction="none")
    expected = F.cross_entropy(logits.double(), targets[:, 0], reduction="none")
    torch.testing.assert_close(loss[:, 0].double(), expected, rtol=1e-5, atol=1.2e-7)
    loss.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(3), rtol=0, atol=2e-7)


def test_strided_and_expanded_logits() -> None:
    logits, targets = inputs(torch.float32)
    expected = multi(logits, targets)
    wide = torch.zeros(24, 28)
    wide[::2, ::2] = logits
    for view in (wide[::2, ::2], logits.T.contiguous().T):
        torch.testing.assert_close(multi(view, targets.transpose(0, 2).contiguous().transpose(0, 2)), expected)
    row = logits[:1].clone().requires_grad_()
    (got,) = torch.autograd.grad(multi(row.expand(12, -1), targets).loss, row)
    (wanted,) = torch.autograd.grad(multi(row.repeat(12, 1), targets).loss, row)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_the_operator_returns_the_logsumexp_of_each_row_and_context(z_loss: float) -> None:
    logits, targets = inputs()
    logits[0, 0] = -math.inf
    ones = torch.ones(3), torch.ones(2)
    options = (SIZES, *ones, -1, "mean", None, 0.0, z_loss, None)
    expected = torch.stack([z.logsumexp(1) for z in logits.split(SIZES, dim=1)], dim=1)
    expected[(targets == -1).all(-1)] = 0  # not looked at
    for function in (reference.mtp_cross_entropy, torch.ops.megactx.mtp_cross_entropy):
        torch.testing.assert_close(function(logits, targets, *options)[2], expected)


def test_a_target_outside_its_vocabulary_is_named() -> None:
    logits, targets = inputs()
    targets[7, 1, 2] = 9
    message = r"targets must be in \[0, 9\) or ignore_index \(-1\), got 9 at row 7, context 1, step 2"
    for backend in ("reference", "auto"):
        with kernels.use_backend(backend), pytest.raises(ValueError, match=message):
            multi(logits, targets)
    targets[7, 1, 2] = -2
    with pytest.raises(ValueError, match="got -2 at row 7"):
        multi(logits, targets)


@pytest.mark.parametrize("ignore_index", [-1, 3, -100, 20])
def test_a_target_outside_its_vocabulary_is_found_among_any_others(ignore_index: int) -> None:
    """The smallest and the largest of all do not tell the contexts apart, nor what is ignored."""
    logits, targets = inputs()
    for other in (0, ignore_index):
        for context, bad in ((0, 5), (0, 8), (1, 9), (0, -1), (1, -2), (1, -101), (1, 2**40)):
            if bad == ignore_index:
                continue
            targets.fill_(other)[7, context, 2] = bad
            with pytest.raises(ValueError, match=f"got {bad} at row 7, context {context}, step 2"):
                multi(logits, targets, ignore_index=ignore_index)
            multi(logits, targets.fill_(other), ignore_index=ignore_index)


@pytest.mark.parametrize("target", [9, -2, 2**40])
def test_where_targets_are_not_looked_at_one_outside_its_vocabulary_makes_the_loss_nan(target: int) -> None:
    """In a traced graph, as on a GPU: nothing is read out of bounds, and the other entries keep their values."""
    torch._dynamo.reset()
    logits, targets = inputs()
    expected = multi(logits, targets, reduction="none").loss
    targets[7, 1, 2] = target
    with kernels.use_backend("reference"):
        compiled = torch.compile(multi, backend="eager", fullgraph=True)
        loss = compiled(logits, targets, reduction="none").loss
        assert compiled(logits, targets).loss.isnan()
    assert loss[7, 1, 2].isnan()
    loss[7, 1, 2] = expected[7, 1, 2]
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_sizes": (5, 8)}, "vocab_sizes must add up to the width of logits = 14"),
        ({"targets": torch.zeros(12, 3, dtype=torch.int64)}, r"targets must have shape \[12, 2, K\], got \(12, 3\)"),
        ({"targets": torch.zeros(12, 2, 3)}, "targets must be int64, got torch.float32"),
        ({"step_weights": (1.0,)}, r"step_weights must have 3 entries, one per step ahead \(K\), got 1"),
        ({"context_weights": (1.0,)}, r"context_weights must have 2 entries, one per context \(C\), got 1"),
        ({"step_weights": torch.ones(3, requires_grad=True)}, "step_weights must not require a gradient"),
        ({"targets": torch.zeros(12, 2, 0, dtype=torch.int64)}, r"targets must have at least one step ahead \(K\)"),
        ({"counts": torch.ones(3)}, "counts must have 2 dimensions"),
        ({"counts": torch.ones(2, 2)}, r"counts must have shape \(2, 3\), got \(2, 2\)"),
        ({"counts": torch.ones(2, 3).bool()}, "counts must be int32, int64, float32 or float64, got torch.bool"),
        ({"counts": torch.ones(2, 3, requires_grad=True)}, "counts must not require a gradient"),
        ({"counts": 4}, "counts must be a torch.Tensor, got int"),
        ({"counts": torch.ones(2, 3), "reduction": "sum"}, 'counts must be None with reduction="sum"'),
        ({"reduction": "avg"}, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        ({"vocab_sizes": 14}, "vocab_sizes must be a sequence of integers, got 14"),
        ({"step_weights": 1.0}, "step_weights must be a sequence of numbers or a tensor, got 1.0"),
        ({"step_weights": None}, "step_weights must be a sequence of numbers or a tensor, got None"),
        ({"step_weights": (1.0, "a", 0.0)}, "step_weights must be finite numbers, got 'a'"),
        ({"context_weights": (1.0, math.nan)}, "context_weights must be finite numbers, got nan"),
        ({"ignore_index": -1.5}, "ignore_index must be an integer, got -1.5"),
        ({"softcap": "a"}, "softcap must be None or positive and finite, got 'a'"),
        ({"softcap": math.inf}, "softcap must be None or positive and finite, got inf"),
        ({"label_smoothing": None}, r"label_smoothing must be in \[0, 1\], got None"),
        ({"z_loss": math.inf}, "z_loss must be >= 0 and finite, got inf"),
        ({"softcap": 0.0}, "softcap must be None or positive"),
        ({"softcap": 1e39}, "softcap must be None or positive and finite, in float32, got 1e[+]39"),
        ({"softcap": 1e-50}, "softcap must be None or positive and finite, in float32, got 1e-50"),
        (
            {"step_weights": torch.ones(3) * 1j},
            "step_weights must be a tensor of floating-point numbers or integers, got",
        ),
        ({"context_weights": torch.ones(2).bool()}, "context_weights must be a tensor of .* integers, got torch.bool"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\]"),
        ({"z_loss": -1.0}, "z_loss must be >= 0"),
        ({"logits": torch.zeros(12, 14, 1)}, "logits must have 2 dimensions"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    logits, targets = inputs()
    good = {"logits": logits, "targets": targets, "vocab_sizes": SIZES, "step_weights": STEPS}
    with pytest.raises((ValueError, TypeError), match=message):
        mtp_cross_entropy(**(good | change))
