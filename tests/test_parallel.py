"""Several processes as one: the same losses and weights as one process, one checkpoint that any number continues.

The processes are started once, by hand as torchrun would, and run a list of commands; the tests look at what is left.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megactx import checkpoint, cli
from megactx.data import Bundle
from megactx.feed import open_feed
from megactx.metrics import read_rows
from megactx.stop import StopSignal

DOCUMENTS = [f"def f{i}(x, y={i % 13}):\n    return (x + {i % 5}) * y\n" for i in range(300)]
MODEL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--gradient_accumulation_steps=2"]
SCHEDULE = ["--max_iters=6", "--learning_rate=3e-3", "--warmup_iters=2", "--save_interval=3"]
RUN = ["--eval_iters=2", "--eval_interval=6", "--log_interval=1", "--sample_tokens=0", "--report=false", "--device=cpu"]
MTP = ["--mtp_enabled", "--mtp_max_steps=3", "--mtp_weight=0.3", "--mtp_rampup_steps=2", "--mtp_decay_end=100"]
SMALL = [*MODEL, *SCHEDULE, *RUN, *MTP]
ONE, EACH = ["--batch_size=4"], ["--batch_size=2"]
HEADS = ["--mtp_heads=sequential", "--position=gaussian_alibi", "--use_flash_lobo"]  # a parameter of one number, too
NUMBERS = ["--numerical_multicontext", "--mtp_enabled=false"]
FAILURES = 8  # a process that cleans up behind an error hangs now and then only

# Each process has a folder of its own: a relative out_dir is another place for each, as on two machines.
# What is to fail ends its process. It comes first, in children: later there are threads, which no child would have.
DRIVER = """
import json, os, shutil, signal, sys
from megactx import cli, train, trainer
from megactx.model import GPT
from megactx.parallel import Group

def fail_after_a_collective(self, batches, stop):
    self.group.sum(batches[0].counts.clone())
    raise MemoryError("no more of it")

def train_once(arguments):
    original = GPT.set_mtp_weight
    if "--out_dir=poison" in arguments and os.environ["RANK"] == "1":  # a loss of NaN in the third update, in one
        calls = iter(range(100))
        GPT.set_mtp_weight = lambda self, value: self.mtp_weight.fill_(float("nan") if next(calls) == 2 else value)
    if "--out_dir=fail" in arguments and os.environ["RANK"] == "1":
        trainer.Trainer._backward = fail_after_a_collective
    code = cli.main(["train", *arguments])
    GPT.set_mtp_weight = original
    return code

os.makedirs(sys.argv[2])
os.chdir(sys.argv[2])
for port, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    if arguments[0] == "forget":
        shutil.rmtree(arguments[1], ignore_errors=True)
        print("CODE 0", flush=True)
        continue
    if arguments[2] not in ("--out_dir=different", "--out_dir=fail"):
        print("CODE", train_once(arguments), flush=True)
        continue
    child = os.fork()
    if not child:
        signal.alarm(30)  # far more than it needs: a process that hangs ends with a code below 0
        sys.exit(train_once(arguments))
    print("CODE", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/bundle` with three contexts, `data/shards` and `data/other` of short documents, which mask targets."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "corpus").mkdir()
    for i in range(0, len(DOCUMENTS), 5):
        (folder / "corpus" / f"{i:03}.py").write_text("".join(DOCUMENTS[i : i + 5]))
    source = ["--input_file", str(folder / "corpus")]
    assert cli.main(["prepare", *source, "--contexts", "case", "column", "--out_dir", str(folder / "bundle")]) == 0
    shards = ["--shards", "--tokens_per_shard=4000", "--out_dir"]
    assert cli.main(["prepare", *source, *shards, str(folder / "shards")]) == 0
    (folder / "log.csv").write_text("phase,level\n" + "".join(f"{i % 5},{(i * i) % 17}\n" for i in range(600)))
    assert cli.main(["prepare", "--csv", str(folder / "log.csv"), "--out_dir", str(folder / "numbers")]) == 0
    (folder / "corpus" / "000.py").write_text("pass\n")
    assert cli.main(["prepare", *source, *shards, str(folder / "other")]) == 0
    return folder


class Pair:
    """What two processes left: the folders they worked in, what they printed, and how each command ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *commands: tuple[list[str], list[str]]) -> list[tuple[int, int]]:
        """Runs commands one after the other, given for rank 0 and rank 1; returns their exit codes."""
        ports = free_ports(len(commands))
        processes = []
        for rank in (0, 1):
            listed = json.dumps([[port, command[rank]] for port, command in zip(ports, commands, strict=True)])
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
            environment = os.environ | {name: str(value) for name, value in place.items()} | {"OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-c", DRIVER, listed, str(self.folder / f"rank{rank}")]
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        try:
            self.output, self.errors = zip(*(process.communicate(timeout=240) for process in processes), strict=True)
        finally:
            for process in processes:
                process.kill()
        codes = [[int(line[5:]) for line in text.splitlines() if line.startswith("CODE ")] for text in self.output]
        assert len(codes[0]) == len(codes[1]) == len(commands), self.errors
        return list(zip(*codes, strict=True))


@pytest.fixture(scope="module")
def pair(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    pair = Pair(tmp_path_factory.mktemp("pair"))
    shards, bundle = ["--dataset", str(data / "shards")], ["--dataset", str(data / "bundle")]
    common = [
        [*shards, "--out_dir=ddp", *SMALL, *EACH, "--parallel=ddp"],
        [*shards, "--out_dir=fsdp", *SMALL, *EACH, "--parallel=fsdp"],
        [*bundle, "--out_dir=windows", *SMALL, *EACH, *HEADS],
        [*bundle, "--out_dir=heads", *SMALL, *EACH, *HEADS, "--parallel=fsdp"],
        [*shards, "--out_dir=muon", *SMALL, *EACH, "--parallel=fsdp", "--optimizer=muon"],
        ["--dataset", str(data / "numbers"), "--out_dir=numbers", *SMALL, *EACH, *NUMBERS, "--parallel=fsdp"],
        [*shards, "--out_dir=poison", *SMALL, *EACH],
        # Half-way on: the first three steps by one kind, the rest by another, with all settings from the checkpoint.
        [*shards, "--out_dir=turn", *SMALL, *EACH, "--dropout=0.1", "--parallel=ddp"],
        ["forget", "turn/step-00000006"],
        ["--parallel=fsdp", "--device=cpu", "--out_dir=turn"],
        [*shards, "--out_dir=there", *SMALL, *EACH, "--dropout=0.1", "--parallel=fsdp"],
    ]
    commands = [(command, command) for command in common]
    other = ["--dataset", str(data / "other"), "--out_dir=different", *SMALL, *EACH]
    nothing = ["--dataset", str(data / "nothing"), "--out_dir=different", *SMALL, *EACH]
    here = [*shards, "--out_dir=different", *SMALL, *EACH]
    failing = [(here, other), (here, nothing)]
    failing += [(here, [*here, flag]) for flag in ("--batch_size=3", "--eval_interval=5", "--mtp_max_steps=2")]
    failing += [(fail := [*shards, "--out_dir=fail", *SMALL, *EACH], fail)] * FAILURES
    pair.codes = pair.run(*failing, *commands)  # type: ignore[attr-defined]
    return pair


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs by one process, with the batch of both."""
    folder = tmp_path_factory.mktemp("alone")
    for name, source, extra in (
        ("plain", "shards", []), ("heads", "bundle", HEADS), ("muon", "shards", ["--optimizer=muon"]),
        ("numbers", "numbers", NUMBERS),
    ):  # fmt: skip
        arguments = ["--dataset", str(data / source), "--out_dir", str(folder / name), *SMALL, *ONE, *extra]
        assert cli.main(["train", *arguments]) == 0
    return folder


def numbers(out_dir: Path) -> list[dict[str, float]]:
    """All losses, weights and norms of the metrics, flat."""
    found = []
    for row in read_rows(out_dir / "metrics.jsonl"):
        flat: dict[str, Any] = {}
        for key, value in row.items():
            nested = value.items() if isinstance(value, dict) else [("", value)]
            flat |= {f"{key}/{name}".rstrip("/"): inner for name, inner in nested}
        clocks = ("ms", "data_ms", "tokens_per_second", "seconds", "event")
        found.append({key: value for key, value in flat.items() if key not in clocks})
    return found


def assert_same_run(one: Path, other: Path, *, tolerance: float = 2e-5) -> None:
    left, right = numbers(one), numbers(other)
    assert len(left) == len(right) == 8  # 6 updates and 2 evaluations
    for row, expected in zip(left, right, strict=True):
        assert row == pytest.approx(expected, rel=tolerance)
    for step in ("step-00000003", "step-00000006"):
        found, wanted = (checkpoint.load(path / step, optimizer=True) for path in (one, other))
        assert found.model.keys() == wanted.model.keys()
        for name, value in wanted.model.items():
            torch.testing.assert_close(found.model[name], value, rtol=10 * tolerance, atol=10 * tolerance)
        moments = {name for name in wanted.optimizer if not name.startswith("rng/")}
        assert moments == {name for name in found.optimizer if not name.startswith("rng/")}


def test_every_command_of_both_ends_as_it_should(pair: Pair) -> None:
    assert pair.codes == [(2, 2)] * (5 + FAILURES) + [(0, 0)] * 11, pair.errors  # type: ignore[attr-defined]


def test_ddp_is_the_run_of_one_process(pair: Pair, alone: Path) -> None:
    assert_same_run(pair.folder / "rank0" / "ddp", alone / "plain")


def test_fsdp_is_the_run_of_one_process(pair: Pair, alone: Path) -> None:
    assert_same_run(pair.folder / "rank0" / "fsdp", alone / "plain")


@pytest.mark.parametrize("name", ["windows", "heads"])
def test_random_windows_of_several_contexts_and_own_heads_too(pair: Pair, alone: Path, name: str) -> None:
    assert_same_run(pair.folder / "rank0" / name, alone / "heads")


def test_numeric_contexts_too(pair: Pair, alone: Path) -> None:
    assert_same_run(pair.folder / "rank0" / "numbers", alone / "numbers")


def test_a_non_finite_loss_in_one_process_skips_the_update_in_both(pair: Pair) -> None:
    """Were they to differ, the weights would too from there on, and the losses with them."""
    found = [row for row in read_rows(pair.folder / "rank0" / "poison" / "metrics.jsonl") if row["event"] == "train"]
    assert [row["skipped"] for row in found] == [0, 0, 1, 1, 1, 1]
    assert [row["loss"] is None for row in found] == [False, False, True, False, False, False]
    assert found[5]["loss"] < found[3]["loss"]


def test_muon_orthogonalises_whole_matrices_of_which_each_process_holds_rows(pair: Pair, alone: Path) -> None:
    """Its bfloat16 products make more of the last bit of a gradient than AdamW does."""
    assert_same_run(pair.folder / "rank0" / "muon", alone / "muon", tolerance=5e-4)


def test_only_rank_0_writes_and_speaks(pair: Pair) -> None:
    assert list((pair.folder / "rank1").iterdir()) == []
    assert {line[:4] for line in pair.output[1].splitlines()} == {"CODE"}
    assert "in 2 processes (fsdp)" in pair.output[0]


def test_a_process_with_other_data_or_none_stops_all(pair: Pair) -> None:
    assert "rank 1: the data here is not that of rank 0" in pair.errors[1]
    assert "rank 1: no dataset bundle at" in pair.errors[1]
    assert "error: leaving, for not all processes have the same data" in pair.errors[0]
    assert "error: the connection to another process is lost" in pair.errors[0]


def test_an_error_in_one_process_ends_all_at_once(pair: Pair) -> None:
    """In the middle of a run, with a reducer and gloo's threads at work. The exit codes are looked at above."""
    assert pair.errors[1].count("error: rank 1: MemoryError: no more of it (unexpected; --debug") == FAILURES
    assert pair.errors[0].count("error: the connection to another process is lost; the first error") == FAILURES + 1


@pytest.mark.parametrize(
    "difference",
    ["batch_size: 2 in rank 0, 3 in rank 1", "eval_interval: 6 in rank 0, 5 in rank 1",
     "mtp_max_steps: 3 in rank 0, 2 in rank 1"],
)  # fmt: skip
def test_settings_that_differ_are_named_by_all(pair: Pair, difference: str) -> None:
    """A rank that evaluates when the other does not would wait for it without end."""
    message = f"all processes of a run need the same settings: {difference}\n"
    assert f"error: {message}" in pair.errors[0]
    assert f"error: rank 1: {message}" in pair.errors[1]


def test_a_run_goes_on_in_another_kind_with_its_own_dropout(pair: Pair) -> None:
    """ddp up to step 3, then fsdp, equals fsdp throughout: each rank's generator is in the checkpoint."""
    assert_same_run(pair.folder / "rank0" / "turn", pair.folder / "rank0" / "there")
    saved = checkpoint.load(checkpoint.find(pair.folder / "rank0" / "there"), optimizer=True).optimizer
    assert not torch.equal(saved["rng/cpu"], saved["rng/cpu/1"])


@pytest.mark.parametrize("name", ["ddp", "fsdp", "muon"])
def test_one_process_continues_what_two_began(pair: Pair, alone: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(pair.folder / "rank0" / name, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-00000006")
    assert cli.main(["train", "--out_dir", str(tmp_path / "run"), *ONE]) == 0
    tolerance = 5e-4 if name == "muon" else 2e-5
    assert_same_run(tmp_path / "run", alone / ("muon" if name == "muon" else "plain"), tolerance=tolerance)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--parallel=none"], "parallel: expected ddp or fsdp for the 2 processes started, got 'none'"),
        (["--device=cuda:0"], "device: expected auto, cpu or cuda for 2 processes"),
    ],
)
def test_settings_that_cannot_be_of_several_processes_are_refused_before_they_meet(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    source = ["--dataset", str(data / "shards"), "--out_dir", str(tmp_path / "run")]
    assert cli.main(["train", *source, *SMALL, *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["windows", "stream"])
@pytest.mark.parametrize("source", ["bundle", "shards"])
def test_ranks_read_disjoint_parts_of_what_one_would(data: Path, kind: str, source: str) -> None:
    def taken(size: int, rank: int, world_size: int) -> list[Any]:
        feed = open_feed(
            Bundle.open(data / source), "train", kind, batch_size=size, block_size=16, accumulation=3, steps=2, seed=1,
            rank=rank, world_size=world_size,
        )  # fmt: skip
        return feed.take(4)

    ranks = [taken(2, rank, 3) for rank in range(3)]
    for micro, batch in enumerate(taken(6, 0, 1)):
        assert torch.equal(torch.cat([parts[micro].x for parts in ranks]), batch.x)
        assert torch.equal(torch.cat([parts[micro].targets() for parts in ranks]), batch.targets())
        assert torch.equal(sum(parts[micro].counts for parts in ranks), batch.counts)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_one_step(data: Path, tmp_path: Path) -> None:
    long = ["--max_iters=5000", "--save_interval=5000", "--eval_interval=5000"]
    out_dir = tmp_path / "run"
    arguments = ["--dataset", str(data / "shards"), "--out_dir", str(out_dir), *SMALL, *EACH, *long]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    process = subprocess.Popen(
        [*command, "-m", "megactx.train", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("step 2/"):
                break
        os.kill(worker(process.pid, rank=1), signal.SIGTERM)
        output = process.stdout.read()
        assert process.wait(60) != 0
    finally:
        process.kill()
    assert "stopped by signal 15 at step" in output
    found = checkpoint.load(checkpoint.find(out_dir), optimizer=True)
    assert 2 <= found.step < 5000
    assert found.state["progress"]["feed"]["position"] == found.step * 2 * 4 * 32
    assert cli.main(["train", "--out_dir", str(out_dir), *ONE, f"--max_iters={found.step + 1}"]) == 0


def worker(parent: int, *, rank: int) -> int:
    """The process that torchrun started as `rank`."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                status, environment = (folder / "stat").read_text(), (folder / "environ").read_bytes()
            except OSError:  # it has ended, or is another user's
                continue
            if int(status.rpartition(")")[2].split()[1]) == parent and f"\0RANK={rank}\0".encode() in environment:
                return int(folder.name)
    raise AssertionError(f"rank {rank} of {parent} is not running")


def test_echoes_of_a_signal_are_one_signal_and_a_later_one_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(signal, "raise_signal", ended.append)
    with StopSignal(echo_seconds=0.2) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGINT
        assert ended == []
        time.sleep(0.25)
        os.kill(os.getpid(), signal.SIGINT)
        assert ended == [signal.SIGINT]
