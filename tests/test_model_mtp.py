"""Multi-token prediction of the GPT: seed 003's losses, one step as ever, weights on the device, and the heads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_models import CASE, HEADS, TEXT, VALUE, gradients, make, stream
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from megactx.config import ContextConfig, GPTConfig
from megactx.model import GPT
from megactx.nn import LinearMTPCrossEntropyLoss, MTPCrossEntropyLoss


def plain_mtp(model: GPT, tokens: Tensor, targets: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Seed 003's forward as it is written there, over the same hidden states: logits, main and total loss."""
    logits = model(tokens, last_only=False).logits["text"]
    flat = logits.view(-1, logits.size(-1))
    main = F.cross_entropy(flat, targets[..., 0, 0].reshape(-1), ignore_index=-1)
    total, aux = main, torch.zeros(())
    for k in range(1, targets.shape[-1]):
        aux = aux + F.cross_entropy(flat, targets[..., 0, k].reshape(-1), ignore_index=-1)
    if targets.shape[-1] > 1:
        total = main + weight * aux / (targets.shape[-1] - 1)
    return logits, main, total


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_seeds_loss_and_gradients(tie: bool, steps: int, dtype: torch.dtype) -> None:
    model = make(tie_weights=tie, mtp_steps=steps).to(dtype)
    model.set_mtp_weight(0.25)
    tokens, targets = stream(model, steps)
    _, _, total = plain_mtp(model, tokens, targets, 0.25)
    output = model(tokens, targets)
    torch.testing.assert_close(output.loss, total, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(model, output.loss), gradients(model, total), rtol=1e-5, atol=1e-6)


def test_the_seeds_form_of_the_call() -> None:
    model = make(mtp_steps=3)
    tokens, targets = stream(model, 3)
    expected, main, total = plain_mtp(model, tokens, targets, 0.1)  # 0.1: the seed's default
    idx, by_step = tokens[..., 0], {f"target_{k + 1}": targets[..., 0, k] for k in range(3)}
    for call in ({"targets_dict": by_step}, {"targets": by_step}):
        logits, loss = model(idx, **call)
        torch.testing.assert_close(logits, expected)
        torch.testing.assert_close(loss, total)
        logits, (first, auxiliary) = model(idx, **call, return_logits=False, return_loss_components=True)
        assert logits is None
        torch.testing.assert_close(first, main)
        torch.testing.assert_close(first + 0.1 * auxiliary, total)
    torch.testing.assert_close(gradients(model, first + 0.1 * auxiliary), gradients(model, total), rtol=1e-4, atol=1e-6)
    logits, (first, auxiliary) = model(idx, {"target_1": targets[..., 0, 0]}, return_loss_components=True)
    torch.testing.assert_close(first, main)
    assert auxiliary is None
    several = make(TEXT, CASE, VALUE, mtp_steps=2)
    tokens, targets = stream(several, 2)
    logits, (first, auxiliary) = several(
        tokens, {"target_1": targets[..., 0], "target_2": targets[..., 1]}, return_loss_components=True
    )
    output = several(tokens, targets)
    assert list(logits) == ["text", "case", "value"]
    torch.testing.assert_close(first, output.context_losses.mean())
    torch.testing.assert_close(auxiliary, output.step_losses[:, 1].sum() / 3)
    torch.testing.assert_close(first + 0.1 * auxiliary, output.loss)


@pytest.mark.parametrize("heads", HEADS)
def test_one_step_is_the_model_without_any_bit_for_bit(heads: str) -> None:
    plain, model = make(TEXT, VALUE, CASE), make(TEXT, VALUE, CASE, mtp_steps=3, mtp_heads=heads)
    trunk = {name: p for name, p in model.state_dict().items() if not name.startswith("mtp_blocks.")}
    assert list(plain.state_dict()) == list(trunk)  # a checkpoint of one step fits
    assert all(torch.equal(p, trunk[name]) for name, p in plain.state_dict().items())  # one seed, one trunk
    tokens, targets = stream(plain, 1)
    expected = plain(tokens, targets[..., 0])
    for output in (plain(tokens, targets), model(tokens, targets), model(tokens, targets[..., 0])):
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.context_losses, expected.context_losses)
        assert torch.equal(output.step_losses, expected.context_losses[:, None])
    ours, theirs = gradients(model, output.loss), gradients(plain, expected.loss)
    assert all(torch.equal(ours[name], gradient) for name, gradient in theirs.items())
    assert ours.keys() == theirs.keys()


def test_configs_and_checkpoints_of_before_still_load() -> None:
    model = make(TEXT, CASE)
    data = model.config.to_json()
    del data["mtp_steps"], data["mtp_heads"]
    assert GPTConfig.from_json(data) == model.config
    assert not [name for name in model.state_dict() if "mtp" in name or "criterion" in name or "entries" in name]
    config = GPTConfig((TEXT,), mtp_steps=4, mtp_heads="sequential")
    assert GPTConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("heads", HEADS)
def test_the_loss_is_linear_in_the_weight_and_weight_0_is_the_next_token(heads: str) -> None:
    model = make(TEXT, VALUE, CASE, mtp_steps=3, mtp_heads=heads)
    tokens, targets = stream(model, 3)
    losses, found = [], []
    for weight in (0.0, 0.5, 1.0):
        model.set_mtp_weight(weight)
        output = model(tokens, targets)
        losses.append(output.loss.detach())
        found.append(gradients(model, output.loss))
    torch.testing.assert_close(losses[1], (losses[0] + losses[2]) / 2)
    for name in found[0]:
        middle = (found[0][name] + found[2][name]) / 2
        torch.testing.assert_close(found[1][name], middle, rtol=1e-4, atol=1e-6)
    next_token = gradients(model, model(tokens, targets[..., :1]).loss)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, next_token.get(name, torch.zeros_like(gradient)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("heads", HEADS)
def test_every_context_and_step_has_its_own_mean(heads: str) -> None:
    weights = (3.0, 2.0, 1.0)
    model = make(TEXT, VALUE, CASE, mtp_steps=3, mtp_heads=heads, context_weights=weights)
    tokens, targets = stream(model, 3)
    output = model(tokens, targets)
    shares = torch.tensor([[1.0, 0.05, 0.05]])  # 0.1 over two steps
    expected = (output.step_losses * shares * torch.tensor(weights)[:, None] / 6).sum()
    torch.testing.assert_close(output.loss, expected)
    assert torch.equal(output.context_losses, output.step_losses[:, 0])
    assert torch.equal(output.step_losses[1, 1:], torch.zeros(2))  # numbers are predicted one step ahead
    assert not output.step_losses.requires_grad
    if heads == "shared":
        logits = model(tokens, last_only=False).logits
        for c, name in ((0, "text"), (2, "case")):
            for k in range(3):
                mean = F.cross_entropy(logits[name].flatten(0, 1), targets[:, :, c, k].flatten(), ignore_index=-1)
                torch.testing.assert_close(output.step_losses[c, k], mean)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_loss_with_logits_is_of_them_and_the_same_to_rounding(heads: str, steps: int) -> None:
    model = make(TEXT, VALUE, CASE, mtp_steps=3, mtp_heads=heads)
    tokens, targets = stream(model, steps)
    counts = (targets != -1).sum((0, 1)) + 3
    without, output = model(tokens, targets, counts=counts), model(tokens, targets, counts=counts, return_logits=True)
    assert without.logits == {}
    torch.testing.assert_close(output.loss, without.loss)
    torch.testing.assert_close(output.step_losses, without.step_losses)
    ours, theirs = gradients(model, without.loss), gradients(model, output.loss)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    expected = model(tokens, last_only=False).logits  # heads or not: those of the next token
    assert all(torch.equal(output.logits[name], expected[name]) for name in expected)


def test_logits_that_are_returned_are_not_made_a_second_time() -> None:
    model = GPT(GPTConfig((ContextConfig("text", vocab_size=5000),), 16, 1, 1, n_embd=8, mtp_steps=2)).train()
    tokens, targets = stream(model, 2, length=16)

    def products(**options: bool) -> int:
        """Multiplications by a matrix as large as the head."""
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            model(tokens, targets, **options).loss.backward()
        found = [event.input_shapes for event in profiler.events() if event.name in ("aten::mm", "aten::addmm_")]
        return sum(any(5000 in shape for shape in shapes) for shapes in found)

    assert products(return_logits=True) == products() == 3  # one forward, two backward


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", [torch.int64, torch.float32])
def test_micro_batches_with_the_counts_of_the_batch_sum_to_it(heads: str, kind: torch.dtype) -> None:
    model = make(TEXT, VALUE, CASE, mtp_steps=3, mtp_heads=heads)
    tokens, targets = stream(model, 3, batch=4)
    targets[0, 1:] = -1
    if heads == "sequential":  # what it cannot use is not to be counted
        targets[0] = -1
    counts = (targets != -1).sum((0, 1)).to(kind)
    whole = model(tokens, targets)
    parts = [model(tokens[rows], targets[rows], counts=counts) for rows in (slice(1), slice(1, 2), slice(2, 4))]
    for field in ("loss", "context_losses", "step_losses"):
        torch.testing.assert_close(sum(getattr(part, field) for part in parts), getattr(whole, field))
    summed = gradients(model, sum(part.loss for part in parts))
    for name, gradient in gradients(model, whole.loss).items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6)
    by_step = {f"target_{k + 1}": targets[1:, ..., k] for k in range(3)}
    _, (main, auxiliary) = model(tokens[1:], by_step, counts=counts, return_loss_components=True)
    torch.testing.assert_close(main + 0.1 * auxiliary, parts[1].loss + parts[2].loss)


@pytest.mark.parametrize("heads", HEADS)
def test_compiles_to_one_graph_whatever_the_weight(heads: str) -> None:
    contexts = (TEXT,) if heads == "parallel" else (TEXT, VALUE, CASE)
    model = make(*contexts, n_layer=1, mtp_steps=2, mtp_heads=heads).train()
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    compiled_after = []
    for weight, length in ((0.1, 5), (0.05, 8), (0.0, 13)):
        model.set_mtp_weight(weight)
        tokens, targets = stream(model, 2, length=length)
        counts = (targets != -1).sum((0, 1)) * 2
        results = []
        for forward in (compiled, model):
            output = forward(tokens, targets, counts=counts)
            results.append([output.loss.detach(), output.step_losses, *gradients(model, output.loss).values()])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
        compiled_after.append(graphs.frame_count)
    assert len(set(compiled_after)) == 1


def test_the_weight_is_a_float32_scalar_that_survives_a_move() -> None:
    model = make(mtp_steps=2)
    assert model.mtp_weight.item() == pytest.approx(0.1)
    model.set_mtp_weight(0.3)
    model.bfloat16()
    assert model.mtp_weight.dtype == torch.float32
    assert model.mtp_weight.shape == ()
    assert model.mtp_weight.item() == torch.tensor(0.3).item()
    assert "mtp_weight" not in model.state_dict()
    for value in (-0.1, float("nan"), float("inf"), 1e39):
        with pytest.raises(ValueError, match="mtp_weight must be >= 0 and finite in float32, got"):
            model.set_mtp_weight(value)
    with pytest.raises(TypeError, match="mtp_weight"):
        model.set_mtp_weight(torch.tensor(0.1))
    assert model.to(torch.float64).mtp_weight.item() == torch.tensor(0.3).item()  # nothing refused was kept
    model.set_mtp_weight(np.float32(0.2))
    assert model.mtp_weight.item() == torch.tensor(0.2).item()
    with torch.device("meta"):
        empty = GPT(model.config)
    empty.set_mtp_weight(0.7)
    assert empty.to_empty(device="cpu").mtp_weight.item() == torch.tensor(0.7).item()


def test_a_loss_is_backpropagated_once_and_the_other_forms_as_often_as_one_likes() -> None:
    model = make(mtp_steps=2)
    tokens, targets = stream(model, 2)
    by_step = {"target_1": targets[..., 0], "target_2": targets[..., 1]}
    _, (main, auxiliary) = model(tokens, by_step, return_loss_components=True)
    fused = model(tokens, targets).loss
    assert main._base is None  # FSDP warns of views
    for loss in (model(tokens, targets, return_logits=True).loss, main, auxiliary, model.half()(tokens, targets).loss):
        for _ in range(2):
            loss.backward(retain_graph=True)
    model.float()
    fused.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients were computed with the loss"):
        fused.backward()


def test_a_model_can_be_made_without_memory_beside_a_real_one() -> None:
    config = make(TEXT, VALUE, mtp_steps=2, mtp_heads="sequential").config
    with FakeTensorMode():
        model = GPT(config)
        step_weights = torch.tensor([1.0, 0.5])
        losses = MTPCrossEntropyLoss(), LinearMTPCrossEntropyLoss(8, 13, step_weights=step_weights)
    assert isinstance(model.mtp_weight, FakeTensor)
    assert isinstance(losses[1].step_weights, FakeTensor)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, None])
def test_every_type_and_autocast_train(heads: str, dtype: torch.dtype | None) -> None:
    model = make(TEXT, VALUE, CASE, mtp_steps=3, mtp_heads=heads).train()
    tokens, targets = stream(model, 3)
    expected = model(tokens, targets)
    model = model if dtype is None else model.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is None):
        output = model(tokens, targets)
    assert output.loss.dtype == output.step_losses.dtype == (dtype if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(output.step_losses.float(), expected.step_losses, rtol=0.05, atol=0.1)
    output.loss.backward()
    assert all(p.grad.dtype == (dtype or torch.float32) and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("heads", HEADS)
def test_training_never_holds_the_logits(heads: str) -> None:
    model = GPT(
        GPTConfig((ContextConfig("text", vocab_size=25000),), 512, 1, 1, n_embd=8, mtp_steps=3, mtp_heads=heads)
    ).train()
    tokens, targets = stream(model, 3, batch=4, length=512)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model(tokens, targets).loss.backward()
    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert 0 < largest < 4 * 512 * 25000 * 4 / 2
