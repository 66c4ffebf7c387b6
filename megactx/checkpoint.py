"""Checkpoints that survive `kill -9`, a full disk and a flipped bit.

One folder a step, `step-00000123/`, holds plain safetensors and JSON, never a pickle:

    model.safetensors       parameters                        (fp32 masters)
    optimizer.safetensors   optimizer moments and the RNG states of each process
    state.json              step, model config, bundle manifest with its tokenizers, run settings
    MANIFEST.json           size and sha256 of the three files above, written last

A save writes into a hidden sibling folder, syncs every file and the folder, and only then renames it into place, so
a folder named `step-*` is either whole or was damaged afterwards. Readers do not trust names: `find` takes the newest
step whose checksums hold and says once for each one it had to pass over.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megactx.errors import MegactxError
from megactx.files import read_json, sha256_of, sync, write_json

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "megactx-checkpoint"
VERSION = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"
CONTENT = (MODEL, OPTIMIZER, STATE)
_STEP_NAME = re.compile(r"^step-(\d{8,})$")


class Damaged(MegactxError):
    """A checkpoint folder whose content is not what was written into it."""


class Checkpoint(NamedTuple):
    """What `load` returns; `optimizer` is empty unless it was asked for."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def step_folders(out_dir: Path) -> list[Path]:
    """The `step-*` folders below `out_dir`, newest step first, whatever their condition."""
    if not out_dir.is_dir():
        return []
    found = [path for path in out_dir.iterdir() if path.is_dir() and _STEP_NAME.search(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def is_step_folder(path: Path) -> bool:
    """Whether `path` itself is a checkpoint, whole or damaged. What lies in it decides, not its name."""
    return any((path / name).is_file() for name in (MANIFEST, MODEL))


def _step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def verify(path: Path, *, contents: bool = True) -> None:
    """Checks a checkpoint folder: every file's size and, unless `contents` is False, its sha256 and the step.

    Raises:
        Damaged: a file is missing, truncated or altered, or the folder bears another step's name.
        MegactxError: the folder was written by another version of the format.
    """
    try:
        manifest = read_json(path / MANIFEST)
    except MegactxError as error:
        raise Damaged(f"checkpoint {path}: {error}") from None
    version, files = manifest.get("version"), manifest.get("files")
    if manifest.get("format") != FORMAT or not isinstance(version, int):
        raise Damaged(f"checkpoint {path}: {MANIFEST} is not that of a {FORMAT}")
    if version != VERSION:
        raise MegactxError(f"checkpoint {path}: expected version {VERSION} of {FORMAT}, got version {version}")
    for name in CONTENT:
        expected = files.get(name) if isinstance(files, dict) else None
        if not isinstance(expected, dict):
            raise Damaged(f"checkpoint {path}: {MANIFEST} does not list {name}")
        try:
            size = (path / name).stat().st_size
            digest = sha256_of(path / name) if contents else expected.get("sha256")
        except OSError as error:
            raise Damaged(f"checkpoint {path}: {name} cannot be read ({error.strerror})") from None
        if size != expected.get("bytes"):
            raise Damaged(f"checkpoint {path}: {name} has {size} bytes, expected {expected.get('bytes')}")
        if digest != expected.get("sha256"):
            raise Damaged(f"checkpoint {path}: the sha256 of {name} is not the one recorded in {MANIFEST}")
    if contents and _STEP_NAME.search(path.name) and read_json(path / STATE).get("step") != _step_of(path):
        raise Damaged(f"checkpoint {path}: it holds another step than its name says")


def find(out_dir: Path) -> Path:
    """The newest valid checkpoint of a run, or `out_dir` itself when it is a step folder.

    Warns once for each newer folder that had to be passed over.

    Raises:
        MegactxError: no folder, no checkpoint in it, none of them valid, or the newest is of another version.
    """
    out_dir = Path(out_dir)
    if is_step_folder(out_dir):
        verify(out_dir)
        return out_dir
    if not out_dir.is_dir():
        raise MegactxError(f"out_dir: expected a folder with checkpoints, got {str(out_dir)!r}, which does not exist")
    damaged = []
    for path in step_folders(out_dir):
        try:
            verify(path)
        except Damaged as error:
            damaged.append(error)
        else:
            for problem in damaged:
                warnings.warn(f"{problem}; falling back to {path.name}", stacklevel=2)
            return path
    if damaged:
        raise MegactxError(f"{damaged[0]}; no older checkpoint in {out_dir} is valid")
    raise MegactxError(f"out_dir: no checkpoint (step-*) in {str(out_dir)!r}")


def load(path: Path, *, optimizer: bool = False) -> Checkpoint:
    """Reads one step folder, which `find` has verified, onto the CPU."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    try:
        state = read_json(path / STATE)
        model = load_file(path / MODEL)
        moments = load_file(path / OPTIMIZER) if optimizer else {}
    except (OSError, SafetensorError) as error:
        raise Damaged(f"checkpoint {path} cannot be read ({error})") from None
    missing = [name for name in ("step", "model_config", "manifest") if name not in state]
    if missing:
        raise Damaged(f"checkpoint {path}: {STATE} lacks {', '.join(missing)}")
    return Checkpoint(path, state["step"], model, moments, state)


def save(
    out_dir: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Writes `out_dir/step-XXXXXXXX` so that a crash at any instant leaves either the whole folder or none.

    Older steps beyond the newest `keep` (at least 2: a lone checkpoint has nothing to fall back to) are removed, but
    only after the new one is in place. A valid folder of the same step is left as it is, damaged ones of earlier steps
    do not count.

    Raises:
        MegactxError: the disk is full or refuses to be written; everything saved before is untouched.
    """
    if keep < 2:
        raise ValueError(f"keep: expected at least 2, got {keep}")
    out_dir = Path(out_dir)
    target = out_dir / f"step-{step:08d}"
    temporary = out_dir / f".saving-step-{step:08d}"
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        if _is_valid(target):
            return target
        _sweep(out_dir)
        _check_room(out_dir, model, optimizer)
        _write_folder(temporary, step, model, optimizer, state)
        if target.exists():  # a damaged folder of the same step: out of the way, it is worth nothing
            shutil.rmtree(target)
        temporary.rename(target)
        sync(out_dir)
        _prune(out_dir, step, keep)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = next((p.name for p in step_folders(out_dir) if _is_valid(p)), "none")
        reason = error.strerror or error
        raise MegactxError(f"cannot save {target}: {reason}; last good checkpoint: {last}") from error
    return target


def _prune(out_dir: Path, step: int, keep: int) -> None:
    """Removes what is older than the newest `keep` usable steps. Later steps than `step` are damaged ones that a resume
    fell back from; they are replaced when the run gets there."""
    past = [path for path in step_folders(out_dir) if _step_of(path) <= step]
    usable = [path for path in past if _is_valid(path, contents=False)]  # hashing gigabytes again would cost seconds
    for path in past:
        if path not in usable[:keep]:
            shutil.rmtree(path, ignore_errors=True)


def _write_folder(
    folder: Path, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    folder.mkdir()
    _write_tensors(folder / MODEL, model)
    _write_tensors(folder / OPTIMIZER, optimizer)
    write_json(folder / STATE, {**state, "step": step})
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)} for name in CONTENT}
    write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, "files": files})
    sync(folder)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Clones, because an optimizer may hand out views of one buffer and safetensors stores no aliases.
    plain = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    path.touch()
    mode = path.stat().st_mode  # what the user's umask allows; the library would leave 0600
    try:
        save_file(plain, path)
    except SafetensorError as error:  # the library wraps the operating system's error in its own type
        raise OSError(str(error)) from error
    path.chmod(mode)
    sync(path)


def _check_room(out_dir: Path, *groups: Mapping[str, Tensor]) -> None:
    needed = sum(t.numel() * t.element_size() for group in groups for t in group.values()) + (1 << 16)
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        raise OSError(f"no space left: the checkpoint needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free")


def _sweep(out_dir: Path) -> None:
    """Removes what a killed save left behind; its name says that it was never finished."""
    for stale in out_dir.glob(".saving-step-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _is_valid(path: Path, *, contents: bool = True) -> bool:
    with contextlib.suppress(MegactxError):
        verify(path, contents=contents)
        return True
    return False
