"""Multi-token prediction: what answers for the steps after the next one, and how the steps weigh.

With shared heads the logits of the next token are held against all K targets. That makes them the distribution of a
mixture: there is none of step k alone in them, and so nothing to draft tokens from. The other two kinds give each step
k >= 2 a hidden state of its own, and with the model's norm and head a distribution of its own. `generate` uses none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megactx.block import Block, MergingBlock, init_blocks
from megactx.config import GPTConfig
from megactx.kernels import linear_mtp_cross_entropy, mtp_cross_entropy
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
        given = torch.stack([self.known[:, k : k + length] for k in range(1, steps)], dim=-1).long().cumprod(-1)
        return torch.where(F.pad(given, (1, 0), value=1).bool().unsqueeze(2), targets, IGNORE_INDEX)


def following(packed: Tensor, targets: Tensor, key_padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The tokens of the positions 0 to T + K - 2, `[B, T + K - 1, C]`, and which are known, bool `[B, T + K - 1]`.

    Padded positions have no token of their own, nor have those behind the end: theirs are the targets of the last
    position before that has one. A target that is ignored, in whichever context, is not known, and those behind it are
    of no use without it.
    """
    batch, length, _, steps = targets.shape
    real = torch.ones_like(packed[..., 0], dtype=torch.bool) if key_padding_mask is None else key_padding_mask
    held = torch.cat((packed.unsqueeze(-1), targets[..., :-1]), dim=-1)  # of each position, and of those behind it
    usable = (held != IGNORE_INDEX).all(2).long().cumprod(-1).bool() & real.unsqueeze(-1)
    place = torch.arange(length + steps - 1, device=packed.device).expand(batch, -1)
    last = torch.where(F.pad(real, (0, steps - 1)), place, 0).cummax(1).values
    distance = place - last
    index = last * steps + distance.clamp(max=steps - 1)
    known = usable.flatten(1).gather(1, index) & (distance < steps)
    ids = held.transpose(2, 3).flatten(1, 2).gather(1, index.unsqueeze(-1).expand(-1, -1, held.shape[2]))
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


def divisors(targets: Tensor, counts: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What each mean over the first dimension divides by: `counts`, or how many targets are valid, and never 0, so that
    a mean over nothing is 0. As in the operators, a count of 0 where there are targets makes the loss enormous."""
    if counts is None:
        return (targets != IGNORE_INDEX).sum(0).clamp(min=1)
    return counts.to(dtype).clamp(min=torch.finfo(dtype).tiny)


def cross_entropy(
    x: Tensor,
    weight: Tensor,
    logits: Tensor | None,
    targets: Tensor,
    shares: Tensor | tuple[float, ...],
    counts: Tensor | None,
    *,
    by_step: bool,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Of states x `[K, B, T, E]`, or `[1, B, T, E]` where all steps share one, against targets `[B * T, C, K]`: the
    loss, or with `by_step` the K parts `[K]` that it is the sum of but for their `shares`; and all means, `[C, K]`.

    `logits` are those of x[0], where they were made: the loss is then that of these, and costs no second product.
    """
    heads, steps = x.shape[0], targets.shape[-1]
    made = 0 if logits is None else steps if heads == 1 else 1  # how many steps the logits answer for
    first, rest = slice(0, made), slice(made, steps)
    calls: list[tuple[Any, tuple[Tensor, ...], Tensor, slice]] = []
    if logits is not None:
        calls.append((mtp_cross_entropy, (logits.flatten(0, 1),), targets[..., first], first))
    if made < steps:
        states, rows = (x, targets) if heads == 1 else (x[rest], own_rows(targets[..., rest]))
        calls.append((linear_mtp_cross_entropy, (states.flatten(0, 2), weight), rows, rest))
    losses, means = [], []
    for operator, inputs, rows, which in calls:
        part = None if counts is None else counts[:, which]
        if by_step:  # the entries of all steps have one derivative, of which each part takes its own
            ones = (1.0,) * rows.shape[-1]
            result = operator(*inputs, rows, step_weights=ones, reduction="none", **options)
            losses.append((result.loss.sum(0) / divisors(rows, part, result.loss.dtype)).sum(0))
        else:
            result = operator(*inputs, rows, step_weights=shares[which], counts=part, **options)
            losses.append(result.loss)
        means.append(result.per_step)
    loss = torch.cat(losses) if by_step else losses[0] if len(losses) == 1 else losses[0] + losses[1]
    return loss, torch.cat(means, dim=-1)
