"""Root-mean-square normalisation with a gain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`y = x / sqrt(mean(x^2) + eps) * weight` over the last axis (Zhang and Sennrich, 2019).

    The epsilon is explicit: PyTorch's default is the machine epsilon of the input's dtype, which would make the same
    checkpoint give different numbers in float32 and bfloat16.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """`x [..., dim]`, any float dtype; the result has the same shape."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
