"""Shards: files of token ids with a header, as the nanoGPT speed-run family (and llm.c) write them.

    256 little-endian int32: magic 20240520, version 1, the number of tokens, then zeros
    that many little-endian uint16 ids

The Llama-3 form of the same family (magic 20240801, version 7, uint32 ids) is read too. A shard says how long it is,
so a download that was cut short is found before it is trained on; whatever does not fit is refused with the file's
name, what was found and what was expected.
"""

from __future__ import annotations

import glob
import hashlib
import os
import stat
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megactx.data.bundle import DTYPES
from megactx.errors import MegactxError

Array = NDArray[Any]
Paths = str | Path | Sequence[str | Path]

MAGIC, VERSION = 20240520, 1
FORMATS = {MAGIC: (VERSION, "uint16"), 20240801: (7, "uint32")}  # magic: (version, type of the ids)
HEADER_WORDS = 256
HEADER_BYTES = 4 * HEADER_WORDS
MAX_TOKENS = (1 << 31) - 1  # the header counts in int32
_CHUNK = 1 << 22
_ENDS = 1 << 16
_OPEN = 32


@dataclass(frozen=True)
class Shard:
    """A shard whose header and size agree."""

    path: Path
    tokens: int
    dtype: str

    def map(self) -> Array:
        """A read-only memory map of its ids."""
        try:
            return np.asarray(np.memmap(self.path, DTYPES[self.dtype], "r", HEADER_BYTES, (self.tokens,)))
        except (OSError, ValueError) as error:  # it was whole when its header was read
            raise MegactxError(f"shard {self.path} cannot be mapped any more: {error}") from None

    def largest(self) -> int:
        """The largest id in it: reads the file."""
        ids = self.map()
        return max(int(ids[at : at + _CHUNK].max()) for at in range(0, self.tokens, _CHUNK))

    def count(self, token: int) -> int:
        """How often it holds `token`: reads the file."""
        ids = self.map()
        return sum(int((ids[at : at + _CHUNK] == token).sum()) for at in range(0, self.tokens, _CHUNK))

    def digest(self) -> str:
        """SHA-256 of the name, the header and the first and last 64 KiB: tells shards apart without reading all."""
        size = self.path.stat().st_size
        found = hashlib.sha256(f"{self.path.name} {size} ".encode())
        with open(self.path, "rb") as file:
            found.update(file.read(HEADER_BYTES + _ENDS))
            file.seek(max(0, size - _ENDS))
            found.update(file.read())
        return found.hexdigest()


def read_shard(path: str | Path) -> Shard:
    """The shard at `path`, its header checked against the size of the file."""
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # to open a pipe would wait for whoever writes to it
            raise MegactxError(f"shard {path} is no regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = np.frombuffer(file.read(HEADER_BYTES), np.uint8)
    except FileNotFoundError:
        raise MegactxError(f"shard {path} does not exist") from None
    except OSError as error:
        raise MegactxError(f"shard {path} cannot be read: {error.strerror}") from None
    if size == 0:
        raise MegactxError(f"shard {path} is empty: expected a header of {HEADER_BYTES} bytes and tokens")
    words = header[: header.size // 4 * 4].view("<i4")
    if words.size == 0 or int(words[0]) not in FORMATS:
        found = f"begins with {int(words[0])}" if words.size else f"has {size} bytes"
        raise MegactxError(
            f"shard {path} {found}, expected the magic number {MAGIC}; a file of bare uint16 ids (train.bin of the "
            f"nanoGPT family) has no header: give its folder to 'megactx prepare --from_folders'"
        )
    version, dtype = FORMATS[int(words[0])]
    if words.size < HEADER_WORDS:
        raise MegactxError(f"shard {path} has {size} bytes: its header of {HEADER_BYTES} bytes is cut short")
    if int(words[1]) != version:
        raise MegactxError(f"shard {path} has version {int(words[1])}, expected {version}")
    tokens = int(words[2])
    if tokens < 1:
        raise MegactxError(f"shard {path} holds {tokens} tokens by its header, expected at least 1")
    _check_size(path, size - HEADER_BYTES, tokens, dtype)
    return Shard(path, tokens, dtype)


def _check_size(path: Path, size: int, tokens: int, dtype: str) -> None:
    width = DTYPES[dtype].itemsize
    if size == tokens * width:
        return
    torn = f" and {size % width} byte{'s' * (size % width > 1)} of another" if size % width else ""
    raise MegactxError(
        f"shard {path} holds {size // width} tokens{torn} behind its header, which says {tokens}: "
        + ("its end is missing" if size < tokens * width else "there is more than it should hold")
    )


def write_shard(path: str | Path, ids: Array) -> str:
    """Writes a shard of uint16 ids (any one-dimensional array of whole numbers in 0..65535), synced to disk.

    Returns the SHA-256 of the file. To have it whole or not at all, write under another name and rename.
    """
    path = Path(path)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise MegactxError(f"shard {path}: expected whole numbers [n], got {ids.dtype} {list(ids.shape)}")
    if not 1 <= ids.size <= MAX_TOKENS:
        raise MegactxError(f"shard {path}: expected 1 to {MAX_TOKENS} tokens, got {ids.size}")
    header = np.zeros(HEADER_WORDS, "<i4")
    header[:3] = MAGIC, VERSION, ids.size
    digest = hashlib.sha256(header.data)
    with open(path, "wb") as file:
        file.write(header.data)
        for at in range(0, ids.size, _CHUNK):
            block = ids[at : at + _CHUNK]
            low, high = int(block.min()), int(block.max())
            if low < 0 or high > 0xFFFF:
                raise MegactxError(f"shard {path}: id {low if low < 0 else high} does not fit uint16")
            raw = np.ascontiguousarray(block, dtype=DTYPES["uint16"]).data.cast("B")
            digest.update(raw)
            file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def find_shards(source: Paths) -> list[Path]:
    """The files that `source` names (a path, a glob, or several of them), sorted; none twice."""
    entries = [source] if isinstance(source, (str, Path)) else list(source)
    found: list[Path] = []
    for entry in map(str, entries):
        if not glob.has_magic(entry) or os.path.exists(entry):
            found.append(Path(entry))
            continue
        matches = [Path(name) for name in glob.glob(entry, recursive=True) if not os.path.isdir(name)]
        if not matches:
            raise MegactxError(f"no shard matches {entry!r}")
        found += matches
    if not found:
        raise MegactxError("no shards were given")
    found.sort()
    seen: set[str] = set()
    for path in found:
        if path.is_dir():
            raise MegactxError(f"shard {path} is a folder: name its files, as '{path / '*.bin'}'")
        real = os.path.realpath(path)  # not Path.resolve, which fails where links go round in a circle
        if real in seen:
            raise MegactxError(f"shard {path} is listed twice")
        seen.add(real)
    return found


def read_shards(
    paths: Sequence[Path], *, skip_bad: bool = False, check: Callable[[Shard], None] | None = None
) -> tuple[list[Shard], tuple[str, ...]]:
    """The shards at `paths`, and what is wrong with those left out.

    Damage (also what `check` raises) is an error that names all of it; with `skip_bad` it is a warning for each shard,
    unless none is left.
    """
    shards: list[Shard] = []
    problems: list[str] = []
    for path in paths:
        try:
            shard = read_shard(path)
            if check is not None:
                check(shard)
            shards.append(shard)
        except MegactxError as error:
            problems.append(str(error))
    if problems and not skip_bad:
        raise MegactxError("; ".join(problems))
    if not shards:
        raise MegactxError(f"all {len(paths)} shards are damaged: {problems[0]}")
    for problem in problems:
        warnings.warn(f"left out: {problem}", stacklevel=2)
    return shards, tuple(problems)


class ShardedTokens:
    """The tokens of several shards as one read-only sequence `[size]`, of which a slice is a copy.

    `ends[i]` is where shard i ends. A few shards are mapped at a time: each map holds a file descriptor, and a corpus
    of a thousand shards would use up a process's allowance.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self.ends = np.cumsum([shard.tokens for shard in self.shards], dtype=np.int64)
        self.size = int(self.ends[-1])
        self.dtype = max((DTYPES[shard.dtype] for shard in self.shards), key=lambda dtype: dtype.itemsize)
        self._maps: OrderedDict[int, Array] = OrderedDict()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: slice) -> Array:
        start, stop, step = index.indices(self.size)
        if step < 1:
            raise ValueError(f"shards are read forwards: expected a step of at least 1, got {step}")
        whole = np.empty(max(0, stop - start), self.dtype)
        at = 0
        for piece in self.pieces(start, whole.size):
            whole[at : at + piece.size] = piece
            at += piece.size
        return whole if step == 1 else whole[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        whole = self[:]
        return whole if dtype is None else whole.astype(dtype)

    def pieces(self, start: int, count: int) -> Iterator[Array]:
        """Views of `count` tokens from `start` on, one for each shard they lie in. They must lie in the sequence."""
        shard = int(np.searchsorted(self.ends, start, side="right"))
        while count > 0:
            begin = int(self.ends[shard]) - self.shards[shard].tokens
            piece = self._map(shard)[start - begin : start - begin + count]
            yield piece
            start, count, shard = start + piece.size, count - piece.size, shard + 1

    def shard_at(self, position: int) -> Shard:
        return self.shards[int(np.searchsorted(self.ends, position, side="right"))]

    def _map(self, shard: int) -> Array:
        if shard not in self._maps:
            while len(self._maps) >= _OPEN:
                self._maps.popitem(last=False)
            self._maps[shard] = self.shards[shard].map()
        self._maps.move_to_end(shard)
        return self._maps[shard]
