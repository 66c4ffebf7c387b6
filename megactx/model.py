"""The multi-context GPT: one decoder that reads C aligned streams at once and predicts the next symbol of each.

The embeddings of a position's symbols are summed, the blocks see one residual stream, and every context has its own
segment of the head. With one categorical context this is an ordinary GPT, number for number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megactx.config import GPTConfig, check_names
from megactx.kernels import mtp_cross_entropy
from megactx.nn.attention import CausalSelfAttention
from megactx.nn.constants import WithConstants
from megactx.nn.embedding import NumericEmbedding, NumericHead, PackedEmbedding, PackedHead
from megactx.nn.mlp import MLP
from megactx.nn.norm import RMSNorm

Tokens = Mapping[str, Tensor] | Sequence[Tensor] | Tensor
IGNORE_INDEX = -1


class GPTOutput(NamedTuple):
    """What a forward pass gives.

    `logits`: per context name, `[B, T, V_c]` for categorical contexts and the standardised prediction `[B, T]` for
    numeric ones (T = 1 where only the last position was asked for). `loss`: float32 scalar, None without targets.
    `context_losses`: float32 `[C]` in the config's order, detached; nats for categorical contexts, squared standard
    deviations for numeric ones.
    """

    logits: dict[str, Tensor]
    loss: Tensor | None
    context_losses: Tensor | None


class Block(nn.Module):
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attention = CausalSelfAttention(
            config.n_embd,
            config.n_head,
            config.n_kv_head,
            position=config.position,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            sinks=_sinks(config),
            log_const=config.flash_lobo_log_const,
            **_rope_settings(config),
        )
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config.n_embd, config.activation, config.dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        lods: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, lods, key_padding_mask)
        return x + self.mlp(self.mlp_norm(x))


def _sinks(config: GPTConfig) -> Literal["layer", "head", "fixed"] | None:
    if not config.use_flash_lobo:
        return None
    return "fixed" if config.flash_lobo_fixed else "head" if config.use_flash_lobo_per_head else "layer"


def _rope_settings(config: GPTConfig) -> dict[str, Any]:
    """The settings of the blocks' `GaussianRoPE`, none where nothing is turned."""
    if not config.rotary:
        return {}
    return {
        "base": config.rope_base,
        "sigma": config.rope_sigma,
        "block_size": config.lod_block_size,
        "lod_pairs": config.lod_pairs,
        "slopes_rule": config.alibi_rule,
    }


class GPT(WithConstants):
    """A decoder over the contexts of `config`. See `forward` for the three ways to hand it tokens."""

    limits: Tensor
    categorical_index: Tensor
    numeric_index: Tensor
    numeric_scales: Tensor
    position_embedding: nn.Parameter | None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        kinds = [context.kind for context in config.contexts]
        self.categorical = [i for i, kind in enumerate(kinds) if kind == "categorical"]
        self.numeric = [i for i, kind in enumerate(kinds) if kind == "numeric"]
        numeric = self.numeric
        hidden, layers = config.numerical_mlp_hidden_dim, config.numerical_mlp_num_layers

        self.embedding = PackedEmbedding(config.vocab_sizes, config.n_embd) if self.categorical else None
        self.numeric_embedding = NumericEmbedding(len(numeric), config.n_embd, hidden, layers) if numeric else None
        learned = config.position == "learned"
        self.position_embedding = nn.Parameter(torch.empty(config.block_size, config.n_embd)) if learned else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        # Tied weights have no second module, so that a state dict holds the table once.
        separate = self.categorical and not config.tie_weights
        self.head = PackedHead(config.vocab_sizes, config.n_embd) if separate else None
        self.numeric_head = NumericHead(len(numeric), config.n_embd, hidden, layers) if numeric else None

        self.set_constants()
        self._init_weights()

    def constants(self, device: torch.device | None) -> dict[str, Tensor]:
        """Small facts about the contexts; `numeric_scales` float32 `[3, numeric contexts]`: mean, std, loss weight."""
        contexts, weights = self.config.contexts, self.config.loss_weights
        scales = [[contexts[i].mean, contexts[i].std, weights[i]] for i in self.numeric]
        rows = torch.tensor(scales, dtype=torch.float32, device=device).reshape(-1, 3)
        return {
            "limits": torch.tensor([context.vocab_size for context in contexts], device=device),
            "categorical_index": torch.tensor(self.categorical, dtype=torch.int64, device=device),
            "numeric_index": torch.tensor(self.numeric, dtype=torch.int64, device=device),
            "numeric_scales": rows.T.contiguous(),
        }

    def _init_weights(self) -> None:
        """N(0, 0.02), and 1/sqrt(2L) of it where a matrix writes to the residual stream: 2L such sums then keep the
        variance of one (GPT-2). Embeddings and numeric MLPs have set themselves up."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for block in self.blocks:
            for name, parameter in block.named_parameters():
                if parameter.dim() == 2:
                    std = residual_std if name in ("attention.out.weight", "mlp.down.weight") else 0.02
                    nn.init.normal_(parameter, std=std)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding, std=0.02)

    def forward(
        self,
        tokens: Tokens,
        targets: Tokens | None = None,
        *,
        positions: Tensor | None = None,
        lods: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        token_order: Sequence[str] | None = None,
        last_only: bool | None = None,
    ) -> GPTOutput:
        """Predict the next symbol of every context.

        `tokens`: a mapping from context name to integer `[B, T]`; or a list of such tensors with their names in
        `token_order`; or one packed tensor `[B, T, C]`, in the config's order unless `token_order` says otherwise.
        `targets`: the same three forms, -1 is ignored. `last_only` runs the heads on the last position alone; by
        default exactly where there are no targets.

        `positions`, `lods`: int32 or int64, `[T]` for all rows alike or `[B, T]`: where each token stands, by default
        0 .. T - 1, and its level of detail, by default 0. Rotary kinds take any position ("simple" makes nothing of
        the lods), "learned" those of its table, and "none" none; these two take no lods. `block_size` limits how many
        tokens there are, not where they stand. `key_padding_mask` bool `[B, T]`: False hides a token from all others;
        it is for the caller to give such tokens the target -1, and to pad on the left where the last position counts.

        The loss is the weighted mean over contexts of cross-entropy (categorical) or squared error of the standardised
        value (numeric), in float32 whatever the model's type (float64 for a double one). ValueError: a missing, unknown
        or repeated context, an id or a target outside its vocabulary, no position at all, more than `block_size`, or
        positions, lods or a mask of another shape or with no use for them.
        """
        packed = self.pack(tokens, token_order)
        _, length, _ = packed.shape
        if length == 0:
            raise ValueError("tokens must hold at least one position, got T = 0")
        if length > self.config.block_size:
            raise ValueError(f"tokens hold {length} positions, more than block_size = {self.config.block_size}")
        last_only = targets is None if last_only is None else last_only
        if last_only and targets is not None:
            raise ValueError("last_only must not be True when targets are given: the loss needs every position")
        self.check_ids(packed)
        self._check_places(packed, positions, lods, key_padding_mask)

        x = self.hidden(packed, positions, lods, key_padding_mask)
        x = self.norm(x[:, -1:] if last_only else x)
        weight = self.head_weight
        flat = None if weight is None else F.linear(x, weight)
        scaled = None if self.numeric_head is None else self.numeric_head(x)
        logits = dict(self._named(flat, scaled))
        if targets is None:
            return GPTOutput(logits, None, None)
        loss, context_losses = self._loss(flat, scaled, self.pack(targets, token_order, "targets"), packed)
        return GPTOutput(logits, loss, context_losses)

    @property
    def head_weight(self) -> Tensor | None:
        """The packed head `[sum of vocabularies, E]`: the embedding table where tied, None without categorical ones."""
        if self.head is not None:
            return self.head.weight
        return None if self.embedding is None else self.embedding.weight

    def hidden(
        self,
        packed: Tensor,
        positions: Tensor | None = None,
        lods: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the last block, before the final norm: `[B, T, C]` to `[B, T, E]`. Nothing is
        checked here; the arguments are those of `forward`."""
        x = self.embed(packed)
        if self.position_embedding is not None:
            table = self.position_embedding
            x = x + (table[: packed.shape[1]] if positions is None else F.embedding(positions, table))
        positions, lods = _shared(packed, positions, lods)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, positions, lods, key_padding_mask)
        return x

    def embed(self, packed: Tensor) -> Tensor:
        """The sum of all contexts' embeddings, `[B, T, C]` ids to `[B, T, E]`."""
        if self.numeric_embedding is None:
            assert self.embedding is not None  # a config has at least one context
            return self.embedding(packed)
        values = self.numeric_embedding(self.standardise(packed.index_select(-1, self.numeric_index)))
        values = values.to(self.norm.weight.dtype)  # the residual stream has the type of the model
        if self.embedding is None:
            return values
        return self.embedding(packed.index_select(-1, self.categorical_index)) + values

    def standardise(self, codes: Tensor) -> Tensor:
        """Integer codes `[..., numeric contexts]` to float32 `(code - mean) / std`."""
        mean, std, _ = self.numeric_scales
        return (codes - mean) / std

    def pack(self, tokens: Tokens, token_order: Sequence[str] | None = None, argument: str = "tokens") -> Tensor:
        """Any of the three forms to one int64 `[B, T, C]` in the config's order; names decide, never positions."""
        names = self.config.names
        if isinstance(tokens, Tensor):
            if tokens.dim() != 3 or tokens.shape[-1] != len(names):
                raise ValueError(f"{argument} must be [B, T, {len(names)}], got {list(tokens.shape)}")
            _check_integer(argument, tokens)
            if token_order is None or tuple(token_order) == names:
                return tokens.long()
            check_names(argument, names, token_order)
            by_name = dict(zip(token_order, tokens.unbind(-1), strict=True))
            return torch.stack([by_name[name] for name in names], dim=-1).long()
        if isinstance(tokens, Mapping):
            by_name = dict(tokens)
            check_names(argument, names, list(by_name))
        else:
            if token_order is None:
                raise ValueError(f"{argument} given as a list need token_order, the names of its contexts")
            if len(tokens) != len(token_order):
                raise ValueError(f"{argument} hold {len(tokens)} tensors, but token_order {len(token_order)} names")
            check_names(argument, names, token_order)
            by_name = dict(zip(token_order, tokens, strict=True))
        first = by_name[names[0]]
        for name in names:
            stream = by_name[name]
            _check_integer(f"{argument} of context {name!r}", stream)
            if stream.dim() != 2 or stream.shape != first.shape:
                raise ValueError(
                    f"{argument} of all contexts must be [B, T] alike: "
                    f"{names[0]!r} is {list(first.shape)}, {name!r} is {list(stream.shape)}"
                )
        return torch.stack([by_name[name] for name in names], dim=-1).long()

    def check_ids(self, packed: Tensor, argument: str = "tokens") -> None:
        """Refuse an id outside its own vocabulary: in a packed table it would quietly read the next context's rows,
        and as a numeric target it would be trained on. `targets` may hold -1, which is ignored.

        On the CPU the answer is there at once and the error says where. On a GPU asking would stall the queue, and
        inside a compiled graph it would break it: there a device-side assertion is queued instead.
        """
        lowest = IGNORE_INDEX if argument == "targets" else 0
        bad = (packed < lowest) | (packed >= self.limits)
        if _asynchronous(packed):
            sizes = ", ".join(f"{c.name!r}: {c.vocab_size}" for c in self.config.contexts)
            torch._assert_async(~bad.any(), f"{argument} hold an id outside its context's vocabulary ({sizes})")
        elif bad.any():
            row, position, index = bad.nonzero()[0].tolist()
            context = self.config.contexts[index]
            raise ValueError(
                f"{argument} of context {context.name!r}: id {int(packed[row, position, index])} at row {row}, "
                f"position {position} is outside its vocabulary of {context.vocab_size}"
            )

    def _check_places(
        self, packed: Tensor, positions: Tensor | None, lods: Tensor | None, key_padding_mask: Tensor | None
    ) -> None:
        """Refuse positions, levels of detail and masks that do not fit the tokens, or that nothing would read."""
        config = self.config
        batch, length, _ = packed.shape
        for argument, value in (("positions", positions), ("lods", lods), ("key_padding_mask", key_padding_mask)):
            if value is None:
                continue
            wanted = (torch.bool,) if argument == "key_padding_mask" else (torch.int32, torch.int64)
            if not isinstance(value, Tensor) or value.dtype not in wanted:
                kind = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
                raise TypeError(f"{argument} must be a tensor of {kind}, got {getattr(value, 'dtype', value)!r}")
            shapes = [(batch, length)] if argument == "key_padding_mask" else [(length,), (batch, length)]
            if tuple(value.shape) not in shapes:
                shape = " or ".join(str(list(s)) for s in shapes)
                raise ValueError(f"{argument} must be {shape} as the tokens are, got {list(value.shape)}")
        if positions is not None and config.position == "none":
            raise ValueError('positions must be None where position = "none": nothing would read them')
        if positions is not None and config.position == "learned":
            inside = (positions >= 0) & (positions < config.block_size)
            _require(inside, f"positions must be in the learned table, 0 to {config.block_size - 1}")
        if lods is not None and not config.rotary:
            raise ValueError(f"lods must be None where position = {config.position!r}: nothing would read them")
        if lods is not None:
            _require(lods >= 0, "lods must be at least 0")

    def _named(self, flat: Tensor | None, scaled: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """Views of the packed outputs under the contexts' names, in the config's order."""
        segments = iter(() if flat is None else flat.split(self.config.vocab_sizes, dim=-1))
        values = iter(() if scaled is None else scaled.unbind(-1))
        for context in self.config.contexts:
            yield context.name, next(segments if context.kind == "categorical" else values)

    def _loss(
        self, flat: Tensor | None, scaled: Tensor | None, targets: Tensor, packed: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted mean of the contexts' losses, and those losses one by one."""
        if targets.shape != packed.shape:
            raise ValueError(f"targets must have the shape of tokens {list(packed.shape)}, got {list(targets.shape)}")
        weights = self.config.loss_weights
        dtype = torch.promote_types(self.norm.weight.dtype, torch.float32)
        total = torch.zeros((), device=packed.device, dtype=dtype)
        losses = torch.zeros(len(weights), device=packed.device, dtype=dtype)
        if flat is not None:
            result = mtp_cross_entropy(
                flat.flatten(0, 1),
                targets.index_select(-1, self.categorical_index).flatten(0, 1).unsqueeze(-1),
                vocab_sizes=self.config.vocab_sizes,
                context_weights=[weights[i] for i in self.categorical],
                ignore_index=IGNORE_INDEX,
            )
            total = total + result.loss
            losses = losses.index_copy(0, self.categorical_index, result.per_step[:, 0].to(dtype))
        if scaled is not None:
            self.check_ids(targets, "targets")  # the categorical ones were checked by their loss
            codes = targets.index_select(-1, self.numeric_index).flatten(0, 1)
            valid = codes != IGNORE_INDEX
            error = torch.where(valid, scaled.flatten(0, 1) - self.standardise(codes), 0.0)
            means = error.square().sum(0) / valid.sum(0).clamp(min=1)
            total = total + (means * self.numeric_scales[2]).sum()
            losses = losses.index_copy(0, self.numeric_index, means.detach().to(dtype))
        return total, losses


def _shared(packed: Tensor, positions: Tensor | None, lods: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What all blocks are given: `[B, T]` where the caller gave anything, so that a compiled block sees one shape."""
    default = torch.arange(packed.shape[1], device=packed.device) if positions is None else positions
    if positions is None and lods is None:
        return default, None
    shape = packed.shape[:2]
    return default.expand(shape).contiguous(), None if lods is None else lods.expand(shape).contiguous()


def _asynchronous(tensor: Tensor) -> bool:
    """Whether reading a value would stall a GPU, or break a graph being traced."""
    return torch.compiler.is_compiling() or tensor.device.type != "cpu"


def _require(good: Tensor, message: str) -> None:
    if _asynchronous(good):
        torch._assert_async(good.all(), message)
    elif not good.all():
        raise ValueError(message)


def _check_integer(argument: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} must be a tensor of integers, got {type(tensor).__name__}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{argument} must be integers, got {tensor.dtype}")
