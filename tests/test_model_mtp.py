"""Multi-token prediction of the GPT: seed 003's losses, one step as ever, weights on the device, and the heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from megactx.config import ContextConfig, GPTConfig
from megactx.generate import generate
from megactx.model import GPT

TEXT = ContextConfig("text", vocab_size=11)
CASE = ContextConfig("case", vocab_size=3)
VALUE = ContextConfig("value", "numeric", 100, mean=40.0, std=20.0)
SMALL = {"block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
HEADS = ("shared", "parallel", "sequential")


def make(*contexts: ContextConfig, **options: object) -> GPT:
    torch.manual_seed(5)
    model = GPT(GPTConfig(contexts or (TEXT,), **{**SMALL, **options}))  # type: ignore[arg-type]
    with torch.no_grad():  # matrices large enough for what the heads say to differ
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model.eval()


def stream(model: GPT, steps: int, batch: int = 2, length: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, C] and their next `steps` symbols [B, T, C, K], some of them ignored."""
    rows = torch.stack([torch.randint(c.vocab_size, (batch, length + steps)) for c in model.config.contexts], dim=-1)
    targets = torch.stack([rows[:, k : k + length] for k in range(1, steps + 1)], dim=-1)
    # as behind the end of a document: from some step on, nothing
    ends = torch.randint(1, 2 * steps, (batch, length, 1, 1))
    ends[:, -1] = steps
    return rows[:, :length], torch.where(torch.arange(steps) < ends, targets, -1)


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


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True) if g is not None}


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


@pytest.mark.parametrize("heads", HEADS)
def test_asking_for_logits_changes_no_bit_of_the_loss(heads: str) -> None:
    model = make(TEXT, VALUE, CASE, mtp_steps=2, mtp_heads=heads)
    tokens, targets = stream(model, 2)
    without, output = model(tokens, targets), model(tokens, targets, return_logits=True)
    assert without.logits == {}
    assert torch.equal(output.loss, without.loss)
    expected = model(tokens, last_only=False).logits  # heads or not: those of the next token
    assert all(torch.equal(output.logits[name], expected[name]) for name in expected)


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


@pytest.mark.parametrize("heads", ["parallel", "sequential"])
def test_generation_does_not_know_of_heads(heads: str) -> None:
    plain, model = make(TEXT, CASE), make(TEXT, CASE, mtp_steps=3, mtp_heads=heads)
    prompt, _ = stream(plain, 1, length=4)
    for cached in (True, False):
        drawn = [torch.stack(list(generate(m, prompt, 20, cached=cached))) for m in (plain, model)]
        assert torch.equal(*drawn)


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
    for value in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="mtp_weight must be >= 0 and finite"):
            model.set_mtp_weight(value)
    with torch.device("meta"):
        empty = GPT(model.config)
    empty.set_mtp_weight(0.7)
    assert empty.to_empty(device="cpu").mtp_weight.item() == torch.tensor(0.7).item()


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


def test_wrong_input_is_named() -> None:
    model = make(TEXT, VALUE, CASE, mtp_steps=2, mtp_heads="sequential")
    tokens, targets = stream(model, 2)
    three = torch.cat((targets, targets[..., :1]), dim=-1)
    with pytest.raises(ValueError, match="targets must hold 1 to mtp_steps = 2 steps, got 3"):
        model(tokens, three)
    with pytest.raises(ValueError, match="1 to mtp_steps = 2 steps, got 0"):
        model(tokens, targets[..., :0])
    with pytest.raises(ValueError, match=r"targets must be \[B, T, 3, K\], got \[2, 9, 2, 2\]"):
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
