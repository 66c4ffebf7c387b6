"""Files that are whole or not there: the few primitives that bundles and checkpoints are written and read with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megactx.errors import MegactxError


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """fsync of a file or of a folder: a rename is durable only when the folder that holds the name is."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes and syncs. NaN and infinities are refused: they are not JSON."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def finite(value: Any) -> Any:
    """`value` with None in place of NaN and the infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`; MegactxError with the path where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MegactxError(f"{path} does not exist") from None
    except OSError as error:
        raise MegactxError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise MegactxError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise MegactxError(f"{path} does not hold a JSON object")
    return value


@contextmanager
def lock(folder: Path, purpose: str) -> Iterator[None]:
    """Holds `folder` against other processes; the lock ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MegactxError(f"{purpose}: another process is writing in {str(folder)!r}") from None
        yield
