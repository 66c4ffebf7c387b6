"""Gist attention: a padded block is the shorter block, padding is exactly zero and contains what stands in it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megactx import kernels
from megactx.kernels import gist_attention


def inputs(dtype: torch.dtype = torch.float64, length: int = 8) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, length, 4, 6), (4, length, 2, 6), (4, length, 2, 6))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    lengths = torch.tensor([length, length // 2, 1, 0])
    return q, k, v, torch.arange(length) < lengths[:, None]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_padded_block_is_the_shorter_block(causal: bool, backend: str) -> None:
    q, k, v, mask = inputs()
    scattered = mask[:, torch.tensor([3, 0, 6, 1, 7, 5, 2, 4])]  # real tokens anywhere in the block
    with kernels.use_backend(backend):
        for real in (mask, scattered):
            out = gist_attention(q, k, v, real, causal=causal)
            assert (out[~real] == 0).all()
            for n in range(q.shape[0]):
                short = [x[n, real[n]].transpose(0, 1)[None] for x in (q, k, v)]
                expected = F.scaled_dot_product_attention(*short, is_causal=causal, enable_gqa=True)[0].transpose(0, 1)
                torch.testing.assert_close(out[n, real[n]], expected)


def test_without_a_mask_every_token_is_real() -> None:
    q, k, v, mask = inputs()
    torch.testing.assert_close(gist_attention(q, k, v), gist_attention(q, k, v, torch.ones_like(mask)))
    torch.testing.assert_close(gist_attention(q, k, v, scale=0.0)[:, :, 0], v.mean(1)[:, None, 0].expand(-1, 8, -1))


@pytest.mark.parametrize("poison", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("names", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_padding_is_contained_forward_and_backward(poison: float, names: str, backend: str) -> None:
    q, k, v, mask = inputs(torch.float32)
    results = []
    with kernels.use_backend(backend):
        for value in (0.0, poison):
            leaves = [
                x.masked_fill(~mask[:, :, None, None], value if name in names else 0.0).requires_grad_()
                for name, x in zip("qkv", (q, k, v), strict=True)
            ]
            out = gist_attention(*leaves, mask)
            upstream = out.detach().cos().masked_fill(~mask[:, :, None, None], value)  # padding sends garbage back too
            results.append((out, *torch.autograd.grad(out, leaves, upstream)))
    torch.testing.assert_close(results[1], results[0])
    for x in results[1]:
        assert (x[~mask] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients(causal: bool, masked: bool) -> None:
    q, k, v, mask = inputs(length=4)
    leaves = tuple(x[:2, ..., :3].clone().requires_grad_() for x in (q, k, v))
    key_padding_mask = mask[:2] if masked else None

    def function(*x: Tensor) -> Tensor:
        return gist_attention(*x, key_padding_mask, causal=causal)

    grads = []
    for backend in ("reference", "auto"):
        with kernels.use_backend(backend):
            assert torch.autograd.gradcheck(function, leaves)
            grads.append(torch.autograd.grad(function(*leaves).sin().sum(), leaves))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-11)
    with kernels.use_backend("reference"):
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_error_is_at_most_that_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(16, 32, 2, 32).to(dtype) for _ in range(3))

    def torch_attention(*x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in x)).transpose(1, 2)

    exact = torch_attention(q.double(), k.double(), v.double())
    ours, theirs = ((x.double() - exact).abs().max() for x in (gist_attention(q, k, v), torch_attention(q, k, v)))
    assert ours <= theirs + 2 * torch.finfo(dtype).eps


def test_blocks_do_not_depend_on_their_neighbours() -> None:
    q, k, v, mask = inputs(torch.float32)
    together = gist_attention(q, k, v, mask)
    alone = torch.cat([gist_attention(q[n : n + 1], k[n : n + 1], v[n : n + 1], mask[n : n + 1]) for n in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-7)


def test_strided_and_empty_inputs() -> None:
    q, k, v, mask = inputs()
    expected = gist_attention(q, k, v, mask)
    packed = torch.cat((q, k, v), dim=2)
    strided = gist_attention(packed[:, :, :4], packed[:, :, 4:6], packed[:, :, 6:], mask.T.contiguous().T)
    torch.testing.assert_close(strided, expected)
    assert gist_attention(q[:0], k[:0], v[:0], mask[:0]).shape == (0, 8, 4, 6)
    assert gist_attention(q[:, :0], k[:, :0], v[:, :0]).shape == (4, 0, 4, 6)
    assert gist_attention(q[:, :1], k[:, :1], v[:, :1]).shape == (4, 1, 4, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(1, 65, 2, 4), "k": torch.zeros(1, 65, 2, 4), "v": torch.zeros(1, 65, 2, 4)},
            "q must have blocks of at most 64 tokens, got 65",
        ),
        ({"k": torch.zeros(2, 7, 2, 4), "v": torch.zeros(2, 7, 2, 4)}, r"k must be as long as q \(8\), got 7"),
        ({"key_padding_mask": torch.ones(2, 7).bool()}, r"key_padding_mask must have shape \(2, 8\), got \(2, 7\)"),
        ({"key_padding_mask": torch.ones(2, 8)}, "key_padding_mask must be bool"),
        ({"causal": None}, "causal must be True or False, got None"),
        ({"scale": 1j}, "scale must be a finite number, got 1j"),
        ({"v": torch.zeros(2, 8, 2, 4).double()}, "v must have the dtype of q"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {name: torch.zeros(2, 8, 2, 4) for name in "qkv"}
    with pytest.raises((ValueError, TypeError), match=message):
        gist_attention(**(good | change))
