"""Writing a bundle: everything into a temporary folder beside the target, synced, then renamed into place.

Whoever looks at the target path sees the old bundle or the complete new one, also after a full disk. A process killed
between the two renames of a replacement leaves the old bundle beside the target; the next `prepare` of that target
puts it back, and clears away what a killed one was writing. The same input gives the same bytes: nothing in a bundle
depends on the clock, the machine or the order of a directory listing.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megactx.data.bundle import (
    DTYPES,
    FORMAT,
    MANIFEST,
    META,
    SHARDS,
    SPLITS,
    VERSION,
    ContextInfo,
    check_name,
    dtype_for,
    measure_context,
    refuse_duplicates,
)
from megactx.errors import MegactxError
from megactx.files import lock, sync, write_json

Array = NDArray[Any]
_CHUNK = 1 << 22


@dataclass(frozen=True)
class NewContext:
    """A context to be written: what it is, and its ids (train, val). `grid` is (minimum, step) of a numeric context."""

    name: str
    kind: Literal["categorical", "numeric"]
    vocab_size: int
    tokenizer: dict[str, Any]
    arrays: tuple[Array, Array]
    grid: tuple[float, float] | None = None
    derived: dict[str, Any] | None = None


def split_at(length: int, val_fraction: float) -> int:
    """Where the validation split begins: its last `floor(length * val_fraction)` tokens, the same in every context."""
    if not 0 < val_fraction < 1:
        raise MegactxError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
    validation = int(length * val_fraction)
    if validation < 2 or length - validation < 2:
        raise MegactxError(
            f"{length} tokens with val_fraction {val_fraction:g} leave {length - validation} for training and "
            f"{validation} for validation: each needs at least 2"
        )
    return length - validation


def write_bundle(
    path: str | Path, contexts: Sequence[NewContext], source: dict[str, Any], *, overwrite: bool = False
) -> dict[str, Any]:
    """Write the bundle and return its manifest. An existing bundle is replaced only with `overwrite`, and only once
    the new one is complete; a folder that holds anything else is never touched."""
    check_contexts(contexts)
    return write_folder(path, lambda folder: _write_folder(folder, contexts, source), overwrite=overwrite)


def write_folder(
    path: str | Path, write: Callable[[Path], dict[str, Any]], *, overwrite: bool = False
) -> dict[str, Any]:
    """`path` as `write` makes it, which is given a folder to create beside it; that is then renamed into place."""
    path = Path(path)
    workshop = path.resolve().parent / f".{path.resolve().name}.preparing"
    try:
        with lock(workshop, "out_dir"):
            try:
                _recover(workshop, path)
                check_target(path, overwrite=overwrite)
                manifest = write(workshop / "new")
                _move_into_place(workshop, path)
            finally:
                if not (workshop / "old").exists():
                    shutil.rmtree(workshop, ignore_errors=True)
    except OSError as error:
        raise MegactxError(f"cannot write the bundle {path}: {error.strerror or error}") from error
    return manifest


def check_contexts(contexts: Sequence[NewContext]) -> None:
    if not contexts:
        raise MegactxError("a bundle needs at least one context")
    refuse_duplicates([context.name for context in contexts])
    for context in contexts:
        check_name(context.name)
        for split, array, first in zip(SPLITS, context.arrays, contexts[0].arrays, strict=True):
            if array.size != first.size:
                raise MegactxError(
                    f"context {context.name!r} has {array.size} tokens in the {split} split, context "
                    f"{contexts[0].name!r} has {first.size}: contexts must be aligned"
                )


def check_target(path: Path, *, overwrite: bool) -> None:
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir() or path.is_symlink():
        raise MegactxError(f"{path} exists and is not a folder")
    if any(path.iterdir()):
        if not any((path / name).is_file() for name in (MANIFEST, SHARDS)):
            raise MegactxError(f"{path} exists and is not a dataset bundle: choose another folder")
        if not overwrite:
            raise MegactxError(f"{path} holds a dataset bundle already: use --overwrite to replace it")


def _write_context(folder: Path, context: NewContext) -> ContextInfo:
    info = measure_context(
        context.name,
        context.kind,
        context.vocab_size,
        context.tokenizer,
        context.arrays,
        grid=context.grid,
        derived=context.derived,
    )
    folder.mkdir()
    dtype = DTYPES[dtype_for(context.vocab_size)]
    sha256: dict[str, str] = {
        split: _write_ids(folder / f"{split}.bin", array, dtype)
        for split, array in zip(SPLITS, context.arrays, strict=True)
    }
    info = replace(info, sha256=sha256)
    write_json(folder / META, info.to_json())
    sync(folder)
    return info


def _write_ids(path: Path, ids: Array, dtype: np.dtype[Any]) -> str:
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for start in range(0, ids.size, _CHUNK):
            block = np.ascontiguousarray(ids[start : start + _CHUNK], dtype=dtype).data.cast("B")
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write_folder(folder: Path, contexts: Sequence[NewContext], source: dict[str, Any]) -> dict[str, Any]:
    folder.mkdir()
    infos = [_write_context(folder / context.name, context) for context in contexts]
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "source": source,
        "tokens": infos[0].tokens,
        "contexts": [info.to_json() for info in infos],
    }
    write_json(folder / MANIFEST, manifest)
    sync(folder)
    return manifest


def _recover(workshop: Path, path: Path) -> None:
    """Undoes what a killed process left in the hidden folder beside the target: an unfinished bundle, or the old one of
    a replacement that was cut between its two renames."""
    shutil.rmtree(workshop / "new", ignore_errors=True)
    old = workshop / "old"
    if old.exists():
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)


def _move_into_place(workshop: Path, path: Path) -> None:
    """Rename, with the old bundle set aside until the new one is in place."""
    old = workshop / "old"
    if path.exists():
        path.rename(old)
    try:
        (workshop / "new").rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    sync(path.resolve().parent)
    shutil.rmtree(old, ignore_errors=True)
