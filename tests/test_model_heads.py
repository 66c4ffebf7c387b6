"""Heads of their own for the steps ahead: what they see, what they are trained on, and padding on either side."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import CASE, HEADS, TEXT, VALUE, gradients, make, stream
from torch import Tensor

from megactx.generate import generate


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_a_heads_gradient_reaches_its_own_and_what_is_below(heads: str) -> None:
    model = make(mtp_steps=3, mtp_heads=heads)
    model.set_mtp_weight(1.0)
    tokens, targets = stream(model, 3)
    trained = []
    for step in range(3):
        only = torch.where(torch.arange(3) == step, targets, -1)
        found = gradients(model, model(tokens, only).loss)
        trained.append({name for name, g in found.items() if g.any()})
    blocks = [{name for name, _ in model.named_parameters() if name.startswith(f"mtp_blocks.{k}.")} for k in range(2)]
    trunk = {name for name, _ in model.named_parameters()} - blocks[0] - blocks[1]
    assert trained[0] == trunk
    assert trained[1] == trunk | blocks[0]
    assert trained[2] == trunk | blocks[1] | (blocks[0] if heads == "sequential" else set())


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", [6, 2, 1])
def test_step_k_sees_the_tokens_it_would_have_when_drafting_and_no_others(heads: str, length: int) -> None:
    model = make(mtp_steps=4, mtp_heads=heads)
    row = torch.randint(1, 11, (1, length + 4, 1))

    def prediction(row: Tensor, at: int, step: int) -> float:
        """The loss of one position and step against a symbol that stays, so that it moves with what was seen alone."""
        targets = torch.full((1, length, 1, step), -1)
        targets[0, -1, 0, :-1] = row[0, length : length + step - 1, 0]  # sequential heads read on from here
        targets[0, at, 0, -1] = 5
        return model(row[:, :length], targets).step_losses[0, step - 1].item()

    for at in {0, length // 2, length - 1}:
        for step in range(1, 5):
            seen = at + (step - 1 if heads == "sequential" else 0)
            before = prediction(row, at, step)
            for changed in range(length + 3):
                other = row.clone()
                other[0, changed] = other[0, changed] % 10 + 1
                assert (prediction(other, at, step) != before) == (changed <= seen), (at, step, changed)


def test_sequential_heads_are_deepseeks_over_the_same_weights() -> None:
    model = make(mtp_steps=3, mtp_heads="sequential", tie_weights=False)
    tokens, targets = stream(model, 3)
    row = torch.cat((tokens, targets[:, -1, :, :2].transpose(1, 2)), dim=1)[..., 0]  # the tokens t_0 .. t_(T + K - 2)
    table, head, length = model.embedding.weight, model.head.weight, tokens.shape[1]

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain

    state = model.hidden(table[tokens[..., 0]])
    for k, block in enumerate(model.mtp_blocks, start=2):
        token = table[row[:, k - 1 : k - 1 + length]]
        merged = torch.cat((norm(state, block.hidden_norm.weight), norm(token, block.embedding_norm.weight)), dim=-1)
        x = merged @ block.merge.weight.T
        x = x + block.attention(norm(x, block.attention_norm.weight))
        state = x + block.mlp(norm(x, block.mlp_norm.weight))
        logits = norm(state, model.norm.weight) @ head.T
        expected = F.cross_entropy(logits.flatten(0, 1), targets[..., 0, k - 1].flatten(), ignore_index=-1)
        torch.testing.assert_close(model(tokens, targets).step_losses[0, k - 1], expected, rtol=1e-4, atol=1e-5)


def test_parallel_heads_are_one_block_each_on_the_trunk() -> None:
    model = make(mtp_steps=3, mtp_heads="parallel")
    tokens, targets = stream(model, 3)
    trunk = model.hidden(model.embed(tokens))
    for k, block in enumerate(model.mtp_blocks, start=2):
        logits = model.norm(block(trunk)) @ model.head_weight.T
        expected = F.cross_entropy(logits.flatten(0, 1), targets[..., 0, k - 1].flatten(), ignore_index=-1)
        torch.testing.assert_close(model(tokens, targets).step_losses[0, k - 1], expected)


def test_what_a_sequential_head_cannot_be_given_it_does_not_answer_for() -> None:
    model = make(mtp_steps=3, mtp_heads="sequential")
    tokens, targets = stream(model, 3)
    targets[targets == -1] = 4
    hidden = targets.clone()
    hidden[:, -1, :, 0] = -1  # the token behind the last one: steps 2 and 3 of T - 1, and step 3 of T - 2 need it
    expected = targets.clone()
    expected[:, -1] = -1
    expected[:, -2, :, 2] = -1
    found, wanted = model(tokens, hidden), model(tokens, expected)
    torch.testing.assert_close(found.step_losses, wanted.step_losses)
    torch.testing.assert_close(gradients(model, found.loss), gradients(model, wanted.loss))
    # a target inside the tokens may be ignored: the token is known all the same
    inside = targets.clone()
    inside[:, 3, :, 0] = -1
    torch.testing.assert_close(model(tokens, inside).step_losses[:, 1:], model(tokens, targets).step_losses[:, 1:])


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
@pytest.mark.parametrize("position", ["gaussian_lod2d_alibi", "learned", "none"])
def test_heads_take_places_and_padding_as_the_blocks_do(heads: str, position: str) -> None:
    model = make(TEXT, VALUE, CASE, mtp_steps=3, mtp_heads=heads, position=position)
    tokens, targets = stream(model, 3, batch=1, length=9)
    targets[:, -1] = torch.tensor([[1, 2, 0], [7, 7, 7], [1, 0, 2]])
    expected = model(tokens, targets).step_losses
    padded = torch.cat((torch.zeros(1, 4, 3, dtype=torch.int64), tokens), dim=1)
    ignored = torch.cat((torch.full((1, 4, 3, 3), -1), targets), dim=1)
    mask = torch.arange(13)[None] >= 4
    where = {} if position == "none" else {"positions": (torch.arange(13) - 4).clamp(min=0)}
    found = model(padded, ignored, key_padding_mask=mask, **where).step_losses
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("steps", [2, 4])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_row_padded_on_the_right_is_the_shorter_row(heads: str, steps: int, compiled: bool) -> None:
    model = make(TEXT, VALUE, CASE, mtp_steps=4, mtp_heads=heads)
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    tokens, targets = stream(model, steps, batch=2, length=9)
    targets[0, -1, :, 1:] = -1  # a row that says nothing of what is behind the next token
    lengths = torch.tensor([9, 5])
    mask = torch.arange(9) < lengths[:, None]
    padded = torch.where(mask[..., None], tokens, 1)
    ignored = torch.where(mask[..., None, None], targets, -1)
    counts = torch.full((3, steps), 7)
    rows = [model(tokens[b : b + 1, :n], targets[b : b + 1, :n], counts=counts) for b, n in enumerate(lengths.tolist())]
    found = call(padded, ignored, key_padding_mask=mask, counts=counts)
    expected = rows[0].step_losses + rows[1].step_losses
    torch.testing.assert_close(found.step_losses, expected, rtol=1e-4, atol=1e-5)
    summed = gradients(model, rows[0].loss + rows[1].loss)
    torch.testing.assert_close(gradients(model, found.loss), summed, rtol=1e-4, atol=1e-5)


def test_a_gap_is_filled_from_the_targets_before_it_or_not_answered_across() -> None:
    model = make(mtp_steps=3, mtp_heads="sequential")
    tokens, targets = stream(model, 3)
    targets[targets == -1] = 4
    mask = torch.arange(9)[None].expand(2, -1) != 4

    def losses(tokens: Tensor, targets: Tensor) -> Tensor:
        return model(tokens, targets, key_padding_mask=mask).step_losses

    targets[:, 4] = -1
    other = tokens.clone()
    other[:, 4] = (other[:, 4] + 1) % 11
    assert torch.equal(losses(tokens, targets), losses(other, targets))  # what lies in a gap is not read
    closed = targets.clone()
    closed[:, 3, :, 0] = -1  # nobody says what stood in the gap: positions 2 and 3 cannot look across it
    expected = closed.clone()
    expected[:, 3] = -1
    expected[:, 2, :, 2] = -1
    torch.testing.assert_close(losses(tokens, closed), losses(tokens, expected))


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_generation_does_not_know_of_heads(heads: str) -> None:
    plain, model = make(TEXT, CASE), make(TEXT, CASE, mtp_steps=3, mtp_heads=heads)
    prompt, _ = stream(plain, 1, length=4)
    for cached in (True, False):
        drawn = [torch.stack(list(generate(m, prompt, 20, cached=cached))) for m in (plain, model)]
        assert torch.equal(*drawn)
