"""The cached forward pass: one position at a time, shared by all contexts, with as few calls as PyTorch allows.

At this size a step is not arithmetic but calls: a position of a 4-layer, 128-wide model is 0.8 M multiply-adds, some
60 us, and an eager forward through the modules costs ten times that. So `Decoder` takes the weights out of the modules
once, folded (norm gains, scales and the GELU's constants go into the neighbouring matrices) and transposed for a
row-times-matrix product, and a step is eighteen calls a layer into buffers that already exist.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.kernels import alibi_attention
from megactx.model import GPT, Block
from megactx.nn.embedding import segment_offsets

# Multiply-adds below which a second CPU thread costs more (a batched product of 3 us takes 18 with two) than it brings.
# An idle machine gains nothing under this either, and on a busy one, where threads wait for each other, two are 3 to 5
# times slower than one.
_SMALL = 1 << 30


def kept_tokens(block_size: int) -> int:
    """How many tokens stay in the window when it overflows."""
    return max(1, block_size // 2)


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
        self.down = down.to(dtype).contiguous().T  # a tall matrix times one row is faster from this side


class _Numeric:
    """The numeric contexts' networks in and out, float32, as plain calls on rows."""

    def __init__(self, model: GPT) -> None:
        embedding, head = model.numeric_embedding, model.numeric_head
        assert embedding is not None
        assert head is not None
        self.index = model.numeric_index
        self.mean, self.std, _ = model.numeric_scales
        self.weight, self.bias = embedding.weight.detach().float(), embedding.bias.detach().float()
        self.middle, self.out = embedding.middle, embedding.out.detach().float().T.contiguous()
        self.head_weight = (head.weight.detach().float() * _gain(model.norm.weight)).T.contiguous()
        self.head_bias = head.bias.detach().float()
        self.head_middle, self.head_out = head.middle, head.out.detach().float()
        self.head_out_bias = head.out_bias.detach().float()
        self.deep = model.config.numerical_mlp_num_layers > 2

    def embed(self, tokens: Tensor, *, out: Tensor) -> Tensor:
        """`tokens` `[R, C]` of all contexts; the numeric ones' embeddings, summed, go to `out` `[R, E]`."""
        values = (tokens.index_select(1, self.index) - self.mean) / self.std
        x = torch.addcmul(self.bias, values.unsqueeze(-1), self.weight).relu_()
        return torch.mm((self.middle(x) if self.deep else x).flatten(1), self.out, out=out)

    def predict(self, x: Tensor) -> Tensor:
        """Standardised predictions `[R, numeric contexts]` from the normalised residual stream without its gain."""
        h = torch.addmm(self.head_bias, x, self.head_weight).relu_().view(-1, *self.head_out.shape)
        return torch.mul(self.head_middle(h) if self.deep else h, self.head_out).sum(-1).add_(self.head_out_bias)


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


class _Views(NamedTuple):
    """What the positions of one call meet: the complex factors of q and of k and v, the ALiBi bias, and per layer its
    weights, its sinks, the slots of the cache to write, and the keys and values to read."""

    q_turn: Tensor
    kv_turn: Tensor
    bias: Tensor | None
    layers: list[tuple[_Layer, Tensor | None, Tensor, Tensor, Tensor]]


class Decoder:
    """A model's weights and a preallocated cache for `batch_size` rows; float32 activations, no autograd.

    `prefill` reads a prompt, `step` one more position; both return `(logits, scaled)` for the last position: the packed
    logits `[B, sum of vocabularies]` of the categorical contexts and the standardised predictions
    `[B, numeric contexts]` of the numeric ones, None where the model has no such context. Past the window, `step`
    follows the rule of `megactx.generate`. `dtype` is that of the matrices; below float32 the result is not exact.

    The weights are taken as they are now: after more training, make a new decoder. Autocast has no say in here, and on
    a CPU small work runs on one thread.
    """

    def __init__(self, model: GPT, batch_size: int, *, dtype: torch.dtype = torch.float32) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        config = model.config
        self.model = model
        self.batch_size = batch_size
        self.device = model.limits.device
        self.length = 0
        self._cost = math.inf
        if self.device.type == "cpu":
            unread = sum(parameter.numel() for parameter in model.mtp_blocks.parameters())
            self._cost = batch_size * (sum(parameter.numel() for parameter in model.parameters()) - unread)
        with torch.inference_mode(), self._undisturbed(1):
            blocks = [block for block in model.blocks if isinstance(block, Block)]
            self.layers = [_Layer(block, dtype) for block in blocks]
            self._rope = blocks[0].attention.rope  # that of all blocks
            gain = _gain(model.norm.weight)
            head = model.head_weight
            self._head = None if head is None else (head.detach() * gain).T.to(dtype).contiguous()
            self._table = None if model.embedding is None else model.embedding.weight.detach().float()
            self._offsets = segment_offsets(config.vocab_sizes).to(self.device)
            self._categorical, self._positions = model.categorical_index, model.position_embedding
            self._numeric = None if model.numeric_embedding is None else _Numeric(model)
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
            self._slopes = None if self._rope is None else self._rope.slopes
            self._bias = self._biases()
            self._sinks = [self._sink(block) for block in blocks]
            self._single = _Workspace(self, 1)
        self._at: list[_Views | None] = [None] * config.block_size
        self._mm = torch.mm if dtype == torch.float32 else _narrow_mm
        self._addmm = torch.addmm if dtype == torch.float32 else _narrow_addmm

    def _turns(self) -> tuple[Tensor, Tensor]:
        """Per position of the window the complex factors of q `[T, D/2]` and of k and v `[2, 1, 1, T, D/2]`.

        Values are not turned; the scales of the attention logits and of the QK-norm are all carried by q. A damped pair
        has a factor below one.
        """
        config = self.model.config
        length, half = config.block_size, config.head_dim // 2
        turn = torch.ones(length, half, dtype=torch.complex64, device=self.device)
        if self._rope is not None:
            cos, sin, _ = self._rope.tables(torch.arange(length, device=self.device))
            turn = torch.complex(cos[0, :, 0], sin[0, :, 0])
        scale = config.head_dim ** (0.5 if config.qk_norm else -0.5)
        return turn * scale, torch.stack((turn, torch.ones_like(turn)))[:, None, None]

    def _biases(self) -> Tensor | None:
        """The ALiBi bias of the last query of a full window, `[B * Hk, G, T]`: that of a shorter one is its end."""
        if self._slopes is None:
            return None
        distances = torch.arange(self.model.config.block_size - 1, -1, -1, device=self.device)
        return self._grouped(-self._slopes[:, None] * distances)

    def _sink(self, block: Block) -> Tensor | None:
        """log C of one block's heads, `[B * Hk, G, 1]`: one more score of each query."""
        sinks = block.attention.sinks
        return None if sinks is None else self._grouped(sinks.detach().float()[:, None])

    def _grouped(self, x: Tensor) -> Tensor:
        """`[Hq, n]` to `[B * Hk, G, n]`, the layout of one position's scores."""
        return x.unflatten(0, (self.model.config.kv_heads, -1)).repeat(self.batch_size, 1, 1)

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
        if self._numeric is None:
            assert self._table is not None  # a config has at least one context
            torch.sum(torch.embedding(self._table, (tokens + self._offsets).flatten(0, -2)), 1, out=work.x)
        else:
            flat = tokens.flatten(0, -2)
            self._numeric.embed(flat, out=work.x)
            if self._table is not None:
                ids = flat.index_select(1, self._categorical) + self._offsets
                work.x.add_(torch.embedding(self._table, ids).sum(1))
        if self._positions is not None:
            rows = self._positions[start : start + work.length]
            work.x.view(self.batch_size, work.length, -1).add_(rows)

    def _views(self, start: int, length: int) -> _Views:
        stop = start + length
        slots = self._cache.narrow(4, start, length).unbind(0)
        keys = self._keys.narrow(3, 0, stop).unbind(0)
        values = self._values.narrow(2, 0, stop).unbind(0)
        layers = list(zip(self.layers, self._sinks, slots, keys, values, strict=True))
        bias = None if self._bias is None else self._bias.narrow(2, self._bias.shape[2] - stop, stop)
        return _Views(self._q_turn.narrow(0, start, length), self._kv_turn.narrow(3, start, length), bias, layers)

    def _run(self, tokens: Tensor, start: int, work: _Workspace) -> tuple[Tensor | None, Tensor | None]:
        if torch.get_num_threads() == 1 and not torch.is_autocast_enabled(self.device.type):
            return self._forward(tokens, start, work)
        with self._undisturbed(work.length):
            return self._forward(tokens, start, work)

    @contextlib.contextmanager
    def _undisturbed(self, length: int) -> Iterator[None]:
        """No autocast, and one CPU thread where `length` positions are too little work for more."""
        threads = torch.get_num_threads()
        mixed = torch.is_autocast_enabled(self.device.type)
        with torch.autocast(self.device.type, enabled=False) if mixed else contextlib.nullcontext():
            torch.set_num_threads(1 if self._cost * length < _SMALL else threads)
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    def _forward(self, tokens: Tensor, start: int, work: _Workspace) -> tuple[Tensor | None, Tensor | None]:
        length = work.length
        self._embed(tokens, start, work)
        x = work.x
        if length > 1:
            q_turn, kv_turn, bias, layers = self._views(start, length)
        else:
            found = self._at[start]
            if found is None:  # every position of a window comes again in the next one
                found = self._at[start] = self._views(start, 1)
            q_turn, kv_turn, bias, layers = found
        qk_norm = self.model.config.qk_norm
        for layer, sink, slot, k, v in layers:
            self._mm(_normalise(work), layer.qkv, out=work.qkv)
            if qk_norm:
                torch.linalg.vector_norm(work.qk, 2, -1, True, out=work.qk_norm)
                work.qk.div_(work.qk_norm.hypot_(self._head_eps))
            torch.mul(work.q_pairs, q_turn, out=work.q_rotated)
            torch.mul(work.kv_pairs, kv_turn, out=slot)
            mixed = _attend(work, k, v, bias, sink) if length == 1 else self._attend_all(work, k, v, sink)
            self._addmm(x, mixed, layer.out, out=x)
            self._mm(_normalise(work), layer.up, out=work.up)
            self._addmm(x, self._activate(work), layer.down, out=x)
        last = _normalise(work) if length == 1 else _normalise(work).view(self.batch_size, length, -1)[:, -1]
        logits = None if self._head is None else (last.to(self._head.dtype) @ self._head).float()
        scaled = None if self._numeric is None else self._numeric.predict(last)
        return logits, scaled

    def _attend_all(self, work: _Workspace, keys: Tensor, values: Tensor, sink: Tensor | None) -> Tensor:
        """Causal attention of a prefill, `[B * P, E]`: it starts an empty cache, so queries and keys are as many."""
        k, v = (u.unflatten(0, (self.batch_size, -1)) for u in (keys.transpose(-1, -2), values))
        if self._slopes is None and sink is None:
            mixed = F.scaled_dot_product_attention(work.q, k, v, is_causal=True, scale=1.0, enable_gqa=True)
            return mixed.transpose(1, 2).reshape(work.unit.shape)
        q, k, v = (u.transpose(1, 2) for u in (work.q, k, v))
        positions = torch.arange(work.length, device=self.device)
        sinks = None if sink is None else sink.view(self.batch_size, -1)[0]  # every row has the same
        mixed = alibi_attention(q, k, v, positions, slopes=self._slopes, sinks=sinks, scale=1.0)
        return mixed.reshape(work.unit.shape)

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


def _attend(work: _Workspace, keys: Tensor, values: Tensor, bias: Tensor | None, sink: Tensor | None) -> Tensor:
    """Attention of one position, which sees all keys: two products and a softmax. `keys` come transposed,
    `[B * Hk, D, stop]`; a sink is one more score, whose weight no value meets."""
    q = work.q_groups
    scores = torch.bmm(q, keys) if bias is None else torch.baddbmm(bias, q, keys)
    if sink is None:
        weights = scores.softmax(-1)
    else:
        weights = torch.cat((scores, sink), -1).softmax(-1).narrow(-1, 0, values.shape[1])
    torch.bmm(weights, values, out=work.mixed)
    return work.mixed_rows


def _narrow_mm(x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    return out.copy_(x.to(weight.dtype) @ weight)


def _narrow_addmm(residual: Tensor, x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
    return torch.add(residual, x.to(weight.dtype) @ weight, out=out)
