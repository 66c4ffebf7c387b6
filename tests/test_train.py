"""Training as a user meets it: it learns, it resumes to the same bits, and nothing that goes wrong costs the run."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megactx import checkpoint, cli
from megactx.files import lock
from megactx.metrics import read_rows
from megactx.schedule import learning_rate_at

TEXT = "".join(f"def f{i % 7}(x, y={i % 13}):\n    return (x + {i % 5}) * y\n\n" for i in range(300))
MODEL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4"]
SCHEDULE = ["--max_iters=8", "--learning_rate=3e-3", "--warmup_iters=2"]
RUN = ["--eval_iters=2", "--eval_interval=4", "--log_interval=3", "--sample_tokens=0", "--report=false", "--device=cpu"]
SMALL = [*MODEL, *SCHEDULE, *RUN]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "input.txt").write_text(TEXT)
    arguments = ["--input_file", str(folder / "input.txt"), "--contexts", "case", "depth", "column"]
    assert cli.main(["prepare", *arguments, "--out_dir", str(folder / "bundle")]) == 0
    return folder / "bundle"


def train(bundle: Path, out_dir: Path, *extra: str) -> int:
    return cli.main(["train", "--dataset", str(bundle), "--out_dir", str(out_dir), *SMALL, *extra])


def spawn(bundle: Path, out_dir: Path, *extra: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "megactx.train", "--dataset", str(bundle), "--out_dir", str(out_dir), *SMALL]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *extra], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def content(out_dir: Path) -> tuple[int, dict[str, torch.Tensor]]:
    found = checkpoint.load(checkpoint.find(out_dir), optimizer=True)
    return found.step, {**found.model, **{f"optimizer:{k}": v for k, v in found.optimizer.items()}}


def assert_same_bits(one: Path, other: Path) -> None:
    (step, left), (other_step, right) = content(one), content(other)
    assert step == other_step
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def losses(out_dir: Path) -> list[dict[str, Any]]:
    """The metric rows without their clock readings."""
    timed = {"ms", "data_ms", "tokens_per_second", "seconds"}
    return [{k: v for k, v in row.items() if k not in timed} for row in read_rows(out_dir / "metrics.jsonl")]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("accumulation", ["1", "3"])
@pytest.mark.parametrize("dropout", ["0", "0.1"])
def test_resume_continues_to_the_same_bits(
    bundle: Path, tmp_path: Path, optimizer: str, accumulation: str, dropout: str
) -> None:
    extra = [f"--optimizer={optimizer}", f"--gradient_accumulation_steps={accumulation}", f"--dropout={dropout}"]
    assert train(bundle, tmp_path / "whole", *extra, "--save_interval=5") == 0
    # What a kill after step 5 leaves behind: the checkpoint of step 5 and metrics that ran ahead of it.
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "step-00000008")
    assert content(tmp_path / "half")[0] == 5
    assert train(bundle, tmp_path / "half", *extra, "--save_interval=5") == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "half")
    assert losses(tmp_path / "whole") == losses(tmp_path / "half")


LOBO = ["--use_flash_lobo", "--use_flash_lobo_per_head=true", "--flash_lobo_log_const=-1"]
FIXED = ["--use_flash_lobo", "--flash_lobo_fixed", "--flash_lobo_log_const=-1"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--position=gaussian_alibi", *LOBO, "--optimizer=muon"],
        ["--position=gaussian_lod2d_alibi", "--lod_pairs=3", "--rope_sigma=power", "--lod_block_size=2"],
        ["--position=gaussian", "--n_kv_head=1", "--use_flash_lobo"],
        ["--position=none", *LOBO],
        ["--position=learned", *FIXED],
    ],
    ids=["alibi", "lod2d", "gaussian", "none", "learned"],
)
def test_every_kind_of_position_resumes_to_the_same_bits_and_samples(
    bundle: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes], flags: list[str]
) -> None:
    assert train(bundle, tmp_path / "whole", *flags, "--save_interval=5", "--sample_tokens=4", "--report=true") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "step-00000008")
    assert train(bundle, tmp_path / "half", "--save_interval=5") == 0  # the checkpoint knows the flags
    assert_same_bits(tmp_path / "whole", tmp_path / "half")
    sinks = [value for name, value in content(tmp_path / "whole")[1].items() if name.endswith("attention.log_const")]
    assert [tuple(value.shape) for value in sinks if value.dim()] == [(2 if LOBO[1] in flags else 1,)] * len(sinks)
    assert bool(sinks) == ("--use_flash_lobo" in flags and "--flash_lobo_fixed" not in flags)
    capsysbinary.readouterr()
    assert cli.main(["sample", "--out_dir", str(tmp_path / "whole"), "--max_new_tokens=40", "--start=def "]) == 0
    assert b"def " in capsysbinary.readouterr().out


def test_a_run_of_an_older_version_is_continued(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megactx.config import GPTConfig
    from megactx.train_config import TrainConfig

    names = "rope_sigma lod_block_size lod_pairs alibi_rule use_flash_lobo use_flash_lobo_per_head flash_lobo_log_const"
    new = ["flash_lobo_fixed", *names.split()]
    with monkeypatch.context() as older:
        for cls in (GPTConfig, TrainConfig):
            full = cls.to_json
            older.setattr(cls, "to_json", lambda self, full=full: {k: v for k, v in full(self).items() if k not in new})
        assert train(bundle, tmp_path / "run") == 0
    assert train(bundle, tmp_path / "run", "--max_iters=10") == 0
    assert content(tmp_path / "run")[0] == 10
    assert train(bundle, tmp_path / "run", "--max_iters=12", "--use_flash_lobo") == 2
    assert "use_flash_lobo: checkpoint has False, asked for True" in capsys.readouterr().err


def test_settings_that_contradict_those_of_the_run_are_named(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where they make no model at all: what does not fit then is a setting that the user did not give."""
    run = tmp_path / "run"
    assert train(bundle, run, "--position=gaussian_lod2d", "--lod_pairs=3", "--use_flash_lobo") == 0
    for flags, changed, reason in (
        (["--position=learned"], "position: checkpoint has 'gaussian_lod2d', asked for 'learned'", "lod_pairs must be"),
        (["--n_head=8"], "n_head: checkpoint has 2, asked for 8", "lod_pairs must be at most 1"),
        (["--n_head=3"], "n_head: checkpoint has 2, asked for 3", "n_embd must be a multiple of n_head, got 32 and 3"),
        (["--flash_lobo_fixed"], "flash_lobo_fixed: checkpoint has False, asked for True", ""),
    ):
        capsys.readouterr()
        assert train(bundle, run, *flags) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: cannot resume {run / 'step-00000008'}: {changed}"), error
        assert reason in error
        assert error.count("\n") == 1
    assert train(bundle, run, "--context_weights", "1") == 2
    assert capsys.readouterr().err.startswith("error: context_weights: expected 4 weights")
    assert train(bundle, run, "--max_iters=9") == 0


def test_a_resumed_run_keeps_its_settings_and_a_finished_one_changes_nothing(bundle: Path, tmp_path: Path) -> None:
    assert train(bundle, tmp_path / "run") == 0
    rows = losses(tmp_path / "run")
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert cli.main(["train", "--out_dir", str(moved)]) == 0
    assert losses(moved) == rows
    assert not (tmp_path / "run").exists()
    assert cli.main(["train", "--out_dir", str(moved), "--max_iters=10"]) == 0
    assert content(moved)[0] == 10


def test_training_learns_every_context(bundle: Path, tmp_path: Path) -> None:
    extra = ["--max_iters=120", "--eval_interval=60", "--eval_iters=4", "--batch_size=16"]
    assert train(bundle, tmp_path / "run", *extra) == 0
    evals = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["event"] == "eval"]
    assert [row["step"] for row in evals] == [0, 60, 120]
    for name in ("text", "case", "depth", "column"):
        assert evals[-1]["val"][name] < 0.6 * evals[0]["val"][name], name
    assert abs(evals[0]["val"]["text"] - math.log(256)) < 0.5


def test_a_non_finite_update_is_skipped_and_only_that_one(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megactx.trainer import Trainer

    trajectory: list[torch.Tensor] = []
    original = Trainer._clip

    def poisoned(self: Trainer) -> torch.Tensor:
        trajectory.append(torch.cat([p.detach().flatten().clone() for p in self.model.parameters()]))
        if self.step == 4:
            next(self.model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
        return original(self)

    monkeypatch.setattr(Trainer, "_clip", poisoned)
    assert train(bundle, tmp_path / "run") == 0
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(trajectory)]
    assert changed == [True, True, True, True, False, True, True]
    assert "step 5: non-finite gradient: this update is skipped" in capsys.readouterr().out
    assert read_rows(tmp_path / "run" / "metrics.jsonl")[-2]["skipped"] == 1
    assert all(torch.isfinite(v).all() for k, v in content(tmp_path / "run")[1].items() if not k.endswith("rng/cpu"))


def test_a_run_of_non_finite_updates_ends_with_an_error(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megactx.trainer import Trainer

    monkeypatch.setattr(Trainer, "_clip", lambda self: torch.tensor(float("inf")))
    assert train(bundle, tmp_path / "run", "--max_iters=50") == 2
    assert "20 updates in a row had a non-finite gradient" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves_and_the_same_command_continues(
    bundle: Path, tmp_path: Path, number: signal.Signals
) -> None:
    extra = ["--max_iters=60", "--eval_interval=30", "--dropout=0.1", "--gradient_accumulation_steps=2"]
    process = spawn(bundle, tmp_path / "run", *extra)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step "):
            break
    process.send_signal(number)
    output = process.stdout.read()
    assert process.wait(60) == 128 + number, output
    assert "the same command continues" in output
    step = content(tmp_path / "run")[0]
    assert 0 < step < 60
    assert train(bundle, tmp_path / "run", *extra) == 0
    assert train(bundle, tmp_path / "whole", *extra) == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_a_signal_in_mid_accumulation_discards_the_partial_step(bundle: Path, tmp_path: Path) -> None:
    """The dropout generator has moved on by then; the checkpoint must hold it as it was after the last whole step."""
    from megactx.stop import StopSignal
    from megactx.trainer import Trainer

    class AfterReads(StopSignal):
        reads = 0

        @property
        def number(self) -> int | None:  # type: ignore[override]
            self.reads += 1
            return 15 if self.reads > 2 else None

        @number.setter
        def number(self, value: int | None) -> None: ...

    extra = ["--dropout=0.1", "--gradient_accumulation_steps=4"]
    assert train(bundle, tmp_path / "whole", *extra) == 0
    original = Trainer.update

    def interrupted(self: Trainer, stop: StopSignal) -> Any:
        if self.step == 3:
            assert original(self, AfterReads()) is None
            self.restore(checkpoint.load(self.save(), optimizer=True))
        return original(self, stop)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "update", interrupted)
        assert train(bundle, tmp_path / "run", *extra) == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_kill_9_at_random_times_ends_in_the_same_bits(bundle: Path, tmp_path: Path) -> None:
    extra = ["--max_iters=40", "--save_interval=2", "--eval_interval=20", "--n_layer=1"]
    assert train(bundle, tmp_path / "whole", *extra) == 0
    generator = torch.Generator().manual_seed(7)
    kills = 0
    for _ in range(5):
        process = spawn(bundle, tmp_path / "run", *extra, "--log_interval=1")
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                break
        time.sleep(0.3 * float(torch.rand((), generator=generator)))
        process.kill()
        process.stdout.close()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    assert train(bundle, tmp_path / "run", *extra) == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_the_report_is_one_page_that_opens_from_disk(bundle: Path, tmp_path: Path) -> None:
    assert train(bundle, tmp_path / "run", "--report=true", "--sample_tokens=20") == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "losses.png").read_bytes().startswith(b"\x89PNG")
    for word in ("text", "case", "depth", "column", "bigram", "data:image/png;base64", "Samples at step 8", "torch"):
        assert word in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_another_architecture_or_other_data_is_not_continued(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(bundle, tmp_path / "run") == 0
    assert train(bundle, tmp_path / "run", "--n_layer=3") == 2
    assert "n_layer: checkpoint has 2, asked for 3" in capsys.readouterr().err
    assert train(bundle, tmp_path / "run", "--init_from=scratch") == 2
    assert "already has checkpoints" in capsys.readouterr().err
    (tmp_path / "other.txt").write_text(TEXT[5:])
    arguments = ["--input_file", str(tmp_path / "other.txt"), "--contexts", "case", "depth", "column"]
    assert cli.main(["prepare", *arguments, "--out_dir", str(tmp_path / "other")]) == 0
    assert train(tmp_path / "other", tmp_path / "run") == 2
    assert "the data of context 'text' has changed" in capsys.readouterr().err
    assert content(tmp_path / "run")[0] == 8


def test_two_runs_do_not_share_a_folder(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock(tmp_path / "run", "test"):
        assert train(bundle, tmp_path / "run") == 2
    assert "out_dir: another process is writing in" in capsys.readouterr().err
    assert train(bundle, tmp_path / "run") == 0


def test_a_checkpoint_folder_is_not_a_run_folder(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(bundle, tmp_path / "run") == 0
    assert train(bundle, tmp_path / "run" / "step-00000008") == 2
    assert "is a checkpoint; give the folder of the run" in capsys.readouterr().err


def test_another_optimizer_is_not_continued(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(bundle, tmp_path / "run") == 0
    assert train(bundle, tmp_path / "run", "--optimizer=muon", "--max_iters=10") == 2
    assert "optimizer: checkpoint has 'adamw', asked for 'muon'" in capsys.readouterr().err


def test_a_reader_that_goes_away_costs_no_update(bundle: Path, tmp_path: Path) -> None:
    process = spawn(bundle, tmp_path / "run", "--max_iters=4000", "--eval_interval=2000", "--log_interval=1")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 5/"):
            break
    process.stdout.close()
    process.wait(60)
    assert 5 <= content(tmp_path / "run")[0] < 4000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_metrics_that_cannot_be_written_are_named_and_the_state_is_saved(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").symlink_to("/dev/full")
    assert train(bundle, tmp_path / "run", "--eval_interval=1000", "--log_interval=5") == 2
    assert "No space left on device: " in capsys.readouterr().err
    assert content(tmp_path / "run")[0] == 0


def test_metrics_of_an_earlier_run_are_set_aside(bundle: Path, tmp_path: Path) -> None:
    assert train(bundle, tmp_path / "run", "--max_iters=4") == 0
    rows = losses(tmp_path / "run")
    for folder in checkpoint.step_folders(tmp_path / "run"):
        shutil.rmtree(folder)
    assert train(bundle, tmp_path / "run", "--max_iters=4") == 0
    assert len(read_rows(tmp_path / "run" / "metrics-1.jsonl")) == len(rows)
    assert losses(tmp_path / "run") == rows


def test_context_weights_weigh_the_loss(bundle: Path, tmp_path: Path) -> None:
    assert train(bundle, tmp_path / "run", "--context_weights", "text=3", "case=0", "depth=1", "column=0") == 0
    row = next(r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if r["event"] == "train")
    expected = 0.75 * row["losses"]["text"] + 0.25 * row["losses"]["depth"]
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_single_mode_and_a_subset_of_contexts(bundle: Path, tmp_path: Path) -> None:
    assert train(bundle, tmp_path / "one", "--training_mode=single") == 0
    assert train(bundle, tmp_path / "two", "--multicontext_datasets", "depth", "text") == 0
    for run, names in (("one", ["text"]), ("two", ["depth", "text"])):
        state = checkpoint.load(checkpoint.find(tmp_path / run)).state
        assert [c["name"] for c in state["manifest"]["contexts"]] == names


def test_integer_columns_train_as_categories_or_as_numbers(tmp_path: Path) -> None:
    rows = "".join(f"{i % 5},{(i * i) % 17}\n" for i in range(600))
    (tmp_path / "log.csv").write_text("phase,level\n" + rows)
    assert cli.main(["prepare", "--csv", str(tmp_path / "log.csv"), "--out_dir", str(tmp_path / "data")]) == 0
    assert train(tmp_path / "data", tmp_path / "ids") == 0
    assert train(tmp_path / "data", tmp_path / "values", "--numerical_multicontext") == 0
    for run, kind in (("ids", "categorical"), ("values", "numeric")):
        state = checkpoint.load(checkpoint.find(tmp_path / run)).state
        assert {c["kind"] for c in state["model_config"]["contexts"]} == {kind}


def test_streams_that_are_not_numbers_are_not_read_as_numbers(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(bundle, tmp_path / "run", "--numerical_multicontext") == 2
    assert "context 'text' cannot be read as numbers" in capsys.readouterr().err


def test_bfloat16_autocast_keeps_float32_weights_and_loss(bundle: Path, tmp_path: Path) -> None:
    assert train(bundle, tmp_path / "run", "--dtype=bfloat16") == 0
    assert {v.dtype for v in checkpoint.load(checkpoint.find(tmp_path / "run")).model.values()} == {torch.float32}


def test_learning_rate_warms_up_then_falls_to_the_floor() -> None:
    rates = [learning_rate_at(s, peak=1.0, floor=0.1, warmup_steps=10, decay_steps=100) for s in range(120)]
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.55)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert set(rates[100:]) == {0.1}


def test_torn_metrics_do_not_stop_a_resume(bundle: Path, tmp_path: Path) -> None:
    assert train(bundle, tmp_path / "run", "--max_iters=4") == 0
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "step": 999}\n{"event": "tra')
    assert train(bundle, tmp_path / "run", "--max_iters=8") == 0
    steps = [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert steps == sorted(steps)
    assert max(steps) == 8


def test_nothing_is_unpickled_while_training_and_sampling(bundle: Path, tmp_path: Path) -> None:
    """An audit hook sees every `find_class` of an unpickler in the process; ours must cause none."""
    script = f"""
import json, sys
seen = []
from megactx import cli
import megactx.trainer, megactx.sample, megactx.generate
sys.addaudithook(lambda event, args: seen.append(str(args)) if event.startswith("pickle.") else None)
train = ["--dataset", {str(bundle)!r}, "--out_dir", {str(tmp_path / "run")!r}, *{SMALL!r}]
assert cli.main(["train", *train, "--max_iters=4"]) == 0
assert cli.main(["train", *train]) == 0
assert cli.main(["sample", "--out_dir", {str(tmp_path / "run")!r}, "--start", "def ", "--max_new_tokens", "4"]) == 0
print("SEEN", json.dumps(seen))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "SEEN []"
    assert json.loads(result.stdout.splitlines()[-1][5:]) == []
