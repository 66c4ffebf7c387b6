"""The benchmarks measure what they say: declared work, providers that agree before they are timed, honest tables."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

BENCH = Path(__file__).resolve().parent.parent / "bench"
sys.path.insert(0, str(BENCH))  # scripts, which import one another by their own names
import cases  # noqa: E402
import figures  # noqa: E402
import measure  # noqa: E402
import mtp_cases  # noqa: E402
import providers  # noqa: E402
import timing  # noqa: E402

sys.path.remove(str(BENCH))

ROTARY = cases.RotaryCase(2, 5, heads=4, kv_heads=2, head_dim=8, dtype="fp32")
ATTENTION = cases.AttentionCase(2, 40, 40, heads=4, kv_heads=2, head_dim=16, dtype="fp32")
FAMILIES = (cases.ROTARY, cases.ATTENTION, mtp_cases.MTP)
ALL = [case for found in FAMILIES for listed in found.values() for case in listed]


def size(*tensors: Tensor) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("change", [{}, {"lods": True}, {"per_sample": True, "lods": True}, {"norm": True}], ids=str)
def test_the_bytes_of_a_rotation_are_those_of_its_tensors(change: dict[str, bool], dtype: str) -> None:
    case = replace(ROTARY, dtype=dtype, **change)
    given = case.inputs("cpu")
    integers = size(given["positions"], *([given["lods"]] if case.lods else []))
    forward = 2 * size(given["q"], given["k"]) + integers
    assert case.bytes == forward
    again = size(given["q"], given["k"]) if case.norm else 0
    assert replace(case, backward=True).bytes == 2 * forward + again


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("queries", [1, 7, 40])
def test_the_work_of_attention_is_that_of_its_tensors_and_pairs(queries: int, dtype: str) -> None:
    case = replace(ATTENTION, queries=queries, dtype=dtype, backward=True)
    given = case.inputs("cpu")
    indices = size(given["positions_q"], given["positions_k"], given["slopes"])
    out, logsumexp = size(given["q"]), 4 * case.batch * case.heads * queries
    forward = size(given["q"], given["k"], given["v"]) + indices + out
    assert replace(case, backward=False).bytes == forward
    gradients = size(given["q"], given["k"], given["v"])
    assert case.bytes == forward + logsumexp + (forward + logsumexp + size(given["grad_out"])) + gradients

    seen = torch.ones(queries, case.keys).tril(case.keys - queries).sum().item()
    products = case.batch * case.heads * seen * case.head_dim
    assert replace(case, backward=False).flops == 2 * 2 * products  # q k^T and p v
    assert case.flops == (2 + 5) * 2 * products  # and again the scores, dv, dp, dq, dk


def test_the_operations_of_a_rotation_are_counted_per_pair() -> None:
    pairs = ROTARY.batch * ROTARY.tokens * (ROTARY.heads + ROTARY.kv_heads) * ROTARY.head_dim // 2
    assert ROTARY.flops == pairs * (4 + 2)  # four products, a sum and a difference
    assert replace(ROTARY, backward=True).flops == 2 * ROTARY.flops


def test_cases_have_names_of_their_own_and_the_sizes_that_are_asked_for() -> None:
    for found in FAMILIES:
        for listed in found.values():
            assert len({case.name for case in listed}) == len(listed)
    names = [case.name for case in ALL]
    assert {"B4 T1024 H12 D64 bf16 fwd", "B4 T1024 H12 D64 fp32 fwd"} <= set(names)
    assert all(f"B4 T{length} H12 D64 bf16 fwd+bwd" in names for length in (1024, 2048, 4096, 8192))
    assert all(f"N2048 V50304 d768 K{steps} fp32 fwd+bwd" in names for steps in (1, 2, 4))
    assert all(f"N16384 V50304 d768 K{steps} bf16 fwd+bwd" in names for steps in (1, 4))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bf16"},
        {"per_sample": True, "lods": True, "backward": True},
        {"norm": True, "backward": True, "dtype": "bf16"},
    ],
    ids=str,
)
def test_every_provider_of_a_rotation_agrees_with_the_truth(change: dict[str, Any]) -> None:
    case = replace(ROTARY, **change)
    facts, calls = measure.admit(case, providers.rotary("eager"), "cpu")
    assert {"auto", "eager", "compiled"} <= set(calls)
    assert set(facts["unavailable"]) == {p.name for p in providers.rotary()} - set(calls)
    assert all(facts["unavailable"].values())
    assert not any("wrong" in reason or "Error" in reason for reason in facts["unavailable"].values())
    assert facts["unavailable"]["Liger"] == "needs a CUDA device"
    assert facts["prepared_bytes"]["auto"] == 0 < facts["prepared_bytes"]["eager"]


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bf16"},
        {"backward": True, "dtype": "bf16"},
        {"queries": 1},
        {"queries": 7, "backward": True},
    ],
    ids=str,
)
def test_every_provider_of_attention_agrees_with_the_truth(change: dict[str, Any]) -> None:
    case = replace(ATTENTION, **change)
    facts, calls = measure.admit(case, providers.attention("eager"), "cpu")
    flex = {"FlexAttention"} if not case.backward else set()
    floor = {"SDPA, no bias"} if case.queries != 7 else set()
    assert {"auto", "SDPA, mask"} | flex | floor <= set(calls)
    assert set(facts["unavailable"]) == {p.name for p in providers.attention()} - set(calls)
    assert not any("wrong" in reason or "Error" in reason for reason in facts["unavailable"].values())
    assert facts["prepared_bytes"]["SDPA, mask"] == 2 * 4 * case.queries * 40 * cases.DTYPES[case.dtype].itemsize
    assert facts["prepared_bytes"]["auto"] == 0


def test_the_truth_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(ATTENTION, queries=33, backward=True)
    given = case.inputs("cpu")
    whole = case.truth(given)
    monkeypatch.setattr(cases, "LONGEST_BLOCK", 10)
    torch.testing.assert_close(case.truth(given), whole)


def test_what_is_wrong_or_breaks_is_not_timed_and_says_so() -> None:
    def off(case: Any, inputs: dict[str, Tensor]) -> Any:
        return lambda: (inputs["q"] * 1.1, inputs["k"]), ()

    def nan(case: Any, inputs: dict[str, Tensor]) -> Any:
        return lambda: (inputs["q"] * math.nan, inputs["k"]), ()

    def breaks(case: Any, inputs: dict[str, Tensor]) -> Any:
        raise RuntimeError("no such kernel\nand a trace")

    wrong = [providers.Provider("off", off), providers.Provider("nan", nan), providers.Provider("breaks", breaks)]
    facts, calls = measure.admit(ROTARY, [*wrong, *providers.rotary("eager")[:1]], "cpu")
    assert list(calls) == ["auto"]
    assert facts["unavailable"]["off"].startswith("wrong: off by ")
    assert facts["unavailable"]["nan"] == "wrong: off by inf, where fp32 explains 1e-05"
    assert facts["unavailable"]["breaks"] == "RuntimeError: no such kernel"


def test_peak_memory_counts_what_is_held_at_a_time() -> None:
    x = torch.randn(4 * 2**20)
    found = [timing.peak_bytes(run, "cpu") for run in (lambda: x.mul_(1), lambda: x * 2, lambda: (x * 2) * 2)]
    if None in found:
        pytest.skip("this system does not tell")
    for peak, buffers in zip(found, range(3), strict=True):
        assert peak is not None
        assert abs(peak - buffers * size(x)) < 2**20


def test_slow_calls_are_timed_for_fewer_rounds_and_quick_ones_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    count = {"slow": 0, "quick": 0}

    def spend(name: str, seconds: float) -> None:
        count[name] += 1
        clock[0] += seconds

    slow = {"slow": lambda: spend("slow", 6.0), "quick": lambda: spend("quick", 0.5)}
    times = timing.interleave_warm(slow)
    assert times["slow"] == pytest.approx([6.0] * 4)  # 26 of 30 seconds, the first call among them
    assert count == {"slow": 4, "quick": 4}
    assert len(timing.interleave_warm({"slow": lambda: spend("slow", 90.0)})["slow"]) == 3
    count["quick"] = 0
    times = timing.interleave_warm({"quick": lambda: spend("quick", 0.005)})
    assert times["quick"] == pytest.approx([0.005] * 15)
    assert 1 + 15 * 3 <= count["quick"] <= 1 + 15 * 4


def run(name: str, monkeypatch: pytest.MonkeyPatch, history: Path) -> Path:
    """A benchmark of a tiny case, forward and backward, as the script writes it."""
    case, found, operator = {
        "rotary": (ROTARY, providers.rotary("eager"), "gaussian_rope"),
        "attention": (ATTENTION, providers.attention("eager"), "alibi_attention"),
    }[name]
    path = history / "a machine" / f"{name}.json"
    arguments = ["--rounds", "2", "--threads", "1", "--device", "cpu", "--case", "fp32", "--json", str(path)]
    monkeypatch.setattr(timing, "COPIED", 2**20)
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    listed = {"cpu": (case, replace(case, backward=True))}
    measure.main(name, "", listed, found, lambda device: providers.runs(operator, device))
    return path


def test_a_run_is_written_and_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run("rotary", monkeypatch, tmp_path)
    assert f"auto is {providers.runs('gaussian_rope', 'cpu')}" in capsys.readouterr().out
    path = run("attention", monkeypatch, tmp_path)
    assert "FlexAttention: n/a, FlexAttention has no backward on the CPU" in capsys.readouterr().out
    data = json.loads(path.read_text())
    forward, both = data["results"]
    assert len(forward["seconds"]["auto"]) == 2
    assert set(both["seconds"]) == set(both["error"]) == set(both["peak_bytes"]) == set(both["prepared_bytes"])
    assert both["case"]["flops"] == replace(ATTENTION, backward=True).flops

    forward["seconds"] = {
        "auto": [2e-3, 1e-3, 3e-3],
        "FlexAttention": [5e-3],
        "SDPA, mask": [4e-3],
        "SDPA, no bias": [1e-3],
    }
    forward["peak_bytes"] |= {"auto": 3_000_000, "SDPA, mask": 1_000_000}
    forward["prepared_bytes"] |= {"auto": 0, "SDPA, mask": 9_000_000}
    path.write_text(json.dumps(data))
    drawn = figures.figures(tmp_path)
    runs = providers.runs("alibi_attention", "cpu")
    assert f"| `alibi_attention` ({runs}), µs | ours | FlexAttention | SDPA, mask | best rival / ours |" in drawn
    assert "| B2 T40 H4/2 D16 fp32 fwd | 2,000 | 5,000 | 4,000 | 2.00x | 1,000 | 3 | 10 |" in drawn
    assert "n/a, FlexAttention: FlexAttention has no backward on the CPU." in drawn
    assert "| `gaussian_rope`" in drawn
    assert "n/a, Liger: needs a CUDA device." in drawn
    assert f"{data['provenance']['cores']} cores, 1 threads" in drawn


def test_a_case_that_does_not_exist_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rotary", "--device", "cpu", "--case", "T7"])
    with pytest.raises(SystemExit):
        measure.main("rotary", "", {"cpu": (ROTARY,)}, [], lambda device: "")
    assert "no cpu case holds 'T7'; there are B2 T5 H4/2 D8 fp32 fwd" in capsys.readouterr().err
