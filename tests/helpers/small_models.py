"""A small GPT and targets for it, for the tests of its losses."""

from __future__ import annotations

import torch
from torch import Tensor

from megactx.config import ContextConfig, GPTConfig
from megactx.model import GPT

TEXT = ContextConfig("text", vocab_size=11)
CASE = ContextConfig("case", vocab_size=3)
VALUE = ContextConfig("value", "numeric", 100, mean=40.0, std=20.0)
SMALL = {"block_size": 16, "n_layer": 2, "n_head": 4, "n_embd": 32}
HEADS = ("shared", "parallel", "sequential")


def make(*contexts: ContextConfig, **options: object) -> GPT:
    torch.manual_seed(5)
    model = GPT(GPTConfig(contexts or (TEXT,), **{**SMALL, **options}))  # type: ignore[arg-type]
    with torch.no_grad():  # matrices large enough for what the heads say to differ
        for parameter in model.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
    return model.eval()


def stream(model: GPT, steps: int, batch: int = 2, length: int = 9) -> tuple[Tensor, Tensor]:
    """Tokens [B, T, C] and their next `steps` symbols [B, T, C, K], some of them ignored."""
    rows = torch.stack([torch.randint(c.vocab_size, (batch, length + steps)) for c in model.config.contexts], dim=-1)
    targets = torch.stack([rows[:, k : k + length] for k in range(1, steps + 1)], dim=-1)
    # as behind the end of a document: from some step on, nothing
    ends = torch.randint(1, 2 * steps, (batch, length, 1, 1))
    ends[:, -1] = steps
    return rows[:, :length], torch.where(torch.arange(steps) < ends, targets, -1)


def gradients(model: GPT, loss: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return {name: g for (name, _), g in zip(model.named_parameters(), found, strict=True) if g is not None}
