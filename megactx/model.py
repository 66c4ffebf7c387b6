"""The multi-context GPT: one decoder that reads C aligned streams at once and predicts the next symbol of each.

The embeddings of a position's symbols are summed, the blocks see one residual stream, and every context has its own
segment of the head. With one categorical context this is an ordinary GPT, number for number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megactx.block import Block, init_blocks
from megactx.config import GPTConfig
from megactx.heads import (
    Ahead,
    Places,
    cross_entropy,
    divisors,
    following,
    make_heads,
    parallel,
    sequential,
    step_weights,
)
from megactx.kernels._runtime import check_number
from megactx.nn.constants import WithConstants
from megactx.nn.embedding import NumericEmbedding, NumericHead, PackedEmbedding, PackedHead
from megactx.nn.norm import RMSNorm
from megactx.tokens import (
    IGNORE_INDEX,
    Tokens,
    check_counts,
    check_ids,
    check_places,
    check_targets,
    is_targets_dict,
    pack_targets,
    pack_targets_dict,
    pack_tokens,
)

__all__ = ["GPT", "IGNORE_INDEX", "Block", "GPTOutput", "Tokens"]


class GPTOutput(NamedTuple):
    """What a forward pass gives.

    `logits`: per context name, `[B, T, V_c]` for categorical contexts and the standardised prediction `[B, T]` for
    numeric ones (T = 1 where only the last position was asked for); empty where none were asked for. `loss`: float32
    scalar, None without targets, as are the others. `context_losses`: float32 `[C]` in the config's order, detached:
    of the next token alone, nats for categorical contexts, squared standard deviations for numeric ones.
    `step_losses`: float32 `[C, K]`, detached, the same for each step ahead; of a numeric context the first, then 0.
    """

    logits: dict[str, Tensor]
    loss: Tensor | None
    context_losses: Tensor | None
    step_losses: Tensor | None = None


# `(logits, loss)` or `(logits, (main loss, auxiliary loss))`: see `GPT.forward` on `targets_dict`.
Pair = tuple[Tensor | dict[str, Tensor] | None, Tensor | tuple[Tensor, Tensor | None]]


class GPT(WithConstants):
    """A decoder over the contexts of `config`. See `forward` for the three ways to hand it tokens."""

    limits: Tensor
    mtp_weight: Tensor
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

        self._mtp_weight = 0.1
        self.set_constants()
        # Embeddings and numeric MLPs have set themselves up. The heads come last: one seed makes one trunk.
        init_blocks(self.blocks, config.n_layer)
        if self.position_embedding is not None:
            nn.init.normal_(self.position_embedding, std=0.02)
        self.mtp_blocks = make_heads(config)

    def constants(self, device: torch.device | None) -> dict[str, Tensor]:
        """Small facts about the contexts; `numeric_scales` float32 `[3, numeric contexts]`: mean, std, loss weight."""
        contexts, weights = self.config.contexts, self.config.loss_weights
        scales = [[contexts[i].mean, contexts[i].std, weights[i]] for i in self.numeric]
        rows = torch.tensor(scales, dtype=torch.float32, device=device).reshape(-1, 3)
        return {
            "mtp_weight": torch.full((), self._mtp_weight, dtype=torch.float32, device=device),
            "limits": torch.tensor([context.vocab_size for context in contexts], device=device),
            "categorical_index": torch.tensor(self.categorical, dtype=torch.int64, device=device),
            "numeric_index": torch.tensor(self.numeric, dtype=torch.int64, device=device),
            "numeric_scales": rows.T.contiguous(),
        }

    def set_mtp_weight(self, value: float) -> None:
        """What the losses of the steps 2 to K weigh together, 0.1 at first; a compiled model goes on with the new value
        without compiling again, and no queue is waited for. A checkpoint does not hold it: it belongs to a schedule.

        This is the way to set it: a number written into the buffer `mtp_weight` is lost when the module moves or
        changes its type."""
        words = ">= 0 and finite in float32"
        value = float(check_number("mtp_weight", value, words))
        if not 0 <= value <= torch.finfo(torch.float32).max:
            raise ValueError(f"mtp_weight must be {words}, got {value!r}")
        self._mtp_weight = value
        self.mtp_weight.fill_(value)

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
        counts: Tensor | None = None,
        return_logits: bool | None = None,
        targets_dict: Mapping[str, Tensor] | None = None,
        return_loss_components: bool = False,
    ) -> GPTOutput | Pair:
        """Predict the next symbols of every context.

        `tokens`: a mapping from context name to integer `[B, T]`; or a list of such tensors with their names in
        `token_order`; or one packed tensor `[B, T, C]`, in the config's order unless `token_order` says otherwise, or
        `[B, T]` of a single context. `targets`: the same three forms, with a last dimension K more where there are
        several steps (`[B, T, K]` of a single context): entry k is the target k + 1 positions ahead, -1 is ignored.
        Fewer than `mtp_steps` will do.
        `last_only` runs the heads on the last position alone; by default exactly where there are no targets.
        `return_logits` gives them with a loss too, which is then taken of them, and holds `[B * T, sum of
        vocabularies]` in memory; by default exactly where there are no targets.

        `positions`, `lods`: int32 or int64, `[T]` for all rows alike or `[B, T]`: where each token stands, by default
        0 .. T - 1, and its level of detail, by default 0. Rotary kinds take any position ("simple" makes nothing of
        the lods), "learned" those of its table, and "none" none; these two take no lods. `block_size` limits how many
        tokens there are, not where they stand. `key_padding_mask` bool `[B, T]`: False hides a token from all others;
        it is for the caller to give such tokens the target -1, and to pad on the left where the last position counts.

        The loss is sum_c cw_c sum_k sw_k mean CE(c, k), over the contexts' weights and the steps' (1, w / (K - 1), ...)
        with w = `mtp_weight`; of a numeric context, the squared error of the standardised value one step ahead. It is
        float32 whatever the model's type (float64 for a double one). `counts` `[C, K]`: what the means divide by, where
        this call sees a part of a batch; the losses of the parts, and their gradients, then sum to the batch's.
        Its gradient is made with it, so a loss can be backpropagated once, and a second time (`retain_graph`) is an
        error. Not so where it is that of logits (`return_logits`, with shared heads), with `return_loss_components`, in
        float16, and in a compiled graph.

        Sequential heads are given the true tokens between. Behind the last one, and where `key_padding_mask` says that
        there is none, these are the targets of the last position before that has one: where one of them is ignored, so
        are the targets that would need it (`counts` must leave them out). Given fewer than K steps, a model with
        parallel or sequential heads leaves the other heads' parameters without a gradient: DistributedDataParallel then
        needs `find_unused_parameters=True`.

        `targets_dict` `{"target_k": [B, T]}`, also in the place of `targets`, is the other form of a call: it returns
        `(logits, loss)`, or with `return_loss_components` `(logits, (main, auxiliary))`, whose second is the mean over
        the steps from 2 on without its weight, None where there are none. Logits are a tensor where there is one
        context, and None where `return_logits` is False (here its default is True). Of several contexts each value has
        one of the forms of `tokens`, `token_order` included. Whoever has called that form elsewhere: without targets
        there is no pair, `model(idx)` is a `GPTOutput`, whose `logits` have names; the flags are keywords; and where
        contexts are really named "target_1" and so on, `targets` are by context unless `return_loss_components` or the
        argument `targets_dict` says that they are by step.

        ValueError or TypeError: a missing, unknown or repeated context, an id or a target outside its vocabulary, no
        position at all, more than `block_size`, more steps than `mtp_steps`, or positions, lods, a mask or counts of
        another shape or with no use for them.
        """
        # Contexts may bear the names of steps; components there are of steps alone.
        if targets_dict is None and is_targets_dict(targets, () if return_loss_components else self.config.names):
            targets, targets_dict = None, targets
        packed = self.pack(tokens, token_order)
        wanted = self._targets(packed, targets, targets_dict, token_order)
        self._check(packed, wanted, last_only, counts, return_logits)
        if return_loss_components and targets_dict is None:
            raise ValueError("return_loss_components must be False without targets_dict: step_losses holds them")
        check_places(packed, self.config, positions, lods, key_padding_mask)
        if return_logits is None:
            return_logits = wanted is None or targets_dict is not None

        x, wanted = self._states(packed, wanted, positions, lods, key_padding_mask)
        x = self.norm(x[:, :, -1:] if wanted is None and last_only in (None, True) else x)
        scaled = None if self.numeric_head is None else self.numeric_head(x[0])
        weight = self.head_weight  # read here, inside the forward call, where FSDP has gathered it
        flat = None if weight is None or not return_logits else F.linear(x[0], weight)
        logits = dict(self._named(flat, scaled)) if return_logits else {}
        if wanted is None:
            return GPTOutput(logits, None, None)
        loss, means = self._loss(x, weight, flat, scaled, wanted, counts, by_step=return_loss_components)
        if targets_dict is None:
            return GPTOutput(logits, loss, means[:, 0], means)
        named = next(iter(logits.values())) if len(logits) == 1 else logits or None
        if not return_loss_components:
            return named, loss
        # FSDP hangs its hooks on what is returned, and warns of views, on which they would not survive an `+=`.
        return named, (loss[0].clone(), loss[1:].mean() if len(loss) > 1 else None)

    def _targets(
        self,
        packed: Tensor,
        targets: Tokens | None,
        targets_dict: Mapping[str, Tensor] | None,
        token_order: Sequence[str] | None,
    ) -> Tensor | None:
        """The targets of either form, `[B, T, C, K]`, checked where the loss would not do it, or would too late."""
        if targets_dict is not None:
            if targets is not None:
                raise ValueError("targets must be None where targets_dict is given")
            wanted = pack_targets_dict(targets_dict, self.config.names, token_order)
        elif targets is not None:
            wanted = pack_targets(targets, self.config, token_order)
        else:
            return None
        check_targets(wanted, packed, self.config.mtp_steps)
        if self.numeric or self.mtp_blocks:
            self.check_ids(wanted, "targets")
        return wanted

    def _check(
        self,
        packed: Tensor,
        targets: Tensor | None,
        last_only: bool | None,
        counts: Tensor | None,
        return_logits: bool | None,
    ) -> None:
        length = packed.shape[1]
        if length == 0:
            raise ValueError("tokens must hold at least one position, got T = 0")
        if length > self.config.block_size:
            raise ValueError(f"tokens hold {length} positions, more than block_size = {self.config.block_size}")
        if last_only and targets is not None:
            raise ValueError("last_only must not be True when targets are given: the loss needs every position")
        if return_logits is False and targets is None:
            raise ValueError("return_logits must not be False without targets: there is nothing else to return")
        if counts is not None:
            if targets is None:
                raise ValueError("counts must be None without targets: there is no mean to divide")
            check_counts(counts, targets, packed)
        self.check_ids(packed)

    @property
    def head_weight(self) -> Tensor | None:
        """The packed head `[sum of vocabularies, E]`: the embedding table where tied, None without categorical ones."""
        if self.head is not None:
            return self.head.weight
        return None if self.embedding is None else self.embedding.weight

    def hidden(self, embedded: Tensor, positions: Tensor | None = None, places: Places | None = None) -> Tensor:
        """The residual stream after the last block, before the final norm, from summed embeddings: `[B, T, E]` to the
        same. `places` is what the blocks are given, `positions` what a learned table is; nothing is checked here."""
        x = embedded
        if self.position_embedding is not None:
            table = self.position_embedding
            x = x + (table[: x.shape[1]] if positions is None else F.embedding(positions, table))
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x, *(places or ()))
        return x

    def _states(
        self,
        packed: Tensor,
        targets: Tensor | None,
        positions: Tensor | None,
        lods: Tensor | None,
        key_padding_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The residual streams that the steps are predicted from, `[K, B, T, E]`, or `[1, B, T, E]` where all share
        one; and the targets that are left for them."""
        embedded = self.embed(packed)
        places = Places(*_shared(packed, positions, lods), key_padding_mask)
        x = self.hidden(embedded, positions, places)
        steps = 1 if targets is None else targets.shape[-1]
        if targets is None or steps == 1 or not self.mtp_blocks:
            return x[None], targets
        if self.config.mtp_heads == "parallel":
            return parallel(self.mtp_blocks, x, steps, places), targets
        if key_padding_mask is None:  # the last token and those behind it; the others have been embedded
            ids, known = following(packed[:, -1:], targets[:, -1:])
            tail = torch.where(known.unsqueeze(-1), self.embed(ids), 0)
            known = F.pad(known, (packed.shape[1] - 1, 0), value=True)
            ahead = Ahead(torch.cat((embedded[:, :-1], tail), dim=1), known)
        else:
            ids, known = following(packed, targets, key_padding_mask)
            ahead = Ahead(torch.where(known.unsqueeze(-1), self.embed(ids), 0), known)
        return sequential(self.mtp_blocks, x, ahead, steps, places), ahead.mask(targets)

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
        """Any form of the tokens to one int64 `[B, T, C]` in the config's order; names decide, never positions."""
        return pack_tokens(tokens, self.config.names, token_order, argument)

    def check_ids(self, packed: Tensor, argument: str = "tokens") -> None:
        """Refuse an id outside its own vocabulary: in a packed table it would quietly read the next context's rows,
        and as a numeric target it would be trained on. `targets` may hold -1, which is ignored."""
        check_ids(packed, self.limits, self.config, argument)

    def _named(self, flat: Tensor | None, scaled: Tensor | None) -> Iterator[tuple[str, Tensor]]:
        """Views of the packed outputs under the contexts' names, in the config's order."""
        sizes = self.config.vocab_sizes
        segments = iter(() if flat is None else (flat,) if len(sizes) == 1 else flat.split(sizes, dim=-1))
        values = iter(() if scaled is None else scaled.unbind(-1))
        for context in self.config.contexts:
            yield context.name, next(segments if context.kind == "categorical" else values)

    def _loss(
        self,
        x: Tensor,
        weight: Tensor | None,
        logits: Tensor | None,
        scaled: Tensor | None,
        targets: Tensor,
        counts: Tensor | None,
        *,
        by_step: bool,
    ) -> tuple[Tensor, Tensor]:
        """The loss, or with `by_step` the K parts `[K]` that it is the weighted sum of; and all means, `[C, K]`."""
        steps = targets.shape[-1]
        dtype = torch.promote_types(self.norm.weight.dtype, torch.float32)
        loss = torch.zeros(steps if by_step else (), device=targets.device, dtype=dtype)
        means = torch.zeros(targets.shape[2:], device=targets.device, dtype=dtype)
        if weight is not None:
            index, sizes = self.categorical_index, self.config.vocab_sizes
            rows = (targets if scaled is None else targets.index_select(2, index)).flatten(0, 1)
            part = counts if counts is None or scaled is None else counts.index_select(0, index)
            shares = step_weights(self.mtp_weight, steps)
            weights = [self.config.loss_weights[i] for i in self.categorical]
            options = {"vocab_sizes": sizes, "context_weights": weights, "ignore_index": IGNORE_INDEX}
            found, by_entry = cross_entropy(x, weight, logits, rows, shares, part, by_step=by_step, **options)
            loss = loss + found
            means = means.index_copy(0, index, by_entry.to(dtype))
        if scaled is not None:
            codes = targets[..., 0].index_select(-1, self.numeric_index).flatten(0, 1)
            valid = codes != IGNORE_INDEX
            error = torch.where(valid, scaled.flatten(0, 1) - self.standardise(codes), 0.0)
            part = None if counts is None else counts[:, 0].index_select(0, self.numeric_index)
            squared = error.square().sum(0) / divisors(codes, part, error.dtype)
            numeric = (squared * self.numeric_scales[2]).sum()
            loss = loss + (F.pad(numeric[None], (0, steps - 1)) if by_step else numeric)
            columns = F.pad(squared.detach().to(dtype)[:, None], (0, steps - 1))
            means = means.index_copy(0, self.numeric_index, columns)
        return loss, means


def _shared(packed: Tensor, positions: Tensor | None, lods: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What all blocks are given: `[B, T]` where the caller gave anything, so that a compiled block sees one shape."""
    default = torch.arange(packed.shape[1], device=packed.device) if positions is None else positions
    if positions is None and lods is None:
        return default, None
    shape = packed.shape[:2]
    return default.expand(shape).contiguous(), None if lods is None else lods.expand(shape).contiguous()
