"""Causal self-attention: one projection for q, k and v, rotary with QK-norm from `megactx.kernels`, then SDPA."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megactx.kernels import gaussian_rope


class CausalSelfAttention(nn.Module):
    """Multi-head attention without biases; fewer key/value heads than query heads group the queries (GQA).

    `rotary` turns q and k by their positions (plain rotary: no damping, every token stands for itself). With `qk_norm`
    each head of q and k is scaled to unit root mean square first, which bounds the logits by sqrt(head_dim).
    """

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        n_kv_head: int | None = None,
        *,
        rotary: bool = True,
        rope_base: float = 10000.0,
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_head = n_head
        self.n_kv_head = n_head if n_kv_head is None else n_kv_head
        self.head_dim = n_embd // n_head
        self.rotary = rotary
        self.rope_base = rope_base
        self.qk_norm_eps = norm_eps if qk_norm else None
        self.dropout = dropout
        self.qkv = nn.Linear(n_embd, (n_head + 2 * self.n_kv_head) * self.head_dim, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """`x [B, T, n_embd]`, `positions` int64 `[T]` or `[B, T]`; returns `[B, T, n_embd]`.

        Causality is by index. `positions` are used by the rotation alone.
        """
        heads = self.qkv(x).unflatten(-1, (self.n_head + 2 * self.n_kv_head, self.head_dim))
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if self.rotary:
            q, k = gaussian_rope(q, k, positions, base=self.rope_base, sigma="none", qk_norm_eps=self.qk_norm_eps)
        elif self.qk_norm_eps is not None:
            q, k = (F.rms_norm(u, (self.head_dim,), eps=self.qk_norm_eps) for u in (q, k))
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=self.n_kv_head != self.n_head,
        )
        y = self.out(y.transpose(1, 2).flatten(2))
        return F.dropout(y, self.dropout, self.training)
