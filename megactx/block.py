"""The block that a GPT is made of, and the one that its sequential heads are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megactx.config import GPTConfig
from megactx.nn.attention import CausalSelfAttention
from megactx.nn.mlp import MLP
from megactx.nn.norm import RMSNorm


class Block(nn.Module):
    """Pre-norm: `x + attention(norm(x))`, then `x + mlp(norm(x))`."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.attention = CausalSelfAttention(
            config.n_embd,
            config.n_head,
            config.n_kv_head,
            position=config.position,
            qk_norm=config.qk_norm,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            sinks=_sinks(config),
            log_const=config.flash_lobo_log_const,
            **_rope_settings(config),
        )
        self.mlp_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config.n_embd, config.activation, config.dropout)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        lods: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, lods, key_padding_mask)
        return x + self.mlp(self.mlp_norm(x))


class MergingBlock(Block):
    """A block that is given one more token: it runs on `merge([norm(x); norm(embedding)])`, `merge` from 2 E to E."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.hidden_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.embedding_norm = RMSNorm(config.n_embd, config.norm_eps)
        self.merge = nn.Linear(2 * config.n_embd, config.n_embd, bias=False)

    def forward(  # type: ignore[override]  # the embedding comes second, and is no option
        self,
        x: Tensor,
        embedding: Tensor,
        positions: Tensor | None = None,
        lods: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """`x` and `embedding`, both `[B, T, E]`; the rest is the block's."""
        both = torch.cat((self.hidden_norm(x), self.embedding_norm(embedding)), dim=-1)
        merged = self.merge(both).to(x.dtype)  # autocast would narrow the residual stream here
        return super().forward(merged, positions, lods, key_padding_mask)


def init_blocks(blocks: Iterable[nn.Module], n_layer: int) -> None:
    """N(0, 0.02), and 1/sqrt(2L) of it where a matrix writes to the residual stream: 2L such sums then keep the
    variance of one (GPT-2)."""
    residual_std = 0.02 / math.sqrt(2 * n_layer)
    for block in blocks:
        for name, parameter in block.named_parameters():
            if parameter.dim() == 2:
                std = residual_std if name in ("attention.out.weight", "mlp.down.weight") else 0.02
                nn.init.normal_(parameter, std=std)


def _sinks(config: GPTConfig) -> Literal["layer", "head", "fixed"] | None:
    if not config.use_flash_lobo:
        return None
    return "fixed" if config.flash_lobo_fixed else "head" if config.use_flash_lobo_per_head else "layer"


def _rope_settings(config: GPTConfig) -> dict[str, Any]:
    """The settings of the blocks' `GaussianRoPE`, none where nothing is turned."""
    if not config.rotary:
        return {}
    return {
        "base": config.rope_base,
        "sigma": config.rope_sigma,
        "block_size": config.lod_block_size,
        "lod_pairs": config.lod_pairs,
        "slopes_rule": config.alibi_rule,
    }
