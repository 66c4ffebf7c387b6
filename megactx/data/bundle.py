"""A dataset bundle on disk: `manifest.json` and one sub-folder per context with `train.bin`, `val.bin` and `meta.json`.

The ids are bare little-endian uint16 (up to 65,536 symbols, inclusive) or uint32. All contexts of a bundle are
aligned: token i of each talks about the same place, and train and validation are cut at the same place. The manifest
is the one source of names, order, sizes and hashes; a context's `meta.json` is its entry in the manifest, so that the
sub-folder can be used alone. Whatever does not fit together is refused by the name of the context.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from megactx.data.entropy import entropies
from megactx.data.numeric import NumericScale, measure_scale
from megactx.data.tokenizers import Tokenizer, tokenizer_from_json
from megactx.errors import MegactxError
from megactx.files import read_json, sha256_of

FORMAT, VERSION = "megactx-bundle", 1
MANIFEST, META = "manifest.json", "meta.json"
SHARDS = "shards.json"  # in its place: a folder of shards (`megactx.data.shards`)
Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = get_args(Split)
Array = NDArray[Any]
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_SCAN = 1 << 24


def dtype_for(vocab_size: int) -> str:
    """The name of the narrowest id type: ids stop at vocab_size - 1, so 65,536 symbols still fit uint16."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True)
class ContextInfo:
    """What a bundle (and a checkpoint) records about one context.

    `vocab_size` is the number of codes of a numeric context. `tokenizer` goes to `tokenizer_from_json`. `derived` is
    None or `{"from": main context, "function": ..., "args": {...}}`. `entropy` holds nats (`unigram`, `bigram`) and
    `_bits` of the training split, for numeric contexts also `variance` in raw units; it is empty where nobody
    counted (shards of others).
    """

    name: str
    kind: Literal["categorical", "numeric"]
    vocab_size: int
    dtype: str
    tokenizer: dict[str, Any]
    numeric: NumericScale | None
    derived: dict[str, Any] | None
    tokens: dict[str, int]
    sha256: dict[str, str]
    entropy: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ContextInfo:
        """The inverse of `to_json`; a missing or wrong entry is named."""
        if not isinstance(data, dict) or not isinstance(data.get("name"), str):
            raise MegactxError("a context of the manifest has no name")
        name = check_name(data["name"])
        wrong = sorted({field.name for field in fields(cls)} ^ set(data))
        if wrong:
            raise MegactxError(f"context {name!r}: the manifest entry lacks or does not know {', '.join(wrong)}")
        for path, kinds in _ENTRY.items():
            _check_entry(name, data, path, kinds)
        for measure in data["entropy"]:
            _check_entry(name, data, f"entropy.{measure}", (int, float))
        if data["numeric"] is not None:
            for field in fields(NumericScale):
                _check_entry(name, data, f"numeric.{field.name}", (int, float))
        info = cls(**{**data, "numeric": NumericScale(**data["numeric"]) if data["numeric"] else None})
        if info.kind not in ("categorical", "numeric") or (info.kind == "numeric") != (info.numeric is not None):
            raise MegactxError(f"context {name!r}: kind {info.kind!r} and numeric scale do not fit together")
        if info.vocab_size < 1:
            raise MegactxError(f"context {name!r}: vocab_size must be a positive whole number, got {info.vocab_size!r}")
        if info.dtype not in DTYPES or info.vocab_size > 1 << 8 * DTYPES[info.dtype].itemsize:
            raise MegactxError(f"context {name!r}: dtype {info.dtype!r} cannot hold {info.vocab_size} symbols")
        return info

    def load_tokenizer(self) -> Tokenizer:
        return tokenizer_from_json(self.tokenizer)


# What an entry of the manifest holds, down to the values that are used without another look.
_ENTRY: dict[str, tuple[type, ...]] = {
    "vocab_size": (int,),
    "dtype": (str,),
    "tokenizer.kind": (str,),
    "numeric": (dict, type(None)),
    "derived": (dict, type(None)),
    "tokens.train": (int,),
    "tokens.val": (int,),
    "sha256.train": (str,),
    "sha256.val": (str,),
    "entropy": (dict,),
}


def _check_entry(name: str, data: dict[str, Any], path: str, kinds: tuple[type, ...]) -> None:
    value: Any = data
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise MegactxError(f"context {name!r}: {path} of the manifest entry is {reprlib.repr(value)}")


def measure_context(
    name: str,
    kind: Literal["categorical", "numeric"],
    vocab_size: int,
    tokenizer: dict[str, Any],
    arrays: Sequence[Array],
    *,
    grid: tuple[float, float] | None = None,
    derived: dict[str, Any] | None = None,
    sha256: dict[str, str] | None = None,
) -> ContextInfo:
    """The `ContextInfo` of the id arrays `(train, val)`; `grid` is (minimum, step) of a numeric context."""
    train, val = arrays
    for split, array in zip(SPLITS, arrays, strict=True):
        if array.size < 2:
            raise MegactxError(f"context {name!r}: the {split} split has {array.size} tokens, expected at least 2")
        if int(array.max()) >= vocab_size:
            raise MegactxError(
                f"context {name!r}: id {int(array.max())} in the {split} split is outside the vocabulary of "
                f"{vocab_size}"
            )
    entropy = entropies(train, vocab_size)
    numeric = None
    if kind == "numeric":
        numeric = measure_scale(train, *(grid or (0.0, 1.0)))
        entropy["variance"] = float((np.std(train, dtype=np.float64) * numeric.step) ** 2)
    return ContextInfo(
        name,
        kind,
        vocab_size,
        dtype_for(vocab_size),
        tokenizer,
        numeric,
        derived,
        {"train": train.size, "val": val.size},
        sha256 or {},
        entropy,
    )


def contexts_from_manifest(manifest: dict[str, Any]) -> tuple[ContextInfo, ...]:
    """The contexts of a manifest, in order, as `Bundle.manifest_json` gave it."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise MegactxError(f"not a {FORMAT} manifest")
    if manifest.get("version") != VERSION:
        raise MegactxError(
            f"manifest version {manifest.get('version')!r} is not {VERSION}: made by another version of megactx"
        )
    entries = manifest.get("contexts")
    if not isinstance(entries, list) or not entries:
        raise MegactxError("the manifest lists no contexts")
    contexts = tuple(map(ContextInfo.from_json, entries))
    refuse_duplicates([info.name for info in contexts])
    return contexts


def check_name(name: str) -> str:
    """`name`, if it can be a folder on disk and a key on the command line."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_+-]{0,63}", name):
        raise MegactxError(f"context name {name!r}: expected 1 to 64 letters, digits, '_', '+' or '-'")
    return name


def refuse_duplicates(names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise MegactxError(f"context {name!r} is listed twice")


class Bundle:
    """Aligned contexts, open for reading. `arrays` holds, per split, one id array per context."""

    def __init__(
        self, path: Path, contexts: tuple[ContextInfo, ...], manifest: dict[str, Any], arrays: dict[Split, list[Array]]
    ) -> None:
        refuse_duplicates([info.name for info in contexts])
        self.path, self.contexts, self.manifest, self._arrays = path, contexts, manifest, arrays
        for split in SPLITS:
            self._refuse_misaligned(split)

    @classmethod
    def open(cls, path: str | Path, *, names: Sequence[str] | None = None, verify: bool = False) -> Bundle:
        """Open a bundle folder, or a folder of shards; `names` picks contexts and their order.

        Sizes are always checked. `verify` also reads every file: content hashes and the largest id. All damage is
        named in one MegactxError.
        """
        path = Path(path)
        if not path.is_dir():
            raise MegactxError(f"no dataset bundle at {path}: expected a folder written by 'megactx prepare'")
        if (path / SHARDS).is_file():
            from megactx.data.shards import ShardSet  # it builds on this module

            return ShardSet.open(path, names=names, verify=verify)
        manifest = read_json(path / MANIFEST)
        try:
            contexts = contexts_from_manifest(manifest)
        except MegactxError as error:
            raise MegactxError(f"{path / MANIFEST}: {error}") from None
        if names is not None:
            contexts = _select(contexts, names)
            manifest = {**manifest, "contexts": [info.to_json() for info in contexts]}
        folders = [path / info.name for info in contexts]
        problems = [
            problem
            for folder, info in zip(folders, contexts, strict=True)
            for problem in find_damage(folder, info, contents=verify)
        ]
        if problems:
            raise MegactxError(f"{path}: {'; '.join(problems)}")
        return cls(path, contexts, manifest, _map_all(folders, contexts))

    @classmethod
    def from_folders(cls, paths: Sequence[str | Path], *, numerical: bool = False) -> Bundle:
        """Contexts from several folders, in the order given.

        Each path is a bundle (all its contexts), a context sub-folder of one, or a folder of the nanoGPT family
        (`train.bin`, `val.bin`, `meta.pkl`); one that does not exist is also looked for with a leading `data/` added
        or taken away. `numerical` reads whole-number contexts as numeric ones.
        """
        from megactx.data.legacy import open_folders  # it builds on this module

        return open_folders(paths, numerical=numerical)

    def split(self, name: Split) -> list[Array]:
        """One read-only id array per context, in order, all of one length."""
        if name not in SPLITS:
            raise ValueError(f"split must be 'train' or 'val', got {name!r}")
        return self._arrays[name]

    def length(self, split: Split) -> int:
        """Tokens of each context in `split`."""
        return int(self.split(split)[0].size)

    def context(self, name: str) -> ContextInfo:
        return _select(self.contexts, [name])[0]

    def manifest_json(self) -> dict[str, Any]:
        """What a checkpoint embeds: everything needed to read prompts and to print samples without the bundle."""
        return {**self.manifest, "contexts": [info.to_json() for info in self.contexts]}

    @property
    def source(self) -> dict[str, Any]:
        """Where the data came from, as `prepare` noted it."""
        found = self.manifest.get("source")
        return found if isinstance(found, dict) else {}

    def _refuse_misaligned(self, split: Split) -> None:
        arrays = self._arrays[split]
        for info, array in zip(self.contexts, arrays, strict=True):
            if array.size != arrays[0].size:
                raise MegactxError(
                    f"context {info.name!r} has {array.size} tokens in the {split} split, context "
                    f"{self.contexts[0].name!r} has {arrays[0].size}: contexts must be aligned"
                )


def _select(contexts: tuple[ContextInfo, ...], names: Sequence[str]) -> tuple[ContextInfo, ...]:
    refuse_duplicates(names)
    by_name = {info.name: info for info in contexts}
    for name in names:
        if name not in by_name:
            raise MegactxError(f"there is no context {name!r} (contexts: {', '.join(by_name)})")
    return tuple(by_name[name] for name in names)


def _map_all(folders: Sequence[Path], contexts: Sequence[ContextInfo]) -> dict[Split, list[Array]]:
    pairs = list(zip(folders, contexts, strict=True))
    return {split: [map_ids(folder / f"{split}.bin", info.dtype) for folder, info in pairs] for split in SPLITS}


def map_ids(path: Path, dtype: str) -> Array:
    """A read-only memory map of a non-empty id file."""
    return np.memmap(path, dtype=DTYPES[dtype], mode="r")


def find_damage(folder: Path, info: ContextInfo, *, contents: bool) -> list[str]:
    """What is wrong with one context's files, each problem a phrase that begins with its name. Empty: nothing.

    `contents` also reads the files: hashes, and ids against the vocabulary."""
    problems = []
    if contents and read_json(folder / META) != info.to_json():
        problems.append(f"context {info.name!r}: {META} differs from the manifest")
    width = DTYPES[info.dtype].itemsize
    for split in SPLITS:
        path = folder / f"{split}.bin"
        label = f"context {info.name!r}: {path.name}"
        if not path.is_file():
            problems.append(f"{label} is missing")
            continue
        size, expected = path.stat().st_size, info.tokens[split] * width
        if size != expected or size == 0:
            problems.append(
                f"{label} has {size} bytes, expected {expected} ({info.tokens[split]} tokens of {info.dtype})"
            )
        elif contents:
            if sha256_of(path) != info.sha256.get(split):
                problems.append(f"{label} does not match its recorded SHA-256")
            ids = map_ids(path, info.dtype)
            largest = max(int(ids[at : at + _SCAN].max()) for at in range(0, ids.size, _SCAN))
            if largest >= info.vocab_size:
                problems.append(f"{label} holds id {largest}, outside the vocabulary of {info.vocab_size}")
    return problems
