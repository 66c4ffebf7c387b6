"""Checkpoints: what is saved comes back, damage is found and named, and no failure costs an older checkpoint."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch

from megactx import checkpoint
from megactx.errors import MegactxError
from megactx.files import sha256_of

STATE = {"model_config": {}, "manifest": {}}


def write(out_dir: Path, step: int, value: float = 0.0, keep: int = 3) -> Path:
    model = {"a": torch.full((7, 3), value), "b": torch.arange(5, dtype=torch.int64)}
    return checkpoint.save(
        out_dir,
        step,
        model=model,
        optimizer={"adamw/a/step": torch.tensor(float(step))},
        state=STATE | {"note": "ö"},
        keep=keep,
    )


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = write(tmp_path, 12, 0.5)
    assert path.name == "step-00000012"
    found = checkpoint.load(checkpoint.find(tmp_path), optimizer=True)
    assert (found.step, found.state) == (12, STATE | {"step": 12, "note": "ö"})
    assert torch.equal(found.model["a"], torch.full((7, 3), 0.5))
    assert found.optimizer["adamw/a/step"].item() == 12.0
    assert checkpoint.load(path).optimizer == {}


def test_aliased_and_strided_tensors_are_stored_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    model = {"x": base, "same": base, "t": base.t(), "row": base[1]}
    checkpoint.save(tmp_path, 1, model=model, optimizer={}, state=STATE)
    found = checkpoint.load(checkpoint.find(tmp_path)).model
    for name, value in model.items():
        assert torch.equal(found[name], value)


def test_only_the_newest_are_kept_and_the_newest_is_found(tmp_path: Path) -> None:
    for step in (2, 4, 99_999_999, 100_000_000):
        write(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.step_folders(tmp_path)] == ["step-100000000", "step-99999999"]
    assert checkpoint.find(tmp_path).name == "step-100000000"


def test_keeping_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep: expected at least 2, got 1"):
        write(tmp_path, 1, keep=1)


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.STATE, checkpoint.MANIFEST])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "empty"])
def test_damage_falls_back_with_one_warning(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path, 1, 1.0)
    file = write(tmp_path, 2, 2.0) / name
    content = file.read_bytes()
    if damage == "truncate":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "flip":
        middle = len(content) // 2 if name != checkpoint.MANIFEST else content.index(b'"sha256": "') + 15
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        file.unlink()
    with pytest.warns(UserWarning, match="falling back to step-00000001") as seen:
        found = checkpoint.find(tmp_path)
    assert len(seen) == 1
    assert checkpoint.load(found).model["a"][0, 0].item() == 1.0


def test_any_bit_flip_in_the_content_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    generator = torch.Generator().manual_seed(0)
    for name in checkpoint.CONTENT:
        content = bytearray((path / name).read_bytes())
        for _ in range(60):
            bit = int(torch.randint(len(content) * 8, (), generator=generator))
            content[bit // 8] ^= 1 << (bit % 8)
            (path / name).write_bytes(content)
            with pytest.raises(checkpoint.Damaged):
                checkpoint.verify(path)
            content[bit // 8] ^= 1 << (bit % 8)
        (path / name).write_bytes(content)
    checkpoint.verify(path)


def test_nothing_valid_is_an_error_that_names_the_damage(tmp_path: Path) -> None:
    (write(tmp_path, 1) / checkpoint.MODEL).write_bytes(b"x")
    with pytest.raises(MegactxError, match=r"model.safetensors has 1 bytes.*no older checkpoint"):
        checkpoint.find(tmp_path)


def test_another_version_is_refused_not_skipped(tmp_path: Path) -> None:
    write(tmp_path, 1)
    file = write(tmp_path, 2) / checkpoint.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 99}))
    with pytest.raises(MegactxError, match="expected version 1 of megactx-checkpoint, got version 99"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("text", ['{"format": "other", "version": 1}', '{"version": "1"}', "[" * 100_000, "[]", "x"])
def test_a_manifest_that_is_no_manifest_is_damage(tmp_path: Path, text: str) -> None:
    write(tmp_path, 1)
    (write(tmp_path, 2) / checkpoint.MANIFEST).write_text(text)
    with pytest.warns(UserWarning, match="falling back to step-00000001"):
        assert checkpoint.find(tmp_path).name == "step-00000001"


def test_a_folder_under_another_steps_name_is_damage(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2).rename(tmp_path / "step-00000009")
    with pytest.warns(UserWarning, match="it holds another step than its name says"):
        assert checkpoint.find(tmp_path).name == "step-00000001"


def test_a_copied_checkpoint_can_be_used_under_any_name(tmp_path: Path) -> None:
    copy = write(tmp_path / "run", 7).rename(tmp_path / "best")
    assert checkpoint.load(checkpoint.find(copy)).step == 7


def test_a_truncated_earlier_step_does_not_count_as_a_fallback(tmp_path: Path) -> None:
    for step in (10, 12):
        write(tmp_path, step, keep=2)
    (tmp_path / "step-00000012" / checkpoint.MODEL).write_bytes(b"x")
    write(tmp_path, 20, keep=2)
    assert [p.name for p in checkpoint.step_folders(tmp_path)] == ["step-00000020", "step-00000010"]


def test_files_are_as_readable_as_the_umask_allows(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}

@pytest.mark.parametrize("place", ["missing", "empty"])
def test_no_checkpoint_is_said_plainly(tmp_path: Path, place: str) -> None:
    out_dir = tmp_path / place
    if place == "empty":
        out_dir.mkdir()
    with pytest.raises(MegactxError, match="out_dir: "):
        checkpoint.find(out_dir)


def test_leftovers_of_a_killed_save_are_ignored_and_swept(tmp_path: Path) -> None:
    write(tmp_path, 1)
    stale = tmp_path / ".saving-step-00000002"
    stale.mkdir()
    (stale / checkpoint.MODEL).write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.find(tmp_path).name == "step-00000001"
    write(tmp_path, 2)
    assert not stale.exists()


def test_a_damaged_folder_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    (write(tmp_path, 3, 1.0) / checkpoint.MODEL).write_bytes(b"x")
    write(tmp_path, 3, 2.0)
    assert checkpoint.load(checkpoint.find(tmp_path)).model["a"][0, 0].item() == 2.0


def test_a_damaged_later_step_does_not_push_out_the_fallback(tmp_path: Path) -> None:
    (write(tmp_path, 20) / checkpoint.MODEL).write_bytes(b"x")
    for step in (10, 12, 14):
        write(tmp_path, step, keep=2)
    (tmp_path / "step-00000014" / checkpoint.MODEL).write_bytes(b"x")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert checkpoint.find(tmp_path).name == "step-00000012"
    assert len(seen) == 2


def test_a_full_disk_is_one_error_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk: the write fails in the middle, in the library that writes."""
    write(tmp_path, 1, 1.0)
    script = textwrap.dedent(f"""
        import resource, torch
        from pathlib import Path
        from megactx import checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, {resource.RLIM_INFINITY}))
        try:
            model = {{"a": torch.zeros(100_000)}}
            checkpoint.save(Path({str(tmp_path)!r}), 2, model=model, optimizer={{}}, state={STATE!r})
        except checkpoint.MegactxError as error:
            print(error)
    """)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "cannot save" in result.stdout
    assert "last good checkpoint: step-00000001" in result.stdout
    assert len(result.stdout.splitlines()) == 1
    assert checkpoint.load(checkpoint.find(tmp_path)).model["a"][0, 0].item() == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_too_little_room_is_said_in_figures_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(MegactxError, match=r"no space left: the checkpoint needs .* MiB, 0.0 MiB are free"):
        write(tmp_path, 2)
    assert checkpoint.find(tmp_path).name == "step-00000001"


def test_a_file_that_is_not_safetensors_is_refused_even_with_the_right_checksum(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / checkpoint.MODEL).write_bytes(b"\x80\x04not a tensor file")
    files = {
        n: {"bytes": (path / n).stat().st_size, "sha256": sha256_of(path / n)}
        for n in checkpoint.CONTENT
    }
    manifest = json.loads((path / checkpoint.MANIFEST).read_text()) | {"files": files}
    (path / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(checkpoint.Damaged, match="cannot be read"):
        checkpoint.load(path)


@pytest.mark.slow
def test_kill_9_at_any_time_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    """A process that only saves is killed at 12 random moments; each time the newest checkpoint is whole."""
    script = textwrap.dedent(f"""
        import itertools, torch
        from pathlib import Path
        from megactx import checkpoint
        for step in itertools.count(START):
            model = {{"a": torch.full((300_000,), float(step))}}
            checkpoint.save(Path({str(tmp_path)!r}), step, model=model, optimizer={{}}, state={STATE!r})
            print(step, flush=True)
    """)
    generator = torch.Generator().manual_seed(3)
    start = 1
    for _ in range(12):
        code = script.replace("START", str(start))
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        process.stdout.readline()  # it is saving by now
        time.sleep(0.05 * float(torch.rand((), generator=generator)))
        os.kill(process.pid, signal.SIGKILL)
        reported = [int(line) for line in process.stdout.read().split()]
        process.stdout.close()
        process.wait()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = checkpoint.load(checkpoint.find(tmp_path))
        assert found.step >= max(reported, default=start)
        assert torch.equal(found.model["a"], torch.full((300_000,), float(found.step)))
        start = found.step + 1
