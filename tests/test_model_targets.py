"""What the GPT is told with its tokens: targets in any form, counts, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from small_models import CASE, HEADS, TEXT, VALUE, make, stream

from megactx.config import ContextConfig, GPTConfig


def test_targets_by_name_in_any_order_and_a_numeric_context_may_have_one_step() -> None:
    model = make(TEXT, VALUE, CASE, mtp_steps=2)
    tokens, targets = stream(model, 2)
    expected = model(tokens, targets)
    names = list(model.config.names)
    named = dict(zip(names, targets.unbind(2), strict=True))
    order = [2, 0, 1]
    for output in (
        model(tokens, named),
        model(tokens, {**named, "value": named["value"][..., 0]}),
        model(tokens[..., order], targets[:, :, order], token_order=[names[i] for i in order]),
    ):
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.step_losses, expected.step_losses)
    streams = [named[names[i]] for i in order]
    listed = model([tokens[..., i] for i in order], streams, token_order=[names[i] for i in order])
    assert torch.equal(listed.loss, expected.loss)
    single = make(mtp_steps=2)
    tokens, targets = stream(single, 2)
    expected = single(tokens, targets)
    assert torch.equal(single(tokens[..., 0], targets).loss, expected.loss)  # [B, T] of the only context
    assert torch.equal(single(tokens[..., 0], targets[..., 0, 0]).loss, single(tokens, targets[..., 0]).loss)
    assert torch.equal(single(tokens[..., 0], targets[..., 0, :]).loss, expected.loss)  # and [B, T, K]
    assert torch.equal(single(tokens, targets[..., 0, :1]).loss, single(tokens, targets[..., 0]).loss)


def test_targets_by_step_are_in_the_order_of_the_tokens_or_by_name() -> None:
    model = make(TEXT, CASE, mtp_steps=2)
    tokens, targets = stream(model, 2)
    _, expected = model(tokens, {"target_1": targets[..., 0], "target_2": targets[..., 1]})
    order = {"token_order": ["case", "text"]}
    swapped = {f"target_{k + 1}": targets[:, :, [1, 0], k] for k in range(2)}
    listed = {key: list(value.unbind(-1)) for key, value in swapped.items()}
    named = {key: dict(zip(order["token_order"], value, strict=True)) for key, value in listed.items()}
    for by_step in (swapped, listed, named):
        for found in (
            model(tokens[..., [1, 0]], by_step, **order)[1],
            model([tokens[..., 1], tokens[..., 0]], targets_dict=by_step, **order)[1],
        ):
            assert torch.equal(found, expected)


def test_contexts_with_the_names_of_steps() -> None:
    model = make(ContextConfig("target_1", vocab_size=11), ContextConfig("target_2", vocab_size=11), mtp_steps=2)
    tokens, targets = stream(model, 2)
    by_context = {"target_1": targets[:, :, 0], "target_2": targets[:, :, 1]}
    by_step = {"target_1": targets[..., 0], "target_2": targets[..., 1]}
    expected = model(tokens, targets)
    assert torch.equal(model(tokens, by_context).loss, expected.loss)
    assert torch.equal(model(tokens, targets_dict=by_step, return_logits=False)[1], expected.loss)
    _, (first, auxiliary) = model(tokens, by_step, return_loss_components=True)
    torch.testing.assert_close(first + 0.1 * auxiliary, expected.loss)


@pytest.mark.parametrize("heads", HEADS)
def test_targets_may_be_overlapping_views_of_one_buffer(heads: str) -> None:
    model = make(TEXT, CASE, mtp_steps=3, mtp_heads=heads)
    buffer = torch.randint(3, (2 * 9 + 3, 2))
    tokens = buffer[:18].view(2, 9, 2)
    views = buffer[1:].as_strided((2, 9, 2, 3), (18, 2, 1, 2))
    copies = views.clone()
    assert torch.equal(copies[..., 1], buffer[2:20].view(2, 9, 2))
    found, expected = model(tokens, views), model(tokens, copies)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.step_losses, expected.step_losses)


@pytest.mark.parametrize("contexts", [(TEXT,), (VALUE,), (VALUE, CASE)], ids=len)
def test_counts_mean_the_same_to_contexts_of_either_kind(contexts: tuple[ContextConfig, ...]) -> None:
    model = make(*contexts)
    tokens, targets = stream(model, 1)
    counts = torch.ones(len(contexts), 1)
    for wrong in (torch.bool, torch.int16, torch.bfloat16):
        with pytest.raises(TypeError, match="counts must be int32, int64, float32 or float64, got"):
            model(tokens, targets, counts=counts.to(wrong))
    with pytest.raises(ValueError, match="counts must not require a gradient"):
        model(tokens, targets, counts=counts.clone().requires_grad_())
    # nothing counted where there are targets: no mean that could be taken for one
    assert (model(tokens, targets, counts=0 * counts).context_losses > 1e30).all()
    assert model(tokens, torch.full_like(targets, -1), counts=0 * counts).loss.item() == 0
    assert model(tokens, targets, counts=math.nan * counts).context_losses.isnan().all()


def test_wrong_input_is_named() -> None:
    model = make(TEXT, VALUE, CASE, mtp_steps=2, mtp_heads="sequential")
    tokens, targets = stream(model, 2)
    three = torch.cat((targets, targets[..., :1]), dim=-1)
    with pytest.raises(ValueError, match="targets must hold 1 to mtp_steps = 2 steps, got 3"):
        model(tokens, three)
    with pytest.raises(ValueError, match="1 to mtp_steps = 2 steps, got 0"):
        model(tokens, targets[..., :0])
    with pytest.raises(ValueError, match=r"targets must be \[B, T, 3\] or \[B, T, 3, K\], got \[2, 9, 2, 2\]"):
        model(tokens, targets[:, :, :2])
    with pytest.raises(ValueError, match=r"shape of tokens \[2, 9, 3\], steps behind it, got \[2, 8, 3, 2\]"):
        model(tokens, targets[:, 1:])
    wrong = targets.clone()
    wrong[1, -1, 2, 0] = 3  # it would be embedded as another context's symbol
    with pytest.raises(ValueError, match=r"'case': id 3 at row 1, position 8, step 1 is outside .* of 3"):
        model(tokens, wrong)
    named = dict(zip(model.config.names, targets.unbind(2), strict=True))
    with pytest.raises(ValueError, match=r"\[B, T, 2\] alike: 'text' is \[2, 9, 2\], 'case' is \[2, 9\]"):
        model(tokens, {**named, "case": named["case"][..., 0]})
    with pytest.raises(ValueError, match=r"counts must have shape \(3, 2\), got \(3, 1\)"):
        model(tokens, targets, counts=torch.ones(3, 1))
    with pytest.raises(ValueError, match="counts must be None without targets"):
        model(tokens, counts=torch.ones(3, 2))
    with pytest.raises(ValueError, match="return_logits must not be False without targets"):
        model(tokens, return_logits=False)
    by_step = {"target_1": targets[..., 0], "target_2": targets[..., 1]}
    with pytest.raises(ValueError, match="targets_dict must hold target_1, target_2, got target_2, target_3"):
        model(tokens, {"target_2": targets[..., 0], "target_3": targets[..., 1]})
    with pytest.raises(ValueError, match="targets must be None where targets_dict is given"):
        model(tokens, targets, targets_dict=by_step)
    with pytest.raises(ValueError, match="return_loss_components must be False without targets_dict"):
        model(tokens, targets, return_loss_components=True)
    with pytest.raises(ValueError, match="targets_dict must hold target_1, got none"):
        model(tokens, targets_dict={})
    with pytest.raises(TypeError, match="targets_dict must map"):
        model(tokens, targets_dict=targets)
    with pytest.raises(TypeError, match="target_1 must be a tensor, or a mapping or list of tensors, got NoneType"):
        model(tokens, targets_dict={"target_1": None})
    with pytest.raises(ValueError, match=r"targets of context 'text' must be \[B, T\] or \[B, T, K\], got \[\]"):
        model(tokens, {**named, "text": torch.tensor(1)})
    with pytest.raises(
        ValueError, match=r"targets must be \[B, T\], \[B, T, K\] or \[B, T, 1, K\], got \[2, 9, 2, 1\]"
    ):
        make(mtp_steps=2)(tokens[..., 0], targets[:, :, :2, :1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mtp_steps": 0}, "mtp_steps must be at least 1, got 0"),
        ({"mtp_steps": 9}, "mtp_steps must be at most 8, got 9"),
        ({"mtp_steps": 2.0}, "mtp_steps must be an integer"),
        ({"mtp_steps": 4, "block_size": 3}, "mtp_steps must be at most block_size = 3, got 4"),
        ({"mtp_heads": "medusa"}, "mtp_heads must be one of shared, parallel, sequential"),
        ({"mtp_heads": "parallel"}, "mtp_heads must be 'shared' where mtp_steps = 1, got 'parallel'"),
        ({"contexts": (VALUE,), "mtp_steps": 2}, "mtp_steps must be 1 without a categorical context"),
    ],
)
def test_steps_and_heads_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        GPTConfig(**{"contexts": (TEXT,), **options})  # type: ignore[arg-type]
