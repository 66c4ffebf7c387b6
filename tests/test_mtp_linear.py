"""The linear form of the cross-entropy: the dense form of its logits, which it never holds, and no product too many."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megactx import kernels
from megactx.kernels import linear_mtp_cross_entropy, mtp_cross_entropy
from megactx.kernels.mtp import config, linear, op, reference
from megactx.kernels.mtp import rows as passes

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
        monkeypatch.setattr(config, "chunk_rows", lambda *_, size=rows: size)
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


class Made(TorchDispatchMode):
    """What is called inside of an operator: the sizes of the tensors made, and the rows of the products."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.products.append(tuple(args[-2].shape + args[-1].shape[1:]))
        if "out" not in (kwargs or {}):
            self.sizes += [
                x.numel()
                for x in tree_leaves(result)
                if isinstance(x, Tensor) and not function.is_view and not function._schema.is_mutable
            ]
        return result


ROWS, WIDTH, VOCAB, CHUNK = 403, 4, 50, 10


def swept(targets: Tensor, needs: tuple[bool, bool, bool], monkeypatch: Any, bias: bool = False) -> Made:
    """One sweep with gradients over inputs of the sizes above."""
    monkeypatch.setattr(config, "chunk_rows", lambda *_: CHUNK)
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH)
    options = ([VOCAB], torch.ones(1), torch.ones(1), -1, "mean", 5.0, 0.1, 0.1, None)
    with torch.no_grad(), Made() as made:
        linear.linear_mtp_cross_entropy_gradients(
            hidden, weight, torch.zeros(VOCAB) if bias else None, targets, *options, *needs
        )
    return made


def test_one_workspace_holds_the_logits_of_every_chunk(monkeypatch: Any) -> None:
    made = swept(torch.randint(0, VOCAB, (ROWS, 1, 1)), (True, True, True), monkeypatch, bias=True)
    assert max(made.sizes) <= max(ROWS * WIDTH, CHUNK * VOCAB)
    assert made.sizes.count(CHUNK * VOCAB) == 1
    assert made.sizes.count(VOCAB * WIDTH) == 1  # the gradient of the weight, summed in place
    assert len(made.products) == 3 * -(-ROWS // CHUNK)


def test_a_small_batch_is_not_spent_on_the_way_to_the_products(monkeypatch: Any) -> None:
    """A call into PyTorch costs microseconds: one chunk of valid targets is looked at once, and not cut or joined."""
    called: list[str] = []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(function.overloadpacket._qualified_op_name.split("::")[1])
            return function(*args, **(kwargs or {}))

    options = ([8], torch.ones(1), torch.ones(1), -1, "mean", None, 0.0, 0.0, None)
    hidden, weight, targets = torch.randn(6, 4), torch.randn(8, 4), torch.randint(0, 8, (6, 1, 1))
    with torch.no_grad():
        columns = passes.mtp_rows(hidden @ weight.T, targets, [8], -1, None, False)
        monkeypatch.setattr(linear, "part", lambda name: lambda *_: columns)
        with Calls():
            linear.linear_mtp_cross_entropy_gradients(hidden, weight, None, targets, *options, True, True, False)
    assert called.count("mm") == 3
    assert not {"cat", "slice", "ne", "any", "index_select", "_to_copy", "clone"} & set(called)
    assert called.count("aminmax") == called.count("mul") - 1 == 1
    assert len(called) <= 26


def test_products_nobody_needs_are_not_computed(monkeypatch: Any) -> None:
    targets = torch.randint(0, VOCAB, (ROWS, 1, 1))
    for needs, products in (((True, False, False), 2), ((False, True, False), 2), ((False, False, True), 1)):
        assert len(swept(targets, needs, monkeypatch, bias=True).products) == products * -(-ROWS // CHUNK)
    # Rows without a target take part in none.
    targets[5:] = -1
    made = swept(targets, (True, True, False), monkeypatch)
    assert made.products == [(5, WIDTH, VOCAB), (5, VOCAB, WIDTH), (VOCAB, 5, WIDTH)]
    assert swept(targets.fill_(-1), (True, True, False), monkeypatch).products == []


def test_without_a_gradient_there_is_one_product_a_chunk(monkeypatch: Any) -> None:
    ran: list[str] = []
    for name in ("_LINEAR", "_GRADIENTS"):
        run = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *args, name=name, run=run: ran.append(name) or run(*args))
    hidden, weight, targets = torch.randn(6, 4), torch.randn(8, 4, requires_grad=True), torch.randint(0, 8, (6, 1))
    with kernels.use_backend("auto"):
        trained = linear_mtp_cross_entropy(hidden, weight, targets)
        with torch.no_grad():
            evaluated = linear_mtp_cross_entropy(hidden, weight, targets)
        frozen = linear_mtp_cross_entropy(hidden, weight.detach(), targets)
        linear_mtp_cross_entropy(hidden.half(), weight, targets)
        linear_mtp_cross_entropy(hidden, weight, targets, reduction="none")
    assert ran == ["_GRADIENTS", "_LINEAR", "_LINEAR", "_LINEAR", "_LINEAR"]
    assert torch.equal(trained.loss, evaluated.loss)
    assert torch.equal(trained.loss, frozen.loss)


def test_the_chunk_size_changes_no_bit(monkeypatch: Any) -> None:
    """Of anything that is not a sum over the rows or the vocabulary in an order that the matrix product chooses.

    The hidden states and weights are small integers, so that the logits are the same in any order; what the rows come
    down to is then the same in any company, and is reduced at once.  The products with the gradient round.
    """
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randint(-3, 4, shape, generator=generator).float() for shape in ((50, 12), (14, 12)))
    targets = some_targets(50)
    targets[7:20] = -1
    seen: list[tuple[Tensor, ...]] = []
    for size in (1, 3, 16, 1000):
        monkeypatch.setattr(config, "chunk_rows", lambda *_, size=size: size)
        leaves = tuple(x.clone().requires_grad_() for x in (hidden, weight))
        settings = {"vocab_sizes": SIZES, "step_weights": STEPS, "z_loss": 0.1, "label_smoothing": 0.1}
        with kernels.use_backend("auto"):
            result = linear_mtp_cross_entropy(*leaves, targets, **settings)
            result.loss.backward()
            each = linear_mtp_cross_entropy(hidden, weight, targets, reduction="none", **settings)
        seen.append((result.loss.detach(), result.per_step, each.loss, *(x.grad for x in leaves)))
    for other in seen[1:]:
        torch.testing.assert_close(other[:3], seen[0][:3], rtol=0, atol=0)
        torch.testing.assert_close(other[3:], seen[0][3:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("rows", "vocab", "itemsize", "device"),
    [(2048, 50304, 4, "cpu"), (2048, 50304, 2, "cpu"), (16384, 50304, 2, "cuda"), (3, 2, 8, "cpu"), (0, 7, 4, "cuda")],
)
def test_chunks_are_even_and_within_their_budget(rows: int, vocab: int, itemsize: int, device: str) -> None:
    size = config.chunk_rows(rows, vocab, 768, itemsize, device)
    assert size >= 1
    last = rows - size * ((rows - 1) // size) if rows else 0
    if rows > size:
        assert last > size // 2
    if device == "cpu":
        assert size * vocab * 4 <= 80 * 2**20
        # The figure: with the gradients of weight and hidden, a quarter of a GiB above the weights.
        assert (size + 768) * vocab * 4 + rows * 768 * 4 <= 2**28
    elif rows:
        assert 1024 <= size <= 4096


def test_frozen_inputs_are_not_differentiated_and_dtypes_may_differ() -> None:
    """Products are taken in the dtype of `hidden`; each gradient comes in the dtype of its input."""
    torch.manual_seed(0)
    targets = torch.randint(0, 8, (6, 1))
    hidden, weight, bias = torch.randn(6, 4), torch.randn(8, 4), torch.randn(8)
    exact = F.cross_entropy(F.linear(hidden, weight, bias), targets[:, 0])
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for dtype, other in itertools.product(dtypes, dtypes):
        for frozen in ("hidden", "weight", "bias"):
            leaves = {
                "hidden": hidden.to(dtype, copy=True),
                "weight": weight.to(other, copy=True),
                "bias": bias.clone(),
            }
            for name, leaf in leaves.items():
                leaf.requires_grad_(name != frozen)
            loss = linear_mtp_cross_entropy(leaves["hidden"], leaves["weight"], targets, bias=leaves["bias"]).loss
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(loss.double(), exact.double(), rtol=0.02, atol=0)
            loss.backward()
            for name, leaf in leaves.items():
                assert (leaf.grad is None) == (name == frozen)
                assert leaf.grad is None or leaf.grad.dtype == leaf.dtype


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_autocast_takes_hidden_in_its_dtype_and_leaves_the_weight_its_own(backend: str) -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, 40, (64, 1))
    hidden, weight = torch.randn(64, 16, requires_grad=True), torch.randn(40, 16, requires_grad=True)
    truth = F.cross_entropy(F.linear(hidden.double(), weight.double()), targets[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        theirs = F.cross_entropy(F.linear(hidden, weight), targets[:, 0])
        with kernels.use_backend(backend):
            loss = linear_mtp_cross_entropy(hidden, weight, targets).loss
    assert loss.dtype == torch.float32
    assert abs(loss - truth) <= abs(theirs - truth) + 2e-3 * truth
    wanted = torch.autograd.grad(truth, (hidden, weight))
    other = torch.autograd.grad(theirs, (hidden, weight))
    grads = torch.autograd.grad(loss, (hidden, weight))
    for grad, their, right in zip(grads, other, wanted, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - right).abs().max() <= 1.2 * (their - right).abs().max() + 1e-5
    assert (grads[1] != grads[1].bfloat16()).any()  # a sum in float32 that was never rounded to bfloat16


def test_upstream_gradients_scale_and_each_gradient_is_handed_over_once() -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, 8, (6, 1))
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    with kernels.use_backend("reference"):
        plain = torch.autograd.grad(linear_mtp_cross_entropy(hidden, weight, targets).loss, (hidden, weight))
    with kernels.use_backend("auto"):
        for factor in (1.0, -3.0, 0.0):
            loss = linear_mtp_cross_entropy(hidden, weight, targets).loss
            grads = torch.autograd.grad(factor * loss, (hidden, weight), retain_graph=True)
            torch.testing.assert_close(grads, tuple(factor * grad for grad in plain))
            with pytest.raises(
                RuntimeError, match=r"megactx::linear_mtp_cross_entropy: its gradients were computed wi"
            ):
                torch.autograd.grad(loss, weight)
        # What it names instead can be repeated.
        total = linear_mtp_cross_entropy(hidden, weight, targets, reduction="none").loss.sum() / 6
        for _ in range(2):
            torch.testing.assert_close(torch.autograd.grad(total, (hidden, weight), retain_graph=True), plain)
        # A batch of upstream gradients is a backward pass of its own kind.
        loss = linear_mtp_cross_entropy(hidden, weight, targets).loss
        (batch,) = torch.autograd.grad(loss, weight, torch.tensor([1.0, 2.0]), is_grads_batched=True)
        torch.testing.assert_close(batch, torch.stack((plain[1], 2 * plain[1])))


def test_the_gradient_of_the_weight_becomes_its_grad_without_a_copy() -> None:
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    with kernels.use_backend("auto"):
        loss = linear_mtp_cross_entropy(hidden, weight, torch.randint(0, 8, (6, 1))).loss
    there = {grad.data_ptr() for grad in loss.grad_fn.grads[:2]}  # type: ignore[union-attr]
    (2 * loss).backward()
    assert {x.grad.data_ptr() for x in (hidden, weight) if x.grad is not None} == there


def test_tied_weights_get_both_gradients() -> None:
    torch.manual_seed(0)
    tokens, targets = torch.randint(0, 8, (6,)), torch.randint(0, 8, (6, 2))
    weight = torch.randn(8, 4, requires_grad=True)
    steps = (1.0, 0.1)
    fused = linear_mtp_cross_entropy(F.embedding(tokens, weight), weight, targets, step_weights=steps).loss
    dense = mtp_cross_entropy(F.linear(F.embedding(tokens, weight), weight), targets, step_weights=steps).loss
    torch.testing.assert_close(fused, dense)
    torch.testing.assert_close(*(torch.autograd.grad(loss, weight)[0] for loss in (fused, dense)))


def test_the_shares_of_a_batch_add_up_with_the_counts_of_the_whole() -> None:
    torch.manual_seed(0)
    targets = some_targets(12)
    hidden, weight = torch.randn(12, 6, requires_grad=True), torch.randn(14, 6, requires_grad=True)
    common = {"vocab_sizes": SIZES, "step_weights": STEPS}
    whole = linear_mtp_cross_entropy(hidden, weight, targets, **common)
    wanted = torch.autograd.grad(whole.loss, (hidden, weight))
    counts = (targets != -1).sum(0)
    parts = [slice(0, 5), slice(5, 12)]
    shares = [linear_mtp_cross_entropy(hidden[p], weight, targets[p], counts=counts, **common) for p in parts]
    torch.testing.assert_close(sum(share.per_step for share in shares), whole.per_step)
    loss = sum(share.loss for share in shares)
    torch.testing.assert_close(loss, whole.loss)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), wanted)


def test_gradients_of_float16_meet_the_loss_scale_before_they_are_rounded() -> None:
    """A mean over many rows: each entry of the gradient is far below the smallest number of float16."""
    torch.manual_seed(0)
    rows = 4096
    hidden, weight = torch.randn(rows, 4).half().requires_grad_(), (0.001 * torch.randn(64, 4)).half()
    loss = linear_mtp_cross_entropy(hidden, weight, torch.randint(0, 64, (rows, 1))).loss
    (grad,) = torch.autograd.grad(65536 * loss, hidden)
    assert (grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_float16_head_meet_the_loss_scale_too(dtype: torch.dtype) -> None:
    """Whatever the hidden state is of: a gradient in float16 is rounded with the scale in it."""
    torch.manual_seed(0)
    rows = 4096
    hidden, targets = (0.1 * torch.randn(rows, 4)).to(dtype), torch.randint(0, 4, (rows, 1))
    rare = torch.where(torch.arange(64) < 4, 0.0, -12.0)
    leaves = (0.01 * torch.randn(64, 4)).half().requires_grad_(), rare.half().requires_grad_()
    exact = tuple(x.detach().double().requires_grad_() for x in leaves)
    truth = torch.autograd.grad(F.cross_entropy(F.linear(hidden.double(), *exact), targets[:, 0]), exact)
    for trained in ((True, True), (True, False), (False, True)):
        for leaf, needed in zip(leaves, trained, strict=True):
            leaf.requires_grad_(needed)
        loss = linear_mtp_cross_entropy(hidden, leaves[0], targets, bias=leaves[1]).loss * 2**20
        needs = [leaf for leaf in leaves if leaf.requires_grad]
        wanted = [right for right, needed in zip(truth, trained, strict=True) if needed]
        for grad, right in zip(torch.autograd.grad(loss, needs), wanted, strict=True):
            # The symbols that are no target have the small ones.
            error = (grad[4:].double() / 2**20 - right[4:]).norm() / right[4:].norm()
            assert error < (2e-3 if dtype == torch.float32 else 0.2)


def test_autocast_to_float16_rounds_nothing_on_the_cpu() -> None:
    """Where the products are taken in float32."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    targets = torch.randint(0, 8, (6, 1))
    plain = linear_mtp_cross_entropy(hidden, weight, targets).loss
    with torch.autocast("cpu", torch.float16):
        cast = linear_mtp_cross_entropy(hidden, weight, targets).loss
    assert torch.equal(cast, plain)
    grads = [torch.autograd.grad(loss, (hidden, weight)) for loss in (cast, plain)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_strided_expanded_and_transposed_inputs() -> None:
    torch.manual_seed(0)
    targets = some_targets(12)
    wide, tall = torch.randn(24, 12), torch.randn(6, 28)
    common = {"vocab_sizes": SIZES, "step_weights": STEPS}
    for hidden, weight in ((wide[::2, ::2], tall[:, ::2].T), (wide[:1, :6].expand(12, 6), tall.T[:14])):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        dense = tuple(x.clone(memory_format=torch.contiguous_format).detach().requires_grad_() for x in leaves)
        strided = linear_mtp_cross_entropy(*leaves, targets.flip(-1).transpose(1, 2).contiguous().mT, **common)
        plain = linear_mtp_cross_entropy(*dense, targets.flip(-1), **common)
        torch.testing.assert_close(strided, plain)
        torch.testing.assert_close(torch.autograd.grad(strided.loss, leaves), torch.autograd.grad(plain.loss, dense))


def test_the_weight_gradient_is_summed_in_float32(monkeypatch: Any) -> None:
    """Many chunks of bfloat16: summed in bfloat16 the small ones would be lost."""
    monkeypatch.setattr(config, "chunk_rows", lambda *_: 4)
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


def test_a_target_outside_its_vocabulary_is_named() -> None:
    hidden, weight = torch.zeros(4, 3), torch.zeros(6, 3, requires_grad=True)
    targets = torch.zeros(4, 2, dtype=torch.int64)
    targets[2, 1] = 6
    message = r"targets must be in \[0, 6\) or ignore_index \(-1\), got 6 at row 2, context 0, step 1"
    for context in (torch.enable_grad, torch.no_grad):
        with context(), pytest.raises(ValueError, match=message):
            linear_mtp_cross_entropy(hidden, weight, targets, step_weights=(1.0, 1.0))


def test_shapes_are_found_without_a_device_and_under_a_mode_that_fakes_tensors() -> None:
    tensors = [torch.empty(shape, device="meta", requires_grad=True) for shape in ((4, 8), (5, 8))]
    targets = torch.empty(4, 2, dtype=torch.int64, device="meta")
    found = linear_mtp_cross_entropy(*tensors, targets, step_weights=(1.0, 0.5))
    assert found.loss.shape == ()
    assert found.per_step.shape == (1, 2)
    linear_mtp_cross_entropy(torch.randn(4, 8), torch.randn(5, 8), torch.zeros(4, 1, dtype=torch.int64))
    with FakeTensorMode():  # where the constants kept by the call before are no use
        fake = linear_mtp_cross_entropy(torch.empty(4, 8), torch.empty(5, 8), torch.zeros(4, 1, dtype=torch.int64))
    assert fake.loss.shape == ()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_schedule_may_write_the_next_weights_before_the_backward_pass(reduction: str) -> None:
    weights = torch.tensor([1.0, 0.5])
    targets = torch.randint(5, (4, 2))

    def gradient(between: float) -> Tensor:
        hidden = torch.ones(4, 8, requires_grad=True)
        loss = linear_mtp_cross_entropy(
            hidden, torch.arange(40.0).view(5, 8) / 40, targets, step_weights=weights, reduction=reduction
        ).loss
        weights.mul_(between)
        return torch.autograd.grad(loss.sum(), hidden)[0]

    torch.testing.assert_close(gradient(2.0), 0.5 * gradient(1.0))
