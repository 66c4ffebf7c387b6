"""Both cross-entropies against float64, on every backend that is live: dtypes, vocabularies, reductions, edges."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megactx import kernels
from megactx.kernels import MTPLoss, _library, linear_mtp_cross_entropy, mtp_cross_entropy

STEPS = (1.0, 0.5, 0.25, 0.25)
FULL: dict[str, Any] = {"softcap": 6.0, "label_smoothing": 0.1, "z_loss": 0.01}


def live() -> list[Any]:
    """The backends that run here, the interpreter as one of its own mark."""
    kernels.backends()  # registers the operators
    marks = {"triton": pytest.mark.interp}
    names = ["reference", *(b for b in ("cpp", "triton") if not _library.why_not("mtp_rows", b, "cpu"))]
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


BACKENDS = live()
KERNELS = BACKENDS[1:]


def some_targets(sizes: tuple[int, ...], rows: int, steps: int = 4) -> Tensor:
    """With ignored ones, duplicates, a row without any target and a context without any in another."""
    generator = torch.Generator().manual_seed(rows)
    columns = [torch.randint(-1, size, (rows, steps), generator=generator) for size in sizes]
    targets = torch.stack(columns, dim=1)
    targets[1, :, 1] = targets[1, :, 0]
    targets[2] = -1
    targets[3, -1] = -1
    targets[-1, :, 1:] = -1  # the tail of a stream: nothing further ahead
    return targets


def some_logits(sizes: tuple[int, ...], rows: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(sum(sizes))
    return (3 * torch.randn(rows, sum(sizes), generator=generator)).to(dtype)


def with_gradient(loss: MTPLoss, *leaves: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The result and the gradients for an upstream gradient that is not 1."""
    upstream = torch.linspace(0.5, 2.0, max(loss.loss.numel(), 1)).view(loss.loss.shape).to(loss.loss.dtype)
    return loss.loss.detach(), loss.per_step, torch.autograd.grad(loss.loss, leaves, upstream)


def exact(function: Any, leaves: tuple[Tensor, ...], *rest: Any, **options: Any) -> Any:
    doubles = tuple(x.detach().double().requires_grad_() for x in leaves)
    with kernels.use_backend("reference"):
        return with_gradient(function(*doubles, *rest, **options), *doubles)


@pytest.mark.parametrize("sizes", [(2,), (1, 3), (7,), (2, 300, 33), (1031,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dense_loss_is_the_truth_rounded_once(backend: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    logits, targets = some_logits(sizes, 6, dtype).requires_grad_(), some_targets(sizes, 6)
    for reduction, options in (("mean", {}), ("mean", FULL), ("sum", FULL), ("none", FULL)):
        settings = {"vocab_sizes": sizes, "step_weights": STEPS, "reduction": reduction, **options}
        loss, per_step, (truth,) = exact(mtp_cross_entropy, (logits,), targets, **settings)
        with kernels.use_backend(backend):
            got = with_gradient(mtp_cross_entropy(logits, targets, **settings), logits)
        assert got[0].dtype == got[1].dtype == torch.float32
        torch.testing.assert_close(got[0].double(), loss, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(got[1].double(), per_step, rtol=3e-6, atol=3e-6)
        grad = got[2][0].double()
        floor = 1e-6 * float(truth.abs().max()) + torch.finfo(dtype).smallest_normal
        assert ((grad - truth).abs() <= torch.finfo(dtype).eps * truth.abs() + floor).all()
        assert (grad[2] == 0).all()


@pytest.mark.parametrize("backend", [b for b in KERNELS if b.values[0] == "cpp"])
def test_the_vocabulary_of_gpt_2(backend: str) -> None:
    sizes = (50304,)
    logits, targets = some_logits(sizes, 6, torch.bfloat16).requires_grad_(), some_targets(sizes, 6)
    loss, per_step, (truth,) = exact(mtp_cross_entropy, (logits,), targets, step_weights=STEPS)
    with kernels.use_backend(backend):
        got = with_gradient(mtp_cross_entropy(logits, targets, step_weights=STEPS), logits)
    torch.testing.assert_close(got[0].double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(got[1].double(), per_step, rtol=1e-6, atol=0)
    torch.testing.assert_close(got[2][0].double(), truth, rtol=2**-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", KERNELS)
def test_what_is_almost_certain_keeps_its_digits(backend: str, dtype: torch.dtype) -> None:
    """As p -> 1 the loss and the gradient at the target are the small 1 - p, to the last digit it has in the dtype."""
    logits = torch.tensor([[24.0, 0.0, 0.0], [0.0, 40.0, -2.0], [9.0, 8.0, 31.0]], dtype=dtype).requires_grad_()
    targets = torch.tensor([[0], [1], [2]])
    z = logits.detach().double()
    ratio = (z - z.gather(1, targets)).exp().scatter(1, targets, 0.0)  # p of the others over that of the target
    rest = ratio.sum(1, keepdim=True)
    loss, truth = rest.log1p().sum(), 0.5 * (ratio / (1 + rest)).scatter(1, targets, -rest / (1 + rest))
    with kernels.use_backend(backend):
        got = with_gradient(mtp_cross_entropy(logits, targets, reduction="sum"), logits)
    torch.testing.assert_close(got[0].double(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(got[2][0].double(), truth, rtol=max(1e-5, torch.finfo(dtype).eps), atol=0)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_that_are_none_stay_in_rows_that_are_ignored(backend: str, linear: bool) -> None:
    torch.manual_seed(0)
    targets = some_targets((5, 9), 6)
    hidden, weight = torch.randn(6, 4), torch.randn(14, 4)
    results = []
    for fill in (0.0, math.nan, math.inf):
        leaves = (hidden.clone(), weight.clone()) if linear else (hidden @ weight.T,)
        leaves[0][2] = fill
        if not linear:
            leaves[0][3, 5:] = fill  # a context without a target, beside one that has some
        for leaf in leaves:
            leaf.requires_grad_()
        function = linear_mtp_cross_entropy if linear else mtp_cross_entropy
        with kernels.use_backend(backend):
            loss = function(*leaves, targets, vocab_sizes=(5, 9), step_weights=STEPS, **FULL)
            results.append(with_gradient(loss, *leaves))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_infinite_logits_are_as_in_log_softmax(backend: str, softcap: float | None) -> None:
    """+inf, a NaN, or nothing above -inf makes its row NaN in that context, and no other; -inf is a symbol less."""
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[0.5, 2, -1], [inf, 0, 1], [0, nan, 1], [-inf] * 3, [-inf, 0, 1], [-inf, inf, 0]])
    logits = torch.cat((logits, torch.randn(6, 4)), dim=1).requires_grad_()
    targets = torch.tensor([1, 0]).expand(6, 2)[:, :, None]
    z = logits[:, :3] if softcap is None else softcap * torch.tanh(logits[:, :3] / softcap)
    wanted = F.log_softmax(z.double(), 1)[:, 1]
    settings = {"vocab_sizes": (3, 4), "context_weights": (1.0, 1.0), "reduction": "none", "softcap": softcap}
    for z_loss in (0.0, 0.01):
        with kernels.use_backend(backend):
            loss = mtp_cross_entropy(logits, targets, z_loss=z_loss, **settings).loss
        if not z_loss:
            torch.testing.assert_close(loss[:, 0, 0].double(), -wanted, equal_nan=True, rtol=1e-6, atol=1e-6)
        assert torch.equal(loss[:, 0, 0].isnan(), wanted.isnan())
        assert loss[:, 1].isfinite().all()
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        assert grad[wanted.isnan(), :3].isnan().all()
        assert grad[:, 3:].isfinite().all()


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_which_nothing_can_be_made_has_no_logsumexp(backend: str, z_loss: float) -> None:
    logits = torch.tensor([[0.0, 1, 2], [math.inf, 0, 1], [0, math.nan, 1], [-math.inf] * 3])
    arguments = (logits, torch.zeros(4, 1, 1).long(), [3], torch.ones(1), torch.ones(1), -1, "mean", None, 0.0, z_loss)
    with kernels.use_backend(backend):
        lse = _library.OPERATORS["mtp_cross_entropy"](*arguments, None)[2]
    assert lse[:, 0].isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_predict_is_zero_with_zero_gradients(backend: str, reduction: str, rows: int) -> None:
    hidden, weight, bias = torch.randn(rows, 4), torch.randn(14, 4), torch.randn(14)
    targets = torch.full((rows, 2, 3), -7)
    settings = {"vocab_sizes": (5, 9), "step_weights": STEPS[:3], "ignore_index": -7, "reduction": reduction, **FULL}
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
    with kernels.use_backend(backend):
        dense = mtp_cross_entropy(F.linear(hidden, weight, bias), targets, **settings)
        fused = linear_mtp_cross_entropy(hidden, weight, targets, bias=bias, **settings)
        for loss, per_step in (dense, fused):
            assert (loss == 0).all()
            assert (per_step == 0).all()
            grads = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
            assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_of_the_seed(backend: str) -> None:
    """Mean cross-entropy of the next token, and a weight times the mean of those further ahead, each its own mean."""
    torch.manual_seed(0)
    weight = 0.1
    hidden, head = torch.randn(40, 16, requires_grad=True), torch.randn(37, 16, requires_grad=True)
    targets = torch.randint(0, 37, (40, 4))
    targets[-3:, 3] = targets[-2:, 2] = targets[-1:, 1] = -1
    logits = F.linear(hidden, head)
    each = [F.cross_entropy(logits, targets[:, k], ignore_index=-1) for k in range(4)]
    seed = each[0] + weight * sum(each[1:]) / 3
    with kernels.use_backend(backend):
        loss, per_step = linear_mtp_cross_entropy(hidden, head, targets, step_weights=(1.0,) + (weight / 3,) * 3)
        grads = torch.autograd.grad(loss, (hidden, head))
    torch.testing.assert_close(loss, seed, rtol=1e-6, atol=0)
    torch.testing.assert_close(per_step[0], torch.stack(each), rtol=1e-6, atol=0)
    torch.testing.assert_close(grads, torch.autograd.grad(seed, (hidden, head)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", KERNELS)
def test_the_linear_loss_is_as_good_as_that_of_pytorch(backend: str, reduction: str, dtype: torch.dtype) -> None:
    """Error against float64 at most that of Linear and cross-entropy in the same dtype, and a floor."""
    torch.manual_seed(0)
    leaves = tuple(torch.randn(shape).to(dtype).requires_grad_() for shape in ((40, 24), (61, 24), (61,)))
    targets = torch.randint(-1, 61, (40, 1))

    def torch_loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> MTPLoss:
        logits = F.linear(hidden, weight, bias).float()
        loss = F.cross_entropy(logits, targets[:, 0], ignore_index=-1, reduction=reduction)
        return MTPLoss(loss[:, None] if reduction == "none" else loss, loss)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> MTPLoss:
        return linear_mtp_cross_entropy(hidden, weight, targets, bias=bias, reduction=reduction)

    truth = exact(ours, leaves)
    theirs = with_gradient(torch_loss(*leaves), *leaves)
    with kernels.use_backend(backend):
        got = with_gradient(ours(*leaves), *leaves)
    for mine, other, right in zip((got[0], *got[2]), (theirs[0], *theirs[2]), (truth[0], *truth[2]), strict=True):
        scale = float(right.abs().max())
        error, allowed = (float((x.double() - right).abs().max()) for x in (mine, other))
        assert error <= 1.5 * allowed + (torch.finfo(dtype).eps + 1e-6) * scale


def test_float64_is_refused_by_name_where_triton_is_demanded() -> None:
    if _library.why_not("mtp_rows", "triton", "cpu"):
        pytest.skip("no interpreter")
    hidden, weight, targets = torch.randn(3, 4).double(), torch.randn(5, 4).double(), torch.zeros(3, 1).long()
    with kernels.use_backend("triton"):
        for call in (
            lambda: mtp_cross_entropy(hidden @ weight.T, targets),
            lambda: linear_mtp_cross_entropy(hidden, weight, targets),
            lambda: linear_mtp_cross_entropy(hidden, weight.requires_grad_(), targets),
        ):
            with pytest.raises(ValueError, match=r'backend "triton" cannot run megactx::\w+: float64'):
                call()


def test_more_targets_than_the_kernels_take_are_refused_where_triton_is_demanded() -> None:
    if _library.why_not("mtp_rows", "triton", "cpu"):
        pytest.skip("no interpreter")
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    targets, steps = torch.zeros(3, 65, dtype=torch.int64), (1.0,) * 65
    with kernels.use_backend("triton"):
        for call in (
            lambda: mtp_cross_entropy(hidden @ weight.T, targets, step_weights=steps),
            lambda: linear_mtp_cross_entropy(hidden, weight, targets, step_weights=steps),
            lambda: linear_mtp_cross_entropy(hidden, weight.requires_grad_(), targets, step_weights=steps),
        ):
            with pytest.raises(ValueError, match=r"megactx::\w+: it takes up to 64 targets a row and context, got 65"):
                call()
