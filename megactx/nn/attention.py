"""Causal self-attention: one projection for q, k and v, then `gaussian_rope` and `alibi_attention`, or SDPA."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megactx.kernels import alibi_attention
from megactx.nn.rotary import GaussianRoPE

UNTURNED = ("learned", "none")


class CausalSelfAttention(nn.Module):
    """Multi-head attention without biases; fewer key/value heads than query heads group the queries (GQA).

    `position`: a kind of `GaussianRoPE`, whose further settings (`block_size`, `base`, `sigma`, `lod_pairs`,
    `slopes_rule`, ...) are taken by name; or `"none"` or `"learned"`, and nothing is turned. With `qk_norm` each head
    of q and k is scaled to unit root mean square first, which bounds the logits by sqrt(head_dim).

    `sinks`: a learned constant C in the denominator of every softmax, so that a head may attend to nothing:
    exp(z_i) / (C + sum_j exp(z_j)). `"layer"` learns one for all heads, `"head"` one for each, None has none. The
    parameter is log C, in `log_const`, and starts there.

    Without slopes, sinks and padding this is PyTorch's SDPA, with `dropout` on the attention weights while training.
    `alibi_attention`, which does the rest, never holds the weights and drops none of them; the result is dropped out
    either way.
    """

    log_const: nn.Parameter | None

    def __init__(
        self,
        n_embd: int,
        n_head: int,
        n_kv_head: int | None = None,
        *,
        position: str = "simple",
        qk_norm: bool = True,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        sinks: Literal["layer", "head"] | None = None,
        log_const: float = 0.0,
        **rope: Any,
    ) -> None:
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {n_embd} and {n_head}")
        if sinks not in (None, "layer", "head"):
            raise ValueError(f"sinks must be 'layer', 'head' or None, got {sinks!r}")
        if position in UNTURNED and rope:
            raise ValueError(f"{', '.join(rope)} must not be given for position {position!r}: nothing is turned")
        self.n_head = n_head
        self.n_kv_head = n_head if n_kv_head is None else n_kv_head
        if n_head % self.n_kv_head:
            raise ValueError(f"n_head must be a multiple of n_kv_head, got {n_head} and {n_kv_head}")
        self.head_dim = n_embd // n_head
        self.qk_norm_eps = norm_eps if qk_norm else None
        self.dropout = dropout
        self.rope = None
        if position not in UNTURNED:
            self.rope = GaussianRoPE(self.head_dim, n_head, position, qk_norm_eps=self.qk_norm_eps, **rope)
        self.qkv = nn.Linear(n_embd, (n_head + 2 * self.n_kv_head) * self.head_dim, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)
        learned = None if sinks is None else torch.full((n_head if sinks == "head" else 1,), float(log_const))
        self.register_parameter("log_const", None if learned is None else nn.Parameter(learned))

    @property
    def sinks(self) -> Tensor | None:
        """log C of every query head, `[n_head]` in float32 (float64 for a double module); None without sinks."""
        if self.log_const is None:
            return None
        return self.log_const.to(torch.promote_types(self.log_const.dtype, torch.float32)).expand(self.n_head)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        lods: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """`x [B, T, n_embd]` to the same shape.

        `positions`, `lods`: int32 or int64, `[T]` for all samples alike or `[B, T]`; by default 0 .. T - 1, all LOD 0.
        `key_padding_mask` bool `[B, T]`, True = attend: padded keys are seen by nobody, and what a padded query gives
        is of no use. Causality is by index, whatever the positions. ValueError or TypeError names the argument; `lods`
        are refused where nothing is turned.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)
        heads = self.qkv(x).unflatten(-1, (self.n_head + 2 * self.n_kv_head, self.head_dim))
        q, k, v = heads.split((self.n_head, self.n_kv_head, self.n_kv_head), dim=2)
        if self.rope is not None:
            q, k = self.rope(q, k, positions, lods)
        elif lods is not None:
            raise ValueError("lods must be None for an attention that turns nothing: no one would read them")
        elif self.qk_norm_eps is not None:  # under autocast the norm is float32, and v is not
            q, k = (F.rms_norm(u, (self.head_dim,), eps=self.qk_norm_eps).to(v.dtype) for u in (q, k))
        y = self.out(self._attend(q, k, v, positions, key_padding_mask).flatten(2))
        return F.dropout(y, self.dropout, self.training)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        slopes, sinks = None if self.rope is None else self.rope.slopes, self.sinks
        if slopes is not None or sinks is not None or key_padding_mask is not None:
            return alibi_attention(q, k, v, positions, slopes=slopes, sinks=sinks, key_padding_mask=key_padding_mask)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
            enable_gqa=self.n_kv_head != self.n_head,
        )
        return y.transpose(1, 2)
