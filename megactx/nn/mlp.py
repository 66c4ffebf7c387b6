"""The feed-forward half of a block: two matrices around an activation, or three for the gated kind."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def hidden_size(n_embd: int, activation: str) -> int:
    """Width between the matrices: 4x, or 8/3x rounded up to a multiple of 8 for "swiglu".

    The gated kind has three matrices, so two thirds of the width keep the parameter count (Shazeer, 2020).
    """
    return 8 * -(-n_embd // 3) if activation == "swiglu" else 4 * n_embd


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation between the matrices; "swiglu" takes gate and value side by side and halves the last axis."""
    if activation == "gelu":
        return F.gelu(x)
    if activation == "relu2":
        return F.relu(x).square()
    if activation == "silu":
        return F.silu(x)
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


class MLP(nn.Module):
    """`down(activation(up(x)))` without biases; "swiglu" packs gate and value into one `up`."""

    def __init__(self, n_embd: int, activation: str = "gelu", dropout: float = 0.0) -> None:
        super().__init__()
        hidden = hidden_size(n_embd, activation)
        self.activation = activation
        self.dropout = dropout
        self.up = nn.Linear(n_embd, 2 * hidden if activation == "swiglu" else hidden, bias=False)
        self.down = nn.Linear(hidden, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., n_embd]` to the same shape."""
        y = self.down(activate(self.up(x), self.activation))
        return F.dropout(y, self.dropout, self.training)
