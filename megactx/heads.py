"""Multi-token prediction: what answers for the steps after the next one, and how the steps weigh.

With shared heads the logits of the next token are held against all K targets. That makes them the distribution of a
mixture: there is none of step k alone in them, and so nothing to draft tokens from. The other two kinds give each step
k >= 2 a hidden state of its own, and with the model's norm and head a distribution of its own. `generate` uses none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from megactx.block import Block, MergingBlock, init_blocks
from megactx.config import GPTConfig
from megactx.tokens import IGNORE_INDEX


class Places(NamedTuple):
    """What every block is given besides the residual stream."""

    positions: Tensor | None
    lods: Tensor | None
    key_padding_mask: Tensor | None


def make_heads(config: GPTConfig) -> nn.ModuleList:
    """Blocks for the steps 2 to K, none where the heads are shared."""
    count = 0 if config.mtp_heads == "shared" else config.mtp_steps - 1
    kind = MergingBlock if config.mtp_heads == "sequential" else Block
    heads = nn.ModuleList(kind(config) for _ in range(count))
    init_blocks(heads, config.n_layer)
    return heads


def step_weights(weight: Tensor, steps: int) -> Tensor | tuple[float]:
    """(1, w / (K - 1), ...) `[K]` from w on the device, with no number of it read; K = 1 needs none."""
    if steps == 1:
        return (1.0,)
    rest = (weight / (steps - 1)).expand(steps - 1)
    return torch.cat((torch.ones_like(rest[:1]), rest))


def parallel(heads: nn.ModuleList, x: Tensor, steps: int, places: Places) -> Tensor:
    """`[K, B, T, E]`: step 1 has x itself, and each later step its block of it (Gloeckle et al., 2024)."""
    return torch.stack([x, *(head(x, *places) for head in heads[: steps - 1])])


class Ahead(NamedTuple):
    """The tokens that a sequential head is given: those that were read and, behind their end, the last row of targets.

    `embeddings` `[B, T + K - 1, E]`: 0 where a token is not known. `known` bool `[B, T + K - 1]`.
    """

    embeddings: Tensor
    known: Tensor

    def at(self, step: int, length: int) -> Tensor:
        """Of every position the token that step `step` >= 2 is given, `step - 1` further on: `[B, T, E]`."""
        return self.embeddings[:, step - 1 : step - 1 + length]

    def mask(self, targets: Tensor) -> Tensor:
        """`[B, T, C, K]` targets, ignored where a head would need a token that is not known."""
        length, steps = targets.shape[1], targets.shape[-1]
        given = torch.stack([self.known[:, k : k + length] for k in range(steps)], dim=-1)
        return torch.where(given.unsqueeze(2), targets, IGNORE_INDEX)


def tail(targets: Tensor) -> tuple[Tensor, Tensor]:
    """The K - 1 tokens behind the end of the tokens, `[B, K - 1, C]`, and which are known, bool `[B, K - 1]`.

    They are the targets of the last position. One that is ignored, in whichever context, is not known, and those
    behind it are of no use without it.
    """
    ids = targets[:, -1, :, :-1].transpose(1, 2)
    known = (ids != IGNORE_INDEX).all(-1).long().cumprod(1).bool()
    return torch.where(known.unsqueeze(-1), ids, 0), known


def sequential(heads: nn.ModuleList, x: Tensor, ahead: Ahead, steps: int, places: Places) -> Tensor:
    """`[K, B, T, E]`: step k runs its block on the state of step k - 1 and the token that one was to predict
    (DeepSeek-V3, 2024). So position i of step k has seen the tokens up to i + k - 1, as a draft would have."""
    states = [x]
    for step, head in enumerate(heads[: steps - 1], start=2):
        states.append(head(states[-1], ahead.at(step, x.shape[1]), *places))
    return torch.stack(states)


def own_rows(targets: Tensor) -> Tensor:
    """`[N, C, K]` targets of one row each for K rows of their own, `[K * N, C, K]`: row (k, n) has its step k alone.

    So one call of the loss takes all heads, with one gradient of the head's weight and one step's logits at a time.
    """
    steps = targets.shape[-1]
    mine = torch.eye(steps, dtype=torch.bool, device=targets.device)[:, None, None]
    return torch.where(mine, targets, IGNORE_INDEX).flatten(0, 1)
