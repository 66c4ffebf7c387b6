"""Where the text of a main context comes from: files and folders, or the standard library of the Python that runs.

Documents are joined by one NUL: a byte that neither text nor Python source contains, so every document boundary can
be seen in the stream itself, by the model and by the derivations, which start afresh there.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megactx.errors import MegactxError

SEPARATOR = b"\0"
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """The joined bytes of all documents, and the note on their origin that the manifest keeps."""

    data: bytes
    source: dict[str, Any]

    def text(self) -> str:
        """The corpus as characters."""
        return self.data.decode("utf-8")


def read_files(
    paths: Sequence[str | Path], pattern: str = "*", max_bytes: int | None = None, *, utf8: bool = False
) -> Corpus:
    """Text files, and the files in folders whose name matches `pattern`, each folder in sorted order of relative paths.

    In folders hidden files and files that contain a NUL (binary ones) are left out. `utf8` refuses what is not UTF-8 by
    its file name.
    """
    documents: list[bytes] = []
    left_out = 0
    for path in map(Path, paths):
        if path.is_dir():
            found = [(file, _read(file)) for file in _inside(path, pattern)]
            kept = [(file, data) for file, data in found if SEPARATOR not in data]
            left_out += len(found) - len(kept)
        elif path.exists():
            kept = [(path, _read(path))]
        else:
            raise MegactxError(f"input file {path} does not exist")
        for file, data in kept:
            if utf8:
                _refuse_undecodable(file, data)
            if data:
                documents.append(data)
    return _join(documents, {"kind": "files", "files": len(documents), "left_out": left_out}, max_bytes)


def _inside(folder: Path, pattern: str) -> list[Path]:
    try:
        files = [(file.relative_to(folder), file) for file in folder.rglob(pattern) if file.is_file()]
    except (NotImplementedError, ValueError):
        raise MegactxError(f"glob: expected a relative pattern such as '*.txt', got {pattern!r}") from None
    files = sorted((inner, file) for inner, file in files if not any(part.startswith(".") for part in inner.parts))
    if not files:
        raise MegactxError(f"input folder {folder} has no file that matches {pattern!r}")
    return [file for _, file in files]


def _refuse_undecodable(file: Path, data: bytes) -> None:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MegactxError(
            f"input file {file} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; only the byte "
            f"tokenizer reads it"
        ) from None


def read_python_stdlib(max_bytes: int | None = None) -> Corpus:
    """The Python source of the standard library.

    In the order of the hashes of the relative paths: fixed, but mixed, so that the end of the corpus (the validation
    split) and its beginning (`max_bytes`) are fair samples of it. Alphabetical order would validate on the test
    suite. Files that are not UTF-8 text (a few fixtures of that test suite) are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for file in root.rglob("*.py") if not _NOT_LIBRARY & set(file.relative_to(root).parts)]
    files.sort(
        key=lambda file: hashlib.sha256(file.relative_to(root).as_posix().encode("utf-8", "surrogateescape")).digest()
    )
    documents: list[bytes] = []
    left_out = total = 0
    for file in files:
        if max_bytes is not None and total > max_bytes:
            break
        data = _read(file)
        total += len(data)
        if _is_text(data):
            documents.append(data)
        else:
            left_out += bool(data)
    if not documents:
        raise MegactxError(f"the standard library at {root} holds no Python source")
    source = {
        "kind": "python-stdlib",
        "python": sysconfig.get_python_version(),
        "files": len(documents),
        "left_out": left_out,
    }
    return _join(documents, source, max_bytes)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MegactxError(f"cannot read {path}: {error.strerror}") from None


def _is_text(data: bytes) -> bool:
    if not data or SEPARATOR in data:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _join(documents: Iterable[bytes], source: dict[str, Any], max_bytes: int | None) -> Corpus:
    if max_bytes is not None and max_bytes < 1:
        raise MegactxError(f"max_bytes must be at least 1, got {max_bytes}")
    data = SEPARATOR.join(documents)
    if max_bytes is not None and len(data) > max_bytes:
        data = _cut(data, max_bytes)
    if not data:
        raise MegactxError(f"the input is empty: {source['files']} files with text in it ({source['kind']})")
    return Corpus(data, {**source, "bytes": len(data)})


def _cut(data: bytes, limit: int) -> bytes:
    """At most `limit` bytes, not ending inside a UTF-8 character (where it is one)."""
    end = limit
    while end > max(0, limit - 3) and data[end] & 0xC0 == 0x80:
        end -= 1
    return data[: end if data[end] & 0xC0 != 0x80 else limit]


SOURCES: dict[str, Callable[[int | None], Corpus]] = {"python-stdlib": read_python_stdlib}
