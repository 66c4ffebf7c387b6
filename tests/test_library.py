"""The operator table: every operator is registered properly, compiles to one graph, and the backend choice is kept."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad

from megactx import kernels
from megactx.kernels import _library, _runtime
from megactx.kernels.sampling import op as sampling

ROOT = Path(__file__).resolve().parent.parent
ROPE = (32, 10000.0, "uniform", 2, False, False, 1e-6, False)


def _arguments(name: str, length: int = 6, *, grad: bool = False) -> tuple[Any, ...]:
    """Valid arguments of the operator `name`, with a sequence or row count of `length`."""
    torch.manual_seed(length)

    def x(*shape: int) -> Tensor:
        return torch.randn(shape, requires_grad=grad)

    q, k, v = x(2, length, 4, 8), x(2, length, 2, 8), x(2, length, 2, 8)
    positions, lods = torch.arange(length) * 1000, torch.arange(length) % 3
    mask = torch.rand(2, length) > 0.3
    alibi = (positions, positions, kernels.alibi_slopes(4), x(4), True, mask, 0.3)
    targets = torch.randint(-1, 5, (length, 2, 3))
    counts = torch.tensor([[9.0, 8.5, 7.0], [9.0, 8.0, 0.5]])
    mtp = ([5, 7], torch.tensor([1.0, 0.5, 0.25]), torch.tensor([0.5, 0.5]), -1, "mean", 3.0, 0.1, 0.01, counts)
    logits, hidden, weight, bias = x(length, 12), x(length, 4), x(12, 4), x(12)
    if name == "gaussian_rope":
        return (q, k, positions, lods, *ROPE)
    if name == "gaussian_rope_":
        return (q.detach(), k.detach(), positions, lods, *ROPE)
    if name == "gaussian_rope_backward":
        return (torch.randn_like(q), torch.randn_like(k), q, k, positions, lods, *ROPE)
    if name == "alibi_attention":
        return (q, k, v, *alibi)
    if name == "alibi_attention_backward":
        out, lse = torch.ops.megactx.alibi_attention(q, k, v, *alibi)
        return (torch.randn_like(q), q, k, v, out, lse, *alibi)
    if name == "gist_attention":
        return (q, k, v, mask, True, 0.3)
    if name == "gist_attention_backward":
        return (torch.randn_like(q), q, k, v, mask, True, 0.3)
    if name == "sample_contexts":
        knobs = [torch.full((length, 2), value) for value in (0.9, 3, 0.8, 0.1)]
        return (logits.detach(), [5, 7], *knobs, torch.arange(length * 2).view(length, 2), torch.tensor(4))
    if name == "mtp_cross_entropy":
        return (logits, targets, *mtp)
    if name.startswith("mtp_rows"):
        return _row_arguments(name, logits.detach(), targets)
    columns = torch.rand(length, 2), -torch.rand(length, 2, 3)  # lse and log_p
    if name == "mtp_cross_entropy_backward":
        return (torch.tensor(1.5), logits, targets, *columns, *mtp)
    if name == "linear_mtp_cross_entropy":
        return (hidden, weight, bias, targets, *mtp)
    if name == "linear_mtp_cross_entropy_gradients":
        return (hidden, weight, bias, targets, *mtp, True, True, True)
    return (torch.tensor(1.5), hidden, weight, bias, targets, *columns, *mtp, True, True, True)


def _row_arguments(name: str, logits: Tensor, targets: Tensor) -> tuple[Any, ...]:
    if name == "mtp_rows":
        return (logits, targets, [5, 7], -1, 3.0, True)
    weights = torch.tensor([1.0, 0.5, 0.25]).expand(targets.shape)
    if name == "mtp_rows_":
        return (logits, targets, weights, [5, 7], -1, 3.0, 0.1, 0.01)
    log_p, _, lse = torch.ops.megactx.mtp_rows(logits, targets, [5, 7], -1, 3.0, True)
    return (logits, targets, log_p, lse, weights, [5, 7], -1, 3.0, 0.1, 0.01)


kernels.backends()  # registers every family
DIFFERENTIABLE = [name for name, operator in _library.OPERATORS.items() if operator.differentiable]
# What is run where a gradient is no matter, or where PyTorch does not tell that it is.
_PLAIN = {name: name.replace("_gradients", "(_gradients)?") for name in _library.SCHEMAS}
# What the public functions run, and not only their derivatives.
FORWARD = [name for name in _library.SCHEMAS if not name.endswith("_backward") and not name.startswith("mtp_rows")]


@pytest.mark.parametrize("name", _library.SCHEMAS)
def test_every_operator_passes_opcheck(name: str) -> None:
    overload = getattr(torch.ops.megactx, name).default
    torch.library.opcheck(overload, _arguments(name, grad=name in DIFFERENTIABLE))


@pytest.mark.parametrize("name", _library.SCHEMAS)
def test_no_rows_give_results_without_rows(name: str) -> None:
    overload = getattr(torch.ops.megactx, name).default
    torch.library.opcheck(overload, _arguments(name, 0), test_utils=("test_schema", "test_faketensor"))


def _public(name: str) -> Callable[..., Any]:
    """The public function of the operator `name`, taking what `_arguments` makes for it and its own other settings."""

    def rope(q: Tensor, k: Tensor, positions: Tensor, lods: Tensor, *_: Any) -> Any:
        return kernels.gaussian_rope(q, k, positions, lods, lod_pairs=2, qk_norm_eps=1e-6)

    def rope_(q: Tensor, k: Tensor, positions: Tensor, lods: Tensor, *_: Any) -> Any:
        return kernels.gaussian_rope_(q + 1, k + 1, positions, lods, sigma="power")

    def alibi(q: Tensor, k: Tensor, v: Tensor, pq: Tensor, pk: Tensor, slopes: Tensor, sinks: Tensor, *_: Any) -> Any:
        return kernels.alibi_attention(q, k, v, pq, pk, slopes, sinks=sinks)

    def gist(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *_: Any) -> Any:
        return kernels.gist_attention(q, k, v, mask)

    def sample(logits: Tensor, *_: Any) -> Any:
        seeds = torch.arange(logits.shape[0])
        return kernels.sample_contexts(logits, (5, 7), temperature=0.7, top_k=4, top_p=0.9, seeds=seeds, step=3)

    def mtp(logits: Tensor, targets: Tensor, *_: Any) -> Any:
        return kernels.mtp_cross_entropy(logits, targets, vocab_sizes=(5, 7), step_weights=(1.0, 0.5, 0.5))

    def linear(reduction: str) -> Callable[..., Any]:
        def run(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, *_: Any) -> Any:
            return kernels.linear_mtp_cross_entropy(
                hidden, weight, targets, bias=bias, vocab_sizes=(5, 7), step_weights=(1, 0.5, 0.5), reduction=reduction
            )

        return run

    return {
        "gaussian_rope": rope,
        "gaussian_rope_": rope_,
        "alibi_attention": alibi,
        "gist_attention": gist,
        "sample_contexts": sample,
        "mtp_cross_entropy": mtp,
        "linear_mtp_cross_entropy": linear("none"),
        "linear_mtp_cross_entropy_gradients": linear("mean"),
    }[name]


def _result_and_grads(
    function: Callable[..., Any], name: str, length: int, around: AbstractContextManager[Any] | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    inputs = _arguments(name, length, grad=name in DIFFERENTIABLE)
    with around or nullcontext():
        results = function(*inputs)
    results = [results] if isinstance(results, Tensor) else list(results)
    if name not in DIFFERENTIABLE:
        return results, []
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    loss = sum((r.square().sum() for r in results if r.requires_grad), torch.zeros(()))
    return results, [g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None]


@pytest.mark.parametrize("name", FORWARD)
def test_compiles_to_one_graph_over_changing_lengths(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    function = _public(name)
    compiles_of_the_first_call = 0  # with dynamic=True dynamo may start over once to settle the Python floats
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for length in (6, 9, 13, 31):
        # The operators, whatever the environment asks for: the plain functions may specialise on a length.
        expected, expected_grads = _result_and_grads(function, name, length, kernels.use_backend("auto"))
        got, grads = _result_and_grads(compiled, name, length, kernels.use_backend("auto"))
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
        torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)
        compiles_of_the_first_call = compiles_of_the_first_call or counter.frame_count
    assert counter.frame_count == compiles_of_the_first_call


@pytest.mark.parametrize("name", FORWARD)
def test_a_demanded_extension_compiles_too(name: str) -> None:
    if reason := _library.why_not(name, "cpp", "cpu"):
        pytest.skip(reason)
    torch._dynamo.reset()
    function = _public(name)
    with kernels.use_backend("cpp"):
        expected, expected_grads = _result_and_grads(function, name, 7)
        got, grads = _result_and_grads(torch.compile(function, backend="aot_eager", fullgraph=True), name, 7)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)


@pytest.mark.parametrize("name", _library.SCHEMAS)
def test_schemas_are_such_that_a_derivative_gets_every_argument(name: str) -> None:
    """The dispatcher leaves out defaults, and hands keyword-only arguments and lists of tensors over differently."""
    for argument in getattr(torch.ops.megactx, name).default._schema.arguments:
        assert not argument.has_default_value()
        assert not argument.kwarg_only
        assert "Tensor[]" not in str(argument.type)


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_the_reference_compiles_too(name: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    function = _public(name)
    with kernels.use_backend("reference"):
        expected, expected_grads = _result_and_grads(function, name, 7)
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        got, grads = _result_and_grads(compiled, name, 7)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", FORWARD)
def test_autocast_does_not_reach_into_an_operator(name: str, backend: str) -> None:
    """But the linear loss takes its hidden state in the dtype of autocast, as `nn.Linear` would."""

    def cast(hidden: Tensor, *rest: Any) -> Any:
        return _public(name)(hidden.bfloat16(), *rest)

    with kernels.use_backend(backend):
        plain = cast if name.startswith("linear_mtp") else _public(name)
        expected, expected_grads = _result_and_grads(plain, name, 7)
        got, grads = _result_and_grads(_public(name), name, 7, torch.autocast("cpu", torch.bfloat16))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    torch.testing.assert_close(grads, expected_grads, rtol=0, atol=0)


@pytest.mark.parametrize("name", FORWARD)
def test_inference_mode_gives_the_same_results(name: str) -> None:
    expected, _ = _result_and_grads(_public(name), name, 7)
    _runtime._CONSTANTS.clear()
    sampling._PREPARED.clear()
    with torch.inference_mode():
        got = _public(name)(*_arguments(name, 7))
    torch.testing.assert_close([got] if isinstance(got, Tensor) else list(got), expected, rtol=0, atol=0)
    again, _ = _result_and_grads(_public(name), name, 7)  # nothing made in inference mode was kept
    torch.testing.assert_close(again, expected, rtol=0, atol=0)


@pytest.mark.slow
def test_inductor_gives_the_eager_result() -> None:
    torch._dynamo.reset()
    for name in ("gaussian_rope", "alibi_attention", "mtp_cross_entropy"):
        function = _public(name)
        expected, expected_grads = _result_and_grads(function, name, 7)
        got, grads = _result_and_grads(torch.compile(function, fullgraph=True), name, 7)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(grads, expected_grads)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_second_derivative_is_refused_by_name(name: str) -> None:
    inputs = _arguments(name, grad=True)
    results = getattr(torch.ops.megactx, name)(*inputs)
    result = results if isinstance(results, Tensor) else results[0]
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    name = name.removesuffix("_gradients")  # which has the gradients by then, and refuses at the first derivative

    def twice() -> None:
        grads = torch.autograd.grad(result.square().sum(), leaves, create_graph=True)
        sum(g.square().sum() for g in grads).backward()

    with pytest.raises(RuntimeError, match=rf'megactx::{name}_backward has no derivative.*use_backend\("reference"\)'):
        twice()


@pytest.mark.parametrize("name", FORWARD)
def test_forward_derivatives_are_refused_by_name_and_the_reference_has_them(name: str) -> None:
    """Silence would be worse: the tangents of an operator without a forward derivative are zeros."""
    first, *rest = _arguments(name)
    function = _public(name)

    def tangent(x: Tensor) -> Tensor:
        result = torch.func.jvp(lambda y: function(y, *rest), (x,), (x.cos(),))[1]
        return result if isinstance(result, Tensor) else result[0]

    message = rf'megactx::{_PLAIN[name]} has no forward-mode derivative .*use_backend\("reference"\)'
    with kernels.use_backend("auto"):
        with pytest.raises(RuntimeError, match=message):
            tangent(first)
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
            function(forward_ad.make_dual(first, torch.ones_like(first)), *rest)
        function(first, *rest)  # and afterwards all is as before
    if name in DIFFERENTIABLE:
        with kernels.use_backend("reference"):
            assert tangent(first).abs().sum() > 0


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_functional_gradients_are_refused_by_name_and_the_reference_has_them(name: str) -> None:
    first, *rest = _arguments(name)
    public = _public(name)

    def function(x: Tensor) -> Tensor:
        result = public(x, *rest)
        return (result if isinstance(result, Tensor) else result[0]).sum()

    batch = torch.stack((first, first + 1))
    message = rf'megactx::{_PLAIN[name]} has no derivative for torch.func .*use_backend\("reference"\)'
    with kernels.use_backend("auto"):
        for gradient in (
            lambda: torch.func.grad(function)(first),
            lambda: torch.func.vjp(function, first),
            lambda: torch.func.jacrev(function)(first),
            lambda: torch.func.vmap(torch.func.grad(function))(batch),
            lambda: torch.func.grad(lambda x: torch.func.vmap(function)(x).sum())(batch),
        ):
            with pytest.raises(RuntimeError, match=message):
                gradient()
        # What the gradient is not of goes through, and so does a map over a batch, with PyTorch's own gradient.
        plain = function(first)
        assert torch.equal(torch.func.grad(lambda s: s * function(first))(torch.ones(())), plain)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # vmap says that it loops
            mapped = torch.func.vmap(function)(batch.requires_grad_())
        torch.testing.assert_close(mapped[0], plain)
        assert torch.autograd.grad(mapped.sum(), batch)[0].abs().sum() > 0
    with kernels.use_backend("reference"):
        assert torch.func.grad(function)(first).abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in _library.SCHEMAS if name.endswith("_")])
def test_writing_in_place_past_the_public_function_gives_no_wrong_gradient(name: str) -> None:
    arguments = _arguments(name)
    overload = getattr(torch.ops.megactx, name).default
    written = [i for i, argument in enumerate(overload._schema.arguments) if argument.is_write]
    for i in written:
        inputs = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        inputs[i] = inputs[i].requires_grad_() * 1
        before = [inputs[j].clone() for j in written]
        argument = overload._schema.arguments[i].name
        with pytest.raises(RuntimeError, match=f"megactx::{name} has no derivative, and its argument {argument} requi"):
            overload(*inputs)
        assert all(torch.equal(inputs[j], x) for j, x in zip(written, before, strict=True))
        for guard in (torch.no_grad, torch.inference_mode):
            version = inputs[i]._version
            with guard():
                overload(*inputs)
            assert inputs[i]._version > version


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("name", FORWARD)
def test_a_default_device_does_not_reach_into_an_operator(name: str, backend: str) -> None:
    inputs = _arguments(name)
    _runtime._CONSTANTS.clear()
    sampling._PREPARED.clear()
    with kernels.use_backend(backend), torch.device("meta"):
        if name == "sample_contexts":
            results = kernels.sample_contexts(inputs[0], (5, 7), top_k=3, seeds=1, step=3)
        else:
            results = _public(name)(*inputs)
    assert {x.device.type for x in ([results] if isinstance(results, Tensor) else results)} == {"cpu"}


def test_backends_reports_every_operator() -> None:
    report = kernels.backends()
    assert report.keys() == _library.SCHEMAS.keys()
    for row in report.values():
        assert set(row) == {"reference", "triton", "cpp"}
        assert row["reference"] == "live"
        assert all(row.values())


def test_a_backend_that_is_not_live_is_refused_by_name() -> None:
    inputs = _arguments("gist_attention")
    live = kernels.backends()["gist_attention"]
    for backend in ("triton", "cpp"):
        if live[backend] == "live":
            continue
        message = f'backend "{backend}" cannot run megactx::gist_attention: '
        with kernels.use_backend(backend), pytest.raises(ValueError, match=message):
            kernels.gist_attention(*inputs[:4])


COMPOSED = [name for name, operator in _library.OPERATORS.items() if operator.parts]


@pytest.mark.parametrize("name", COMPOSED)
def test_a_composed_operator_lives_where_all_of_its_parts_do(name: str, monkeypatch: Any) -> None:
    operator = _library.OPERATORS[name]
    for backend in ("triton", "cpp"):
        reasons = [_library.why_not(part, backend) for part in operator.parts]
        assert _library.why_not(name, backend) in (reasons if any(reasons) else [""])
    monkeypatch.setattr(_library.OPERATORS[operator.parts[-1]], "triton", "")
    assert _library.why_not(name, "triton") == "no Triton kernel is registered for this operator"
    if not name.endswith("_backward"):
        with kernels.use_backend("triton"), pytest.raises(ValueError, match="no Triton kernel is registered"):
            operator(*_arguments(name))


@pytest.mark.interp
@pytest.mark.parametrize("name", [name for name in COMPOSED if not name.endswith("_backward")])
def test_the_parts_of_an_interpreted_operator_are_interpreted(name: str, monkeypatch: Any) -> None:
    if reason := _library.why_not(name, "triton", "cpu"):
        pytest.skip(reason)
    ran: set[str] = set()
    launch = _library.Operator._launch

    def recorded(operator: Any, *args: Any) -> Any:
        ran.add(operator.name)
        return launch(operator, *args)

    for part in _library.OPERATORS[name].parts:
        operator = _library.OPERATORS[part]
        recording = functools.partial(recorded, operator)
        monkeypatch.setattr(operator, "interpreted", recording)
    expected, expected_grads = _result_and_grads(_public(name), name, 7, kernels.use_backend("auto"))
    assert not ran
    got, grads = _result_and_grads(_public(name), name, 7, kernels.use_backend("triton"))
    assert ran == set(_library.OPERATORS[name].parts)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(grads, expected_grads)


def test_a_pass_over_rows_has_no_derivative_and_says_what_has() -> None:
    logits, *rest = _arguments("mtp_rows")
    log_p, _, _ = torch.ops.megactx.mtp_rows(logits.requires_grad_(), *rest)
    with pytest.raises(RuntimeError, match=r"megactx::mtp_rows has no derivative: call megactx\.kernels\.mtp_cross_e"):
        log_p.sum().backward()


def test_use_backend_restores_the_choice_and_refuses_unknown_names() -> None:
    before = _library._choice.name
    with kernels.use_backend("reference"):
        with pytest.raises(ZeroDivisionError), kernels.use_backend("auto"):
            raise ZeroDivisionError
        assert _library._choice.name == "reference"
    assert _library._choice.name == before
    with (
        pytest.raises(ValueError, match="one of auto, reference, triton, cpp, got 'cuda'"),
        kernels.use_backend("cuda"),
    ):
        pass


def test_the_choice_of_one_thread_is_not_that_of_another() -> None:
    """Blocks that overlap in time, neither inside the other, and compiled code that follows its own thread."""
    q, k, positions = torch.randn(1, 3, 2, 4), torch.randn(1, 3, 2, 4), torch.arange(3)
    seen: list[str] = []

    def recorder(backend: str) -> Callable[..., Any]:
        return lambda *args: seen.append(backend) or (q, k)

    operator = _library.Operator("gaussian_rope", recorder("reference"), recorder("auto"))
    before = _library._choice.name
    inside, outside = threading.Event(), threading.Event()

    @torch.compile(backend="eager", fullgraph=True)
    def follower(x: Tensor) -> Tensor:
        return x + 1 if _library._choice.name == "auto" else x + 2

    compiled: list[float] = []

    def other() -> None:
        with kernels.use_backend("reference"):
            inside.set()
            outside.wait(10)
            operator(q, k, positions)
            compiled.append(float(follower(torch.zeros(()))))

    thread = threading.Thread(target=other)
    with kernels.use_backend("auto"):
        compiled.append(float(follower(torch.zeros(()))))
        thread.start()
        inside.wait(10)
        operator(q, k, positions)
    outside.set()
    thread.join()
    assert seen == ["auto", "reference"]
    assert compiled == [1.0, 2.0]
    assert _library._choice.name == before


def test_compiled_code_follows_the_choice() -> None:
    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    q, positions = torch.randn(1, 3, 2, 4), torch.arange(3)
    compiled = torch.compile(lambda x: kernels.gaussian_rope(x, x, positions)[0], backend=backend, fullgraph=True)

    def calls() -> None:
        compiled(q)
        for name in ("auto", "reference", "auto", "reference"):
            with kernels.use_backend(name):
                compiled(q)

    with ThreadPoolExecutor(1) as thread:  # a fresh thread, in which no backend has been chosen yet
        thread.submit(calls).result()
    assert sorted("megactx.gaussian_rope" in code for code in graphs) == [False, True]


def test_an_extension_that_does_not_load_warns_once_and_says_why(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(_library, "__file__", str(tmp_path / "_library.py"))
    assert "not built" in _library._load_extension()
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    with pytest.warns(UserWarning, match="the C.. extension failed to load: .*; the reference implementation is used"):
        reason = _library._load_extension()
    assert reason.startswith("the C++ extension failed to load: ")


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), "PATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, megactx.kernels as k; dir(k); assert 'torch' not in sys.modules; print(len(k.__all__))"
    done = _python(code)
    assert done.returncode == 0, done.stderr


def test_the_environment_chooses_the_backend() -> None:
    code = "from megactx.kernels import _library; print(_library._choice.name)"
    assert _python(code, MEGACTX_BACKEND="reference").stdout.strip() == "reference"
    refused = _python(code, MEGACTX_BACKEND="fast")
    assert "MEGACTX_BACKEND must be one of auto, reference, triton, cpp, got 'fast'" in refused.stderr
    twice = """
from megactx import kernels
for _ in range(2):
    try: kernels.gaussian_rope
    except ValueError as error: print(error)
"""
    first, second = _python(twice, MEGACTX_BACKEND="fast").stdout.splitlines()
    assert first == second


def test_the_interpreter_is_asked_for_as_triton_is() -> None:
    pytest.importorskip("triton")
    code = """
from triton import knobs
from megactx.kernels import _library
assert _library._INTERPRETING == knobs.runtime.interpret
print(_library._INTERPRETING)
"""
    for value, asked in (("1", True), ("true", True), ("Yes", True), ("ON", True), ("0", False), ("2", False)):
        done = _python(code, TRITON_INTERPRET=value)
        assert done.stdout.strip() == str(asked), done.stderr
    code = """
from megactx.kernels import _library, rotary
from megactx import kernels
kernels.backends()
print(_library.why_not("gaussian_rope", "triton", "cpu"))
"""
    assert "it runs on cuda tensors, got cpu (TRITON_INTERPRET=1 interprets it on the CPU)" in _python(code).stdout


def test_every_public_name_resolves_and_unknown_ones_do_not() -> None:
    for name in kernels.__all__:
        assert getattr(kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'gaussian_ropes'"):
        kernels.gaussian_ropes  # noqa: B018
