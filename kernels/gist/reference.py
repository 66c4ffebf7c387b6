"""Attention inside many tiny padded blocks: the specification, in plain PyTorch.

A block is a sequence of at most 64 tokens of which the mask names the real ones, anywhere in the block.  A padded token
is neither a query nor a key: its row is exactly zero, and a block gives what its real tokens alone would give.  That
is what attention over pairs does for a query that may see nothing and a key that nothing may see.
"""

from __future__ import annotations

from torch import Tensor

from ..attention.reference import allowed_pairs, masked_attention, masked_attention_backward


def gist_attention(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """out [N, L, Hq, D] of q [N, L, Hq, D] and k, v [N, L, Hk, D]; key_padding_mask bool [N, L], True = a token."""
    mask = key_padding_mask
    allowed = allowed_pairs(q.shape[1], k.shape[1], causal, mask, mask, q.device)
    return masked_attention(q, k, v, None, allowed, None, scale)[0]


def gist_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.  Softmax statistics are not saved: a block is small enough to make them again."""
    mask = key_padding_mask
    allowed = allowed_pairs(q.shape[1], k.shape[1], causal, mask, mask, q.device)
    _, lse = masked_attention(q, k, v, None, allowed, None, scale)
    grad_q, grad_k, grad_v, _ = masked_attention_backward(grad_out, q, k, v, lse, None, allowed, scale)
    return grad_q, grad_k, grad_v
