"""The operator table: every schema of the package, and which implementation of it runs.

All operators live in the dispatcher namespace `megactx`, and the schemas below are the only ones.  An operator
has up to three implementations behind its schema, and the dispatcher picks by device, so that eager mode,
autograd, `torch.compile` and C++ callers all go through one door:

    reference   plain PyTorch, any device, the specification       CompositeExplicitAutograd
    triton      one kernel for CUDA tensors                        CUDA
    cpp         the compiled extension, `_C*.so` beside this file   CPU

A family registers its reference, shape function and derivative by `register`; a Triton kernel is one further call,
`implement(name, "triton", function)`; the extension holds only implementations and is loaded after the schemas exist.

`use_backend("reference")` leaves the dispatcher out: the plain function is called, is differentiable as often as
one likes, forwards too, and takes float64.  Naming `triton` or `cpp` demands that one, and is an error where it
cannot run.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from ._runtime import without_autocast

NAMESPACE = "megactx"
BACKENDS = ("auto", "reference", "triton", "cpp")

_DISPATCH_KEY = {"triton": "CUDA", "cpp": "CPU"}
_DEVICE = {"triton": "cuda", "cpp": "cpu"}
_FAMILIES = ("rotary", "attention", "gist", "sampling", "mtp")

_ROPE = (
    "Tensor positions, Tensor? lods, int block_size, float base, str sigma, int lod_pairs, bool interleaved, "
    "bool conjugate, float? qk_norm_eps, bool norm_after"
)
_ALIBI = (
    "Tensor positions_q, Tensor positions_k, Tensor? slopes, Tensor? sinks, bool causal, Tensor? key_padding_mask, "
    "float scale"
)
_MTP = (
    "int[] vocab_sizes, Tensor step_weights, Tensor context_weights, int ignore_index, str reduction, "
    "float? softcap, float label_smoothing, float z_loss"
)
SCHEMAS = {
    "gaussian_rope": f"(Tensor q, Tensor k, {_ROPE}) -> (Tensor, Tensor)",
    "gaussian_rope_": f"(Tensor(a!) q, Tensor(b!) k, {_ROPE}) -> ()",
    "gaussian_rope_backward": f"(Tensor grad_q, Tensor grad_k, Tensor? q, Tensor? k, {_ROPE}) -> (Tensor, Tensor)",
    "alibi_attention": f"(Tensor q, Tensor k, Tensor v, {_ALIBI}) -> (Tensor out, Tensor lse)",
    "alibi_attention_backward": (
        f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_ALIBI}) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "gist_attention": "(Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, bool causal, float scale) -> Tensor",
    "gist_attention_backward": (
        "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? key_padding_mask, bool causal, float scale) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "sample_contexts": (
        "(Tensor logits, int[] vocab_sizes, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
        "Tensor seeds, Tensor step) -> Tensor"
    ),
    "mtp_cross_entropy": f"(Tensor logits, Tensor targets, {_MTP}) -> (Tensor loss, Tensor per_step, Tensor lse)",
    "mtp_cross_entropy_backward": f"(Tensor grad_loss, Tensor logits, Tensor targets, Tensor lse, {_MTP}) -> Tensor",
    "linear_mtp_cross_entropy": (
        f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_MTP}) "
        "-> (Tensor loss, Tensor per_step, Tensor lse)"
    ),
    "linear_mtp_cross_entropy_backward": (
        f"(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor lse, {_MTP}, "
        "bool need_hidden, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)"
    ),
}


def _checked_backend(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


class _Choice(threading.local):
    """The backend in force in this thread."""

    def __init__(self) -> None:  # runs once per thread
        self.name = _DEFAULT  # on the object: an attribute of the class would escape Dynamo's guards


# Before the namespace is taken: a module that fails to import is imported again at the next use.
_DEFAULT = _checked_backend(os.environ.get("MEGACTX_BACKEND") or "auto", "MEGACTX_BACKEND")
_choice = _Choice()

_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)


def _load_extension() -> str:
    """Load the compiled kernels; the empty string, or why there are none."""
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        return "the C++ extension is not built (no _C*.so in the kernels folder)"
    try:
        torch.ops.load_library(str(found[-1]))
    except OSError as error:
        reason = f"the C++ extension failed to load: {error}"
        warnings.warn(f"megactx: {reason}; the reference implementation is used", stacklevel=2)
        return reason
    return ""


EXTENSION_ERROR = _load_extension()


@dataclass(eq=False)
class Operator:
    """One row of the table.  Calling it runs the backend in force."""

    name: str
    reference: Callable[..., Any]
    overload: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        choice = _choice.name
        if choice == "reference":
            return self.reference(*args)
        if forward_ad._current_level >= 0:  # an operator has no forward derivative, and its tangents would be zero
            raise RuntimeError(
                f"{NAMESPACE}::{self.name} has no forward-mode derivative (jvp, jacfwd, dual_level): "
                'compute it under megactx.kernels.use_backend("reference")'
            )
        if choice != "auto":
            device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
            reason = why_not(self.name, choice, device)
            if reason:
                raise ValueError(f'backend "{choice}" cannot run {NAMESPACE}::{self.name}: {reason}')
        return self.overload(*args)


OPERATORS: dict[str, Operator] = {}


def register(
    name: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> Operator:
    """Give the operator `name` its reference, its shape function and its derivative.

    An operator whose name ends in `_backward` gets a derivative that refuses, since gradients of gradients are
    what the reference is for.
    """
    qualified = f"{NAMESPACE}::{name}"
    reference = without_autocast(reference)
    _library.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if name.endswith("_backward"):
        backward = _no_second_derivative(qualified)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_library)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    OPERATORS[name] = operator = Operator(name, reference, overload)
    return operator


def implement(name: str, backend: str, function: Callable[..., Any]) -> None:
    """Register `function` as the `backend` implementation of the operator `name`."""
    _library.impl(name, function, _DISPATCH_KEY[backend])


def _no_second_derivative(qualified: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: torch.Tensor) -> None:
        raise RuntimeError(
            f"{qualified} has no derivative, so a gradient of a gradient cannot pass through it: "
            'compute the forward under megactx.kernels.use_backend("reference")'
        )

    return backward


def why_not(name: str, backend: str, device: str | None = None) -> str:
    """Why `backend` does not run operator `name` (on `device`): the empty string where it does."""
    if backend == "reference":
        return ""
    qualified = f"{NAMESPACE}::{name}"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(qualified, _DISPATCH_KEY[backend]):
        if backend == "triton":
            return "no Triton kernel is registered for this operator"
        return EXTENSION_ERROR or "the C++ extension holds no kernel for this operator"
    if device is not None and device != _DEVICE[backend]:
        return f"it runs on {_DEVICE[backend]} tensors, got {device}"
    if backend == "triton" and not torch.cuda.is_available():
        return "no CUDA device"
    return ""


def backends() -> dict[str, dict[str, str]]:
    """For every operator and backend: `"live"`, or why the backend does not run that operator on this machine."""
    for family in _FAMILIES:
        import_module(f".{family}.op", __package__)
    return {name: {b: why_not(name, b) or "live" for b in BACKENDS if b != "auto"} for name in SCHEMAS}


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the operators called inside the block on one backend: `auto`, `reference`, `triton` or `cpp`.

    The choice is the thread's own, as that of `torch.no_grad` is.  The default outside any block, and in a new thread,
    is the environment variable `MEGACTX_BACKEND`, or `auto`, the fastest that is present.  A backward pass needs no
    block: the derivative of an operator is an operator, and that of the reference is PyTorch's.  The latter follows
    the autocast of the place where `backward()` is called, so call it outside of autocast, as PyTorch asks.
    """
    before, _choice.name = _choice.name, _checked_backend(name, "use_backend: name")
    try:
        yield
    finally:
        _choice.name = before
