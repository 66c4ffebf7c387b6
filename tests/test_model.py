"""The multi-context GPT: one context is an ordinary GPT, names decide the order, and wrong input is named."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from megactx.config import ContextConfig, GPTConfig
from megactx.model import GPT
from megactx.nn import NumericEmbedding, NumericHead, PackedEmbedding
from megactx.nn.rotary import KINDS

TEXT = ContextConfig("text", vocab_size=11)
CASE = ContextConfig("case", vocab_size=3)
VALUE = ContextConfig("value", "numeric", 100, mean=40.0, std=20.0)
SMALL = {"block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}


def make(*contexts: ContextConfig, **options: object) -> GPT:
    return GPT(GPTConfig(contexts or (TEXT, VALUE, CASE), **{**SMALL, **options})).eval()  # type: ignore[arg-type]


def ids(model: GPT, batch: int = 2, length: int = 9) -> Tensor:
    return torch.stack([torch.randint(c.vocab_size, (batch, length)) for c in model.config.contexts], dim=-1)


def plain_gpt(model: GPT, tokens: Tensor) -> Tensor:
    """A single-context GPT as a textbook writes it, over the same weights: [B, T] to [B, T, V]."""
    config, table = model.config, model.embedding.weight
    heads, width = config.n_head, config.head_dim
    length = tokens.shape[1]
    angle = torch.arange(length)[:, None] * config.rope_base ** (-torch.arange(0, width, 2) / width)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)

    def norm(x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * gain

    def rotate(x: Tensor) -> Tensor:
        a, b = norm(x).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    x = table[tokens]
    for block in model.blocks:
        qkv = norm(x, block.attention_norm.weight) @ block.attention.qkv.weight.T
        q, k, v = (part.unflatten(-1, (heads, width)) for part in qkv.chunk(3, dim=-1))
        scores = torch.einsum("bihd,bjhd->bhij", rotate(q), rotate(k)) / math.sqrt(width)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        x = x + torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2) @ block.attention.out.weight.T
        x = x + F.gelu(norm(x, block.mlp_norm.weight) @ block.mlp.up.weight.T) @ block.mlp.down.weight.T
    return norm(x, model.norm.weight) @ table.T


def test_one_categorical_context_is_a_plain_gpt() -> None:
    model = make(TEXT)
    tokens = ids(model)
    output = model(tokens, tokens, return_logits=True)
    expected = plain_gpt(model, tokens[..., 0])
    torch.testing.assert_close(output.logits["text"], expected, rtol=1e-4, atol=1e-5)
    loss = F.cross_entropy(expected.flatten(0, 1), tokens.flatten())
    torch.testing.assert_close(output.loss, loss, rtol=1e-5, atol=1e-6)


def test_any_order_of_the_contexts_gives_the_same_bits() -> None:
    model = make()
    packed = ids(model)
    targets = packed.roll(-1, 1)
    expected = model(packed, targets, return_logits=True)
    names = list(model.config.names)
    for order in (names, names[::-1], [names[1], names[2], names[0]]):
        at = [names.index(name) for name in order]
        streams, wanted = [packed[..., i] for i in at], [targets[..., i] for i in at]
        forms = [
            model(dict(zip(order, streams, strict=True)), dict(zip(order, wanted, strict=True)), return_logits=True),
            model(streams, wanted, token_order=order, return_logits=True),
            model(packed[..., at], targets[..., at], token_order=order, return_logits=True),
        ]
        for output in forms:
            assert torch.equal(output.loss, expected.loss)
            assert torch.equal(output.context_losses, expected.context_losses)
            assert list(output.logits) == names
            assert all(torch.equal(output.logits[name], expected.logits[name]) for name in names)


def test_the_loss_is_the_weighted_mean_of_the_contexts_losses() -> None:
    model = make(context_weights=(3.0, 0.0, 1.0))
    tokens = ids(model)
    targets = tokens.roll(-1, 1)
    targets[0, 3:] = -1  # ignored
    output = model(tokens, targets, return_logits=True)
    text, case = (
        F.cross_entropy(output.logits[name].flatten(0, 1), targets[..., i].flatten(), ignore_index=-1)
        for name, i in (("text", 0), ("case", 2))
    )
    valid = targets[..., 1] != -1
    value = (output.logits["value"] - (targets[..., 1] - 40) / 20)[valid].square().mean()
    torch.testing.assert_close(output.context_losses, torch.stack((text, value, case)).detach())
    torch.testing.assert_close(output.loss, (3 * text + case) / 4)
    assert not output.context_losses.requires_grad


def test_the_loss_stays_float32_under_autocast_and_numbers_keep_their_digits() -> None:
    model = make(VALUE, TEXT)
    tokens = ids(model)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens, tokens, return_logits=True)
    assert output.loss.dtype == output.context_losses.dtype == torch.float32
    assert output.logits["value"].dtype == torch.float32
    embedding = NumericEmbedding(1, 8)
    values = torch.tensor([[1.0], [1.001]])  # one number in bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        first, second = embedding(values)
    assert not torch.equal(first, second)


def test_standardisation_survives_half_precision_weights() -> None:
    model = make(ContextConfig("n", "numeric", 20000, mean=11003.0, std=1.0)).bfloat16()
    assert model.standardise(torch.tensor([11004])).tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("contexts", [(TEXT,), (VALUE,), (TEXT, VALUE, CASE)], ids=len)
@pytest.mark.parametrize("position", ["simple", "learned"])
def test_a_model_of_another_type_runs_and_trains(
    dtype: torch.dtype, contexts: tuple[ContextConfig, ...], position: str
) -> None:
    model = make(*contexts, position=position)
    tokens = ids(model)
    expected = model(tokens, tokens)
    output = model.to(dtype)(tokens, tokens)
    assert output.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(output.loss.float(), expected.loss, rtol=0.02, atol=0.01)
    torch.testing.assert_close(output.context_losses.float(), expected.context_losses, rtol=0.02, atol=0.01)
    output.loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_stacked_numeric_networks_are_the_separate_ones() -> None:
    embedding, head = NumericEmbedding(2, 8, hidden=5, layers=3), NumericHead(2, 8, hidden=5, layers=3)
    values, hidden = torch.randn(4, 2), torch.randn(4, 8)
    total, predictions = torch.zeros(4, 8), []
    for c in range(2):
        h = F.relu(values[:, c : c + 1] * embedding.weight[c] + embedding.bias[c])
        h = F.relu(h @ embedding.middle.weight[0, c] + embedding.middle.bias[0, c])
        total = total + h @ embedding.out[:, 5 * c : 5 * c + 5].T
        g = F.relu(hidden @ head.weight[5 * c : 5 * c + 5].T + head.bias[5 * c : 5 * c + 5])
        g = F.relu(g @ head.middle.weight[0, c] + head.middle.bias[0, c])
        predictions.append(g @ head.out[c] + head.out_bias[c])
    torch.testing.assert_close(embedding(values), total)
    torch.testing.assert_close(head(hidden), torch.stack(predictions, -1))


def test_the_packed_embedding_is_the_sum_of_the_contexts_own() -> None:
    embedding = PackedEmbedding((5, 3), 4)
    tokens = torch.tensor([[[4, 0], [0, 2]]])
    own = embedding.weight[:5][tokens[..., 0]] + embedding.weight[5:][tokens[..., 1]]
    torch.testing.assert_close(embedding(tokens), own)


def test_without_targets_only_the_last_position_is_computed() -> None:
    model = make()
    tokens = ids(model)
    last, every = model(tokens), model(tokens, last_only=False)
    assert last.loss is None
    for name in model.config.names:
        assert last.logits[name].shape[1] == 1
        torch.testing.assert_close(last.logits[name], every.logits[name][:, -1:], rtol=1e-5, atol=1e-6)


def test_no_position_sees_its_future() -> None:
    model = make(n_kv_head=2)
    tokens = ids(model)
    changed = tokens.clone()
    changed[:, 5:] = ids(model)[:, 5:]
    before, after = (model(t, last_only=False).logits for t in (tokens, changed))
    for name in model.config.names:
        assert torch.equal(before[name][:, :5], after[name][:, :5])


@pytest.mark.parametrize("activation", ["gelu", "relu2", "silu", "swiglu"])
@pytest.mark.parametrize("position", [*KINDS, "learned", "none"])
def test_every_kind_trains_every_parameter(activation: str, position: str) -> None:
    lobo = {"use_flash_lobo": activation != "silu", "use_flash_lobo_per_head": activation == "gelu"}
    model = make(activation=activation, position=position, n_kv_head=1, tie_weights=False, **lobo).train()
    tokens = ids(model)
    model(tokens, tokens).loss.backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    if position == "learned":
        silent = [name for name in silent if name != "position_embedding"]  # rows past T have none
    assert silent == []


def test_order_matters_only_with_positions() -> None:
    tokens = torch.tensor([[[1], [2], [3], [4]]])
    swapped = tokens[:, [1, 0, 2, 3]]
    for position, same in (("none", True), ("simple", False), ("learned", False)):
        model = make(TEXT, n_layer=1, position=position)
        with torch.no_grad():
            [p.mul_(4) for p in model.parameters()]
        a, b = model(tokens).logits["text"], model(swapped).logits["text"]
        assert torch.allclose(a, b, atol=1e-5) == same


def test_compiles_to_one_graph_over_changing_lengths() -> None:
    model = make().train()
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    compiled_after = []
    for length in (5, 8, 13):
        tokens = ids(model, length=length)
        gradients = []
        for forward in (compiled, model):
            model.zero_grad()
            loss = forward(tokens, tokens).loss
            loss.backward()
            gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
        torch.testing.assert_close(*gradients)
        compiled_after.append(graphs.frame_count)
    assert len(set(compiled_after)) == 1  # the first length's graph served them all
    tokens = ids(model)
    tokens[0, 0, 2] = 3
    with pytest.raises(RuntimeError, match="'case': 3"):
        compiled(tokens, tokens)


def test_residual_projections_start_smaller() -> None:
    model = make(TEXT, n_layer=8, n_embd=64)
    block = model.blocks[0]
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for weight in (block.attention.out.weight, block.mlp.down.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)


def test_an_empty_batch_passes_and_an_empty_sequence_is_refused() -> None:
    model = make()
    assert model(ids(model, batch=0)).logits["text"].shape == (0, 1, 11)
    with pytest.raises(ValueError, match="T = 0"):
        model(ids(model, length=0))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["text", "value"], "'case' is missing"),
        (["text", "value", "case", "kind"], "unknown context 'kind'"),
        (["text", "value", "case", "case"], "'case' is given twice"),
    ],
)
def test_contexts_are_refused_by_name(names: list[str], message: str) -> None:
    model = make()
    stream = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        model([stream] * len(names), token_order=names)


def test_wrong_input_is_named() -> None:
    model = make()
    tokens = ids(model)
    with pytest.raises(ValueError, match="17 positions, more than block_size = 16"):
        model(ids(model, length=17))
    for bad in (3, -1):
        wrong = tokens.clone()
        wrong[1, 4, 2] = bad
        with pytest.raises(ValueError, match=f"context 'case': id {bad} at row 1, position 4 .* vocabulary of 3"):
            model(wrong)
    for bad in (-100, -2, 100):
        wrong = tokens.clone()
        wrong[1, 4, 1] = bad
        with pytest.raises(ValueError, match=f"targets of context 'value': id {bad} at row 1, position 4"):
            model(tokens, wrong)
    with pytest.raises(TypeError, match="tokens must be integers"):
        model(tokens.float())
    with pytest.raises(ValueError, match=r"must be \[B, T, 3\]"):
        model(tokens[..., :2])
    streams = dict(zip(model.config.names, tokens.unbind(-1), strict=True))
    with pytest.raises(ValueError, match=r"'text' is \[2, 9\], 'case' is \[2, 8\]"):
        model({**streams, "case": streams["case"][:, :8]})
    with pytest.raises(ValueError, match="need token_order"):
        model(list(streams.values()))
    with pytest.raises(ValueError, match="shape of tokens"):
        model(tokens, tokens[:, :4])
    with pytest.raises(ValueError, match="last_only"):
        model(tokens, tokens, last_only=True)


def test_a_config_survives_json_and_refuses_what_it_does_not_know() -> None:
    config = GPTConfig((TEXT, VALUE), context_weights=(1, 2), n_head=4, n_embd=64, n_kv_head=2)
    data = config.to_json()
    assert GPTConfig.from_json(data) == config
    assert config.loss_weights == pytest.approx((1 / 3, 2 / 3))
    for weight in (1e308, 5e-324):
        huge = GPTConfig((TEXT, VALUE, CASE), context_weights=(weight,) * 3)
        assert huge.loss_weights == pytest.approx((1 / 3,) * 3)
    with pytest.raises(ValueError, match="unknown field 'n_layers', did you mean 'n_layer'"):
        GPTConfig.from_json({**data, "n_layers": 2})
    with pytest.raises(ValueError, match="'contexts' is missing"):
        GPTConfig.from_json({"n_layer": 2})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": ()}, "at least one context"),
        ({"contexts": (TEXT, TEXT)}, "'text' twice"),
        ({"n_embd": 30}, "multiple of n_head"),
        ({"n_kv_head": 3}, "multiple of n_kv_head"),
        ({"n_embd": 20}, "must be even"),
        ({"n_layer": 0}, "n_layer must be at least 1"),
        ({"dropout": 1.0}, "dropout"),
        ({"activation": "tanh"}, "activation must be one of gelu"),
        ({"position": "alibi"}, "position must be one of"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
        ({"context_weights": (1.0, 2.0)}, "context_weights needs 1 values"),
        ({"context_weights": (-1.0,)}, "context_weights must be >= 0"),
    ],
)
def test_a_config_is_refused_by_its_field(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{"contexts": (TEXT,), **SMALL, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"std": 1e-50}, "std of context 'n' must be in"),
        ({"std": 1e300}, "std of context 'n' must be in"),
        ({"mean": 1e30}, "mean of context 'n' must be within"),
        ({"vocab_size": 2**24 + 1}, "vocab_size of numeric context 'n' must be <= 2"),
    ],
)
def test_a_numeric_context_stays_within_what_float32_holds(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ContextConfig(**{"name": "n", "kind": "numeric", **options})  # type: ignore[arg-type]
    model = make(ContextConfig("n", "numeric", 2**24, std=1e-6), n_layer=1)
    codes = torch.tensor([[[2**24 - 1], [2**24 - 2]]])
    first, second = model.standardise(codes).flatten()
    assert first > second
    assert model(codes, codes).loss.isfinite()
