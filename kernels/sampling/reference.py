"""One draw per context from packed logits: the specification, in plain PyTorch.

The draw is a Gumbel-max over what temperature, top-k, top-p and min-p leave: `argmax(z / temperature + g)`, with the
noise `g(id)` read from a counter-based generator (Philox 4x32-10, Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011).  The counter holds token id, context and step, the key holds the seed, so a row's draw depends on
nothing but (seed, step, context, its logits): not on the batch, the packing or the order of the rows.  All
arithmetic is float32, whatever the logits are, so that every backend decides alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_U_MIN, _U_MAX = 2.0**-64, 1.0 - 2.0**-24


def sample_contexts(
    logits: Tensor,
    vocab_sizes: Sequence[int],
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    step: Tensor,
) -> Tensor:
    """Draw ids int64 [B, C], -1 for a row without a draw; logits [B, sum V], knobs and seeds [B, C], step 0-d."""
    ids = torch.empty(temperature.shape, dtype=torch.int64, device=logits.device)
    for context, z in enumerate(logits.split(list(vocab_sizes), dim=1)):
        t, k, p, m, seed = (column[:, context, None] for column in (temperature, top_k, top_p, min_p, seeds))
        ids[:, context] = _draw(z.float(), t, k, p, m, seed, context, step)
    return ids


def _draw(
    z: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    context: int,
    step: Tensor,
) -> Tensor:
    """Ids [B] of one context: z float32 [B, V], every knob [B, 1]."""
    largest = z.amax(-1, keepdim=True)  # NaN if any is
    undefined = torch.isnan(largest) | (largest == -torch.inf)
    # A row with +inf is certain: only the infinite entries can be drawn, all alike.
    z = torch.where(largest == torch.inf, torch.where(z == torch.inf, 0.0, -torch.inf), z)

    x = z / torch.where(temperature > 0, temperature, 1.0)
    # A temperature so small that the division overflows is as good as zero.
    greedy = (temperature == 0) | (top_k == 1) | torch.isinf(x.amax(-1, keepdim=True))
    keep = surviving(x, top_k, top_p, min_p)
    score = torch.where(keep, x + gumbel_noise(z.shape[1], seed, context, step), -torch.inf)
    ids = torch.where(greedy, z, score).argmax(-1, keepdim=True)  # argmax takes the lowest id among equals
    return torch.where(undefined, -1, ids).squeeze(-1)


def surviving(x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Which tokens the filters leave: bool [B, V] from x = z / temperature [B, V] and knobs [B, 1]."""
    vocab = x.shape[1]
    # Whether any filter is on may be asked only where asking does not stall a device or break a traced graph.
    cheap_to_ask = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if cheap_to_ask and bool((((top_k <= 0) | (top_k >= vocab)) & (top_p >= 1) & (min_p <= 0)).all()):
        return torch.ones_like(x, dtype=torch.bool)

    ordered, order = x.sort(dim=-1, descending=True, stable=True)  # (x descending, id ascending)
    rank = torch.arange(vocab, device=x.device)
    keep = rank < torch.where(top_k <= 0, vocab, top_k)
    weight = torch.where(keep, (ordered - ordered[:, :1]).exp(), 0.0)
    # A running sum is one chain of additions per row, so it does not depend on how many rows there are.
    mass = weight.cumsum(-1)
    before = F.pad(mass[:, :-1], (1, 0))
    keep = keep & ((top_p >= 1) | (before < top_p * mass[:, -1:]) | (rank == 0))
    keep = keep & (ordered >= ordered[:, :1] + min_p.log())
    return torch.zeros_like(keep).scatter_(-1, order, keep)


def gumbel_noise(vocab: int, seed: Tensor, context: int, step: Tensor) -> Tensor:
    """Standard Gumbel noise float32 [B, V] of seeds int64 [B, 1]: -log(-log(1 - u)) with u from 64 random bits."""
    pairs = torch.arange((vocab + 1) // 2, device=seed.device)
    counter = (pairs, torch.full_like(pairs, context), step & _WORD, (step >> 32) & _WORD)
    w0, w1, w2, w3 = philox(counter, (seed & _WORD, (seed >> 32) & _WORD))
    high = torch.stack((w0, w2), dim=-1).flatten(-2)[:, :vocab]
    low = torch.stack((w1, w3), dim=-1).flatten(-2)[:, :vocab]
    # Two words keep the relative precision of a small u, which is where the large noise comes from.
    u = (high.float() * 2.0**-32 + low.float() * 2.0**-64).clamp(_U_MIN, _U_MAX)
    return -torch.log(-torch.log1p(-u))


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 on broadcastable int64 tensors, each element holding one unsigned 32-bit word."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product may wrap to a negative number; its bits, which is all that is used, are right.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3
