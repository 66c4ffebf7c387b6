"""The losses as modules: PyTorch's numbers with PyTorch's call, K targets, no logits held, weights that move."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from megactx.kernels import MTPLoss
from megactx.nn import LinearMTPCrossEntropyLoss, MTPCrossEntropyLoss

WIDTH, CLASSES = 8, 13


def hidden(*shape: int) -> Tensor:
    return torch.randn(*shape, WIDTH, requires_grad=True)


def targets(*shape: int, ignored: int = -100) -> Tensor:
    drawn = torch.randint(CLASSES, shape)
    return torch.where(torch.rand(shape) < 0.2, ignored, drawn)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(), (5,)], ids=len)
def test_one_target_is_pytorchs_own_loss(reduction: str, label_smoothing: float, shape: tuple[int, ...]) -> None:
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    x = torch.randn(*shape, CLASSES, requires_grad=True)
    y = torch.randint(CLASSES, shape)
    losses = [kind(**options)(x, y) for kind in (nn.CrossEntropyLoss, MTPCrossEntropyLoss)]
    torch.testing.assert_close(losses[1], losses[0])
    gradients = [torch.autograd.grad(loss.sum(), x)[0] for loss in losses]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_linear_loss_is_a_linear_layer_and_the_loss(bias: bool, reduction: str) -> None:
    torch.manual_seed(3)
    layer = nn.Linear(WIDTH, CLASSES, bias=bias)
    torch.manual_seed(3)
    module = LinearMTPCrossEntropyLoss(WIDTH, CLASSES, bias=bias, reduction=reduction)
    for name, parameter in layer.named_parameters():  # the same names, and the same start from the same seed
        assert torch.equal(module.get_parameter(name), parameter)
    module.load_state_dict(layer.state_dict())
    layer.load_state_dict(module.state_dict())

    x, y = hidden(6), targets(6)
    expected = F.cross_entropy(layer(x), y, reduction=reduction)
    found = module(x, y)
    torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(found.sum(), [x, *module.parameters()])
    theirs = torch.autograd.grad(expected.sum(), [x, *layer.parameters()])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(module.logits(x), layer(x))


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyLoss"), reason="comes with torch 2.13")
def test_pytorchs_fused_module_gives_way_to_ours() -> None:
    theirs = nn.LinearCrossEntropyLoss(WIDTH, CLASSES, bias=True, label_smoothing=0.1)
    ours = LinearMTPCrossEntropyLoss(WIDTH, CLASSES, bias=True, label_smoothing=0.1)
    ours.load_state_dict(theirs.linear.state_dict())
    x, y = hidden(7), torch.randint(CLASSES, (7,))
    torch.testing.assert_close(ours(x, y), theirs(x, y))


def test_k_targets_are_k_losses_over_any_leading_shape() -> None:
    weights = (1.0, 0.25, 0.5)
    x, y = hidden(2, 3), targets(2, 3, 3)
    linear = LinearMTPCrossEntropyLoss(WIDTH, CLASSES, step_weights=weights)
    logits = linear.logits(x)
    means = torch.stack([F.cross_entropy(logits.flatten(0, 1), y[..., k].flatten()) for k in range(3)])
    expected = (means * torch.tensor(weights)).sum()
    for result in (
        linear(x, y, return_per_step=True),
        MTPCrossEntropyLoss(step_weights=weights)(logits, y, return_per_step=True),
    ):
        assert isinstance(result, MTPLoss)
        torch.testing.assert_close(result.loss, expected)
        torch.testing.assert_close(result.per_step, means.detach()[None])
        assert not result.per_step.requires_grad
    torch.testing.assert_close(linear(x, y[..., :1], step_weights=(2.0,)), 2 * means[0])
    torch.testing.assert_close(linear(x, y[:, :, None]), expected)  # one context, spelt out
    entries = LinearMTPCrossEntropyLoss(WIDTH, CLASSES, step_weights=weights, reduction="none")
    entries.load_state_dict(linear.state_dict())
    assert entries(x, y).shape == y.shape


def test_contexts_have_their_own_vocabularies_and_weights() -> None:
    sizes, x = (9, 4), hidden(2, 3)
    linear = LinearMTPCrossEntropyLoss(WIDTH, CLASSES, vocab_sizes=sizes, context_weights=(0.75, 0.25))
    y = torch.stack([torch.randint(size, (2, 3)) for size in sizes], dim=-1)
    parts = [
        F.cross_entropy(z.flatten(0, 1), y[..., c].flatten()) for c, z in enumerate(linear.logits(x).split(sizes, -1))
    ]
    expected = 0.75 * parts[0] + 0.25 * parts[1]
    torch.testing.assert_close(linear(x, y), expected)  # [..., C] is one step
    torch.testing.assert_close(linear(x, y[..., None]), expected)
    logits = MTPCrossEntropyLoss(vocab_sizes=sizes)  # by default all alike
    torch.testing.assert_close(logits(linear.logits(x), y), (parts[0] + parts[1]) / 2)


def test_a_tied_loss_has_no_weight_and_trains_the_one_it_is_given() -> None:
    table = nn.Embedding(CLASSES, WIDTH)
    loss = LinearMTPCrossEntropyLoss(WIDTH, CLASSES, tied=True)
    assert not loss.state_dict()
    tokens, y = torch.randint(CLASSES, (6,)), targets(6)
    value = loss(table(tokens), y, table.weight)
    expected = F.cross_entropy(F.linear(table(tokens), table.weight), y)
    torch.testing.assert_close(value, expected)
    ours, theirs = (torch.autograd.grad(v, table.weight)[0] for v in (value, expected))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="weight must be given to a tied loss"):
        loss(table(tokens), y)
    with pytest.raises(ValueError, match="weight must be None"):
        LinearMTPCrossEntropyLoss(WIDTH, CLASSES)(table(tokens), y, table.weight)
    with pytest.raises(ValueError, match=r"weight must have shape \(13, 8\), got \(4, 8\)"):
        loss(table(tokens), y, table.weight[:4])


def test_parts_with_the_counts_of_the_whole_sum_to_it() -> None:
    loss = LinearMTPCrossEntropyLoss(WIDTH, CLASSES, step_weights=(1.0, 0.5))
    x, y = hidden(9), targets(9, 2)
    y[:3] = -100  # a part with no target at all
    counts = (y != -100).sum(0)[None]
    whole = loss(x, y, return_per_step=True)
    parts = [
        loss(x[rows], y[rows], counts=counts, return_per_step=True) for rows in (slice(3), slice(3, 4), slice(4, 9))
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    torch.testing.assert_close(sum(part.per_step for part in parts), whole.per_step)
    gradients = [torch.autograd.grad(v, loss.weight)[0] for v in (sum(part.loss for part in parts), whole.loss)]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_mean_over_no_target_is_zero() -> None:
    loss = LinearMTPCrossEntropyLoss(WIDTH, CLASSES)
    x = hidden(4)
    value = loss(x, torch.full((4,), -100))
    value.backward()
    assert value.item() == 0
    assert not x.grad.any()
    assert not loss.weight.grad.any()
    assert loss(hidden(0), targets(0)).item() == 0


def test_weights_on_the_device_follow_a_schedule_without_compiling_again() -> None:
    schedule = torch.tensor([1.0, 0.5])
    loss = LinearMTPCrossEntropyLoss(WIDTH, CLASSES, step_weights=schedule)
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    x, y = hidden(6), targets(6, 2)
    means = [F.cross_entropy(loss.logits(x), y[:, k]) for k in range(2)]
    for second in (0.5, 0.125, 0.0):
        schedule[1] = second
        expected = means[0] + second * means[1]
        for call in (loss, compiled):
            torch.testing.assert_close(call(x, y), expected)
    assert graphs.frame_count == 1
    assert "step_weights" not in loss.state_dict()
    loss.bfloat16()
    assert loss.weight.dtype == torch.bfloat16
    assert loss.step_weights.dtype == torch.float32


def test_weights_keep_their_numbers_through_the_meta_device_and_stay_where_nothing_moves() -> None:
    schedule = torch.tensor([1.0, 0.5])
    loss = LinearMTPCrossEntropyLoss(WIDTH, CLASSES, device="meta", step_weights=schedule)
    loss.to_empty(device="cpu")  # a deferred initialisation: the parameters are made now
    assert loss.step_weights is schedule
    for move in (loss.bfloat16, loss.cpu):
        move()
        assert loss.step_weights is schedule
    schedule[1] = 0.25
    loss.to("meta")
    assert loss.step_weights.is_meta
    loss.to("meta").to_empty(device="cpu")
    assert torch.equal(loss.step_weights, torch.tensor([1.0, 0.25]))
    with torch.device("meta"):
        made = MTPCrossEntropyLoss(step_weights=torch.tensor([1.0, 0.5]))
    assert made.to_empty(device="cpu").step_weights.isnan().all()  # no number was ever there, and that shows


def test_autocast_rounds_the_products_and_not_the_loss() -> None:
    loss = LinearMTPCrossEntropyLoss(WIDTH, CLASSES, step_weights=(1.0, 0.5))
    x, y = hidden(32), targets(32, 2)
    expected = loss(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(x, y)
    value.backward()
    assert value.dtype == x.grad.dtype == loss.weight.grad.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=0.02, atol=0.02)


def test_softcap_and_z_loss_are_those_of_the_operator() -> None:
    x, y = hidden(5), targets(5)
    loss = LinearMTPCrossEntropyLoss(WIDTH, CLASSES, softcap=0.5, z_loss=0.1)
    capped = loss.logits(x)
    assert capped.abs().max() < 0.5
    valid = y != -100
    z = capped.logsumexp(-1).square()[valid].mean()
    torch.testing.assert_close(loss(x, y), F.cross_entropy(capped, y) + 0.1 * z)


def test_no_logits_are_held_forwards_or_backwards() -> None:
    rows, classes = 2048, 25000
    loss = LinearMTPCrossEntropyLoss(4, classes)
    x, y = torch.randn(rows, 4, requires_grad=True), torch.randint(classes, (rows,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss(x, y).backward()
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert 0 < largest < rows * classes * 4 / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_sizes": (5, 7)}, "vocab_sizes must add up to num_classes = 13"),
        ({"vocab_sizes": (13, 0)}, "vocab_sizes must be at least 1, got 0"),
        ({"reduction": "average"}, "reduction must be one of"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"softcap": 0.0}, "softcap"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"ignore_index": 0.5}, "ignore_index"),
        ({"context_weights": (0.5, 0.5)}, "context_weights must have 1 entries"),
        ({"step_weights": 1.0}, "step_weights must be a sequence"),
        ({"step_weights": torch.tensor(1.0)}, "step_weights must have 1 dimensions"),
        ({"weight": torch.ones(CLASSES)}, "weight must be None: classes have no weights here, got Tensor"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"bias": 1}, "bias must be True or False"),
    ],
)
def test_settings_that_could_never_run_are_refused_at_once(options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        LinearMTPCrossEntropyLoss(**{"in_features": WIDTH, "num_classes": CLASSES, **options})


def test_the_first_argument_of_pytorchs_loss_is_taken_where_it_says_nothing() -> None:
    x, y = torch.randn(4, CLASSES), targets(4)
    torch.testing.assert_close(MTPCrossEntropyLoss(None)(x, y), nn.CrossEntropyLoss(None)(x, y))
    with pytest.raises(TypeError, match="weight must be None: classes have no weights here"):
        MTPCrossEntropyLoss(torch.ones(CLASSES))


def test_wrong_input_is_named() -> None:
    loss = LinearMTPCrossEntropyLoss(WIDTH, CLASSES)
    x = hidden(2, 3)
    with pytest.raises(ValueError, match=r"target must have shape \[2, 3\] or \[2, 3, K\] .*got \(3, 2\)"):
        loss(x, targets(3, 2))
    with pytest.raises(ValueError, match=r"target must have shape \[2, 3, 2\] or \[2, 3, 2, K\]"):
        MTPCrossEntropyLoss(vocab_sizes=(9, 4))(loss.logits(x), targets(2, 3))
    with pytest.raises(TypeError, match="targets must be int64"):
        loss(x, torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"target must be a torch\.Tensor, got list"):
        loss(x, [0])
    with pytest.raises(TypeError, match="input must be float16"):
        loss(x.long(), targets(2, 3))
    with pytest.raises(ValueError, match="step_weights must have 2 entries"):
        loss(x, targets(2, 3, 2))
    beyond = torch.zeros(2, 3, dtype=torch.int64)
    beyond[1, 1] = 13
    with pytest.raises(ValueError, match=r"\[0, 13\) or ignore_index \(-100\), got 13 at row 4"):
        loss(x, beyond)
    with pytest.raises(ValueError, match="counts"):
        loss(x, targets(2, 3), counts=torch.ones(2, 2))
