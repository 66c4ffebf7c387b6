"""Checkpoints that survive `kill -9`, a full disk and a flipped bit.

One folder a step, `step-00000123/`, holds plain safetensors and JSON, never a pickle:

    model.safetensors       parameters                        (fp32 masters)
    optimizer.safetensors   optimizer moments and RNG states
    state.json              model config, bundle manifest with its tokenizers, data position, run settings
    MANIFEST.json           size and sha256 of the three files above, written last

A save writes into a hidden sibling folder, syncs every file and the folder, and only then renames it into place, so
a folder named `step-*` is either whole or was damaged afterwards. Readers do not trust names: `find` takes the newest
step whose checksums hold and says once for each one it had to pass over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import struct
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megactx.errors import MegactxError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "megactx-checkpoint"
VERSION = 1
MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"
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
    found = [(int(m.group(1)), p) for p in out_dir.iterdir() if p.is_dir() and (m := _STEP_NAME.search(p.name))]
    return [path for _, path in sorted(found, reverse=True)]


def verify(path: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint folder after checking every file's size and sha256.

    Raises:
        Damaged: a file is missing, truncated or altered.
        MegactxError: the folder was written by another version of the format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        version, files = manifest["version"], dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"checkpoint {path}: {MANIFEST} cannot be read ({_reason(error)})") from None
    if manifest.get("format") != FORMAT or version != VERSION:
        raise MegactxError(
            f"checkpoint {path}: expected format {FORMAT!r} version {VERSION}, "
            f"got {manifest.get('format')!r} version {version!r}"
        )
    for name in (MODEL, OPTIMIZER, STATE):
        expected = files.get(name)
        if not isinstance(expected, dict):
            raise Damaged(f"checkpoint {path}: {MANIFEST} does not list {name}")
        try:
            size, digest = (path / name).stat().st_size, _sha256(path / name)
        except OSError as error:
            raise Damaged(f"checkpoint {path}: {name} cannot be read ({_reason(error)})") from None
        if size != expected.get("bytes"):
            raise Damaged(f"checkpoint {path}: {name} has {size} bytes, expected {expected.get('bytes')}")
        if digest != expected.get("sha256"):
            raise Damaged(f"checkpoint {path}: the sha256 of {name} is not the one recorded in {MANIFEST}")
    return manifest


def find(out_dir: Path) -> Path:
    """The newest valid checkpoint of a run, or `out_dir` itself when it is a step folder.

    Warns once for each newer folder that had to be passed over.

    Raises:
        MegactxError: no folder, no checkpoint in it, none of them valid, or the newest is of another version.
    """
    out_dir = Path(out_dir)
    if (out_dir / MANIFEST).exists() or _STEP_NAME.search(out_dir.name):
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
    """Reads one step folder onto the CPU. The caller has it from `find`, which verified it."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    try:
        step = int(json.loads((path / MANIFEST).read_text())["step"])
        state = json.loads((path / STATE).read_text())
        model = load_file(path / MODEL)
        moments = load_file(path / OPTIMIZER) if optimizer else {}
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Damaged(f"checkpoint {path} cannot be read ({_reason(error)})") from None
    return Checkpoint(path, step, model, moments, state)


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
    only after the new one is in place. A valid folder of the same step is left as it is.

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
        _sync(out_dir)
        # Folders of later steps are damaged ones that a resume fell back from: they do not count as a fallback.
        for old in [p for p in step_folders(out_dir) if p.name <= target.name][keep:]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        last = next((p.name for p in step_folders(out_dir) if _is_valid(p)), "none")
        raise MegactxError(f"cannot save {target}: {_reason(error)}; last good checkpoint: {last}") from error
    return target


def _write_folder(
    folder: Path, step: int, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: Mapping[str, Any]
) -> None:
    folder.mkdir()
    _write_tensors(folder / MODEL, model)
    _write_tensors(folder / OPTIMIZER, optimizer)
    _write_json(folder / STATE, state)
    content = (MODEL, OPTIMIZER, STATE)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _sha256(folder / name)} for name in content}
    _write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, "step": step, "files": files})
    _sync(folder)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Clones, because an optimizer may hand out views of one buffer and safetensors stores no aliases.
    plain = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    try:
        save_file(plain, path)
    except SafetensorError as error:  # the library wraps the operating system's error in its own type
        raise OSError(str(error)) from error
    _sync(path)


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())


def _check_room(out_dir: Path, *groups: Mapping[str, Tensor]) -> None:
    needed = sum(t.numel() * t.element_size() for group in groups for t in group.values()) + (1 << 16)
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        raise OSError(f"no space left: the checkpoint needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free")


def _sweep(out_dir: Path) -> None:
    """Removes what a killed save left behind; its name says that it was never finished."""
    for stale in out_dir.glob(".saving-step-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _is_valid(path: Path) -> bool:
    with contextlib.suppress(MegactxError):
        verify(path)
        return True
    return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """fsync of a file or of a folder: a rename is durable only when the folder that holds the name is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror
    elif isinstance(error, struct.error | KeyError):
        text = f"missing {text}"
    return text or type(error).__name__
