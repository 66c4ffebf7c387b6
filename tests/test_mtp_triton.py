"""The Triton row kernels of the losses against the float64 reference: in the interpreter, or on a GPU."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megactx import kernels
from megactx.kernels import _library, _tune

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
pytestmark = [
    pytest.mark.interp,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),  # numpy's; meant
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(INTERPRETED and not _library._INTERPRETING, reason="no GPU, and TRITON_INTERPRET is not set"),
]
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")

SETTINGS: list[dict[str, Any]] = [
    {},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.1},
    {"softcap": 5.0},
    {"softcap": 2.0, "label_smoothing": 0.2, "z_loss": 1e-2},
    {"label_smoothing": 1.0, "ignore_index": 1},
]
VOCABULARIES = [(1,), (2,), (37,), (256,), (700,), (3, 129, 1, 40), (5000,)]
Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def inputs(
    sizes: tuple[int, ...], rows: int = 4, steps: int = 3, dtype: torch.dtype = torch.float32, ignore: int = -1
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets with some ignored and some equal, weights."""
    generator = torch.Generator().manual_seed(sum(sizes) + steps)
    logits = 3 * torch.randn(rows, sum(sizes), generator=generator)
    targets = torch.stack([torch.randint(size, (rows, steps), generator=generator) for size in sizes], dim=1)
    targets[:, :, -1] = targets[:, :, 0]
    targets[1 % rows, :, 0] = ignore
    weights = torch.rand(targets.shape, generator=generator)
    return logits.to(DEVICE, dtype), targets.to(DEVICE), weights.to(DEVICE)


def triton_operators() -> dict[str, Any]:
    """The operators that the launchers are behind."""
    kernels.backends()  # registers them all
    namespace = torch.ops.megactx_interpreted if INTERPRETED else torch.ops.megactx
    return {name: getattr(namespace, name) for name in ("mtp_rows", "mtp_rows_", "mtp_rows_backward")}


def run(
    operators: dict[str, Any], logits: Tensor, targets: Tensor, weights: Tensor, sizes: tuple[int, ...], **settings: Any
) -> Results:
    """log_p, mean_log_p, lse; the gradient, and the gradient that was written over the logits."""
    s = {"ignore_index": -1, "softcap": None, "label_smoothing": 0.0, "z_loss": 0.0} | settings
    sizes_and_cap = (list(sizes), s["ignore_index"], s["softcap"])
    log_p, mean, lse = operators["mtp_rows"](logits, targets, *sizes_and_cap, s["label_smoothing"] > 0)
    rest = (weights, *sizes_and_cap, s["label_smoothing"], s["z_loss"])
    grad = operators["mtp_rows_backward"](logits, targets, log_p, lse, *rest)
    over = logits.clone()
    columns = operators["mtp_rows_"](over, targets, *rest)
    for again, once in zip(columns, (log_p, mean, lse), strict=True):
        torch.testing.assert_close(again, once, rtol=1e-6, atol=1e-6, equal_nan=True)  # a clone may lie otherwise
    return log_p, mean, lse, grad, over


def triton(*args: Any, **settings: Any) -> Results:
    return run(triton_operators(), *args, **settings)


def truth(logits: Tensor, targets: Tensor, weights: Tensor, sizes: tuple[int, ...], **settings: Any) -> Results:
    operators = {name: _library.OPERATORS[name].reference for name in triton_operators()}
    return run(operators, logits.double(), targets, weights.double(), sizes, **settings)


def assert_matches(got: Results, exact: Results, floor: float = 4e-6) -> None:
    for a, b in zip(got[:3], exact[:3], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=floor, equal_nan=True)
    rounding = torch.finfo(got[3].dtype).eps if got[3].dtype != torch.float32 else 1e-6
    for a in got[3:]:  # the interpreter's rounding to bfloat16 cuts off
        torch.testing.assert_close(a.double(), exact[3], rtol=rounding, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("sizes", VOCABULARIES, ids=str)
def test_values_and_gradients_are_those_of_the_reference(sizes: tuple[int, ...], settings: dict[str, Any]) -> None:
    data = inputs(sizes, ignore=settings.get("ignore_index", -1))
    assert_matches(triton(*data, sizes, **settings), truth(*data, sizes, **settings))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(77,), (1024,), (48, 16), (4500,)], ids=str)
def test_half_precision_is_rounded_once(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    data = inputs(sizes, dtype=dtype)
    for settings in ({}, {"softcap": 3.0, "label_smoothing": 0.1, "z_loss": 1e-2}):
        assert_matches(triton(*data, sizes, **settings), truth(*data, sizes, **settings))


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_any_number_of_steps(steps: int) -> None:
    data = inputs((50, 9), steps=steps)
    assert_matches(triton(*data, (50, 9)), truth(*data, (50, 9)))


@pytest.mark.parametrize("softcap", [None, 60.0])
@pytest.mark.parametrize("lead", [5.0, 12.0, 25.0])
def test_what_is_nearly_certain_keeps_its_digits(lead: float, softcap: float | None) -> None:
    """The loss and the gradient at the target are about exp(-lead); in lse - z and p - 1 nothing would be left."""
    logits, targets, weights = inputs((3000,), rows=3, steps=2)
    logits *= 0.1
    targets[:] = torch.tensor([2999, 0, 1500], device=DEVICE)[:, None, None]
    logits.scatter_(1, targets[:, 0, :1], lead + 8)
    got = triton(logits, targets, weights, (3000,), softcap=softcap)
    exact = truth(logits, targets, weights, (3000,), softcap=softcap)
    torch.testing.assert_close(got[0].double(), exact[0], rtol=2e-5 if softcap else 4e-6, atol=0)
    for grad in got[3:]:
        columns = [x.double().gather(1, targets[:, 0]) for x in (grad, exact[3])]
        torch.testing.assert_close(*columns, rtol=2e-5 if softcap else 4e-6, atol=0)


def test_saturated_logits_have_the_slope_of_the_cap() -> None:
    logits = torch.tensor([[-40.0, -9.0, -0.4, 0.0, 0.3, 8.0, 30.0, 35.0]], device=DEVICE)
    targets = torch.full((1, 1, 1), 2, device=DEVICE)
    weights = torch.ones(1, 1, 1, device=DEVICE)
    got, exact = (f(logits, targets, weights, (8,), softcap=4.0)[3].double() for f in (triton, truth))
    # 1 - (z / softcap)^2 is 8e-8 at the last one, in float64
    torch.testing.assert_close(got, exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("shift", [-3e4, 1e3, 3e4])
def test_a_shift_of_all_logits_changes_little(shift: float) -> None:
    logits, targets, weights = inputs((900,))
    logits = (logits * 8).round() / 8 + shift  # so that the sum is exact
    got, exact = triton(logits, targets, weights, (900,)), truth(logits, targets, weights, (900,))
    torch.testing.assert_close(got[0].double(), exact[0], rtol=2e-6, atol=2e-6)
    for grad in got[3:]:
        torch.testing.assert_close(grad.double(), exact[3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sizes", [(40,), (3, 70)], ids=str)
def test_a_row_without_targets_is_not_read(sizes: tuple[int, ...]) -> None:
    logits, targets, weights = inputs(sizes)
    targets[2] = -1
    logits[2] = math.nan
    log_p, mean, lse, grad, over = triton(logits, targets, weights, sizes, label_smoothing=0.1, z_loss=0.1)
    for x in (log_p, mean, lse, grad, over):
        assert (x[2] == 0).all()
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("bad", [-2, 40, 2**40, -(2**62)])
def test_a_target_outside_of_its_vocabulary_is_nan_in_its_row_and_context(bad: int) -> None:
    """The next context begins where the first ends: reading on would find a number."""
    data = inputs((40, 30))
    data[1][2, 0, 1] = bad
    got = triton(*data, (40, 30), z_loss=0.1)
    assert_matches(got, truth(*data, (40, 30), z_loss=0.1))
    assert torch.isnan(got[0]).sum() == 1
    assert torch.isnan(got[3][2, :40]).all()
    assert torch.isnan(got[3]).sum() == 40


LOWEST = torch.finfo(torch.float32).min
MASKED = {"columns": ([5, 8, 899],), "threads": (slice(0, 512), slice(640, 900)), "parts": (slice(256, 900),)}


@pytest.mark.parametrize("fill", [-1e9, -2e9, -1e10, -1e30, LOWEST, -math.inf])
@pytest.mark.parametrize("where", MASKED)
def test_a_masked_column_has_no_probability_whatever_the_fill(where: str, fill: float) -> None:
    """Over single columns, over all that some threads see, over whole tiles and parts."""
    sizes = (900,)
    logits, targets, weights = inputs(sizes)
    targets.clamp_(min=-1, max=599).masked_fill_(targets > 511, 520)
    for columns in MASKED[where]:
        logits[:, columns] = fill
    targets[:] = targets.where(torch.isin(targets, (logits[0] == fill).nonzero()).logical_not(), 600)
    logits[:, 600] = 1.5
    assert_matches(triton(logits, targets, weights, sizes), truth(logits, targets, weights, sizes))
    grad = triton(logits, targets, weights, sizes)[3]
    assert (grad[logits == fill] == 0).all()


@pytest.mark.parametrize("fill", [-2e9, -1e10, -1e30, LOWEST, -math.inf])
def test_a_masked_part_of_a_split_vocabulary(fill: float) -> None:
    sizes = (66_000,)
    logits, targets, weights = inputs(sizes, rows=2)
    targets %= 100
    logits[0, 32768:] = fill
    logits[1, 200:65_000] = fill
    assert_matches(triton(logits, targets, weights, sizes), truth(logits, targets, weights, sizes))


@pytest.mark.parametrize("top", [-1e10, 1e10, -1e30, 1e38, 3.4e38, -3.4e38, LOWEST])
def test_the_largest_logit_may_be_of_any_size(top: float) -> None:
    """The probabilities are those of the differences, which float32 logits this large have in steps of themselves."""
    for sizes in ((40,), (900,)):
        logits, targets, weights = inputs(sizes)
        at = torch.tensor(top, dtype=torch.float32)
        logits[:] = at.nextafter(torch.tensor(-math.inf)) if top > LOWEST else -math.inf
        logits[:, ::7] = at
        targets[0, 0, 1], targets[1, 0] = 7, 14
        for cap in (None, 20.0):
            settings = {"softcap": cap}
            got, exact = (f(logits, targets, weights, sizes, **settings) for f in (triton, truth))
            torch.testing.assert_close(got[0].double(), exact[0], rtol=1e-6, atol=4e-6)
            torch.testing.assert_close(got[2].double(), exact[2], rtol=1e-6, atol=4e-6)
            torch.testing.assert_close(got[4].double(), exact[3], rtol=1e-6, atol=1e-6)  # sums the row again
            assert torch.isfinite(got[3]).all()
            assert (got[3].abs() <= weights.sum(-1).cpu().to(DEVICE)).all()
            if cap is not None:
                torch.testing.assert_close(got[3].double(), exact[3], rtol=1e-6, atol=1e-6)


def test_nan_and_infinity_stay_in_their_row_and_context() -> None:
    logits, targets, weights = inputs((40, 300), rows=6)
    clean = triton(logits, targets, weights, (40, 300))
    logits[2, 39] = math.nan
    logits[3, 41] = math.inf
    logits[4, :40] = -math.inf
    got = triton(logits, targets, weights, (40, 300))
    hit = torch.zeros(6, 2, dtype=torch.bool, device=DEVICE)
    hit[2, 0] = hit[3, 1] = hit[4, 0] = True
    for column, before in zip((got[0], got[2]), (clean[0], clean[2]), strict=True):
        assert torch.isnan(column[hit]).all()
        assert torch.equal(column[~hit], before[~hit])
    for grad, before in zip(got[3:], clean[3:], strict=True):
        assert torch.isnan(grad[2, :40]).all()
        assert torch.isnan(grad[3, 40:]).all()
        assert torch.equal(grad[[0, 1, 5]], before[[0, 1, 5]])
        assert torch.equal(grad[[2, 4], 40:], before[[2, 4], 40:])


@pytest.mark.parametrize("size", [1, 40, 33_000])
def test_a_target_of_plus_infinity_and_a_row_without_a_symbol_are_nan(size: int) -> None:
    """As in torch.log_softmax, whose sum they are no part of: inf - inf, -inf - -inf."""
    logits, targets, weights = inputs((size,), steps=1)
    targets[:] = size - 1
    logits[0, -1], logits[1] = math.inf, -math.inf
    assert torch.log_softmax(logits, 1)[:2, -1].isnan().all()
    log_p, mean, lse, grad, over = triton(logits, targets, weights, (size,), label_smoothing=0.1)
    for x in (log_p, mean, lse, grad, over):
        assert x[:2].isnan().all()
        assert x[2:].isfinite().all()


def test_logits_of_minus_infinity_have_no_probability() -> None:
    logits, targets, weights = inputs((40,))
    targets.clamp_(max=19)
    logits[:, 20:] = -math.inf
    assert_matches(triton(logits, targets, weights, (40,)), truth(logits, targets, weights, (40,)))
    targets[0] = 30  # infinitely wrong: the loss is infinite, its gradient is not
    got = triton(logits, targets, weights, (40,))
    assert_matches(got, truth(logits, targets, weights, (40,)))
    assert (got[0][0] == -math.inf).all()
    assert torch.isfinite(got[3]).all()


def test_any_strides() -> None:
    sizes = (24, 40)
    logits, targets, weights = inputs(sizes)
    expected = triton(logits, targets, weights, sizes)
    wide = torch.full((4, 100), math.nan, device=DEVICE)
    wide[:, 3:67] = logits
    shared = weights[:1, :1].expand(4, 2, 3)
    steps_first = targets.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for z in (wide[:, 3:67], logits.T.contiguous().T, torch.cat((logits, logits), 1).view(8, 64)[::2]):
        for got, exact in zip(triton(z, steps_first, weights, sizes), expected, strict=True):
            torch.testing.assert_close(got, exact, rtol=1e-6, atol=1e-6)
        assert_matches(triton(z, targets, shared, sizes), truth(z, targets, shared, sizes))
    tokens = torch.randint(24, (9,), device=DEVICE)
    ahead = tokens.as_strided((4, 1, 3), (1, 0, 1), 1)  # K targets a row from one row of tokens
    assert_matches(
        triton(logits[:, :24], ahead, weights[:, :1], (24,)), truth(logits[:, :24], ahead, weights[:, :1], (24,))
    )
    everywhere = tokens[:1].expand(4, 1, 3)
    data = (logits[:1, :24].expand(4, 24), everywhere, weights[:, :1], (24,))
    assert torch.equal(triton(*data)[0][0], triton(*data)[0][3])


def test_contexts_may_lie_two_to_the_31_entries_apart(tmp_path: Path) -> None:
    """Targets and weights as slices of larger tensors; a file without contents costs no memory."""
    sizes, apart = (9, 5, 4), 2**30 + 7
    logits, targets, weights = inputs(sizes)
    expected = triton(logits, targets, weights, sizes)

    def spread(x: Tensor) -> Tensor:
        if DEVICE == "cpu":
            room = torch.from_file(str(tmp_path / str(x.dtype)), shared=True, size=2 * apart + 50, dtype=x.dtype)
        else:
            room = torch.empty(2 * apart + 50, dtype=x.dtype, device=DEVICE)
        return room.as_strided(x.shape, (3, apart, 1)).copy_(x)

    for got, exact in zip(triton(logits, spread(targets), spread(weights), sizes), expected, strict=True):
        assert torch.equal(got, exact)


def test_logits_that_overlap_themselves_are_not_written_over() -> None:
    _, targets, weights = inputs((30,))
    rest = (targets, weights, [30], -1, None, 0.0, 0.0)
    line = torch.randn(200, device=DEVICE)
    for strides in ((0, 1), (1, 0), (29, 1), (1, 1), (2, 1), (1, 3)):
        before = line.clone()
        with pytest.raises(ValueError, match=r"mtp_rows_: logits must not overlap itself.* \[\d+, \d\]"):
            triton_operators()["mtp_rows_"](line.as_strided((4, 30), strides), *rest)
        assert torch.equal(line, before)
    for strides in ((30, 1), (1, 4), (35, 1), (1, 5)):
        triton_operators()["mtp_rows_"](line.as_strided((4, 30), strides), *rest)
    one = (targets[:1], weights[:1], *rest[2:])
    triton_operators()["mtp_rows_"](line.as_strided((1, 30), (0, 1)), *one)


def test_what_lies_between_strided_rows_stays() -> None:
    logits, targets, weights = inputs((30,))
    wide = torch.full((4, 50), 7.0, device=DEVICE)
    wide[:, 10:40] = logits
    triton_operators()["mtp_rows_"](wide[:, 10:40], targets, weights, [30], -1, None, 0.0, 0.0)
    assert (wide[:, :10] == 7).all()
    assert (wide[:, 40:] == 7).all()
    column_major = logits.T.contiguous().T
    version = column_major._version
    triton_operators()["mtp_rows_"](column_major, targets, weights, [30], -1, None, 0.0, 0.0)
    torch.testing.assert_close(column_major, wide[:, 10:40], rtol=1e-6, atol=1e-6)
    assert column_major._version > version


@pytest.mark.parametrize("shape", [(0, (7,), 2), (0, (7, 40000), 2), (3, (7,), 0)], ids=str)
def test_nothing_gives_nothing(shape: tuple[int, tuple[int, ...], int]) -> None:
    rows, sizes, steps = shape
    logits = torch.ones(rows, sum(sizes), device=DEVICE)
    targets = torch.zeros(rows, len(sizes), steps, dtype=torch.int64, device=DEVICE)
    got = triton(logits, targets, targets.float(), sizes, label_smoothing=0.1)
    assert [x.shape for x in got[:3]] == [targets.shape, targets.shape[:2], targets.shape[:2]]
    assert all((x == 0).all() for x in got)


@pytest.mark.parametrize("sizes", [(37,), (5, 300), (5000,)], ids=str)
def test_a_row_does_not_depend_on_its_company(sizes: tuple[int, ...]) -> None:
    data = inputs(sizes, rows=7)
    settings = {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 1e-3}
    together = triton(*data, sizes, **settings)
    for rows in (slice(3, 4), slice(2, 7), [6, 0, 3]):
        for part, whole in zip(triton(*(x[rows] for x in data), sizes, **settings), together, strict=True):
            assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("settings", [{}, {"softcap": 20.0, "label_smoothing": 0.1, "z_loss": 1e-3}], ids=str)
@pytest.mark.parametrize("sizes", [(33000,), (9, 40001, 300)], ids=str)
def test_a_split_vocabulary_gives_the_same_bits(
    sizes: tuple[int, ...], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are split over programs; with a bound of none they are not."""
    from megactx.kernels.mtp import launch

    logits, targets, weights = inputs(sizes, rows=3)
    targets[0, -1, 1] = sizes[-1] - 1
    logits[0, -1] = 30.0  # nearly certain, in the last part
    data = (logits, targets, weights)
    split = triton(*data, sizes, **settings)
    monkeypatch.setattr(launch._Rows, "_is_split", lambda self: False)
    whole = triton(*data, sizes, **settings)
    assert all(torch.equal(a, b) for a, b in zip(split, whole, strict=True))
    assert_matches(split, truth(*data, sizes, **settings))


def test_few_rows_of_a_large_vocabulary_are_split() -> None:
    from megactx.kernels.mtp import launch

    for rows, size, split in ((3, 33000, True), (3, 20000, False), (200, 33000, False)):
        targets = torch.zeros(rows, 1, 1, dtype=torch.int64, device=DEVICE)
        logits = torch.zeros(1, size, device=DEVICE).expand(rows, size)
        assert launch._Rows(logits, targets, [size], -1, None)._is_split() == split


def test_shipped_configurations_fit_their_kernels() -> None:
    from megactx.kernels.mtp import launch
    from megactx.kernels.mtp.config import choose_rows

    for arch in _tune.ARCHITECTURES:
        for itemsize in (2, 4):
            for widest in (1, 256, 257, 1024, 4096, 300_000):
                for softcap in (False, True):
                    config = choose_rows(arch, itemsize, widest, softcap)
                    assert min(widest, 32768) <= config.part <= 2**31 - 1 - launch._MAX_WIDTH  # begin + part: an int32
                    for vec in (1, 16 // itemsize):
                        sizes = config.tile(vec)
                        tile = sizes["GROUP"] * sizes["THREADS"] * sizes["VEC"]
                        assert config.part % tile == 0, (arch, itemsize, widest, vec)


@pytest.mark.parametrize("name", ["mtp_rows", "mtp_rows_", "mtp_rows_backward"])
def test_the_operators_pass_opcheck(name: str) -> None:
    logits, targets, weights = inputs((9, 5), rows=3)
    log_p, _, lse, _, _ = triton(logits, targets, weights, (9, 5))
    shared = ([9, 5], -1, 3.0)
    arguments = {
        "mtp_rows": (logits, targets, *shared, True),
        "mtp_rows_": (logits, targets, weights, *shared, 0.1, 1e-3),
        "mtp_rows_backward": (logits, targets, log_p, lse, weights, *shared, 0.1, 1e-3),
    }
    torch.library.opcheck(triton_operators()[name].default, arguments[name])


def test_what_does_not_fit_goes_to_the_reference() -> None:
    from megactx.kernels.mtp import launch

    logits, targets, weights = inputs((9,))
    assert "it takes float16, bfloat16 and float32" in launch.unfit("mtp_rows", logits.double(), targets, [9], -1, None)
    many = targets[..., :1].expand(-1, -1, 65)
    assert "up to 64 targets" in launch.unfit("mtp_rows_", logits, many, weights, [9], -1, None, 0.0, 0.0)
    wide = torch.empty(1, 2**31 - 2**15, device="meta", dtype=torch.bfloat16)
    assert "up to 2,147,418,112 logits" in launch.unfit("mtp_rows", wide, targets, [wide.shape[1]], -1, None)
    assert not launch.unfit("mtp_rows", wide[:, : 2**31 - 2**16], targets, [2**31 - 2**16], -1, None)
    got = triton_operators()["mtp_rows"](logits.double(), targets, [9], -1, None, True)
    exact = _library.OPERATORS["mtp_rows"].reference(logits.double(), targets, [9], -1, None, True)
    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3, 9, 1)}, "logits must have two dimensions"),
        ({"sizes": [5, 5]}, r"vocab_sizes must be positive and add up to the width of logits = 9, got \[5, 5\]"),
        ({"sizes": [9, 0]}, "vocab_sizes must be positive"),
        ({"targets": torch.zeros(2, 1, 2, dtype=torch.int64)}, r"targets must have shape \[3, 1, K\]"),
        ({"targets": torch.zeros(3, 2, 2, dtype=torch.int64)}, r"targets must have shape \[3, 1, K\]"),
        ({"targets": torch.zeros(3, 1, 2, dtype=torch.int32)}, "targets must be int64"),
        ({"weights": torch.zeros(3, 1, 1)}, r"weights must be float32 \(3, 1, 2\)"),
        ({"weights": torch.zeros(3, 1, 2).double()}, "weights must be float32"),
        ({"softcap": 0.0}, "softcap must be None or positive, got 0.0"),
    ],
)
def test_a_call_past_the_public_function_reads_nothing_out_of_bounds(change: dict[str, Any], message: str) -> None:
    good = {"logits": torch.zeros(3, 9), "targets": torch.zeros(3, 1, 2, dtype=torch.int64),
            "weights": torch.zeros(3, 1, 2), "sizes": [9], "ignore": -1, "softcap": None}  # fmt: skip
    values = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in (good | change).values()]
    with pytest.raises(ValueError, match=f"mtp_rows: {message}"):
        triton_operators()["mtp_rows_"](*values, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("factor", [1.0, -2.5, math.nan])
def test_a_tensor_is_scaled_by_a_number_on_the_device(factor: float, dtype: torch.dtype) -> None:
    from megactx.kernels.mtp.scale import scale_

    x = torch.randn(3, 1700).to(DEVICE, dtype)
    for each in (x, x.T, x[:0]):
        scaled = scale_(each.clone(), torch.tensor(factor, device=DEVICE))
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(scaled, (each.double() * factor).to(dtype), rtol=rounding, atol=0, equal_nan=True)


@pytest.mark.gpu
@needs_gpu
def test_logits_past_two_to_the_31() -> None:
    rows, size = 43_000, 50_257
    logits = torch.randn(rows, size, device=DEVICE, dtype=torch.bfloat16)
    targets = torch.randint(size, (rows, 1, 4), device=DEVICE)
    weights = torch.rand(rows, 1, 4, device=DEVICE)
    operators = triton_operators()
    log_p, _, lse = operators["mtp_rows"](logits, targets, [size], -1, None, False)
    grad = operators["mtp_rows_backward"](logits, targets, log_p, lse, weights, [size], -1, None, 0.0, 0.0)
    for part in (slice(0, 4), slice(21_400, 21_404), slice(rows - 4, rows)):
        exact = truth(logits[part], targets[part], weights[part], (size,))
        torch.testing.assert_close(log_p[part].double(), exact[0], rtol=1e-6, atol=4e-6)
        torch.testing.assert_close(grad[part].double(), exact[3], rtol=2**-8, atol=1e-7)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(50_304,), (50_257,), (50_257, 2, 300), (300_000,)], ids=str)
def test_full_size_against_float64(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    """More rows than the GPU holds at once, then a few of them alone: the same bits."""
    data = inputs(sizes, rows=1024, steps=4, dtype=dtype)
    settings = {"softcap": 30.0, "label_smoothing": 0.1, "z_loss": 1e-4}
    for each in ({}, settings):
        got = triton(*data, sizes, **each)
        few = [x[500:516] for x in data]
        assert_matches(tuple(x[500:516] for x in got), truth(*few, sizes, **each), 1e-5)
        for part, whole in zip(triton(*few, sizes, **each), got, strict=True):
            assert torch.equal(part, whole[500:516])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("rows", [8, 600])
def test_a_cuda_graph_replays_it_and_nothing_waits_for_the_device(rows: int) -> None:
    sizes = (40_000, 64)
    data = inputs(sizes, rows=rows, dtype=torch.bfloat16)
    expected = triton(*data, sizes)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton(*data, sizes)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        operators = triton_operators()
        log_p, _, lse = operators["mtp_rows"](data[0], data[1], list(sizes), -1, None, False)
        grad = operators["mtp_rows_backward"](
            data[0], data[1], log_p, lse, data[2], list(sizes), -1, None, 0.0, 0.0
        )  # fmt: skip
        over = data[0].clone()
        operators["mtp_rows_"](over, data[1], data[2], list(sizes), -1, None, 0.0, 0.0)
    graph.replay()
    for got, exact in zip((log_p, lse, grad, over), (expected[0], *expected[2:]), strict=True):
        assert torch.equal(got, exact)


def test_the_losses_run_on_the_kernels() -> None:
    logits, targets, _ = inputs((40, 24))
    logits.requires_grad_()
    with kernels.use_backend("triton"):
        loss = kernels.mtp_cross_entropy(logits, targets, vocab_sizes=(40, 24), step_weights=(1.0, 0.5, 0.25)).loss
    exact = logits.detach().double().requires_grad_()
    with kernels.use_backend("reference"):
        expected = kernels.mtp_cross_entropy(
            exact, targets, vocab_sizes=(40, 24), step_weights=(1.0, 0.5, 0.25)
        ).loss  # fmt: skip
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    grads = [torch.autograd.grad(x, y)[0].double() for x, y in ((loss, logits), (expected, exact))]
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)
