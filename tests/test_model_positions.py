"""Where tokens stand: positions, levels of detail and padding of each row reach every block of the GPT, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from megactx.config import ContextConfig, GPTConfig
from megactx.model import GPT
from megactx.nn.rotary import KINDS
from megactx.optim import build_optimizers

TEXT = ContextConfig("text", vocab_size=11)
CASE = ContextConfig("case", vocab_size=3)
SMALL = {"block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
LOBO = {"use_flash_lobo": True, "use_flash_lobo_per_head": True}
FIXED = {"use_flash_lobo": True, "flash_lobo_fixed": True, "flash_lobo_log_const": 1.25}


def make(position: str, **options: object) -> GPT:
    model = GPT(GPTConfig((TEXT, CASE), position=position, **{**SMALL, **options})).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def ids(batch: int = 3, length: int = 9) -> Tensor:
    return torch.stack([torch.randint(c.vocab_size, (batch, length)) for c in (TEXT, CASE)], dim=-1)


def places(model: GPT, batch: int = 3, length: int = 9) -> dict[str, Tensor]:
    """Of each row its own."""
    if model.config.position == "none":
        return {}
    if model.config.position == "learned":
        return {"positions": torch.stack([torch.randperm(16)[:length] for _ in range(batch)])}
    positions = torch.randint(1, 40, (batch, length)).cumsum(1) + torch.randint(0, 10**6, (batch, 1))
    return {"positions": positions, "lods": torch.randint(0, 3, (batch, length))}


@pytest.mark.parametrize("position", [*KINDS, "learned", "none"])
@pytest.mark.parametrize("options", [{}, LOBO], ids=["", "lobo"])
def test_a_row_with_its_own_places_is_the_same_in_any_batch(position: str, options: dict[str, Any]) -> None:
    model = make(position, **options)
    tokens, where = ids(), places(model)
    together = model(tokens, tokens, **where, return_logits=True)
    losses = []
    for b in range(3):
        own = {name: value[b] for name, value in where.items()}
        alone = model(tokens[b : b + 1], tokens[b : b + 1], **own, return_logits=True)
        for name in ("text", "case"):
            torch.testing.assert_close(alone.logits[name][0], together.logits[name][b], rtol=0, atol=1e-5)
        losses.append(alone.loss)
    torch.testing.assert_close(together.loss, torch.stack(losses).mean())


@pytest.mark.parametrize("position", [*KINDS, "learned"])
def test_places_that_are_not_given_are_those_of_a_plain_text(position: str) -> None:
    model = make(position)
    tokens = ids()
    expected = model(tokens, tokens).loss
    assert torch.equal(model(tokens, tokens, positions=torch.arange(9)).loss, expected)
    assert torch.equal(model(tokens, tokens, positions=torch.arange(9, dtype=torch.int32).expand(3, -1)).loss, expected)
    if position in KINDS:
        assert torch.equal(model(tokens, tokens, lods=torch.zeros(3, 9, dtype=torch.int32)).loss, expected)
        shifted = model(tokens, tokens, positions=torch.arange(9) + 10**9).loss  # far past block_size
        torch.testing.assert_close(shifted, expected, rtol=0, atol=1e-5)


def test_levels_and_positions_matter_where_they_should() -> None:
    tokens, lods = ids(), torch.randint(1, 3, (3, 9))
    apart = torch.arange(9) * 3
    for position in KINDS:
        model = make(position)
        plain, coarse, far = (
            model(tokens, tokens, **where).loss for where in ({}, {"lods": lods}, {"positions": apart})
        )
        assert torch.equal(plain, coarse) == (position == "simple")
        assert not torch.allclose(plain, far)
    model = make("learned")
    expected = model(tokens, tokens).loss
    with torch.no_grad():
        model.position_embedding.copy_(model.position_embedding.roll(3, 0))
    assert torch.equal(model(tokens, tokens, positions=torch.arange(3, 12)).loss, expected)
    assert not torch.allclose(model(tokens, tokens).loss, expected)


@pytest.mark.parametrize("position", [*KINDS, "learned", "none"])
@pytest.mark.parametrize("left", [False, True])
def test_a_padded_batch_trains_as_its_shorter_rows(position: str, left: bool) -> None:
    model = make(position, **LOBO)
    tokens, where = ids(), places(model)
    mask = torch.arange(9) < torch.tensor([9, 5, 1])[:, None]
    mask = mask.flip(1) if left else mask
    targets = torch.where(mask[..., None], tokens.roll(-1, 1), -1)
    padded = model(tokens, targets, **where, key_padding_mask=mask, return_logits=True)
    padded.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    total = torch.zeros(())
    for b in range(3):
        kept = mask[b]
        own = {name: value[b][kept] for name, value in where.items()}
        if position == "learned" and not own:
            own = {"positions": torch.arange(9)[kept]}
        alone = model(tokens[b][kept][None], targets[b][kept][None], **own, return_logits=True)
        torch.testing.assert_close(alone.logits["text"][0], padded.logits["text"][b][kept], rtol=0, atol=1e-5)
        total = total + alone.loss * kept.sum() / mask.sum()
        if left:
            last = model(tokens, **where, key_padding_mask=mask).logits["text"][b, 0]
            torch.testing.assert_close(last, alone.logits["text"][0, -1], rtol=0, atol=1e-5)
    torch.testing.assert_close(total, padded.loss)
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_or_would_not_be_read_is_refused() -> None:
    model = make("gaussian_alibi")
    tokens = ids()
    steps = torch.arange(9)
    for argument, value, message in (
        ("positions", steps[:8], r"positions must be \[9\] or \[3, 9\] as the tokens are, got \[8\]"),
        ("lods", steps.expand(2, 9), r"lods must be \[9\] or \[3, 9\] as the tokens are, got \[2, 9\]"),
        ("lods", steps - 1, "lods must be at least 0"),
        ("key_padding_mask", steps > 2, r"key_padding_mask must be \[3, 9\] as the tokens are, got \[9\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens, **{argument: value})
    for argument, value, message in (
        ("positions", steps.float(), r"positions must be a tensor of int32 or int64, got torch\.float32"),
        ("lods", [0] * 9, "lods must be a tensor of int32 or int64, got"),
        ("key_padding_mask", steps.expand(3, 9), r"key_padding_mask must be a tensor of bool, got torch\.int64"),
    ):
        with pytest.raises(TypeError, match=message):
            model(tokens, **{argument: value})
    with pytest.raises(ValueError, match="17 positions, more than block_size = 16"):
        model(ids(length=17), positions=torch.arange(17))
    learned = make("learned")
    for bad in (steps + 8, steps - 1):
        with pytest.raises(ValueError, match="positions must be in the learned table, 0 to 15"):
            learned(tokens, positions=bad)
    with pytest.raises(ValueError, match='positions must be None where position = "none"'):
        make("none")(tokens, positions=steps)
    for position in ("learned", "none"):
        with pytest.raises(ValueError, match=f"lods must be None where position = '{position}'"):
            make(position)(tokens, lods=steps)


def test_compiles_to_one_graph_with_places_of_each_row() -> None:
    model = make("gaussian_lod2d_alibi", **LOBO, n_kv_head=2).train()
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    compiled_after = []
    for length in (5, 8, 13):
        tokens, where = ids(length=length), places(model, length=length)
        mask = torch.rand(3, length) > 0.2
        gradients = []
        for forward in (compiled, model):
            model.zero_grad()
            loss = forward(tokens, tokens, **where, key_padding_mask=mask).loss
            loss.backward()
            gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
        compiled_after.append(graphs.frame_count)
    assert len(set(compiled_after)) == 1  # the first length's graph served them all


def test_a_block_compiled_alone_is_compiled_once_for_places_of_any_form() -> None:
    model = make("gaussian_alibi").eval()
    graphs = CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    block = model.blocks[0]
    block.compile(backend=graphs, fullgraph=True)
    tokens, where = ids(), places(model)
    for positions, lods in (("[B, T]", "[B, T]"), ("[T]", "[B, T]"), ("[B, T]", "[T]"), ("[T]", "[T]"), (None, "[T]")):
        own = {"positions": positions, "lods": lods}
        own = {name: where[name][0] if form == "[T]" else where[name] for name, form in own.items() if form}
        with torch.no_grad():
            model(tokens, **own)
        assert graphs.frame_count == 1


def test_a_model_made_without_memory_is_the_model_once_it_has_its_weights() -> None:
    config = GPTConfig(
        (TEXT, CASE, ContextConfig("value", "numeric", 9, mean=1.3)), **SMALL, position="gaussian_alibi", **FIXED
    )
    model = GPT(config)
    with torch.device("meta"):
        other = GPT(config)
    other.to_empty(device="cpu").load_state_dict(model.state_dict())
    tokens = torch.randint(3, (2, 9, 3))
    assert torch.equal(other(tokens, tokens).loss, model(tokens, tokens).loss)


def test_a_fixed_constant_is_in_every_block_and_in_no_checkpoint() -> None:
    tokens = ids()
    fixed, plain = make("gaussian", **FIXED), make("gaussian")
    assert fixed.state_dict().keys() == plain.state_dict().keys()
    learned = make("gaussian", use_flash_lobo=True, flash_lobo_log_const=1.25)
    learned.load_state_dict(fixed.state_dict(), strict=False)
    with torch.no_grad():
        for block in learned.blocks:
            block.attention.log_const.fill_(1.25)
    plain.load_state_dict(fixed.state_dict())
    loss = fixed(tokens, tokens).loss
    torch.testing.assert_close(loss, learned(tokens, tokens).loss)
    assert not torch.allclose(loss, plain(tokens, tokens).loss)


@pytest.mark.parametrize("per_head", [False, True])
def test_the_constant_starts_where_it_should_is_not_decayed_and_not_orthogonalised(per_head: bool) -> None:
    config = GPTConfig(
        (TEXT,), **SMALL, use_flash_lobo=True, use_flash_lobo_per_head=per_head, flash_lobo_log_const=-1.5
    )
    model = GPT(config)
    for block in model.blocks:
        assert block.attention.log_const.tolist() == [-1.5] * (4 if per_head else 1)
        assert block.attention.log_const.dtype == torch.float32
    optimizers = build_optimizers(
        model, kind="muon", learning_rate=1e-3, weight_decay=0.1, betas=(0.9, 0.99), muon_learning_rate=0.02
    )
    for block in model.blocks:
        homes = [
            (name, group["weight_decay"])
            for name, optimizer in optimizers.items()
            for group in optimizer.param_groups
            if any(p is block.attention.log_const for p in group["params"])
        ]
        assert homes == [("adamw", 0.0)]


def test_a_config_of_an_older_version_is_the_model_it_was() -> None:
    data = GPTConfig((TEXT,), **SMALL).to_json()  # type: ignore[arg-type]
    new = ("rope_sigma", "lod_block_size", "lod_pairs", "alibi_rule", "use_flash_lobo", "use_flash_lobo_per_head")
    new += ("flash_lobo_fixed",)
    old = {name: value for name, value in data.items() if name not in (*new, "flash_lobo_log_const")}
    assert GPTConfig.from_json(old) == GPTConfig.from_json(data)
    full = GPTConfig((TEXT,), **SMALL, **LOBO, position="gaussian_lod2d_alibi", lod_pairs=1, rope_sigma="power")  # type: ignore[arg-type]
    assert GPTConfig.from_json(full.to_json()) == full


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_sigma": "none"}, "rope_sigma must be one of uniform, power, got 'none'"),
        ({"alibi_rule": "linear"}, "alibi_rule must be one of press, geometric"),
        ({"lod_block_size": 0}, "lod_block_size must be at least 1"),
        ({"lod_block_size": 2**31, "position": "gaussian"}, "lod_block_size must be at most 2147483647, got"),
        ({"lod_pairs": 2}, "lod_pairs must be None where position = 'simple', for which nothing reads it, got 2"),
        ({"lod_pairs": 2, "position": "gaussian_alibi"}, "lod_pairs must be None where position = 'gaussian_alibi'"),
        ({"lod_block_size": 2}, "lod_block_size must be 32 where position = 'simple'"),
        ({"rope_sigma": "power", "position": "none"}, "rope_sigma must be 'uniform' where position = 'none'"),
        ({"alibi_rule": "geometric", "position": "gaussian"}, "alibi_rule must be 'press' where position = 'gaussian'"),
        ({"lod_pairs": 4, "position": "gaussian_lod2d"}, "lod_pairs must be at most 3, .*, got 4"),
        ({"n_head": 16, "position": "gaussian_lod2d_alibi"}, "n_embd / n_head must be at least 4 where .*, got 2"),
        ({"flash_lobo_fixed": True}, "flash_lobo_fixed must not be set without use_flash_lobo, got True"),
        ({**LOBO, "flash_lobo_fixed": True}, "flash_lobo_fixed must not be set with use_flash_lobo_per_head"),
        ({"lod_pairs": 0, "position": "gaussian_lod2d"}, "lod_pairs must be at least 1"),
        ({"use_flash_lobo_per_head": True}, "use_flash_lobo_per_head must not be set without use_flash_lobo"),
        ({"flash_lobo_log_const": 2.0}, "flash_lobo_log_const must not be set without use_flash_lobo, got 2.0"),
        ({"flash_lobo_log_const": float("nan"), "use_flash_lobo": True}, "flash_lobo_log_const must be finite"),
        ({"flash_lobo_log_const": 1e30, "use_flash_lobo": True}, r"flash_lobo_log_const must be within \+-1e4"),
    ],
)
def test_a_config_is_refused_by_its_field(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig((TEXT,), **{**SMALL, **options})  # type: ignore[arg-type]
