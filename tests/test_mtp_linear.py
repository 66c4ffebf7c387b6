"""The linear form of the cross-entropy: the dense form of its logits, which it never holds, and no product too many."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megactx import kernels
from megactx.kernels import linear_mtp_cross_entropy, mtp_cross_entropy
from megactx.kernels.mtp import reference

SIZES = (5, 9)
STEPS = (1.0, 0.5, 0.25)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 2.5},
    {"softcap": 4.0, "label_smoothing": 0.1, "z_loss": 0.01, "context_weights": (1.0, 0.0)},
]


def some_targets(rows: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(-1, size, (rows, len(STEPS)), generator=generator) for size in SIZES], dim=1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_linear_form_is_the_dense_form_of_its_logits(options: dict[str, Any], monkeypatch: Any) -> None:
    torch.manual_seed(0)
    targets = some_targets(12)
    hidden = torch.randn(12, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(14, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(14, dtype=torch.float64, requires_grad=True)
    common = {"vocab_sizes": SIZES, "step_weights": STEPS, **options}
    for reduction, rows in itertools.product(("mean", "sum", "none"), (5, 1000)):
        monkeypatch.setattr(reference, "_CHUNK_GEMM", rows * 14)
        fused = linear_mtp_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction, **common)
        dense = mtp_cross_entropy(F.linear(hidden, weight, bias), targets, reduction=reduction, **common)
        torch.testing.assert_close(fused, dense)
        upstream = torch.randn_like(fused.loss)
        grads = [torch.autograd.grad(x.loss, (hidden, weight, bias), upstream) for x in (fused, dense)]
        torch.testing.assert_close(grads[0], grads[1])


def test_the_linear_reference_has_first_and_second_derivatives() -> None:
    targets = some_targets(3)
    torch.manual_seed(0)
    leaves = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 2), (14, 2), (14,)))
    with kernels.use_backend("reference"):

        def function(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return linear_mtp_cross_entropy(
                h, w, targets, bias=b, vocab_sizes=SIZES, step_weights=STEPS, z_loss=0.1, softcap=3.0
            ).loss

        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor made."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


def test_the_linear_form_never_holds_the_logits(monkeypatch: Any) -> None:
    rows, width, vocab, chunk = 400, 4, 50, 10
    monkeypatch.setattr(reference, "_CHUNK_GEMM", chunk * vocab)
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width)
    targets = torch.randint(0, vocab, (rows, 1, 1))
    options = ([vocab], torch.ones(1), torch.ones(1), -1, "mean", 5.0, 0.1, 0.1)
    with torch.no_grad(), Largest() as made:
        loss, _, lse = reference.linear_mtp_cross_entropy(hidden, weight, None, targets, *options)
        reference.linear_mtp_cross_entropy_backward(
            torch.ones_like(loss), hidden, weight, None, targets, lse, *options, True, True, False
        )
    assert made.numel <= max(rows * width, chunk * vocab)


def test_frozen_inputs_are_not_differentiated_and_dtypes_may_differ() -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, 8, (6, 1))
    hidden, weight = torch.randn(6, 4).bfloat16(), torch.randn(8, 4)
    exact = F.cross_entropy(F.linear(hidden.float(), weight), targets[:, 0])
    for frozen in ("hidden", "weight"):
        h, w = hidden.clone().requires_grad_(frozen != "hidden"), weight.clone().requires_grad_(frozen != "weight")
        loss = linear_mtp_cross_entropy(h, w, targets).loss
        torch.testing.assert_close(loss, exact)
        loss.backward()
        assert (h.grad is None) == (frozen == "hidden")
        assert (w.grad is None) == (frozen == "weight")
    unneeded = torch.ops.megactx.linear_mtp_cross_entropy_backward(
        torch.ones(()), hidden, weight, None, targets[:, None], torch.zeros(6, 1), [8], torch.ones(1), torch.ones(1),
        -1, "mean", None, 0.0, 0.0, False, True, False,
    )  # fmt: skip
    assert [x.numel() for x in unneeded] == [0, 32, 0]


def test_the_weight_gradient_is_summed_in_float32(monkeypatch: Any) -> None:
    """Many chunks of bfloat16: summed in bfloat16 the small ones would be lost."""
    monkeypatch.setattr(reference, "_CHUNK_GEMM", 8)
    torch.manual_seed(0)
    hidden = (1 + 0.01 * torch.randn(2048, 4)).bfloat16()
    weight = torch.randn(8, 4).bfloat16().requires_grad_()
    targets = torch.randint(0, 8, (2048, 1))
    linear_mtp_cross_entropy(hidden, weight, targets).loss.backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(F.linear(hidden.double(), exact), targets[:, 0]).backward()
    assert weight.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=2**-8, atol=1e-6)


def test_bad_linear_arguments_are_named() -> None:
    hidden, weight, targets = torch.zeros(4, 3), torch.zeros(6, 3), torch.zeros(4, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight must have shape \[V, 3\] as hidden, got \(6, 2\)"):
        linear_mtp_cross_entropy(hidden, weight[:, :2], targets)
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\), got \(5,\)"):
        linear_mtp_cross_entropy(hidden, weight, targets, bias=torch.zeros(5))
    with pytest.raises(ValueError, match="vocab_sizes must add up to the rows of weight = 6"):
        linear_mtp_cross_entropy(hidden, weight, targets, vocab_sizes=(7,))
