"""`gist_attention`: attention inside blocks of at most 64 tokens, with exact zeros for padding."""

from typing import Any

from torch import Tensor

from .. import _library
from .._runtime import check_bool, check_like, check_mask
from ..attention.op import check_attention_inputs, checked_scale
from . import reference

MAX_LENGTH = 64


def gist_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v inside each of N blocks of L <= 64 tokens.

    `q` [N, L, Hq, D]; `k`, `v` [N, L, Hk, D], Hq a multiple of Hk, all of one float dtype.  `key_padding_mask` bool
    [N, L], True = a real token.  `scale` is 1 / sqrt(D) by default.  Returns [N, L, Hq, D].

    Rows of padded tokens are exactly 0 with zero gradients, and nothing in them, be it NaN, reaches any other row: the
    result of a padded block is the result of the shorter one.  Raises `ValueError` or `TypeError` naming the argument.
    """
    check_attention_inputs(q, k, v)
    check_bool("causal", causal)
    blocks, length = q.shape[:2]
    if k.shape[1] != length:
        raise ValueError(f"k must be as long as q ({length}), got {k.shape[1]}")
    if length > MAX_LENGTH:
        raise ValueError(f"q must have blocks of at most {MAX_LENGTH} tokens, got {length}")
    if key_padding_mask is not None:
        check_mask("key_padding_mask", key_padding_mask, (blocks, length))
        check_like("key_padding_mask", key_padding_mask, "q", q, dtype=False)
    return _GIST(q, k, v, key_padding_mask, causal, checked_scale(scale, q.shape[3]))


def _fake(q: Tensor, *rest: Any) -> Tensor:
    return q.new_empty(q.shape)


def _backward_fake(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, causal, scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.settings = (causal, scale)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
    return (*_GIST_BACKWARD.derivative(grad_out, *ctx.saved_tensors, *ctx.settings), None, None, None)


_GIST = _library.register(
    "gist_attention",
    reference=reference.gist_attention,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)
_GIST_BACKWARD = _library.register(
    "gist_attention_backward", reference=reference.gist_attention_backward, fake=_backward_fake
)
