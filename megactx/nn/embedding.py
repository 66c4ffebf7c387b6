"""How many contexts enter and leave one residual stream at the price of one.

All categorical contexts share one table `[sum of vocabularies, E]`; context c owns the rows from its offset on. The
embedding of a position is then one summed bag and the logits of all contexts are one matrix product, so the number of
launches does not grow with the number of contexts. Numeric contexts do the same with their MLPs: the weights of all of
them are stacked, so that C small networks run as one batched one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megactx.nn.constants import WithConstants


def segment_offsets(vocab_sizes: Sequence[int], device: torch.device | None = None) -> Tensor:
    """First row of each context in a packed table: the exclusive cumulative sum, int64 `[C]`."""
    return torch.tensor([0, *vocab_sizes], dtype=torch.int64, device=device).cumsum(0)[:-1]


class PackedEmbedding(WithConstants):
    """The sum over contexts of their embeddings, `[B, T, C]` ids to `[B, T, E]`, by one bag lookup."""

    offsets: Tensor

    def __init__(self, vocab_sizes: Sequence[int], n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sum(vocab_sizes), n_embd))
        nn.init.normal_(self.weight, std=0.02)
        self.vocab_sizes = tuple(vocab_sizes)
        self.set_constants()

    def constants(self, device: torch.device | None) -> dict[str, Tensor]:
        return {"offsets": segment_offsets(self.vocab_sizes, device)}

    def forward(self, tokens: Tensor) -> Tensor:
        """`tokens` int64 `[B, T, C]`, each id within its own vocabulary (the caller checks: an id past the end of one
        context's rows would read the next context's)."""
        bags = (tokens + self.offsets).flatten(0, 1)
        return F.embedding_bag(bags, self.weight, mode="sum").unflatten(0, tokens.shape[:2])


class PackedHead(nn.Module):
    """The logits of all contexts side by side, `[..., E]` to `[..., sum of vocabularies]`, by one matrix product."""

    def __init__(self, vocab_sizes: Sequence[int], n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(sum(vocab_sizes), n_embd))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., E]`."""
        return F.linear(x, self.weight)


class _NumericMiddle(nn.Module):
    """The hidden layers after the first, for all numeric contexts at once: `[N, C, H]` to `[N, C, H]`."""

    def __init__(self, contexts: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, contexts, hidden, hidden))
        self.bias = nn.Parameter(torch.zeros(layers, contexts, hidden))
        nn.init.normal_(self.weight, std=1 / math.sqrt(hidden))

    def forward(self, x: Tensor) -> Tensor:
        for weight, bias in zip(self.weight.float(), self.bias.float(), strict=True):
            x = F.relu(torch.einsum("nch,chk->nck", x, weight) + bias)
        return x


class NumericEmbedding(nn.Module):
    """The sum over numeric contexts of an MLP of the standardised value; the forward pass is float32 under autocast.

    bfloat16 keeps 8 bits: the value 11,000 would enter as 11,008, so neither the value nor the network that reads it
    may be rounded to it. Gradients are float32 in eager mode; `torch.compile` runs a backward pass in the autocast of
    its forward call, so there their matrix products are rounded like all others.
    """

    def __init__(self, contexts: int, n_embd: int, hidden: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(contexts, hidden))
        self.bias = nn.Parameter(torch.empty(contexts, hidden))
        self.middle = _NumericMiddle(contexts, hidden, layers - 2) if layers > 2 else nn.Identity()
        self.out = nn.Parameter(torch.empty(n_embd, contexts * hidden))
        # Kinks spread over the range of a standardised value; the sum starts at the scale of a categorical embedding.
        nn.init.normal_(self.weight)
        nn.init.normal_(self.bias)
        nn.init.normal_(self.out, std=0.02 / math.sqrt(hidden))

    def forward(self, values: Tensor) -> Tensor:
        """`values` float `[..., C]`, standardised; returns float32 `[..., E]`."""
        with torch.autocast(values.device.type, enabled=False):
            x = values.float().flatten(0, -2).unsqueeze(-1)
            x = self.middle(F.relu(torch.addcmul(self.bias.float(), x, self.weight.float())))
            return F.linear(x.flatten(1), self.out.float()).unflatten(0, values.shape[:-1])


class NumericHead(nn.Module):
    """One MLP per numeric context from the residual stream to its standardised value, in float32 likewise."""

    def __init__(self, contexts: int, n_embd: int, hidden: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(contexts * hidden, n_embd))
        self.bias = nn.Parameter(torch.zeros(contexts * hidden))
        self.middle = _NumericMiddle(contexts, hidden, layers - 2) if layers > 2 else nn.Identity()
        self.out = nn.Parameter(torch.empty(contexts, hidden))
        self.out_bias = nn.Parameter(torch.zeros(contexts))
        nn.init.normal_(self.weight, std=1 / math.sqrt(n_embd))
        nn.init.normal_(self.out, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., E]`; returns float32 `[..., C]`."""
        with torch.autocast(x.device.type, enabled=False):
            h = F.relu(F.linear(x.float().flatten(0, -2), self.weight.float(), self.bias.float()))
            h = self.middle(h.unflatten(-1, self.out.shape))
            return ((h * self.out.float()).sum(-1) + self.out_bias.float()).unflatten(0, x.shape[:-1])
