"""Generation: one key/value cache shared by all contexts, exact against running the whole window again.

At this size a step is not arithmetic but calls: a position of a 4-layer, 128-wide model is 0.8 M multiply-adds, some
60 us, and an eager forward through the modules costs ten times that. So `Decoder` takes the weights out of the modules
once, folded (norm gains, scales and the GELU's constants go into the neighbouring matrices) and transposed for a
row-times-matrix product, and a step is about sixteen calls a layer into buffers that already exist.

**The window.** A model reads at most `block_size` positions. The window starts at the prompt's first token and grows;
when one more token would not fit, it jumps so that the last `block_size // 2` tokens remain, counted from position 0
again, and the cache is rebuilt from them by one prefill. That costs one prefill per half window instead of one per
token, and it is a rule about tokens, not about caches: `generate(cached=False)` follows it with plain forward passes,
and both give the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.kernels import gaussian_rope
from megactx.kernels.sampling.op import draw, prepare_knobs, prepare_seeds
from megactx.model import GPT, Block
from megactx.nn.embedding import segment_offsets

Knob = float | Sequence[float] | Tensor


def kept_tokens(block_size: int) -> int:
    """How many tokens stay in the window when it overflows."""
    return max(1, block_size // 2)


def row_seeds(seed: int, rows: int) -> Tensor:
    """One independent 64-bit seed a row, int64 `[rows]`: row i depends on `seed` and i alone, whatever the batch."""
    words = [np.random.SeedSequence(seed % 2**64, spawn_key=(row,)).generate_state(1, np.uint64) for row in range(rows)]
    return torch.from_numpy(np.concatenate(words).view(np.int64)) if rows else torch.zeros(0, dtype=torch.int64)


class _Layer:
    """One block's weights as a row-times-matrix product wants them, everything constant folded in.

    RMSNorm's gain and factor sqrt(E) go into the next matrix (`_normalise` leaves them out). The rotated pairs
    (j, j + D/2) of q and k become neighbours, so that a rotation is one complex product; q and k are permuted alike,
    which leaves q.k as it is. GELU(x) = x/2 (1 + erf(x / sqrt 2)) becomes u + u erf(u), u = x / sqrt 2.
    """

    def __init__(self, block: Block, dtype: torch.dtype) -> None:
        attention, mlp = block.attention, block.mlp
        heads, width = attention.n_head + 2 * attention.n_kv_head, attention.head_dim
        order = torch.arange(width).view(2, -1).T.flatten()
        rows = torch.arange(heads * width).view(heads, width)
        rotated = attention.n_head + attention.n_kv_head
        rows[:rotated] = rows[:rotated, order]
        qkv = attention.qkv.weight.detach().float()[rows.flatten().to(attention.qkv.weight.device)]
        up, down = mlp.up.weight.detach().float(), mlp.down.weight.detach().float()
        if mlp.activation == "gelu":
            up, down = up / math.sqrt(2), down / math.sqrt(2)
        self.qkv = (qkv * _gain(block.attention_norm.weight)).T.to(dtype).contiguous()
        self.out = attention.out.weight.detach().T.to(dtype).contiguous()
        self.up = (up * _gain(block.mlp_norm.weight)).T.to(dtype).contiguous()
        self.down = down.T.to(dtype).contiguous()


def _gain(weight: Tensor) -> Tensor:
    return weight.detach().float() * math.sqrt(weight.numel())


class _Workspace:
    """Every intermediate of `rows` x `length` positions, and the views of them that a layer needs, made once."""

    def __init__(self, decoder: Decoder, length: int) -> None:
        config, batch = decoder.model.config, decoder.batch_size
        heads, kv_heads, width = config.n_head, config.kv_heads, config.head_dim
        rows = batch * length

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, device=decoder.device)

        self.length = length
        # the residual stream, with RMSNorm's epsilon riding along as one more channel: |stream|^2 = |x|^2 + E eps
        self.stream = empty(rows, config.n_embd + 1).fill_(math.sqrt(config.norm_eps * config.n_embd))
        self.x = self.stream[:, :-1]
        self.norm, self.unit = empty(rows, 1), empty(rows, config.n_embd)
        self.qkv = empty(rows, (heads + 2 * kv_heads) * width)
        split = self.qkv.view(batch, length, heads + 2 * kv_heads, width)
        self.qk = split[:, :, : heads + kv_heads]
        self.qk_norm = empty(batch, length, heads + kv_heads, 1)
        # complex views: [B, Hq, P, D/2], and keys and values side by side as [2, B, Hk, P, D/2]
        self.q_pairs = _pairs(split[:, :, :heads]).transpose(1, 2)
        kv = _pairs(split[:, :, heads:]).unflatten(2, (2, kv_heads))
        self.kv_pairs = kv.permute(2, 0, 3, 1, 4)
        self.q = empty(batch, heads, length, width)
        self.q_rotated = _pairs(self.q)
        # for one position, the grouped queries of a key/value head are the rows of one matrix
        self.q_groups = self.q.view(batch * kv_heads, -1, width)
        self.mixed = torch.empty_like(self.q_groups)
        self.mixed_rows = self.mixed.view(rows, config.n_embd)
        self.up = empty(rows, decoder.layers[0].up.shape[1])
        self.half = self.up.chunk(2, dim=-1)
        self.erf = torch.empty_like(self.up)
        self.gated = torch.empty_like(self.half[0])


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class Decoder:
    """A model's weights and a preallocated cache for `batch_size` rows; float32 activations, no autograd.

    `prefill` reads a prompt, `step` one more position; both return `(logits, scaled)` for the last position: the packed
    logits `[B, sum of vocabularies]` of the categorical contexts and the standardised predictions
    `[B, numeric contexts]` of the numeric ones, None where the model has no such context. Past the window, `step`
    follows the rule of this module. `dtype` is that of the matrices; below float32 the result is not exact.

    The weights are a copy: train on, and make a new decoder.
    """

    def __init__(self, model: GPT, batch_size: int, *, dtype: torch.dtype = torch.float32) -> None:
        config = model.config
        self.model = model
        self.batch_size = batch_size
        self.device = model.limits.device
        self.length = 0
        with torch.inference_mode():
            blocks = [block for block in model.blocks if isinstance(block, Block)]
            self.layers = [_Layer(block, dtype) for block in blocks]
            gain = _gain(model.norm.weight)
            head = model.head_weight
            self._head = None if head is None else (head.detach() * gain).T.to(dtype).contiguous()
            self._gain = gain
            # contexts that are all categorical need no module: one lookup and one sum
            plain = model.embedding is not None and model.numeric_embedding is None
            self._table = model.embedding.weight.detach() if model.embedding is not None and plain else None
            self._offsets = segment_offsets(config.vocab_sizes).to(self.device)
            self._head_eps = torch.tensor(math.sqrt(config.norm_eps * config.head_dim), device=self.device)
            size = (config.n_layer, 2, batch_size, config.kv_heads, config.block_size, config.head_dim)
            cache = torch.empty(size, device=self.device)
            self._cache = _pairs(cache)
            flat = cache.flatten(2, 3)
            self._keys, self._values = flat[:, 0].transpose(-1, -2), flat[:, 1]
            self._history = torch.zeros(
                (config.block_size, batch_size, len(config.contexts)), dtype=torch.int64, device=self.device
            )
            self._q_turn, self._kv_turn = self._turns()
            self._single = _Workspace(self, 1)
        self._at: list[Any] = [None] * config.block_size
        self._mm = torch.mm if dtype == torch.float32 else _narrow_mm
        self._addmm = torch.addmm if dtype == torch.float32 else _narrow_addmm

    def _turns(self) -> tuple[Tensor, Tensor]:
        """Per position of the window the complex factors of q `[T, D/2]` and of k and v `[2, 1, 1, T, D/2]`.

        The rotation is read off `gaussian_rope` itself, by turning the unit vector of every pair. Values are not
        turned; the scales of the attention logits and of the QK-norm are all carried by q.
        """
        config = self.model.config
        length, half = config.block_size, config.head_dim // 2
        turn = torch.ones(length, half, dtype=torch.complex64, device=self.device)
        if config.position == "simple":
            unit = torch.cat((torch.ones(length, half), torch.zeros(length, half)), dim=-1).to(self.device)
            positions = torch.arange(length, device=self.device)
            turned, _ = gaussian_rope(
                unit[None, :, None], unit[None, :, None], positions, base=config.rope_base, sigma="none"
            )
            turn = torch.complex(*turned[0, :, 0].chunk(2, dim=-1))
        scale = config.head_dim ** (0.5 if config.qk_norm else -0.5)
        return turn * scale, torch.stack((turn, torch.ones_like(turn)))[:, None, None]

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Start the window afresh with `tokens` int64 `[B, P, C]`, 1 <= P <= block_size, contexts in config order."""
        batch, length, _ = tokens.shape
        block_size = self.model.config.block_size
        if batch != self.batch_size:
            raise ValueError(f"tokens hold {batch} rows, the decoder was made for {self.batch_size}")
        if not 1 <= length <= block_size:
            raise ValueError(f"tokens must hold 1 to block_size = {block_size} positions, got {length}")
        self._history[:length] = tokens.transpose(0, 1)
        self.length = length
        return self._run(tokens, 0, self._single if length == 1 else _Workspace(self, length))

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Append one position, `tokens` int64 `[B, C]` within the vocabularies."""
        start = self.length
        if start == self.model.config.block_size:
            kept = kept_tokens(start) - 1
            tail = self._history[start - kept :]
            return self.prefill(torch.cat((tail, tokens[None])).transpose(0, 1))
        self._history[start].copy_(tokens)
        self.length = start + 1
        return self._run(tokens, start, self._single)

    def _embed(self, tokens: Tensor, start: int, work: _Workspace) -> None:
        """The sum of the embeddings of `tokens` `[B, P, C]` (or `[B, C]` for one position) into the residual stream."""
        model = self.model
        if self._table is not None:
            ids = (tokens + self._offsets).flatten(0, -2)
            torch.sum(torch.embedding(self._table, ids), 1, out=work.x)
        else:
            work.x.copy_(model.embed(tokens.view(self.batch_size, work.length, -1)).flatten(0, 1))
        if model.position_embedding is not None:
            work.x.view(self.batch_size, work.length, -1).add_(model.position_embedding[start : start + work.length])

    def _views(self, start: int, length: int) -> tuple[Tensor, Tensor, list[tuple[_Layer, Tensor, Tensor, Tensor]]]:
        """The turns of `length` positions, and per layer its weights, the cache they write and the cache they read."""
        stop = start + length
        slots = self._cache.narrow(4, start, length).unbind(0)
        keys = self._keys.narrow(3, 0, stop).unbind(0)
        values = self._values.narrow(2, 0, stop).unbind(0)
        layers = list(zip(self.layers, slots, keys, values, strict=True))
        return self._q_turn.narrow(0, start, length), self._kv_turn.narrow(3, start, length), layers

    def _run(self, tokens: Tensor, start: int, work: _Workspace) -> tuple[Tensor | None, Tensor | None]:
        length = work.length
        self._embed(tokens, start, work)
        x = work.x
        if length > 1:
            q_turn, kv_turn, layers = self._views(start, length)
        else:
            found = self._at[start]
            if found is None:  # every position of a window comes again in the next one
                found = self._at[start] = self._views(start, 1)
            q_turn, kv_turn, layers = found
        qk_norm = self.model.config.qk_norm
        for layer, slot, k, v in layers:
            self._mm(_normalise(work), layer.qkv, out=work.qkv)
            if qk_norm:
                torch.linalg.vector_norm(work.qk, 2, -1, True, out=work.qk_norm)
                work.qk.div_(work.qk_norm.hypot_(self._head_eps))
            torch.mul(work.q_pairs, q_turn, out=work.q_rotated)
            torch.mul(work.kv_pairs, kv_turn, out=slot)
            self._addmm(x, _attend(work, k, v), layer.out, out=x)
            self._mm(_normalise(work), layer.up, out=work.up)
            self._addmm(x, self._activate(work), layer.down, out=x)
        last = _normalise(work) if length == 1 else _normalise(work).view(self.batch_size, length, -1)[:, -1]
        logits = None if self._head is None else (last.to(self._head.dtype) @ self._head).float()
        scaled = None if self.model.numeric_head is None else self.model.numeric_head(last * self._gain)
        return logits, scaled

    def _activate(self, work: _Workspace) -> Tensor:
        """The activation in place; the GELU's constants are in the matrices around it."""
        activation = self.model.config.activation
        if activation == "gelu":
            torch.erf(work.up, out=work.erf)
            return torch.addcmul(work.up, work.up, work.erf, out=work.up)
        if activation == "relu2":
            return work.up.relu_().mul_(work.up)
        if activation == "silu":
            return F.silu(work.up, inplace=True)
        gate, value = work.half
        return torch.mul(F.silu(gate), value, out=work.gated)


def _normalise(work: _Workspace) -> Tensor:
    """`x / sqrt(|x|^2 + E eps)`, RMSNorm up to the factor sqrt(E): two calls where `rms_norm` makes eight."""
    torch.linalg.vector_norm(work.stream, 2, -1, True, out=work.norm)
    return torch.div(work.x, work.norm, out=work.unit)


def _attend(work: _Workspace, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of the workspace's queries, `[B * P, E]`; `keys` come transposed, `[B * Hk, D, stop]`.

    One query sees all keys: two products and a softmax. A prefill starts an empty cache, so top-left causal is right.
    """
    if work.length == 1:
        weights = torch.bmm(work.q_groups, keys).softmax(-1)
        torch.bmm(weights, values, out=work.mixed)
        return work.mixed_rows
    k, v = (u.unflatten(0, (work.q.shape[0], -1)) for u in (keys.transpose(-1, -2), values))
    mixed = F.scaled_dot_product_attention(work.q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
    return mixed.transpose(1, 2).reshape(work.unit.shape)


def _narrow_mm(x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(x.to(weight.dtype) @ weight)


def _narrow_addmm(residual: Tensor, x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    return torch.add(residual, x.to(weight.dtype) @ weight, out=out)


def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: Knob = 1.0,
    top_k: Knob = 0,
    top_p: Knob = 1.0,
    min_p: Knob = 0.0,
    seeds: int | Sequence[int] | Tensor = 0,
    cached: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """Yield the next symbols of all contexts, int64 `[B, C]` a position in the config's order, `max_new_tokens` times.

    `prompt` integer `[B, P, C]`, 1 <= P <= block_size. The knobs are those of `megactx.kernels.sample_contexts`: one
    value for all contexts, or one per context (those of numeric contexts are not used: they give the rounded
    prediction, clamped to the recorded range). `seeds`: one integer, from which every row derives its own, or one per
    row. What a row draws depends on its own tokens and seed alone, never on the rest of the batch. A context whose
    logits are not finite gives -1.

    `cached=False` runs the model itself over the whole window each time: slow, the specification. ValueError: a prompt
    that is empty, longer than the window, or holds an id outside its vocabulary.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    tokens = model.pack(prompt)
    length = tokens.shape[1]
    if not 1 <= length <= model.config.block_size:
        raise ValueError(f"prompt must hold 1 to block_size = {model.config.block_size} positions, got {length}")
    model.check_ids(tokens)
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    symbols = _Draw(model, tokens.shape[0], knobs, seeds)
    if cached:
        return _cached(model, tokens, max_new_tokens, symbols, dtype)
    return _uncached(model, tokens, max_new_tokens, symbols)


def _cached(model: GPT, tokens: Tensor, count: int, symbols: _Draw, dtype: torch.dtype) -> Iterator[Tensor]:
    decoder = Decoder(model, tokens.shape[0], dtype=dtype)
    for step in range(count):
        outputs = decoder.step(tokens) if step else decoder.prefill(tokens)
        tokens = symbols(*outputs)
        yield tokens


def _uncached(model: GPT, tokens: Tensor, count: int, symbols: _Draw) -> Iterator[Tensor]:
    config = model.config
    start = 0
    for _ in range(count):
        if tokens.shape[1] - start > config.block_size:
            start = tokens.shape[1] - kept_tokens(config.block_size)
        was_training = model.training
        with torch.inference_mode():
            named = model.eval()(tokens[:, start:]).logits
            model.train(was_training)
            logits = [named[c.name][:, -1] for c in config.contexts if c.kind == "categorical"]
            scaled = [named[c.name][:, -1] for c in config.contexts if c.kind == "numeric"]
        drawn = symbols(torch.cat(logits, -1) if logits else None, torch.stack(scaled, -1) if scaled else None)
        tokens = torch.cat((tokens, drawn[:, None]), dim=1)
        yield drawn


class _Draw:
    """From a position's outputs to its symbols; the knobs are checked and spread once, not once a position."""

    def __init__(self, model: GPT, rows: int, knobs: dict[str, Knob], seeds: int | Sequence[int] | Tensor) -> None:
        self.model = model
        device = model.limits.device
        self.vocab_sizes = model.config.vocab_sizes
        spread = {name: self._spread(name, knob).to(device) for name, knob in knobs.items()}
        contexts = len(self.vocab_sizes)
        self.knobs = prepare_knobs(rows, contexts, device, **spread)
        by_row = row_seeds(seeds, rows) if isinstance(seeds, int) else torch.as_tensor(seeds, dtype=torch.int64)
        if by_row.shape != (rows,):
            raise ValueError(f"seeds must be one integer or one per row, [{rows}], got {list(by_row.shape)}")
        self.seeds = prepare_seeds(by_row.to(device), rows, contexts, device)
        self.step = torch.zeros((), dtype=torch.int64, device=device)

    def _spread(self, name: str, knob: Knob) -> Tensor:
        """One value per categorical context, `[C]`."""
        values = torch.as_tensor(knob, dtype=torch.int64 if name == "top_k" else torch.float32)
        contexts = len(self.model.config.contexts)
        if values.dim() == 0:
            return values.expand(len(self.vocab_sizes)).contiguous()
        if values.shape != (contexts,):
            raise ValueError(f"{name} must be one value or one per context, [{contexts}], got {list(values.shape)}")
        return values[self.model.categorical]

    def __call__(self, logits: Tensor | None, scaled: Tensor | None) -> Tensor:
        drawn = codes = None
        if logits is not None:
            drawn = draw(logits, self.vocab_sizes, self.knobs, self.seeds, self.step)
            self.step.add_(1)
        if scaled is not None:
            codes = self.model.to_codes(scaled)
        if codes is None or drawn is None:
            result = codes if drawn is None else drawn
            assert result is not None  # a config has at least one context
            return result
        result = drawn.new_empty(drawn.shape[0], len(self.model.config.contexts))
        result.index_copy_(1, self.model.categorical_index, drawn)
        return result.index_copy_(1, self.model.numeric_index, codes)
