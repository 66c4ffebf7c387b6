"""Who computes the cross-entropies: ours on each backend, and what one would use without them.

Rivals: the seed's form, one `F.cross_entropy` a target over one set of logits, eager and compiled; PyTorch's own
`F.linear_cross_entropy`, Liger's and Apple's (CCE), each of which knows one target and is called once for each.  With
several contexts they are called on the part of the weight or of the logits that is a context's.  Yardsticks: the
matrix products alone, and ours with the first target alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from mtp_cases import ONE_TARGET, PRODUCTS, MTPCase
from providers import Call, Inputs, Provider, _on, _ours, _run, runs
from torch import Tensor

from megactx import kernels

LARGE = 2**24  # logits: from here on, what is slow by design is left out on the CPU
# Rows at a time, where `F.linear_cross_entropy` is given a number. That for the CPU was the fastest of those tried,
# where what it picks by itself is far too small; that for CUDA is a guess, with no measurement behind it.
CHUNK = {"cpu": 512, "cuda": 4096}
LIGER_CHUNKS = 16  # times the memory for logits that Liger's rule allows itself, which leaves few rows to a chunk
GIVEN = "mtp_cross_entropy"

Single = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets [N] -> loss


def mtp(compiler: str = "inductor") -> list[Provider]:
    """Providers of an `MTPCase`; `compiler` is the backend of `torch.compile`."""

    def compiled(case: MTPCase, inputs: Inputs) -> tuple[Call, tuple[Tensor, ...]]:
        return _seed(case, inputs, lambda f: torch.compile(f, dynamic=False, fullgraph=True, backend=compiler))

    return [
        *_ours(GIVEN, _megactx, _no_reference),  # both losses run on the same passes over logits
        Provider("auto, K = 1", lambda case, inputs: _megactx(case, inputs, steps=1), _no_first, plain=ONE_TARGET),
        Provider("seed", _seed),
        Provider("compiled", compiled),
        Provider("native", _native, _no_native, "", True),  # all three return, and the last two sum, a mean in bfloat16
        Provider("native, its chunks", lambda case, inputs: _native(case, inputs, "auto"), _no_native_choice, "", True),
        Provider("native, chunks", lambda case, inputs: _native(case, inputs, "fixed"), _no_native_chunks, "", True),
        Provider("Liger", _liger, _no_liger),
        Provider("Liger, larger chunks", lambda case, inputs: _liger(case, inputs, LIGER_CHUNKS), _no_liger_chunks),
        Provider("CCE", _cce, _no_cce),
        Provider("GEMMs", _products, _no_products, plain=PRODUCTS),
    ]


def operator(device: str) -> str:
    """Which implementation `auto` takes for the passes over logits that both losses are made of."""
    return runs(GIVEN, device)


def _megactx(
    case: MTPCase, inputs: Inputs, backend: str = "auto", steps: int | None = None
) -> tuple[Call, tuple[Tensor, ...]]:
    targets, weights = case.targets(inputs)[..., :steps], inputs["step_weights"][:steps]
    function: Any = kernels.linear_mtp_cross_entropy if case.width else kernels.mtp_cross_entropy

    def call(*leaves: Tensor) -> tuple[Tensor]:
        return (function(*leaves, targets, vocab_sizes=case.vocab_sizes, step_weights=weights).loss,)

    return _run(case, _on(backend, call), [inputs[name] for name in case.leaves], []), ()


def _seed(
    case: MTPCase, inputs: Inputs, wrapped: Callable[[Any], Any] = lambda function: function
) -> tuple[Call, tuple[Tensor, ...]]:
    """The logits once and a cross-entropy for each target, in float32 as autocast has it: it casts at every call."""
    chosen = _targets(case, inputs)

    def loss(*leaves: Tensor) -> tuple[Tensor]:
        logits = F.linear(*leaves) if case.width else leaves[0]
        total = None
        for _, part, weight, targets in chosen:
            z = logits if len(case.vocab_sizes) == 1 else logits[:, part]
            term = weight * F.cross_entropy(z.float(), targets, ignore_index=-1)
            total = term if total is None else total + term
        assert total is not None
        return (total,)

    prepared = tuple(targets for *_, targets in chosen)
    return _run(case, wrapped(loss), [inputs[name] for name in case.leaves], []), prepared


def _native(case: MTPCase, inputs: Inputs, chunks: str = "") -> tuple[Call, tuple[Tensor, ...]]:
    """`F.linear_cross_entropy`: without options a product and a cross-entropy, else in chunks of rows."""
    options = None
    if chunks:
        size = CHUNK[inputs["hidden"].device.type] if chunks == "fixed" else None
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=size)

    def single(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, targets, ignore_index=-1, options=options)

    return _one_by_one(case, inputs, single)


def _liger(case: MTPCase, inputs: Inputs, chunks: int = 1) -> tuple[Call, tuple[Tensor, ...]]:
    from liger_kernel.transformers import functional  # type: ignore[import-not-found]

    if not case.width:
        ((_, _, _, targets),) = _targets(case, inputs)

        def given(logits: Tensor) -> tuple[Tensor]:  # writes over the logits, which costs the same whatever they hold
            return (functional.liger_cross_entropy(logits, targets, ignore_index=-1),)

        return _run(case, given, [inputs["logits"]], []), (targets,)
    options = {} if chunks == 1 else {"chunk_mem_const": chunks}

    def single(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return functional.liger_fused_linear_cross_entropy(hidden, weight, targets, ignore_index=-1, **options)

    return _one_by_one(case, inputs, single)


def _cce(case: MTPCase, inputs: Inputs) -> tuple[Call, tuple[Tensor, ...]]:
    """Without its filter, which drops the gradients of a model that is not trained yet: nearly all are small."""
    from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]

    def single(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets, ignore_index=-1, filter_eps=None, impl="cce")

    return _one_by_one(case, inputs, single)


def _products(case: MTPCase, inputs: Inputs) -> tuple[Call, tuple[Tensor, ...]]:
    """The products that no exact loss can do without; the logits stand in for their gradient."""
    hidden, weight = inputs["hidden"], inputs["weight"]

    def call() -> tuple[Tensor, ...]:
        with torch.no_grad():
            logits = hidden @ weight.T
            return (logits @ weight, logits.T @ hidden) if case.backward else (logits[:, ::64],)

    return call, ()


def _targets(case: MTPCase, inputs: Inputs) -> list[tuple[int, slice, float, Tensor]]:
    """For each context and step: its number, its part of the vocabulary, its weight in the loss, its targets [N]."""
    targets = case.targets(inputs)
    return [
        (index, part, share * weight, targets[:, index, k].contiguous())
        for index, part, share in case.segments()
        for k, weight in enumerate(case.step_weights)
    ]


def _one_by_one(case: MTPCase, inputs: Inputs, single: Single) -> tuple[Call, tuple[Tensor, ...]]:
    """A loss that knows one target and one vocabulary, called for each."""
    chosen = _targets(case, inputs)

    def call(hidden: Tensor, weight: Tensor) -> tuple[Tensor]:
        terms = [w * single(hidden, weight[part], targets).float() for _, part, w, targets in chosen]
        return (torch.stack(terms).sum(),)

    prepared = tuple(targets for *_, targets in chosen)
    return _run(case, call, [inputs["hidden"], inputs["weight"]], []), prepared


def _no_first(case: MTPCase, device: str) -> str:
    if case.steps == 1:
        return "the case itself"
    return "measured beside K = 4" if _large(case, device) and case.steps < 4 else ""


def _large(case: MTPCase, device: str) -> bool:
    return device == "cpu" and case.rows * sum(case.vocab_sizes) > LARGE


def _no_reference(case: MTPCase, device: str) -> str:
    return "it is the specification, not made for such sizes" if case.rows * sum(case.vocab_sizes) > LARGE else ""


def _no_linear(case: MTPCase, device: str) -> str:
    if not hasattr(F, "linear_cross_entropy"):
        return "needs torch 2.13"
    return "" if case.width else "over given logits it is the seed's form"


def _no_native(case: MTPCase, device: str) -> str:
    if case.dtype == "fp32" and case.steps == 1 and len(case.vocab_sizes) == 1:
        return "without options it is the seed's form of one target"
    if _large(case, device) and case.steps > 1:
        return "its products for each target, where the seed's form shares them"
    return _no_linear(case, device)


def _no_native_chunks(case: MTPCase, device: str) -> str:
    if _large(case, device) and case.steps > 1 and (case.dtype, case.steps) != ("fp32", 4):
        return "K times its time for one target, as the fp32 cases with K = 4 show"
    return _no_linear(case, device)


def _no_native_choice(case: MTPCase, device: str) -> str:
    if _large(case, device) and case.width:
        return "the chunks it chooses by itself take three times as long here"
    return _no_linear(case, device)


def _no_liger(case: MTPCase, device: str) -> str:
    if device != "cuda":
        return "needs a CUDA device"
    if not case.width and (case.steps > 1 or len(case.vocab_sizes) > 1):
        return "writes its gradient over the logits, which the next target needs"
    return "" if find_spec("liger_kernel") else "liger_kernel is not installed"


def _no_liger_chunks(case: MTPCase, device: str) -> str:
    return _no_liger(case, device) or ("" if case.width else "given logits are not taken in chunks")


def _no_cce(case: MTPCase, device: str) -> str:
    if device != "cuda":
        return "needs a CUDA device"
    if not case.width:
        return "it has no form for given logits"
    return "" if find_spec("cut_cross_entropy") else "cut_cross_entropy is not installed"


def _no_products(case: MTPCase, device: str) -> str:
    return "" if case.width else "there is no product"
