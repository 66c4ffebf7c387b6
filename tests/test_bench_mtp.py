"""The benchmarks of the cross-entropies and of a training step: declared work, wrong targets found, honest tables."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megactx import kernels

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))  # scripts, which import one another by their own names
import figures  # noqa: E402
import measure  # noqa: E402
import mtp  # noqa: E402
import mtp_cases  # noqa: E402
import mtp_providers  # noqa: E402
import mtp_step  # noqa: E402
import providers  # noqa: E402
import timing  # noqa: E402

sys.path.remove(str(BENCH))

MTP = mtp_cases.MTPCase(40, (48, 7), 16, steps=3)
STEP = mtp_step.StepCase(2, "fp32", tokens=8, layers=1, width=16, heads=2, vocabulary=32)


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_work_of_a_cross_entropy_is_that_of_its_tensors_and_products(dtype: str) -> None:
    case = replace(MTP, dtype=dtype)
    given = case.inputs("cpu")
    small = size(given["tokens"], given["step_weights"]) + 4
    own = size(given["hidden"], given["weight"])
    assert replace(case, backward=False).bytes == own + small
    assert case.bytes == 2 * own + small
    assert case.flops == 3 * replace(case, backward=False).flops == 3 * 2 * 40 * (48 + 7) * 16

    over = replace(case, width=None)
    logits = size(over.inputs("cpu")["logits"])
    assert replace(over, backward=False).bytes == logits + small
    assert over.bytes == 2 * (logits + small) + logits  # read again, and the gradient


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"dtype": "bf16"},
        {"backward": False},
        {"vocab_sizes": (61,), "steps": 1},
        {"width": None},
        {"width": None, "dtype": "bf16", "vocab_sizes": (61,), "backward": False},
    ],
    ids=str,
)
def test_every_provider_of_a_cross_entropy_agrees_with_the_truth(change: dict[str, Any]) -> None:
    case = replace(MTP, **change)
    listed = mtp_providers.mtp("eager")
    facts, calls = measure.admit(case, listed, "cpu")
    native = (
        {"native, its chunks", "native, chunks"}
        if case.width and hasattr(torch.nn, "LinearCrossEntropyLoss")
        else set()
    )
    products = {"GEMMs"} if case.width else set()
    first = {"auto, K = 1"} if case.steps > 1 else set()
    assert {"auto", "seed", "compiled"} | native | products | first <= set(calls)
    assert set(facts["unavailable"]) == {p.name for p in listed} - set(calls)
    assert not any("wrong" in reason or "Error" in reason for reason in facts["unavailable"].values())
    assert facts["unavailable"]["CCE"] == "needs a CUDA device"
    assert facts["prepared_bytes"]["auto"] == 0


def test_the_targets_of_a_position_are_the_tokens_that_follow_and_are_in_memory_once() -> None:
    given = MTP.inputs("cpu")
    targets, tokens = MTP.targets(given), given["tokens"]
    assert targets.shape == (40, 2, 3)
    assert all(torch.equal(targets[..., k], tokens[k : k + 40]) for k in range(3))
    assert targets.untyped_storage().nbytes() == size(tokens)


def test_the_truth_of_a_cross_entropy_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    given = MTP.inputs("cpu")
    whole = MTP.truth(given)
    monkeypatch.setattr(mtp_cases, "BLOCK", 13 * 55)
    torch.testing.assert_close(MTP.truth(given), whole)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("width", [16, None])
@pytest.mark.parametrize("taken", [(0, 0, 0), (0, 1, 1), (0, 2, 1), (1, 1, 2)])
def test_a_provider_that_takes_one_target_for_another_is_refused(
    dtype: str, backward: bool, width: int | None, taken: tuple[int, ...]
) -> None:
    case = replace(MTP, rows=400, vocab_sizes=(97,), width=width, dtype=dtype, backward=backward)

    def mixed(case: Any, inputs: dict[str, Tensor], steps: tuple[int, ...] = taken) -> Any:
        operator: Any = kernels.linear_mtp_cross_entropy if case.width else kernels.mtp_cross_entropy
        targets, weights = case.targets(inputs)[..., list(steps)], inputs["step_weights"]
        return providers._run(
            case, lambda *x: (operator(*x, targets, step_weights=weights).loss,), [inputs[n] for n in case.leaves], []
        ), ()

    def right(case: Any, inputs: dict[str, Tensor]) -> Any:
        return mixed(case, inputs, (0, 1, 2))

    facts, calls = measure.admit(case, [providers.Provider("mixed", mixed), providers.Provider("right", right)], "cpu")
    same = taken == (0, 2, 1)  # of one weight: their order does not matter
    assert set(calls) == ({"mixed", "right"} if same else {"right"})
    assert same or facts["unavailable"]["mixed"].startswith("wrong: off by ")


def test_a_mean_rounded_to_bfloat16_is_no_error_of_who_returns_it_so() -> None:
    case = replace(MTP, dtype="bf16", backward=False)

    def rounded(case: Any, inputs: dict[str, Tensor]) -> Any:
        call, prepared = mtp_providers._megactx(case, inputs)
        return lambda: (call()[0] * (1 + 2**-9),), prepared

    listed = [providers.Provider(str(allowed), rounded, rounds_mean=allowed) for allowed in (True, False)]
    assert set(measure.admit(case, listed, "cpu")[1]) == {"True"}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_training_step_that_takes_one_target_for_another_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    case = replace(STEP, dtype=dtype, tokens=64)
    turns, _ = mtp_step.build(case, "cpu")  # the forms agree
    assert set(turns) == set(case.turns)
    real = mtp_step.F.cross_entropy
    first: list[Tensor] = []

    def one_target(logits: Tensor, targets: Tensor, **options: Any) -> Tensor:
        first.append(targets)
        return real(logits, first[0], **options)

    monkeypatch.setattr(mtp_step.F, "cross_entropy", one_target)
    with pytest.raises(SystemExit, match="of the two forms are not the same"):
        mtp_step.build(case, "cpu")


def test_a_form_of_a_training_step_has_run_before_its_memory_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    build, calls = mtp_step.build, dict.fromkeys(STEP.turns, 0)

    def counting(case: mtp_step.StepCase, device: str) -> Any:
        turns, held = build(case, device)

        def counted(name: str) -> Tensor:
            calls[name] += 1
            return turns[name]()

        return {name: partial(counted, name) for name in turns}, held

    monkeypatch.setattr(mtp_step, "build", counting)
    monkeypatch.setattr(mtp_step, "interleave", lambda turns, *args, **options: {name: [1.0] for name in turns})
    mtp_step.measure(STEP, "cpu", rounds=1)
    assert all(count == 2 for count in calls.values())  # once to set up libraries and buffers, once to be measured


def test_memory_is_that_of_a_process_of_its_own_where_the_case_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))  # the other process imports what it runs
    case = mtp_cases.MTPCase(1024, (16384,), 8, steps=2, backward=False, alone=True)
    call = mtp.call_of(case, "seed", 1)
    call()
    found = mtp.peak(case, "seed", call, "cpu")
    if found is None:
        pytest.skip("this system does not tell")
    here = measure.peak(case, "seed", call, "cpu")
    assert here is not None
    assert abs(found - here) < 2**20
    assert found > 0.95 * 2 * 4 * 1024 * 16384  # the logits and their log-softmax


def test_the_cross_entropies_and_a_training_step_are_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a machine" / "mtp.json"
    arguments = ["--rounds", "2", "--threads", "1", "--device", "cpu", "--case", "fp32", "--json", str(path)]
    monkeypatch.setattr(timing, "COPIED", 2**20)
    monkeypatch.setattr(sys, "argv", ["mtp", *arguments])
    listed = {"cpu": (replace(MTP, backward=False), MTP)}
    measure.main("mtp", "", listed, mtp_providers.mtp("eager"), mtp_providers.operator)
    data = json.loads(path.read_text())
    forward, both = data["results"]
    assert "auto, K = 1" in both["seconds"]
    forward["seconds"] = {
        "auto": [0.2],
        "auto, K = 1": [0.16],
        "seed": [0.5],
        "compiled": [0.4],
        "native": [0.9],
        "native, chunks": [0.3],
        "GEMMs": [0.15],
    }
    forward["peak_bytes"] = {"auto": 1_000_000, "seed": 7_000_000, "native": 9_000_000, "native, chunks": 2_000_000}
    path.write_text(json.dumps(data))
    monkeypatch.setitem(mtp_step.CASES, "cpu", (STEP,))
    step = path.with_name("mtp_step.json")
    arguments = ["--rounds", "2", "--threads", "1", "--device", "cpu", "--json", str(step)]
    monkeypatch.setattr(sys, "argv", ["mtp_step", *arguments])
    mtp_step.main()

    drawn = figures.figures(tmp_path)
    runs = providers.runs("mtp_cross_entropy", "cpu")
    assert (
        f"| cross-entropy ({runs}), ms | ours | seed | compiled | native | seed / ours | best rival / ours |" in drawn
    )
    name = "N40 V48+7 d16 K3 fp32 fwd"
    assert f"| {name} | 200 | 500 | 400 | 300 | 2.50x | 1.50x | 75 % | 1.250x |" in drawn
    assert f"| {name} | 1 | 7 | n/a | 2 |" in drawn
    assert "n/a, Liger: needs a CUDA device." in drawn
    assert f"{STEP.name}: K = 4, seed's form" in drawn
    assert "CCE: Apple's, its filter off, which drops" in drawn

    for row in data["results"]:
        del row["seconds"]["seed"]
    forward["seconds"] = {"auto": [0.2]}
    path.write_text(json.dumps(data))
    assert f"| {name} | 200 | n/a | n/a | n/a | n/a |  |  |" in figures.mtp(path)


def test_a_training_step_of_one_target_and_of_four_are_steps_of_one_model() -> None:
    result = mtp_step.measure(STEP, "cpu", rounds=2)
    parameters = 32 * 16 + 12 * 16 * 16
    assert 3 * 4 * parameters <= result["held_bytes"] < 3 * 4 * (parameters + 1000)  # weights and AdamW's two moments
    assert set(result["seconds"]) == set(result["peak_bytes"]) == set(result["ratios"]) == set(STEP.turns)
    assert result["ratios"]["K = 1"] == 1


def test_forms_of_a_training_step_that_disagree_are_not_timed() -> None:
    with pytest.raises(SystemExit, match=r"the losses 1.0 and 2.0 of the two forms are not the same"):
        mtp_step.check(STEP, "cpu", lambda: torch.tensor(1.0), lambda: torch.tensor(2.0))
