"""Cached generation is the uncached loop, token for token, whatever the model, the batch and the window."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megactx.config import ContextConfig, GPTConfig
from megactx.generate import Decoder, generate, kept_tokens, row_seeds
from megactx.model import GPT
from megactx.nn import PackedHead

TEXT = ContextConfig("text", vocab_size=37)
CASE = ContextConfig("case", vocab_size=3)
VALUE = ContextConfig("value", "numeric", 100, mean=40.0, std=20.0)


def make(*contexts: ContextConfig, **options: object) -> GPT:
    """A small model with weights far from their initial smallness, and gains far from one."""
    small = {"block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 64}
    model = GPT(GPTConfig(contexts or (TEXT, VALUE, CASE), **{**small, **options}))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("log_const"):
                parameter.uniform_(-1, 3)
            else:
                parameter.mul_(4 if parameter.dim() > 1 else torch.rand_like(parameter) + 0.5)
    return model.eval()


def prompt(model: GPT, batch: int = 2, length: int = 3) -> Tensor:
    return torch.stack([torch.randint(c.vocab_size, (batch, length)) for c in model.config.contexts], dim=-1)


def drawn(model: GPT, start: Tensor, count: int, **options: object) -> Tensor:
    return torch.stack(list(generate(model, start, count, **options)), dim=1)  # type: ignore[arg-type]


LOBO = {"use_flash_lobo": True}
PER_HEAD = {"use_flash_lobo": True, "use_flash_lobo_per_head": True}
KINDS = [
    {},
    LOBO,
    {"position": "none", **PER_HEAD, "n_kv_head": 1},
    {"position": "learned", **LOBO},
    {"position": "learned", **LOBO, "flash_lobo_fixed": True, "flash_lobo_log_const": 1.5, "n_kv_head": 2},
    {"position": "gaussian", "n_kv_head": 2, **PER_HEAD},
    {"position": "gaussian", "rope_sigma": "power", "lod_block_size": 2, "qk_norm": False},
    {"position": "gaussian_alibi"},
    {"position": "gaussian_alibi", "n_kv_head": 2, **PER_HEAD},
    {"position": "gaussian_alibi", "alibi_rule": "geometric", "n_kv_head": 1, "block_size": 7, **LOBO},
    {"position": "gaussian_lod2d", "lod_pairs": 4, **LOBO},
    {"position": "gaussian_lod2d_alibi", "rope_sigma": "power", **PER_HEAD},
    {"position": "gaussian_lod2d_alibi", "n_kv_head": 2, "activation": "silu"},
    {"n_kv_head": 2},
    {"n_kv_head": 1, "qk_norm": False},
    {"position": "learned"},
    {"position": "none"},
    {"activation": "swiglu"},
    {"activation": "relu2", "tie_weights": False},
    {"activation": "silu", "rope_base": 500.0, "norm_eps": 0.1},
    {"numerical_mlp_num_layers": 3},
    {"block_size": 5},
    {"block_size": 1},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_cached_is_uncached_token_for_token_past_the_window(options: dict[str, object], batch: int) -> None:
    model = make(**options)
    start = prompt(model, batch, min(3, model.config.block_size))
    knobs = {"temperature": (0.9, 1.0, 0.0), "top_k": 20, "top_p": 0.95, "min_p": 0.01, "seeds": 5}
    cached = drawn(model, start, 45, **knobs)
    assert torch.equal(cached, drawn(model, start, 45, cached=False, **knobs))
    assert len(cached[0, :, 0].unique()) > 5  # a constant stream would prove little


@pytest.mark.parametrize("contexts", [(TEXT,), (VALUE,), (VALUE, TEXT), (TEXT, CASE)], ids=len)
def test_every_mixture_of_contexts(contexts: tuple[ContextConfig, ...]) -> None:
    model = make(*contexts)
    start = prompt(model)
    assert torch.equal(drawn(model, start, 40, seeds=1), drawn(model, start, 40, seeds=1, cached=False))


@pytest.mark.parametrize("options", [kind for kind in KINDS if "block_size" not in kind], ids=str)
def test_cached_outputs_are_the_models_to_float32_rounding(options: dict[str, object]) -> None:
    model = make(**options)
    tokens = prompt(model, length=16)
    decoder = Decoder(model, 2)
    outputs = decoder.prefill(tokens[:, :3])
    for length in range(3, 17):
        with torch.no_grad():
            expected = model(tokens[:, :length]).logits
        logits = torch.cat((expected["text"], expected["case"]), -1)[:, 0]
        torch.testing.assert_close(outputs[0], logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(outputs[1], expected["value"], rtol=2e-6, atol=1e-5)
        if length < 16:
            outputs = decoder.step(tokens[:, length])


def test_past_the_window_the_last_half_is_read_afresh() -> None:
    model = make(position="learned")
    tokens = prompt(model, length=40)
    decoder = Decoder(model, 2)
    decoder.prefill(tokens[:, :1])
    window = 1
    for length in range(2, 41):
        logits, _ = decoder.step(tokens[:, length - 1])
        window = window + 1 if window < 16 else kept_tokens(16)
        with torch.no_grad():
            expected = model(tokens[:, length - window : length]).logits["text"][:, 0]
        torch.testing.assert_close(logits[:, :37], expected, rtol=0, atol=1e-5)


def test_a_row_is_the_same_in_any_batch() -> None:
    model = make()
    start = prompt(model, 4)
    together = drawn(model, start, 30, seeds=[11, 12, 13, 14])
    for row in range(4):
        alone = drawn(model, start[row : row + 1], 30, seeds=[11 + row])
        assert torch.equal(alone[0], together[row])
    assert row_seeds(7, 3).tolist() == row_seeds(7, 8)[:3].tolist()
    assert len(set(row_seeds(7, 100).tolist()) | set(row_seeds(8, 100).tolist())) == 200


def test_seeds_decide_the_draw_and_zero_temperature_does_not_ask_them() -> None:
    model = make(TEXT)
    start = prompt(model, 1)
    assert torch.equal(drawn(model, start, 20, seeds=3), drawn(model, start, 20, seeds=3))
    assert not torch.equal(drawn(model, start, 20, seeds=3), drawn(model, start, 20, seeds=4))
    greedy = drawn(model, start, 20, seeds=3, temperature=0)
    assert torch.equal(greedy, drawn(model, start, 20, seeds=4, temperature=0))
    tokens = start
    for step in range(12):
        best = model(tokens).logits["text"][:, -1].argmax(-1)
        assert best.item() == greedy[0, step].item()
        tokens = torch.cat((tokens, best.view(1, 1, 1)), dim=1)


def test_numeric_contexts_give_the_rounded_prediction_within_their_range() -> None:
    model = make(VALUE, TEXT)
    start = prompt(model)
    first = drawn(model, start, 1)[:, 0, 0]
    with torch.no_grad():
        expected = (model(start).logits["value"][:, -1] * 20 + 40).round().clamp(0, 99)
    assert first.tolist() == expected.tolist()
    with torch.no_grad():
        model.numeric_head.out_bias.fill_(1e6)
    assert drawn(model, start, 3)[..., 0].tolist() == [[99] * 3] * 2


def test_generation_is_lazy_leaves_the_model_alone_and_needs_no_grad() -> None:
    model = make(dropout=0.5).train()
    start = prompt(model)
    for cached in (True, False):
        first = list(itertools.islice(generate(model, start, 10**9, cached=cached, seeds=2), 2))
        assert model.training
        assert not first[0].requires_grad
        assert torch.equal(torch.stack(first, 1), drawn(model, start, 2, seeds=2))


def test_reduced_precision_weights_stay_close() -> None:
    model = make()
    tokens = prompt(model, length=8)
    full, _ = Decoder(model, 2).prefill(tokens)
    half, _ = Decoder(model, 2, dtype=torch.bfloat16).prefill(tokens)
    assert (full - half).abs().max() < 0.05 * full.abs().max()
    rounded, _ = Decoder(model.bfloat16(), 2).prefill(tokens)  # a model that is bfloat16 itself
    assert rounded.dtype == torch.float32
    assert (full - rounded).abs().max() < 0.05 * full.abs().max()


def test_nothing_to_generate_and_what_is_refused() -> None:
    model = make()
    start = prompt(model)
    assert list(generate(model, start, 0)) == []
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(model, start, -1)
    for length in (0, 17):
        with pytest.raises(ValueError, match=f"1 to block_size = 16 positions, got {length}"):
            generate(model, prompt(model, length=length), 1)
    with pytest.raises(ValueError, match="at least one row"):
        generate(model, start[:0], 1)
    bad = start.clone()
    bad[0, 0, 2] = 3
    with pytest.raises(ValueError, match="context 'case': id 3"):
        generate(model, bad, 1)
    with pytest.raises(ValueError, match="top_k must be one value or one per context"):
        generate(model, start, 1, top_k=(1, 2))
    with pytest.raises(ValueError, match="temperature"):
        generate(model, start, 1, temperature=-1.0)
    with pytest.raises(ValueError, match="seeds must be one integer or one per row"):
        generate(model, start, 1, seeds=[1, 2, 3])
    with pytest.raises(ValueError, match="3 rows, the decoder was made for 2"):
        Decoder(model, 2).prefill(prompt(model, 3))


def test_small_steps_run_on_one_thread_and_give_the_others_back() -> None:
    class Watched(Decoder):
        def _turns(self) -> tuple[Tensor, Tensor]:
            seen.append(torch.get_num_threads())
            return super()._turns()

        def _forward(self, *args: Any) -> tuple[Tensor | None, Tensor | None]:
            seen.append(torch.get_num_threads())
            return super()._forward(*args)

    seen: list[int] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        model = make()
        tokens = prompt(model)
        decoder = Watched(model, 2)
        decoder.prefill(tokens)
        decoder.step(tokens[:, 0])
        assert seen == [1, 1, 1]
        assert torch.get_num_threads() == 2
        with pytest.raises(IndexError):
            decoder.prefill(tokens + 1000)
        assert torch.get_num_threads() == 2
        decoder._cost = math.inf  # a model worth more threads
        decoder.step(tokens[:, 0])
        assert seen[-1] == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("cached", [True, False])
def test_outputs_that_are_not_finite_end_no_other_row(cached: bool) -> None:
    model = make(TEXT, CASE, block_size=6)
    start = prompt(model)
    start[0, :, 0], start[1, :, 0] = 5, 6
    expected = drawn(model, start[1:], 12, seeds=[2], top_k=3)
    poison = next(i for i in range(7, 37) if i not in expected[..., 0])
    start[0, 2, 0] = poison
    with torch.no_grad():
        model.embedding.weight[poison] = torch.nan  # the head is tied: then every row's logits are NaN in that place
        model.head = PackedHead(model.config.vocab_sizes, 64)
    healthy = drawn(model, start[1:], 12, seeds=[2])
    both = drawn(model, start, 12, seeds=[1, 2], cached=cached)
    assert both[0, :4].tolist() == [[-1, -1]] * 4
    assert both[0, 4:].min() >= 0  # the window has left the damage behind
    assert torch.equal(both[1], healthy[0])
    assert torch.equal(both, drawn(model, start, 12, seeds=[1, 2], cached=not cached))


def test_a_numeric_prediction_that_is_not_a_number_gives_minus_one() -> None:
    model = make()
    start = prompt(model)
    with torch.no_grad():
        model.numeric_head.out_bias.fill_(torch.nan)
    for cached in (True, False):
        tokens = drawn(model, start, 20, cached=cached)
        assert (tokens[..., 1] == -1).all()
        assert (tokens[..., [0, 2]] >= 0).all()


def test_half_precision_does_not_round_a_context_of_large_numbers() -> None:
    model = make(ContextConfig("n", "numeric", 20000, mean=11003.0, std=1.0)).bfloat16()
    with torch.no_grad():
        model.numeric_head.out.zero_()
        for bias, code in ((2.25, 11005), (1e9, 19999), (-1e9, 0)):
            model.numeric_head.out_bias.fill_(bias)
            for cached in (True, False):
                assert drawn(model, torch.zeros(1, 1, 1).long(), 2, cached=cached).flatten().tolist() == [code] * 2


@pytest.mark.parametrize("cached", [True, False])
def test_autocast_changes_nothing(cached: bool) -> None:
    model = make()
    start = prompt(model)
    expected = drawn(model, start, 20, seeds=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(drawn(model, start, 20, seeds=1, cached=cached), expected)


@pytest.mark.parametrize("cached", [True, False])
def test_what_the_caller_does_with_the_tensors_does_not_matter(cached: bool) -> None:
    model = make()
    start = prompt(model)
    expected = drawn(model, start, 20, seeds=1)
    given, tokens = start.clone(), []
    symbols = generate(model, given, 20, seeds=1, cached=cached)
    given.zero_()
    for step in range(20):
        with torch.inference_mode(step % 2 == 0):
            tokens.append(next(symbols).clone())
    assert torch.equal(torch.stack(tokens, 1), expected)
    with torch.inference_mode():
        symbols = generate(model, start, 20, seeds=1, cached=cached)
        first = next(symbols)
    second = next(symbols)
    assert torch.equal(torch.stack((first, second), 1), expected[:, :2])
    second.zero_()
    assert torch.equal(torch.stack(list(symbols), 1), expected[:, 2:])


def test_modules_keep_their_modes_whatever_happens() -> None:
    model = make().train()
    model.blocks[0].eval()
    model.blocks[1].mlp = torch.nn.Identity()
    modes = [module.training for module in model.modules()]
    list(generate(model, prompt(model), 2, cached=False))
    assert [module.training for module in model.modules()] == modes
    model.blocks[1].attention.out = torch.nn.Linear(1, 1)  # breaks the pass
    modes = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError):
        list(generate(model, prompt(model), 2, cached=False))
    assert [module.training for module in model.modules()] == modes


def test_knobs_and_seeds_are_taken_as_they_are_given() -> None:
    model = make()
    start = prompt(model)
    for top_k in (1.9, [1.9] * 3, torch.tensor([1.0] * 3)):
        with pytest.raises(TypeError, match="top_k must be an integer"):
            generate(model, start, 1, top_k=top_k)
    for seeds in (1.5, [1.0, 2.0], torch.tensor(1.5)):
        with pytest.raises(TypeError, match="seeds must be"):
            generate(model, start, 1, seeds=seeds)  # type: ignore[arg-type]
    expected = drawn(model, start, 8, seeds=3)
    for seed in (np.int64(3), torch.tensor(3), np.array(3)):
        assert torch.equal(drawn(model, start, 8, seeds=seed), expected)
    rows = drawn(model, start, 8, seeds=[3, 4])
    for given in (np.array([3, 4]), torch.tensor([3, 4], dtype=torch.int32)):
        assert torch.equal(drawn(model, start, 8, seeds=given), rows)
    assert torch.equal(drawn(model, start[:1], 8, seeds=torch.tensor([3])), rows[:1])  # a seed of its own, not a source
