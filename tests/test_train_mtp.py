"""Multi-token prediction as a user meets it: the weight's schedule, the metrics, streams of shards, bad settings."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megactx import checkpoint, cli
from megactx.data import Bundle, WindowLoader
from megactx.data.shard_file import ShardedTokens, write_shard
from megactx.feed import open_feed
from megactx.metrics import read_rows
from megactx.schedule import mtp_weight_at
from megactx.window import Window

DOCUMENTS = [f"def f{i}(x, y={i % 13}):\n    return (x + {i % 5}) * y\n" for i in range(300)]
MODEL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4"]
SCHEDULE = ["--max_iters=12", "--learning_rate=3e-3", "--warmup_iters=2"]
RUN = ["--eval_iters=2", "--eval_interval=6", "--log_interval=1", "--sample_tokens=0", "--report=false", "--device=cpu"]
MTP = ["--mtp_enabled", "--mtp_max_steps=3", "--mtp_weight=0.3", "--mtp_rampup_steps=4"]
DECAY = ["--mtp_decay_start=6", "--mtp_decay_end=10"]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/bundle` with three contexts and `data/shards`, four of them, of many short documents."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "corpus").mkdir()
    for i in range(0, len(DOCUMENTS), 5):
        (folder / "corpus" / f"{i:03}.py").write_text("".join(DOCUMENTS[i : i + 5]))
    source = ["--input_file", str(folder / "corpus")]
    assert cli.main(["prepare", *source, "--contexts", "case", "column", "--out_dir", str(folder / "bundle")]) == 0
    shards = ["--shards", "--tokens_per_shard=4000", "--out_dir", str(folder / "shards")]
    assert cli.main(["prepare", *source, *shards]) == 0
    return folder


def flags(dataset: Path, out_dir: Path, *extra: str) -> list[str]:
    return ["train", "--dataset", str(dataset), "--out_dir", str(out_dir), *MODEL, *SCHEDULE, *RUN, *extra]


def train(dataset: Path, out_dir: Path, *extra: str) -> int:
    return cli.main(flags(dataset, out_dir, *extra))


def rows(out_dir: Path, event: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(out_dir / "metrics.jsonl") if row["event"] == event]


def assert_same_bits(one: Path, other: Path) -> None:
    left, right = (checkpoint.load(checkpoint.find(path), optimizer=True) for path in (one, other))
    assert left.step == right.step
    assert left.model.keys() == right.model.keys()
    assert left.optimizer.keys() == right.optimizer.keys()
    for name in left.model:
        assert torch.equal(left.model[name], right.model[name]), name
    for name in left.optimizer:
        assert torch.equal(left.optimizer[name], right.optimizer[name]), name
    assert left.state["progress"]["feed"] == right.state["progress"]["feed"]


def test_the_weight_rises_holds_and_falls_to_nothing() -> None:
    weights = [mtp_weight_at(s, weight=0.1, rampup_steps=10, decay_start=60, decay_end=90) for s in range(120)]
    assert weights[:11] == pytest.approx([0.01 * s for s in range(11)])
    assert set(weights[10:61]) == {0.1}
    assert weights[60:91] == pytest.approx([0.1 * (90 - s) / 30 for s in range(60, 91)])
    assert set(weights[90:]) == {0.0}


def test_the_weight_never_exceeds_either_slope() -> None:
    """A decay that begins before the ramp is over makes a tent; a decay of no steps a cliff; no ramp a plateau."""
    tent = [mtp_weight_at(s, weight=1.0, rampup_steps=20, decay_start=0, decay_end=20) for s in range(21)]
    assert tent == pytest.approx([min(s / 20, 1 - s / 20) for s in range(21)])
    cliff = [mtp_weight_at(s, weight=1.0, rampup_steps=0, decay_start=5, decay_end=5) for s in range(8)]
    assert cliff == [1.0] * 5 + [0.0] * 3


@pytest.mark.parametrize("loader", ["windows", "stream"])
def test_the_metrics_hold_every_step_and_their_sum_is_the_loss(data: Path, tmp_path: Path, loader: str) -> None:
    assert train(data / "bundle", tmp_path / "run", *MTP, *DECAY, f"--loader={loader}") == 0
    found = rows(tmp_path / "run", "train")
    expected = [mtp_weight_at(s, weight=0.3, rampup_steps=4, decay_start=6, decay_end=10) for s in range(12)]
    assert [row["mtp_weight"] for row in found] == pytest.approx(expected)
    assert expected[0] == expected[-1] == 0.0
    for row in found:
        assert row["ntp_loss"] == pytest.approx(sum(row["losses"].values()) / 3, rel=1e-5)
        ahead = (row["mtp_loss_2"] + row["mtp_loss_3"]) / 2
        assert row["loss"] == pytest.approx(row["ntp_loss"] + row["mtp_weight"] * ahead, rel=1e-5)
        assert "mtp_loss_4" not in row
    for row in rows(tmp_path / "run", "eval"):
        assert row["val_loss"] == row["val_ntp_loss"] == pytest.approx(sum(row["val"].values()) / 3)
        ahead = (row["val_mtp_loss_2"] + row["val_mtp_loss_3"]) / 2
        assert row["val_mtp_loss"] == pytest.approx(row["val_loss"] + row["mtp_weight"] * ahead)
    assert {"mtp_loss_2", "ntp_loss", "mtp_weight"}.isdisjoint(_plain_row(data, tmp_path))


def _plain_row(data: Path, tmp_path: Path) -> dict[str, Any]:
    assert train(data / "bundle", tmp_path / "plain", "--max_iters=2") == 0
    assert rows(tmp_path / "plain", "eval")[-1]["val_loss"] > 0
    return rows(tmp_path / "plain", "train")[-1]


def test_by_default_the_weight_falls_over_the_last_third_and_own_heads_keep_it(data: Path, tmp_path: Path) -> None:
    assert train(data / "bundle", tmp_path / "shared", *MTP) == 0
    weights = [row["mtp_weight"] for row in rows(tmp_path / "shared", "train")]
    assert weights[4:9] == pytest.approx([0.3] * 5)
    assert weights[9:] == pytest.approx([0.225, 0.15, 0.075])
    assert rows(tmp_path / "shared", "eval")[-1]["mtp_weight"] == 0.0
    assert train(data / "bundle", tmp_path / "parallel", *MTP, "--mtp_heads=parallel") == 0
    assert [row["mtp_weight"] for row in rows(tmp_path / "parallel", "train")][4:] == pytest.approx([0.3] * 8)


def test_losses_are_means_over_the_targets_of_the_whole_update(data: Path, tmp_path: Path) -> None:
    """Micro-batches with different numbers of masked targets weigh by what they hold: cutting the same tokens into
    more of them changes nothing. The mean of their means would be another number."""
    runs = []
    for size, accumulation in ((8, 1), (2, 4)):
        out_dir = tmp_path / f"run{size}"
        extra = [f"--batch_size={size}", f"--gradient_accumulation_steps={accumulation}"]
        assert train(data / "shards", out_dir, *MTP, *extra) == 0
        runs.append((rows(out_dir, "train"), checkpoint.load(checkpoint.find(out_dir)).model))
    (left, weights), (right, other_weights) = runs
    for one, other in zip(left, right, strict=True):
        for name in ("loss", "ntp_loss", "mtp_loss_2", "mtp_loss_3", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-5), name
    for name in weights:
        torch.testing.assert_close(weights[name], other_weights[name], rtol=1e-4, atol=1e-5)
    buffers = open_feed(
        Bundle.open(data / "shards"), "train", "stream", batch_size=2, block_size=32, accumulation=40, steps=3, seed=0,
        rank=0, world_size=1,
    ).take(0)  # fmt: skip
    assert len({tuple(buffer.counts.flatten().tolist()) for buffer in buffers}) > 1


@pytest.mark.parametrize("heads", ["shared", "parallel", "sequential"])
@pytest.mark.parametrize("source", ["shards", "bundle"])
def test_resume_continues_to_the_same_bits(data: Path, tmp_path: Path, heads: str, source: str) -> None:
    extra = [*MTP, *DECAY, f"--mtp_heads={heads}", "--dropout=0.1", "--save_interval=5", "--optimizer=muon"]
    extra += ["--gradient_accumulation_steps=2", "--log_interval=3"]
    assert train(data / source, tmp_path / "whole", *extra) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "step-00000012")
    assert train(data / source, tmp_path / "half") == 0  # the checkpoint knows the flags
    assert_same_bits(tmp_path / "whole", tmp_path / "half")


def test_a_kill_at_a_random_step_of_a_stream_ends_in_the_same_bits(data: Path, tmp_path: Path) -> None:
    extra = [*MTP, "--max_iters=60", "--save_interval=2", "--eval_interval=30", "--dropout=0.1"]
    assert train(data / "shards", tmp_path / "whole", *extra) == 0
    generator = torch.Generator().manual_seed(5)
    command = [sys.executable, "-m", "megactx.cli", *flags(data / "shards", tmp_path / "run", *extra)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 4/"):
            break
    time.sleep(0.5 * float(torch.rand((), generator=generator)))
    process.kill()
    process.stdout.close()
    assert process.wait() in (-signal.SIGKILL, 0)
    assert train(data / "shards", tmp_path / "run", *extra) == 0
    assert_same_bits(tmp_path / "whole", tmp_path / "run")


def test_a_stream_is_read_in_order_and_its_place_is_in_the_checkpoint(data: Path, tmp_path: Path) -> None:
    assert train(data / "shards", tmp_path / "run", *MTP, "--max_iters=7", "--gradient_accumulation_steps=2") == 0
    progress = checkpoint.load(checkpoint.find(tmp_path / "run")).state["progress"]
    assert progress["feed"]["position"] == 7 * 2 * 4 * 32
    # Another batch goes on at that token.
    assert train(data / "shards", tmp_path / "run", "--max_iters=9", "--batch_size=1") == 0
    progress = checkpoint.load(checkpoint.find(tmp_path / "run")).state["progress"]
    assert progress["feed"]["position"] == 7 * 2 * 4 * 32 + 2 * 2 * 1 * 32


@pytest.mark.parametrize("kind", ["windows", "stream"])
def test_reading_ahead_changes_neither_the_batches_nor_the_place(data: Path, kind: str) -> None:
    def feed() -> Any:
        bundle = Bundle.open(data / "shards")
        return open_feed(
            bundle, "train", kind, batch_size=2, block_size=16, accumulation=3, steps=2, seed=1, rank=0, world_size=1
        )

    plain, ahead = feed(), feed()
    for step in range(5):
        wanted, found = plain.take(step), ahead.take(step)
        for one, other in zip(wanted, found, strict=True):
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.targets(), other.targets())
        ahead.prepare(step + 1)
        assert plain.state() == ahead.state()
    resumed = feed()
    resumed.restore(ahead.state())
    assert torch.equal(resumed.take(5)[1].x, plain.take(5)[1].x)


def test_a_window_of_an_older_checkpoint_is_read(data: Path) -> None:
    times = {"applied": True, "norm": 1.0, "lr": 0.1, "seconds": 2.0, "data_seconds": 0.5}
    row = times | {"loss": 2.0, "losses": [1.0, None]}
    window = Window.from_json([row], contexts=2, steps=1)
    found = window.summary(["a", "b"], [0.5, 0.5], 100)
    assert found["losses"]["a"] == 1.0
    assert math.isnan(found["losses"]["b"])
    assert found["tokens_per_second"] == 50
    assert Window.from_json([row], contexts=2, steps=3).rows == []


def test_own_heads_learn_what_lies_ahead(data: Path, tmp_path: Path) -> None:
    """Shared logits answer for all steps with one distribution; heads of their own come closer to each."""
    extra = ["--max_iters=150", "--eval_interval=150", "--eval_iters=4", "--batch_size=16", "--mtp_weight=1"]
    found = {}
    for heads in ("shared", "parallel", "sequential"):
        keep = ["--mtp_decay_start=150"]
        options = [*MTP[:2], *extra, *keep, f"--mtp_heads={heads}"]
        assert train(data / "shards", tmp_path / heads, *options) == 0
        first, last = rows(tmp_path / heads, "eval")
        assert last["val_mtp_loss_3"] < 0.75 * first["val_mtp_loss_3"]
        found[heads] = last
    for heads in ("parallel", "sequential"):
        assert found[heads]["val_mtp_loss_2"] < found["shared"]["val_mtp_loss_2"] - 0.05
        assert found[heads]["val_loss"] < found["shared"]["val_loss"] - 0.05


def test_bare_shards_train_by_their_glob(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bare").mkdir()
    for path in (data / "shards").glob("*.bin"):
        shutil.copy(path, tmp_path / "bare")
    source = ["--input_bin", str(tmp_path / "bare" / "train_*.bin"), "--input_vocab_size=256"]
    source += ["--input_val_bin", str(tmp_path / "bare" / "val_*.bin")]
    run = ["--out_dir", str(tmp_path / "run"), *MODEL, *SCHEDULE, *RUN, "--report=true", *MTP]
    assert cli.main(["train", *source, *run]) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "3 tokens ahead" in page
    assert "val_mtp_loss" in page
    output = capsys.readouterr().out
    assert "val ahead: " in output
    assert "ahead +2" in output
    # A damaged shard stops the run, unless it may be left out, and then it is named.
    with open(tmp_path / "bare" / "train_000001.bin", "r+b") as file:
        file.write(b"\0\0\0\0")
    run[1] = str(tmp_path / "other")
    assert cli.main(["train", *source, *run]) == 2
    assert "train_000001.bin" in capsys.readouterr().err
    assert cli.main(["train", *source, *run, "--skip_bad_shards"]) == 0
    assert "skipped: " in (output := capsys.readouterr().out)
    assert "train_000001.bin" in output


def test_a_delimiter_can_be_given_for_shards_of_another_vocabulary(data: Path, tmp_path: Path) -> None:
    """What lies behind it is no target two tokens ahead; without one, every token but a shard's last has both."""
    found = {}
    for name, extra in (("none", []), ("minus", ["--shard_delimiter=-1"]), ("newline", ["--shard_delimiter=10"])):
        source = [f"--input_{kind}bin={data}/shards/{split}_*.bin" for kind, split in (("", "train"), ("val_", "val"))]
        run = ["--out_dir", str(tmp_path / name), "--input_vocab_size=256", *MODEL, *SCHEDULE, *RUN, *extra]
        assert cli.main(["train", *source, *run, "--mtp_enabled", "--max_iters=1"]) == 0
        found[name] = rows(tmp_path / name, "eval")[0]
    assert found["none"]["val_mtp_loss_2"] == found["minus"]["val_mtp_loss_2"] != found["newline"]["val_mtp_loss_2"]
    assert found["none"]["val_loss"] == found["newline"]["val_loss"]


def test_a_run_on_shards_goes_on_only_with_those_it_began_with(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "shards", tmp_path / "shards")
    assert train(tmp_path / "shards", tmp_path / "run", "--max_iters=2") == 0
    with open(tmp_path / "shards" / "train_000001.bin", "r+b") as file:
        file.write(b"\0\0\0\0")
    assert train(tmp_path / "shards", tmp_path / "run", "--max_iters=3", "--skip_bad_shards") == 2
    error = capsys.readouterr().err
    assert "has changed since: a run goes on only with the same shards (left out then: nothing; now: shard " in error
    assert "train_000001.bin begins with 0" in error
    assert train(tmp_path / "shards", tmp_path / "run", "--max_iters=3", "--numerical_multicontext") == 2
    assert train(data / "shards", tmp_path / "run", "--max_iters=3") == 0


def test_numbers_are_not_asked_of_shards(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data / "shards", tmp_path / "run", "--numerical_multicontext") == 2
    assert "numerical_multicontext: expected numbers, got" in capsys.readouterr().err


def test_an_end_of_the_decay_at_0_is_one(data: Path, tmp_path: Path) -> None:
    assert train(data / "bundle", tmp_path / "run", *MTP, "--mtp_decay_end=0", "--max_iters=6") == 0
    assert {row["mtp_weight"] for row in rows(tmp_path / "run", "train")} == {0.0}


def shards_of(folder: Path, *sizes: int) -> str:
    """Shards of so many tokens each; their glob."""
    folder.mkdir()
    ids = np.arange(sum(sizes)) % 50
    for number, end in enumerate(np.cumsum(sizes)):
        write_shard(folder / f"{number:03}.bin", ids[end - sizes[number] : end])
    return str(folder / "*.bin")


def test_where_there_is_no_target_there_is_no_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A shard's last token has no next one. Eight such shards are the first update's batch: a loss of 0 would look
    perfect, and halve the mean over the two updates of a log interval."""
    train_bin, val_bin = shards_of(tmp_path / "train", *[1] * 8, *[2] * 20), shards_of(tmp_path / "val", *[1] * 8, 40)
    source = [f"--input_bin={train_bin}", f"--input_val_bin={val_bin}", "--input_vocab_size=50", "--block_size=4"]
    small = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--batch_size=2", "--max_iters=2", "--eval_iters=1"]
    common = ["train", *source, *small, "--mtp_enabled", "--sample_tokens=0", "--device=cpu"]
    for interval in (1, 2):
        assert cli.main([*common, f"--out_dir={tmp_path / str(interval)}", f"--log_interval={interval}"]) == 0
        assert (tmp_path / str(interval) / "report.html").read_text().count("<td>-</td>") >= 3
    assert "loss - | text - | ahead +2 - x 0" in capsys.readouterr().out
    (empty, full), (both,) = rows(tmp_path / "1", "train"), rows(tmp_path / "2", "train")
    assert empty["loss"] is empty["ntp_loss"] is empty["mtp_loss_2"] is empty["losses"]["text"] is None
    assert full["mtp_loss_2"] is both["mtp_loss_2"] is None
    assert 3 < full["loss"] == full["ntp_loss"] == both["loss"] == both["ntp_loss"]
    for row in rows(tmp_path / "1", "eval"):
        assert row["val_loss"] is row["val"]["text"] is row["val_mtp_loss_2"] is row["val_mtp_loss"] is None


def test_a_split_with_nothing_to_predict_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = [f"--input_bin={shards_of(tmp_path / 'train', 40)}", "--input_vocab_size=50", "--block_size=4"]
    source += [f"--input_val_bin={shards_of(tmp_path / 'val', *[1] * 8)}", "--batch_size=2"]
    assert cli.main(["train", *source, "--out_dir", str(tmp_path / "run"), *RUN]) == 2
    assert "the val split of" in (error := capsys.readouterr().err)
    assert "has no next token to predict: each of its shards (8) holds one token" in error


def test_a_window_of_updates_leaves_out_what_had_no_target() -> None:
    def row(loss: float, ahead: float, weight: float) -> dict[str, Any]:
        steps = {"loss": torch.tensor(loss + weight * ahead), "steps": torch.tensor([[loss, ahead]])}
        rest = {"applied": True, "mtp_weight": weight, "lr": 0.1, "norm": 1.0, "seconds": 1.0, "data_seconds": 0.0}
        return steps | rest

    found = Window([row(2.0, 3.0, 0.1), row(4.0, math.nan, 0.3), row(3.0, 5.0, 0.2)]).summary(["text"], [1.0], 8)
    assert found["ntp_loss"] == pytest.approx(3.0)
    assert found["mtp_loss_2"] == pytest.approx(4.0)
    assert found["mtp_weight"] == pytest.approx(0.2)


def test_windows_of_shards_are_read_where_they_lie(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The corpus is not copied into memory, and the windows are those of the copy."""
    shards = Bundle.open(data / "shards")
    text = np.asarray(shards.split("train")[0])
    monkeypatch.delattr(ShardedTokens, "__array__")
    loader = WindowLoader(shards, "train", 8, 32, seed=5)
    x, y = loader.batch(3)
    for row, target, start in zip(x, y, loader.starts(3), strict=True):
        assert row[:, 0].tolist() == text[start : start + 32].tolist()
        assert target[:, 0].tolist() == text[start + 1 : start + 33].tolist()
    monkeypatch.undo()
    source = [f"--input_bin={shards_of(tmp_path / 'bin', 300)}", f"--input_val_bin={shards_of(tmp_path / 'val', 300)}"]
    flags = ["--input_vocab_size=40", "--loader=windows", *MODEL, *RUN, "--out_dir", str(tmp_path / "run")]
    assert cli.main(["train", *source, *flags]) == 2
    assert "000.bin holds id 49, outside the vocabulary of 40" in capsys.readouterr().err


def test_windows_mask_what_lies_behind_a_document(data: Path) -> None:
    bundle = Bundle.open(data / "bundle")
    assert open_feed(
        bundle, "train", None, batch_size=64, block_size=32, accumulation=1, steps=1, seed=0, rank=0, world_size=1
    ).take(0)[0].counts.tolist() == [[64 * 32]] * 3  # fmt: skip
    loader = WindowLoader(bundle, "train", 64, 32, seed=0, steps=4, delimiters=(0,))
    x, y = loader.batch(0)
    assert y.shape == (64, 32, 3, 4)
    text = np.asarray(bundle.split("train")[0])
    masked = 0
    for b, start in enumerate(loader.starts(0)):
        for t in range(32):
            ahead = text[start + t + 1 : start + t + 5].tolist()
            for k in range(4):
                hidden = 0 in ahead[:k]
                masked += hidden
                assert y[b, t, 0, k] == (-1 if hidden else ahead[k])
    assert masked > 10
    assert torch.equal(y[:, :-1, :, 0], x[:, 1:])


def test_a_run_goes_on_with_the_data_that_is_named_now(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever way it was named before. Where that is other data, the data is what is refused."""
    names = ["--multicontext_datasets", "case", "text"]
    assert train(data / "bundle", tmp_path / "names", *names) == 0
    assert train(data / "bundle", tmp_path / "names", "--max_iters=13") == 0
    shards = data / "shards"
    assert train(shards, tmp_path / "run", "--max_iters=2") == 0
    resumed = ["--input_bin", f"{shards}/train_*.bin", "--input_val_bin", f"{shards}/val_*.bin"]
    code = cli.main(["train", "--out_dir", str(tmp_path / "run"), *resumed, "--input_vocab_size=300", "--max_iters=3"])
    assert code == 2
    assert "the data of context 'text' has changed" in capsys.readouterr().err
    assert train(shards, tmp_path / "run", "--max_iters=3") == 0


def test_ranks_share_one_batch_of_windows(data: Path) -> None:
    bundle = Bundle.open(data / "bundle")
    whole = WindowLoader(bundle, "train", 6, 16, seed=3, steps=2).batch(9)
    parts = [WindowLoader(bundle, "train", 2, 16, seed=3, steps=2, rank=r, world_size=3).batch(9) for r in range(3)]
    for i in range(2):
        assert torch.equal(torch.cat([part[i] for part in parts]), whole[i])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--mtp_enabled", "--mtp_max_steps=9"], "mtp_max_steps: expected a number in 2..8, got 9"),
        (["--mtp_enabled", "--mtp_max_steps=1"], "mtp_max_steps: expected a number in 2..8, got 1"),
        (["--mtp_enabled", "--mtp_max_steps=4", "--block_size=3"], "mtp_max_steps: expected at most block_size = 3"),
        (["--mtp_weight=0.2"], "mtp_weight: expected --mtp_enabled with it"),
        (["--mtp_heads=parallel"], "mtp_heads: expected --mtp_enabled with it"),
        (["--mtp_enabled", "--mtp_weight=-1"], "mtp_weight: expected a number of at least 0, got -1.0"),
        (["--mtp_enabled", "--mtp_rampup_steps=-1"], "mtp_rampup_steps: expected a number of at least 0, got -1"),
        (
            ["--mtp_enabled", "--mtp_decay_start=9", "--mtp_decay_end=8"],
            "mtp_decay_end: expected at least mtp_decay_start = 9, got 8",
        ),
        (["--mtp_enabled", "--mtp_weight=1e39"], "mtp_weight: expected a number in 0..1e+06, got 1e+39"),
        (
            ["--mtp_enabled", "--multicontext_datasets", "column"],
            "mtp_enabled: expected a context of symbols, got numeric ones alone (column)",
        ),
        (["--skip_bad_shards"], "skip_bad_shards: expected shards, got"),
        (["--shard_delimiter=3"], "shard_delimiter: expected --input_bin with it"),
        (["--parallel=ddp"], "parallel: 'ddp' needs processes started by torchrun"),
        (["--parallel=fsdp"], "parallel: 'fsdp' needs processes started by torchrun"),
        (["--input_bin=x.bin"], "input_val_bin: expected validation shards besides --input_bin, got none"),
        (["--input_bin=x.bin", "--input_val_bin=y.bin"], "input_bin: expected it without dataset, got both"),
        (["--input_vocab_size=256"], "input_vocab_size: expected --input_bin with it"),
        (["--loader=stream", "--batch_size=100000"], "less than one batch"),
    ],
)
def test_bad_settings_are_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert train(data / "bundle", tmp_path / "run", *extra) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_steps_and_weight_can_be_changed_in_mid_run_and_heads_cannot(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data / "bundle", tmp_path / "run", *MTP, "--log_interval=5") == 0
    assert train(data / "bundle", tmp_path / "run", "--max_iters=14", "--mtp_max_steps=2", "--mtp_weight=0.5") == 0
    assert "mtp_loss_3" not in rows(tmp_path / "run", "train")[-1]
    assert train(data / "bundle", tmp_path / "run", "--max_iters=16", "--mtp_enabled=false") == 0
    assert "ntp_loss" not in rows(tmp_path / "run", "train")[-1]
    assert math.isfinite(rows(tmp_path / "run", "train")[-1]["loss"])
    assert train(data / "bundle", tmp_path / "run", "--mtp_enabled", "--mtp_heads=parallel") == 2
    assert "mtp_heads: checkpoint has 'shared', asked for 'parallel'" in capsys.readouterr().err
