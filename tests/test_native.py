"""The C++ operator draws what the reference draws: same ids over shapes, dtypes, strides, filters and odd values."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from megactx import kernels
from megactx.kernels import _library
from megactx.kernels.sampling import reference

ROOT = Path(__file__).resolve().parent.parent
BUILT = kernels.backends()["sample_contexts"]["cpp"] == "live"
built = pytest.mark.skipif(not BUILT, reason="the C++ extension was not built")
INF = float("inf")


class Case(NamedTuple):
    """The arguments of the operator, knobs as [B, C]."""

    logits: Tensor
    vocab_sizes: list[int]
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seeds: Tensor
    step: Tensor


def case(
    logits: Tensor,
    vocab_sizes: list[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 7,
    step: int = 3,
) -> Case:
    def knob(value: float, dtype: torch.dtype) -> Tensor:
        return torch.tensor(value, dtype=dtype).expand(logits.shape[0], len(vocab_sizes))

    floats = [knob(value, torch.float32) for value in (temperature, top_p, min_p)]
    k, seeds = knob(top_k, torch.int64), knob(seed, torch.int64)
    return Case(logits, vocab_sizes, floats[0], k, floats[1], floats[2], seeds, torch.tensor(step))


def cpp(arguments: Case) -> Tensor:
    return torch.ops.megactx.sample_contexts(*arguments)


def check(arguments: Case) -> Tensor:
    """The ids of C++, having compared them: they may differ from the reference's at near ties of the score alone."""
    drawn, wanted = cpp(arguments), reference.sample_contexts(*arguments)
    assert drawn.dtype == torch.int64
    assert drawn.shape == wanted.shape
    sizes = torch.tensor(arguments.vocab_sizes)
    assert ((drawn >= -1) & (drawn < sizes)).all()
    offsets = [0, *sizes.cumsum(0).tolist()]
    for b, c in (drawn != wanted).nonzero().tolist():
        noise = reference.gumbel_noise(int(sizes[c]), arguments.seeds[b, c].view(1, 1), c, arguments.step)[0]
        x = arguments.logits[b, offsets[c] : offsets[c + 1]].float() / arguments.temperature[b, c]
        pair = torch.stack((drawn[b, c], wanted[b, c]))
        assert (pair >= 0).all(), f"row {b}, context {c}: {pair.tolist()}"
        one, other = (x.double() + noise.double())[pair].tolist()
        assert abs(one - other) <= 1e-5 * max(1.0, abs(one)), f"row {b}, context {c}: {pair.tolist()}"
    return drawn


def strided(logits: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return logits.t().contiguous().t()
    if layout == "sliced":
        wide = torch.full((logits.shape[0], 2 * logits.shape[1] + 1), float("nan"), dtype=logits.dtype)
        wide[:, 1::2] = logits
        return wide[:, 1::2]
    return logits


def odd_values(logits: Tensor, values: str, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(logits.shape, generator=generator)
    if values == "ties":
        return logits.round()
    if values == "equal":
        return torch.zeros_like(logits)
    if values == "masked":
        return logits.masked_fill(chosen < 0.7, -INF)
    if values == "infinite":
        return logits.masked_fill(chosen < 0.02, INF)
    if values == "nan":
        return logits.masked_fill(chosen < 0.002, float("nan"))
    return logits


def test_the_extension_is_built_in_ci() -> None:
    if os.environ.get("CI") != "true":
        pytest.skip("only CI promises a compiler")
    assert BUILT, kernels.backends()["sample_contexts"]["cpp"]


@built
@pytest.mark.parametrize("values", ["normal", "ties", "equal", "masked", "infinite", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_same_ids_as_the_reference(dtype: torch.dtype, values: str) -> None:
    generator = torch.Generator().manual_seed(5)

    def pick(choices: list[float], shape: tuple[int, int], to: torch.dtype) -> Tensor:
        return torch.tensor(choices, dtype=to)[torch.randint(len(choices), shape, generator=generator)]

    for trial in range(40):
        sizes = [[33, 257, 1], [31, 64, 1000, 2], [5003]][trial % 3]
        shape = (1 + trial % 4, len(sizes))
        spread = [0.01, 1.0, 5.0, 30.0][trial // 3 % 4]
        logits = torch.randn(shape[0], sum(sizes), generator=generator) * spread
        logits = odd_values(logits, values, generator).to(dtype)
        check(
            Case(
                strided(logits, ["contiguous", "transposed", "sliced"][trial // 2 % 3]),
                sizes,
                pick([0.0, 0.3, 1.0, 1.7], shape, torch.float32),
                pick([0, 0, 1, 2, 5, 40, 900, 10**9], shape, torch.int64),
                pick([1.0, 1.0, 1e-6, 0.1, 0.5, 0.95, 0.999999], shape, torch.float32),
                pick([0.0, 0.0, 0.01, 0.3, 1.0], shape, torch.float32),
                torch.randint(-(2**63), 2**63 - 1, shape, generator=generator),
                torch.tensor(2**33 + trial),
            )
        )


@built
@pytest.mark.parametrize(
    ("vocab_sizes", "rows"),
    [([262144], 1), ([50257] * 3, 1), ([256] * 64, 1), ([1], 5), ([1, 2, 3], 4), ([1000], 0), ([1] * 64, 2)],
)
@pytest.mark.parametrize("filters", [{}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 3000, "top_p": 0.5}])
def test_sizes(vocab_sizes: list[int], rows: int, filters: dict[str, float]) -> None:
    drawn = check(case(torch.randn(rows, sum(vocab_sizes)) * 3, vocab_sizes, **filters))  # type: ignore[arg-type]
    assert drawn.shape == (rows, len(vocab_sizes))


@built
@pytest.mark.parametrize("size", [7, 10, 49, 100])
def test_top_p_that_falls_on_a_border_keeps_what_the_reference_keeps(size: int) -> None:
    rows = 200
    for kept in range(1, size):
        drawn = check(case(torch.zeros(rows, size), [size], top_p=kept / size, seed=kept))
        every_row_differs = Case(*case(torch.zeros(rows, size), [size], top_p=kept / size))._replace(
            seeds=torch.arange(rows)[:, None]
        )
        assert int(check(every_row_differs).max()) <= kept  # ties go to the lowest ids
        assert len(set(drawn.flatten().tolist())) == 1  # one seed, one draw


@built
def test_exactly_k_survive_a_tie() -> None:
    arguments = case(torch.zeros(2000, 300), [300], top_k=4)._replace(seeds=torch.arange(2000)[:, None])
    assert set(check(arguments).flatten().tolist()) == {0, 1, 2, 3}
    zeros = torch.tensor([[-0.0, 0.0, -0.0, 0.0]]).repeat(500, 1)  # the two zeros are equal
    arguments = case(zeros, [4], top_k=2)._replace(seeds=torch.arange(500)[:, None])
    assert set(check(arguments).flatten().tolist()) == {0, 1}


@built
def test_rows_without_a_draw() -> None:
    nan = torch.zeros(1, 100)
    nan[0, 77] = float("nan")
    assert check(case(nan, [100])).item() == -1
    assert check(case(-nan, [100], temperature=0.0)).item() == -1
    assert check(case(torch.full((1, 100), -INF), [100])).item() == -1
    mixed = torch.cat((nan, torch.zeros(1, 3)), dim=1)
    assert check(case(mixed, [100, 3]))[0, 1] >= 0  # the other context is drawn


@built
def test_infinite_logits_are_certain() -> None:
    logits = torch.randn(400, 64)
    logits[:, [9, 40]] = INF
    arguments = case(logits, [64])._replace(seeds=torch.arange(400)[:, None])
    assert set(check(arguments).flatten().tolist()) == {9, 40}
    assert check(case(logits[:1], [64], temperature=0.0)).item() == 9


@built
@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-20, 3e38])
def test_extreme_temperatures(temperature: float) -> None:
    check(case(torch.randn(50, 100) * 100, [100], temperature=temperature))
    check(case(torch.randn(50, 100) * 100, [100], temperature=temperature, top_k=5, top_p=0.5, min_p=0.1))


@built
def test_a_draw_does_not_depend_on_its_surroundings() -> None:
    sizes, rows = [5000, 300, 20000], 6
    logits = torch.randn(rows, sum(sizes)) * 2
    arguments = case(logits, sizes, top_p=0.97)._replace(seeds=torch.arange(rows * 3).view(rows, 3))
    whole = cpp(arguments)
    for row in range(rows):
        alone = [argument[row : row + 1] for argument in arguments[2:7]]
        assert torch.equal(cpp(Case(logits[row : row + 1], sizes, *alone, arguments.step)), whole[row : row + 1])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert torch.equal(cpp(arguments), whole)
    finally:
        torch.set_num_threads(threads)


@built
def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.megactx.sample_contexts.default, tuple(case(torch.randn(3, 40), [8, 32], top_k=5)))


@built
def test_frequencies_follow_the_softmax() -> None:
    rows, size = 40_000, 9
    logits = torch.linspace(-2.0, 2.0, size)
    arguments = case(logits.expand(rows, size), [size], temperature=0.8)._replace(seeds=torch.arange(rows)[:, None])
    counts = cpp(arguments).flatten().bincount(minlength=size).double()
    expected = torch.softmax(logits.double() / 0.8, 0) * rows
    assert float(((counts - expected) ** 2 / expected).sum()) < 26.1  # chi-square, 8 degrees of freedom, p = 0.001


@built
def test_arguments_of_the_wrong_shape_are_refused_and_not_read() -> None:
    good = case(torch.zeros(2, 10), [4, 6])
    for bad in (
        good._replace(vocab_sizes=[4, 7]),
        good._replace(vocab_sizes=[10, 0]),
        good._replace(temperature=torch.ones(2, 3)),
        good._replace(top_k=torch.zeros(2, 2, dtype=torch.int32)),
        good._replace(seeds=torch.zeros(2, dtype=torch.int64)),
        good._replace(step=torch.zeros(2, dtype=torch.int64)),
        good._replace(logits=torch.zeros(2, 10, dtype=torch.int64)),
        good._replace(logits=torch.zeros(10)),
    ):
        with pytest.raises(RuntimeError, match="sample_contexts"):
            cpp(bad)


@built
def test_a_vocabulary_too_large_for_its_ids_is_refused() -> None:
    good = case(torch.zeros(1, 4), [4])
    with pytest.raises(RuntimeError, match=r"vocab_sizes must be positive and below 2\^31, got 2147483648"):
        cpp(good._replace(vocab_sizes=[2**31]))


CPP_TYPES = {
    "Tensor": "Tensor",
    "torch::headeronly::IntHeaderOnlyArrayRef": "List[int]",
    "int64_t": "int",
    "double": "float",
    "bool": "bool",
    "std::string": "str",
}


def schema_type(cpp: str) -> str:
    """How a schema spells the C++ type of a parameter."""
    cpp = re.sub(r"^const (.*)&$", r"\1", cpp)
    optional = re.fullmatch(r"std::optional<(.*)>", cpp)
    return f"Optional[{CPP_TYPES[optional[1]]}]" if optional else CPP_TYPES[cpp]


def test_cpp_signatures_are_the_schemas() -> None:
    """The stable ABI does not compare the two, and a wrong order would be read as garbage."""
    source = "\n".join(path.read_text() for path in sorted((ROOT / "csrc").glob("*.cpp")))
    names = re.findall(r'm\.impl\("(\w+)"', source)
    assert "sample_contexts" in names
    for name in names:
        schema = torch._C.parse_schema(f"megactx::{name}{_library.SCHEMAS[name]}")
        found = re.search(rf"^(Tensor|void|std::tuple<([\w, ]+)>) {name}\(([^)]*)\)", source, re.MULTILINE)
        assert found, f"no function {name} in csrc"
        returned = found[2].split(", ") if found[2] else [found[1]] * (found[1] != "void")
        assert [CPP_TYPES[each] for each in returned] == [str(r.type) for r in schema.returns], name
        parameters = [re.fullmatch(r"(.*?)\s*(\w+)", " ".join(p.split())) for p in found[3].split(",")]
        written = [(m[2], schema_type(m[1])) for m in parameters if m]
        assert written == [(a.name, str(a.type)) for a in schema.arguments], name


DRAW_MANY = """
generator = torch.Generator().manual_seed(0)
logits = torch.randn(40, 8257, generator=generator) * 2
e = lambda value, dtype: torch.tensor(value, dtype=dtype).expand(40, 2)
for p, k in ((1.0, 0), (0.9, 0), (0.99, 300)):
    print(*torch.ops.megactx.sample_contexts(
        logits, [8000, 257], e(0.9, torch.float32), e(k, torch.int64), e(p, torch.float32), e(0.0, torch.float32),
        e(5, torch.int64), torch.tensor(9)).flatten().tolist())
"""
TURN_MANY = """
from hashlib import sha256
generator = torch.Generator().manual_seed(0)
positions = torch.randint(-10**12, 10**12, (2, 9), generator=generator)
levels = torch.randint(0, 4, (2, 9), generator=generator)
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for dim in (10, 80):
        q, k = (torch.randn(2, 9, 3, dim, generator=generator).to(dtype) for _ in range(2))
        for interleaved in (False, True):
            for eps, after in ((None, False), (1e-5, False), (1e-5, True)):
                rest = (positions, levels, 3, 10000.0, "uniform", 2, interleaved, False, eps, after)
                out = *torch.ops.megactx.gaussian_rope(q, k, *rest), *torch.ops.megactx.gaussian_rope_backward(
                    k, q, q, k, *rest)
                print(sha256(torch.cat(out).view(torch.uint8).numpy().tobytes()).hexdigest())
"""
DESCEND_MANY = """
for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
    for sizes in ([2500], [3, 1, 700]):
        for softcap, smoothing, z_loss in ((None, 0.0, 0.0), (5.0, 0.1, 0.01)):
            logits = (torch.randn(4, sum(sizes), generator=generator) * 3).to(dtype)
            targets = torch.stack([torch.randint(-1, size, (4, 3), generator=generator) for size in sizes], 1)
            weights = torch.rand(targets.shape, generator=generator)
            columns = torch.ops.megactx.mtp_rows_(logits, targets, weights, sizes, -1, softcap, smoothing, z_loss)
            bits = b"".join(x.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for x in (*columns, logits))
            print(sha256(bits).hexdigest())
"""


@built
@pytest.mark.slow
def test_baseline_code_computes_the_same_bits(tmp_path: Path) -> None:
    """Compiled without the AVX clones: what an old machine draws, turns and differentiates."""
    if shutil.which("c++") is None:
        pytest.skip("no compiler")
    environment = {**os.environ, "CXXFLAGS": "-DMEGACTX_BASELINE", "MEGACTX_BUILD_CPP": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path / "temp"],
        cwd=ROOT,
        env=environment,
        check=True,
        capture_output=True,
    )
    [extension] = (tmp_path / "megactx" / "kernels").glob("_C*.so")
    load = f"""
import torch
library = torch.library.Library("megactx", "DEF")
for name, schema in {_library.SCHEMAS!r}.items():
    library.define(name + schema)
torch.ops.load_library({str(extension)!r})
"""
    baseline, here = (
        subprocess.run(
            [sys.executable, "-c", start + DRAW_MANY + TURN_MANY + DESCEND_MANY],
            cwd=ROOT,
            env=environment,
            check=True,
            capture_output=True,
        ).stdout
        for start in (load, "import torch\nfrom megactx import kernels\nkernels.backends()")
    )
    assert len(here.split()) == 240 + 48 + 16
    assert baseline == here
