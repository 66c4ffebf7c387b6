"""Where metrics go: the JSONL that a resume trims, TensorBoard's event files, wandb's calls."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megactx.errors import MegactxError
from megactx.metrics import JsonLines, TensorBoard, Wandb, read_rows

ROWS = [
    {"event": "train", "step": 10, "loss": 2.5, "losses": {"text": 3.0, "case": 2.0}},
    {"event": "eval", "step": 20, "val": {"text": 1.5}},
]


def test_rows_past_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for resume_step, expected in ((None, [10, 20]), (10, [10, 10, 20]), (5, [10, 20])):
        sink = JsonLines(path, resume_step)
        for row in ROWS:
            sink.write(row)
        sink.close()
        assert [row["step"] for row in read_rows(path)] == expected


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.write(ROWS[0])
    assert read_rows(tmp_path / "metrics.jsonl") == [ROWS[0]]
    sink.close()


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    sink.write({"event": "train", "step": 1, "loss": float("nan"), "losses": {"a": float("inf"), "b": 1.0}})
    sink.close()
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert read_rows(tmp_path / "metrics.jsonl")[0]["losses"] == {"a": None, "b": 1.0}


def test_rows_that_are_no_metrics_are_passed_over(tmp_path: Path) -> None:
    strange = ['{"event": "eval"}', '{"step": 3}', '{"event": "eval", "step": "x"}', "[" * 10_000, "7"]
    lines = [*strange, json.dumps(ROWS[0])]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert read_rows(tmp_path / "metrics.jsonl") == [ROWS[0]]


def test_tensorboard_holds_every_scalar_at_its_step(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    sink = TensorBoard(tmp_path)
    for row in ROWS:
        sink.write(row)
    sink.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    found = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert found == {
        "train/loss": [(10, 2.5)],
        "train/losses/text": [(10, 3.0)],
        "train/losses/case": [(10, 2.0)],
        "eval/val/text": [(20, 1.5)],
    }


def test_wandb_gets_the_settings_and_the_same_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, float], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finished")

    def init(**options: Any) -> Run:
        calls.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    sink = Wandb("project", "name", tmp_path, {"n_layer": 2})
    sink.write(ROWS[0])
    sink.close()
    options = {"project": "project", "name": "name", "dir": str(tmp_path), "config": {"n_layer": 2}}
    values = {"train/loss": 2.5, "train/losses/text": 3.0, "train/losses/case": 2.0}
    assert calls == [options, (10, values), "finished"]


@pytest.mark.parametrize(("module", "flag"), [("wandb", "--wandb_log"), ("tensorboard", "--tensorboard_log")])
def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, flag: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == module or "torch.utils.tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MegactxError, match=rf"{flag}: {module} is not installed \(pip install 'megactx\[{module}\]'\)"):
        Wandb("p", None, tmp_path, {}) if module == "wandb" else TensorBoard(tmp_path)
