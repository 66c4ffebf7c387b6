"""The operator table: every schema of the package, and which implementation of it runs.

All operators live in the dispatcher namespace `megactx`, and the schemas below are the only ones.  An operator
has up to three implementations behind its schema, and the dispatcher picks by device, so that eager mode,
autograd, `torch.compile` and C++ callers all go through one door:

    reference   plain PyTorch, any device, the specification       CompositeExplicitAutograd
    triton      kernels for CUDA tensors                           CUDA
    cpp         the compiled extension, `_C*.so` beside this file   CPU

A family registers its reference, shape function and derivative by `register`; Triton kernels are one further call,
`triton(name, module)`, which imports them at their first use; the extension holds only implementations and is loaded
after the schemas exist.

Under `TRITON_INTERPRET=1` the Triton kernels also run on CPU tensors, in Triton's interpreter: slowly, to test them.
They live in a second namespace then, so that `auto` on the CPU stays what it is.

An operator may also be composed of others in PyTorch (`register(..., parts=...)`), on every device by the same code.
It lives where all of its parts do: `why_not` and what is built on it ask them, and in the interpreter's namespace its
parts are the interpreted ones.

`use_backend("reference")` leaves the dispatcher out: the plain function is called, is differentiable as often as
one likes, forwards too, and takes float64.  Naming `triton` or `cpp` demands that one, and is an error where it
cannot run.
"""

from __future__ import annotations

import importlib.util
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._runtime import without_autocast

NAMESPACE = "megactx"
BACKENDS = ("auto", "reference", "triton", "cpp")

_YES = ("1", "true", "yes", "on", "y")  # as Triton reads its variables
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
    "float? softcap, float label_smoothing, float z_loss, Tensor? counts"
)
_NEEDS = "bool need_hidden, bool need_weight, bool need_bias"
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
    "mtp_cross_entropy": (
        f"(Tensor logits, Tensor targets, {_MTP}) -> (Tensor loss, Tensor per_step, Tensor lse, Tensor log_p)"
    ),
    "mtp_cross_entropy_backward": (
        f"(Tensor grad_loss, Tensor logits, Tensor targets, Tensor lse, Tensor log_p, {_MTP}) -> Tensor"
    ),
    "linear_mtp_cross_entropy": (
        f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_MTP}) "
        "-> (Tensor loss, Tensor per_step, Tensor lse, Tensor log_p)"
    ),
    "linear_mtp_cross_entropy_backward": (
        "(Tensor grad_loss, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor lse, Tensor log_p, "
        f"{_MTP}, {_NEEDS}) -> (Tensor, Tensor, Tensor)"
    ),
    "linear_mtp_cross_entropy_gradients": (
        f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_MTP}, {_NEEDS}) "
        "-> (Tensor loss, Tensor per_step, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
    ),
    # The three passes over logits that the losses above are composed of, and all that a kernel has to do for them.
    "mtp_rows": (
        "(Tensor logits, Tensor targets, int[] vocab_sizes, int ignore_index, float? softcap, bool mean) "
        "-> (Tensor log_p, Tensor mean_log_p, Tensor lse)"
    ),
    "mtp_rows_": (
        "(Tensor(a!) logits, Tensor targets, Tensor weights, int[] vocab_sizes, int ignore_index, float? softcap, "
        "float label_smoothing, float z_loss) -> (Tensor log_p, Tensor mean_log_p, Tensor lse)"
    ),
    "mtp_rows_backward": (
        "(Tensor logits, Tensor targets, Tensor log_p, Tensor lse, Tensor weights, int[] vocab_sizes, "
        "int ignore_index, float? softcap, float label_smoothing, float z_loss) -> Tensor"
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
        self.interpreted = False  # whether a derivative or the parts of an interpreted operator are being computed


# Before the namespace is taken: a module that fails to import is imported again at the next use.
_DEFAULT = _checked_backend(os.environ.get("MEGACTX_BACKEND") or "auto", "MEGACTX_BACKEND")
_choice = _Choice()

_library = torch.library.Library(NAMESPACE, "DEF")
_TRITON_MISSING = "" if importlib.util.find_spec("triton") else "triton is not installed"
_INTERPRETING = os.environ.get("TRITON_INTERPRET", "").lower() in _YES and not _TRITON_MISSING
_interpreter_lock = threading.RLock()  # the interpreter keeps the state of the running program in globals
_interpreter = torch.library.Library(f"{NAMESPACE}_interpreted", "DEF") if _INTERPRETING else None
for _name, _schema in SCHEMAS.items():
    for _each in (_library, _interpreter):
        if _each is not None:
            _each.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)


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


class Triton(Protocol):
    """A module of Triton launchers: functions with the names and arguments of the operators, and"""

    @staticmethod
    def unfit(name: str, *args: Any) -> str:
        """why its kernels do not take these arguments: the empty string where they do.

        Not for arguments that are wrong, which the public functions refuse, but for float64 and sizes past a limit.
        """


_LAUNCHERS: dict[str, Triton] = {}


@torch.compiler.assume_constant_result
def _import_launchers(module: str) -> None:
    """Have `module` in the table.  Dynamo, which follows no import, calls this while it traces."""
    if module not in _LAUNCHERS:
        launchers: Any = import_module(module, __package__)
        _LAUNCHERS[module] = launchers


@dataclass(eq=False)
class Operator:
    """One row of the table.  Calling it runs the backend in force."""

    name: str
    reference: Callable[..., Any]
    overload: Callable[..., Any]
    interpreted: Callable[..., Any] | None = None  # the Triton kernels on the CPU
    triton: str = ""  # the module of its Triton launchers
    fallback: Callable[..., Any] | None = None  # what runs where no kernel fits: the reference, unless told otherwise
    differentiable: bool = False
    parts: tuple[str, ...] = ()  # the operators it is composed of, where it has no kernels of its own
    unfit: Callable[..., str] | None = None  # why the Triton kernels of its parts do not take its arguments

    def __call__(self, *args: Any) -> Any:
        choice = _choice.name
        if choice == "reference":
            return self.reference(*args)
        if forward_ad._current_level >= 0:  # an operator has no forward derivative, and its tangents would be zero
            raise RuntimeError(
                f"{NAMESPACE}::{self.name} has no forward-mode derivative (jvp, jacfwd, dual_level): "
                'compute it under megactx.kernels.use_backend("reference")'
            )
        if self.differentiable and not torch.compiler.is_compiling() and _functional_gradient(args):
            raise RuntimeError(
                f"{NAMESPACE}::{self.name} has no derivative for torch.func (grad, vjp, jacrev): "
                'compute it under megactx.kernels.use_backend("reference")'
            )
        if choice != "auto":
            device = next(a.device.type for a in args if isinstance(a, torch.Tensor))
            reason = why_not(self.name, choice, device)
            if not reason and choice == "triton":
                reason = self.unfit(*args) if self.unfit else self.launchers().unfit(self.name, *args)
            if reason:
                raise ValueError(f'backend "{choice}" cannot run {NAMESPACE}::{self.name}: {reason}')
            if choice == "triton" and device == "cpu":
                assert self.interpreted is not None
                return self.interpreted(*args)
        return self.overload(*args)

    def derivative(self, *args: Any) -> Any:
        """The operator as the derivative or a part of another one: the dispatcher's choice, whatever is in force here.

        A backward pass runs in threads of its own, which know no `use_backend`; only what the interpreter computed
        goes on in the interpreter.
        """
        return (self.interpreted if _choice.interpreted and self.interpreted else self.overload)(*args)

    def launchers(self) -> Triton:
        _import_launchers(self.triton)
        return _LAUNCHERS[self.triton]

    def _launch(self, *args: Any) -> Any:
        """The Triton kernel, or the fallback for what it does not take."""
        launchers = self.launchers()
        if launchers.unfit(self.name, *args):
            return (self.fallback or self.reference)(*args)
        launch = getattr(launchers, self.name)
        if not _INTERPRETING:
            return launch(*args)
        with _interpreter_lock:
            return launch(*args)


OPERATORS: dict[str, Operator] = {}


def register(
    name: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
    fallback: Callable[..., Any] | None = None,
    parts: tuple[str, ...] = (),
    unfit: Callable[..., str] | None = None,
) -> Operator:
    """Give the operator `name` its reference, its shape function and its derivative.

    `fallback` is what runs where no kernel does, by default the reference.  An operator whose name ends in `_backward`
    gets a derivative that refuses, since gradients of gradients are what the reference is for.  With `parts`, the
    fallback is composed of the operators of these names, and `unfit` tells what their Triton kernels do not take.
    """
    reference = without_autocast(reference)
    fallback = without_autocast(fallback) if fallback else None
    _library.impl(name, fallback or reference, "CompositeExplicitAutograd")
    if _interpreter is not None and fallback and parts:
        _interpreter.impl(name, _interpreted(fallback), "CompositeExplicitAutograd")
    differentiable = setup_context is not None  # other derivatives there are only refuse
    if name.endswith("_backward"):
        backward = _no_second_derivative(f"{NAMESPACE}::{name}")
    found: list[Any] = []
    for library, derivative in ((_library, backward), (_interpreter, backward and _interpreted(backward))):
        if library is None:
            found.append(None)
            continue
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
        overload = getattr(getattr(torch.ops, library.ns), name).default
        if derivative is not None:
            differentiated = _differentiated(overload, derivative, setup_context)
            library.impl(name, differentiated, "Autograd", with_keyset=True)
        if name.endswith("_"):
            for key, function in (("Autograd", _refusing_gradients), ("ADInplaceOrView", _counting_writes)):
                library.impl(name, function(overload), key, with_keyset=True)
        found.append(overload)
    overload, interpreted = found
    operator = Operator(
        name,
        reference,
        overload,
        interpreted,
        fallback=fallback,
        differentiable=differentiable,
        parts=parts,
        unfit=unfit,
    )
    OPERATORS[name] = operator
    return operator


def triton(name: str, module: str) -> None:
    """Say that `module` (relative to this package) holds Triton launchers, and one for the operator `name`."""
    operator = OPERATORS[name]
    operator.triton = module
    if _TRITON_MISSING:
        return
    launch = without_autocast(operator._launch)
    _library.impl(name, launch, _DISPATCH_KEY["triton"])
    if _interpreter is not None:
        _interpreter.impl(name, launch, "CPU")


def _interpreted(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, a derivative or a composed operator, with the interpreted operators for those it calls."""

    def run(*args: Any) -> Any:
        before, _choice.interpreted = _choice.interpreted, True
        try:
            return function(*args)
        finally:
            _choice.interpreted = before

    return run


def _differentiated(
    overload: Any, backward: Callable[..., Any], setup_context: Callable[..., Any] | None
) -> Callable[..., Any]:
    """What `torch.library.register_autograd` makes of a derivative, at a fraction of its price.

    That one looks up the schema's default values argument by argument in every call, which for the many arguments here
    takes as long as a small kernel.  These schemas have no default values, keyword-only arguments or lists of tensors.
    """

    def below(keyset: Any, args: tuple[Any, ...]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def forward(ctx: Any, *inputs: Any) -> Any:
        *args, keyset = inputs
        result = below(keyset, tuple(args))
        if setup_context is not None:
            setup_context(ctx=ctx, inputs=tuple(args), output=result)
        return result

    def differentiate(ctx: Any, *grads: Tensor | None) -> Any:
        needs = ctx.needs_input_grad
        ctx.needs_input_grad = needs[:-1]  # the key set is none of the operator's inputs
        try:
            found = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needs
        return (*found, None) if isinstance(found, tuple) else (found, None)

    members = {"forward": staticmethod(forward), "backward": staticmethod(differentiate)}
    function: Any = type(overload._opname, (torch.autograd.Function,), members)

    def run(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        return below(keyset, args)

    return run


def _written(overload: Any) -> list[int]:
    return [i for i, argument in enumerate(overload._schema.arguments) if argument.is_write]


def _refusing_gradients(overload: Any) -> Callable[..., Any]:
    """Writing in place has no derivative: autograd would go on with that of the value that was there before."""
    written = _written(overload)
    counting = _counting_writes(overload)

    def run(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled():
            for i in written:
                if args[i].requires_grad:
                    raise RuntimeError(
                        f"{overload.name()} has no derivative, and its argument {overload._schema.arguments[i].name} "
                        "requires a gradient: call the public function of megactx.kernels"
                    )
        return counting(keyset, *args)  # from here on: one step into Python is enough

    return run


def _counting_writes(overload: Any) -> Callable[..., Any]:
    """A kernel writes memory unseen by autograd, which has to know that a tensor it saved is not what it was."""
    written = _written(overload)

    def run(keyset: Any, *args: Any) -> Any:
        torch.autograd.graph.increment_version([args[i] for i in written])
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    return run


def _functional_gradient(args: tuple[Any, ...]) -> bool:
    """Whether torch.func is taking a gradient by one of the arguments, at whatever depth of its transforms."""
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is None or not torch.is_grad_enabled():
        return False
    for x in args:
        while isinstance(x, torch.Tensor) and functorch.is_functorch_wrapped_tensor(x):
            if functorch.is_gradtrackingtensor(x) and x.requires_grad:
                return True
            x = functorch.get_unwrapped(x)
    return False


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
    if name in OPERATORS and OPERATORS[name].parts:
        return next(filter(None, (why_not(part, backend, device) for part in OPERATORS[name].parts)), "")
    if backend == "triton":
        if name not in OPERATORS or not OPERATORS[name].triton:
            return "no Triton kernel is registered for this operator"
        if _TRITON_MISSING or (_INTERPRETING and device != "cuda"):
            return _TRITON_MISSING
    elif not _has_kernel(name, _DISPATCH_KEY[backend]):
        return EXTENSION_ERROR or "the C++ extension holds no kernel for this operator"
    if device is not None and device != _DEVICE[backend]:
        hint = " (TRITON_INTERPRET=1 interprets it on the CPU)" if (backend, device) == ("triton", "cpu") else ""
        return f"it runs on {_DEVICE[backend]} tensors, got {device}{hint}"
    if backend == "triton" and not torch.cuda.is_available():
        return "no CUDA device"
    return ""


@torch.compiler.assume_constant_result
def _has_kernel(name: str, key: str) -> bool:
    """A question to the dispatcher, which Dynamo has to put where it would trace it."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key)


def backends() -> dict[str, dict[str, str]]:
    """For every operator and backend: `"live"`, or why the backend does not run that operator on this machine."""
    for family in _FAMILIES:
        import_module(f".{family}.op", __package__)
    return {name: {b: why_not(name, b) or "live" for b in BACKENDS if b != "auto"} for name in SCHEMAS}


def chosen() -> str:
    """The backend in force here, for a public function that has a better way than an operator under `auto`."""
    return _choice.name


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
