"""Causal self-attention: one projection for q, k and v, then `gaussian_rope` and `alibi_attention`, or SDPA."""

from __future__ import annotations

from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megactx.kernels import alibi_attention
from megactx.kernels._runtime import check_bool, check_choice, check_like, check_mask, check_number, check_tensor
from megactx.nn.constants import WithConstants
from megactx.nn.rotary import KINDS, GaussianRoPE, check_count, check_positions, check_positive

UNTURNED = ("learned", "none")


class CausalSelfAttention(WithConstants):
    """Multi-head attention without biases; fewer key/value heads than query heads group the queries (GQA).

    `position`: a kind of `GaussianRoPE`, whose settings `block_size` to `norm_after` are; or `"none"` or `"learned"`,
    and nothing is turned. With `qk_norm` each head of q and k is scaled to unit root mean square first (by `norm_after`
    after the rotation), which bounds the logits by sqrt(head_dim).

    `sinks`: a constant C in the denominator of every softmax, so that a head may attend to nothing:
    exp(z_i) / (C + sum_j exp(z_j)). `"layer"` learns one for all heads and `"head"` one for each: the parameter is
    log C, in `log_const`, and starts there. `"fixed"` keeps the one it is given: no parameter. None has none.

    Without slopes, sinks and padding this is PyTorch's SDPA, with `dropout` on the attention weights while training.
    `alibi_attention`, which does the rest, never holds the weights and drops none of them; the result is dropped out
    either way.

    What could never run is refused here, with a ValueError or TypeError naming the argument, and so are settings of a
    rotation or of a constant that is not there.
    """

    log_const: nn.Parameter | None
    fixed_log_const: Tensor | None

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
        sinks: Literal["layer", "head", "fixed"] | None = None,
        log_const: float = 0.0,
        block_size: int = 32,
        base: float = 10000.0,
        sigma: str = "uniform",
        lod_pairs: int | None = None,
        slopes_rule: str = "press",
        interleaved: bool = False,
        conjugate: bool = False,
        norm_after: bool = False,
    ) -> None:
        super().__init__()
        check_choice("position", position, (*KINDS, *UNTURNED))
        n_embd, self.n_head = check_count("n_embd", n_embd), check_count("n_head", n_head)
        self.n_kv_head = self.n_head if n_kv_head is None else check_count("n_kv_head", n_kv_head)
        if n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {n_embd} and {n_head}")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head must be a multiple of n_kv_head, got {n_head} and {n_kv_head}")
        self.head_dim = n_embd // self.n_head
        self.dropout = float(check_number("dropout", dropout, "in [0, 1)"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout!r}")
        norm_eps = check_positive("norm_eps", norm_eps)
        self.qk_norm_eps = norm_eps if check_bool("qk_norm", qk_norm) else None
        if norm_after and not qk_norm:
            raise ValueError(f"norm_after must be False without qk_norm, got {norm_after!r}")
        rope = {"block_size": block_size, "base": base, "sigma": sigma, "lod_pairs": lod_pairs}
        rope |= {"slopes_rule": slopes_rule, "interleaved": interleaved, "conjugate": conjugate}
        self.rope = self._rotation(position, {**rope, "norm_after": norm_after})
        self.qkv = nn.Linear(n_embd, (self.n_head + 2 * self.n_kv_head) * self.head_dim, bias=False)
        self.out = nn.Linear(n_embd, n_embd, bias=False)
        self._set_sinks(sinks, log_const)

    def _rotation(self, position: str, settings: dict[str, Any]) -> GaussianRoPE | None:
        if position not in UNTURNED:
            if self.head_dim % 2:
                raise ValueError(f"n_embd / n_head must be even for position {position!r}, got {self.head_dim}")
            return GaussianRoPE(self.head_dim, self.n_head, position, qk_norm_eps=self.qk_norm_eps, **settings)
        for name, parameter in signature(GaussianRoPE).parameters.items():
            if name in settings and settings[name] != parameter.default:
                raise ValueError(
                    f"{name} must be {parameter.default!r} for position {position!r}, where nothing is turned, "
                    f"got {settings[name]!r}"
                )
        return None

    def _set_sinks(self, sinks: str | None, log_const: float) -> None:
        if sinks not in (None, "layer", "head", "fixed"):
            raise ValueError(f"sinks must be 'layer', 'head', 'fixed' or None, got {sinks!r}")
        log_const = float(check_number("log_const", log_const))
        if log_const and sinks is None:
            raise ValueError(f"log_const must be 0 without sinks, got {log_const!r}")
        learned = None if sinks in (None, "fixed") else torch.full((self.n_head if sinks == "head" else 1,), log_const)
        self.register_parameter("log_const", None if learned is None else nn.Parameter(learned))
        self._fixed = log_const if sinks == "fixed" else None
        self.set_constants()

    def constants(self, device: torch.device | None) -> dict[str, Tensor | None]:
        if self._fixed is None:
            return {"fixed_log_const": None}
        return {"fixed_log_const": torch.full((self.n_head,), self._fixed, dtype=torch.float32, device=device)}

    @property
    def sinks(self) -> Tensor | None:
        """log C of every query head, `[n_head]`, at least float32 (float64 if it is learned by a double module); None
        without sinks."""
        if self.log_const is None:
            return self.fixed_log_const
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
        `key_padding_mask` bool `[B, T]`, True = attend: a padded row of x is seen by nobody, be it NaN, neither
        forwards nor backwards. It gives what a row of zeros would, which is of no use. Causality is by index, whatever
        the positions. ValueError or TypeError names the argument; `lods` are refused where nothing is turned.
        """
        shape = check_tensor("x", x, 3).shape[:2]
        if key_padding_mask is not None:
            check_mask("key_padding_mask", key_padding_mask, shape)
            check_like("key_padding_mask", key_padding_mask, "x", x, dtype=False)
            x = torch.where(key_padding_mask[..., None], x, 0)  # a NaN would reach the gradient of the projection
        if positions is None:
            positions = torch.arange(shape[1], device=x.device)
        elif self.rope is None:  # else the rotation has the same checks
            check_positions(positions, shape)
            check_like("positions", positions, "x", x, dtype=False)
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
