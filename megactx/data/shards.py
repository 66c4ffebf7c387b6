"""A dataset in shards: one context of uint16 ids, cut into files of the form that `shard_file` describes.

`megactx prepare --shards` writes a folder of them with `shards.json`, which holds what a bundle's manifest does (the
tokenizer, sizes, hashes) and the token that stands between documents. The shards of others have no such file:
`ShardSet.from_files` takes what they cannot say from its arguments. Either way the result is a `Bundle` of one
context, so a model is trained on it, saved and sampled as on any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from megactx.data.bundle import (
    FORMAT,
    SHARDS,
    SPLITS,
    VERSION,
    Bundle,
    ContextInfo,
    Split,
    check_name,
    measure_context,
)
from megactx.data.shard_file import (
    MAX_TOKENS,
    Paths,
    Shard,
    ShardedTokens,
    find_shards,
    read_shards,
    write_shard,
)
from megactx.data.tokenizers import IntegerTokenizer, TiktokenTokenizer
from megactx.data.write import NewContext, write_folder
from megactx.errors import MegactxError
from megactx.files import read_json, sha256_of, sync, write_json

Array = NDArray[Any]
Delimiter = int | Literal["auto"] | None

SHARDS_FORMAT, SHARDS_VERSION = "megactx-shards", 1
TOKENS_PER_SHARD = 100_000_000  # the family's own size
# What the family's shards hold: GPT-2 ids, of a vocabulary padded for the GPU's tiles, and Llama-3 ids.
BARE = {"uint16": ("gpt2", 50_304, 50_256), "uint32": (None, 128_256, 128_000)}


class ShardSet(Bundle):
    """Training and validation shards. `split(name)[0]` is a `ShardedTokens`: slices of it are arrays.

    `delimiter` is the token between documents, None where there is none. `skipped` says what is wrong with the shards
    that were left out.
    """

    def __init__(
        self,
        path: Path,
        info: ContextInfo,
        source: dict[str, Any],
        streams: Sequence[ShardedTokens],
        *,
        delimiter: int | None,
        skipped: tuple[str, ...] = (),
    ) -> None:
        if delimiter is not None and not 0 <= delimiter < info.vocab_size:
            raise MegactxError(f"delimiter {delimiter} is outside the vocabulary of {info.vocab_size}")
        self.delimiter, self.skipped = delimiter, skipped
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "source": source,
            "tokens": info.tokens,
            "delimiter": delimiter,
            "skipped": list(skipped),  # for a checkpoint, which is continued with the same shards alone
            "contexts": [info.to_json()],
        }
        arrays = {split: [cast(Array, stream)] for split, stream in zip(SPLITS, streams, strict=True)}
        super().__init__(path, (info,), manifest, arrays)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        names: Sequence[str] | None = None,
        verify: bool = False,
        skip_bad: bool = False,
    ) -> ShardSet:
        """Open a folder that `megactx prepare --shards` wrote.

        Headers and sizes are always checked; `verify` also reads every file (hashes, largest ids). A damaged shard is
        an error, or, with `skip_bad`, left out with a warning.
        """
        path = Path(path)
        description = read_json(path / SHARDS)
        try:
            info, listed = _read_description(description)
        except MegactxError as error:
            raise MegactxError(f"{path / SHARDS}: {error}") from None
        if names is not None and list(names) != [info.name]:
            raise MegactxError(f"{path} has the one context {info.name!r}, asked for {', '.join(map(repr, names))}")
        streams: list[ShardedTokens] = []
        skipped: tuple[str, ...] = ()
        damage: list[str] = []
        for split in SPLITS:
            try:
                stream, left_out = _open_listed(path, listed[split], info.vocab_size, verify=verify, skip_bad=skip_bad)
            except MegactxError as error:
                damage.append(str(error))
            else:
                streams.append(stream)
                skipped += left_out
        if damage:
            raise MegactxError("; ".join(damage))
        hashes = {entry["file"]: entry["sha256"] for split in SPLITS for entry in listed[split]}
        info = _measured(info, streams, lambda shard: hashes[shard.path.name])
        return cls(path, info, description["source"], streams, delimiter=description["delimiter"], skipped=skipped)

    @classmethod
    def from_files(
        cls,
        train: Paths,
        val: Paths,
        *,
        vocab_size: int | None = None,
        tokenizer: dict[str, Any] | None = None,
        delimiter: Delimiter = "auto",
        skip_bad: bool = False,
    ) -> ShardSet:
        """Shards without a description, each of `train` and `val` a path, a glob, or a list of them.

        They are taken to hold what the speed-run family's do: GPT-2 ids in a vocabulary padded to 50,304, documents
        separated by 50,256 (uint32 ones: Llama-3 ids, 128,256 and 128,000). Where the GPT-2 tokenizer cannot be had,
        or with another `vocab_size`, text is shown as numbers, and another vocabulary has no delimiter unless one is
        given. The entropies are not counted, which would mean to read everything.
        """
        opened = [read_shards(find_shards(paths), skip_bad=skip_bad) for paths in (train, val)]
        streams = [ShardedTokens(shards) for shards, _ in opened]
        twice = {s.path.resolve() for s in streams[0].shards} & {s.path.resolve() for s in streams[1].shards}
        if twice:
            raise MegactxError(f"shard {min(twice)} is among the training and the validation shards")
        for folder in sorted({shard.path.parent for stream in streams for shard in stream.shards}):
            if (folder / SHARDS).is_file():
                warnings.warn(f"{folder / SHARDS} tells what its shards hold: open the folder for that", stacklevel=2)
        dtype = "uint32" if any(s.dtype == "uint32" for stream in streams for s in stream.shards) else "uint16"
        encoding, usual, between = BARE[dtype]
        size = usual if vocab_size is None else vocab_size
        known = between < size <= usual  # another vocabulary has other ids
        tokenizer = tokenizer or _bare_tokenizer(encoding if known else None, size)
        info = ContextInfo("text", "categorical", size, dtype, tokenizer, None, None, {}, {}, {})
        info = ContextInfo.from_json(_measured(info, streams, Shard.digest).to_json())  # refuses what does not fit
        if delimiter == "auto":
            delimiter = between if known else None
        source = {"kind": "shards", "files": sum(len(stream.shards) for stream in streams)}
        skipped = opened[0][1] + opened[1][1]
        return cls(streams[0].shards[0].path.parent, info, source, streams, delimiter=delimiter, skipped=skipped)

    def shards(self, split: Split) -> tuple[Shard, ...]:
        """The shards of `split`, in order."""
        return cast(ShardedTokens, self.split(split)[0]).shards


def _bare_tokenizer(encoding: str | None, vocab_size: int) -> dict[str, Any]:
    if encoding is not None:
        with contextlib.suppress(MegactxError):  # not installed, or no way to download it
            return TiktokenTokenizer(encoding, vocab_size).to_json()
    return IntegerTokenizer(0, vocab_size - 1).to_json()


def _measured(info: ContextInfo, streams: Sequence[ShardedTokens], digest: Callable[[Shard], str]) -> ContextInfo:
    """`info` with the sizes and hashes of its splits."""
    tokens, sha256 = {}, {}
    for split, stream in zip(SPLITS, streams, strict=True):
        tokens[str(split)] = stream.size
        sha256[str(split)] = _joint_hash((shard.path.name, shard.tokens, digest(shard)) for shard in stream.shards)
    return replace(info, tokens=tokens, sha256=sha256)


def _joint_hash(shards: Iterable[tuple[str, int, str]]) -> str:
    """One hash of the shards of a split, from their names, sizes and hashes: the same wherever they lie."""
    return hashlib.sha256("".join(f"{name} {size} {digest}\n" for name, size, digest in shards).encode()).hexdigest()


def _read_description(data: dict[str, Any]) -> tuple[ContextInfo, dict[Split, list[dict[str, Any]]]]:
    """The context and the files that `shards.json` lists; whatever is missing or wrong is named."""
    if data.get("format") != SHARDS_FORMAT:
        raise MegactxError(f"not a {SHARDS_FORMAT} description")
    if data.get("version") != SHARDS_VERSION:
        raise MegactxError(f"version {data.get('version')!r} is not {SHARDS_VERSION}: made by another megactx")
    delimiter = data.get("delimiter")
    if not isinstance(data.get("source"), dict):
        raise MegactxError(f"source: expected an object, got {data.get('source')!r}")
    if delimiter is not None and (not isinstance(delimiter, int) or isinstance(delimiter, bool)):
        raise MegactxError(f"delimiter: expected a token or null, got {delimiter!r}")
    info = ContextInfo.from_json(data.get("context", {}))
    shards = data.get("shards")
    listed: dict[Split, list[dict[str, Any]]] = {}
    for split in SPLITS:
        entries = shards.get(split) if isinstance(shards, dict) else None
        if not isinstance(entries, list) or not entries:
            raise MegactxError(f"shards.{split}: expected a list of files, got {type(entries).__name__}")
        for entry in entries:
            _check_listed(split, entry)
        files = [entry["file"] for entry in entries]
        if sorted(set(files)) != files:
            raise MegactxError(f"shards.{split}: the files are not in order, or one is listed twice")
        listed[split] = entries
    return info, listed


def _check_listed(split: Split, entry: Any) -> None:
    kinds: dict[str, type] = {"file": str, "tokens": int, "sha256": str}
    for key, kind in kinds.items():
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise MegactxError(f"shards.{split}: {key} of an entry is {value!r}")
    if Path(entry["file"]).name != entry["file"]:
        raise MegactxError(f"shards.{split}: {entry['file']!r} is not the name of a file in this folder")


def _open_listed(
    folder: Path, entries: Sequence[dict[str, Any]], vocab_size: int, *, verify: bool, skip_bad: bool
) -> tuple[ShardedTokens, tuple[str, ...]]:
    expected = {folder / entry["file"]: entry for entry in entries}

    def check(shard: Shard) -> None:
        entry = expected[shard.path]
        if shard.tokens != entry["tokens"] or shard.dtype != "uint16":
            raise MegactxError(
                f"shard {shard.path} holds {shard.tokens} {shard.dtype} tokens, {SHARDS} lists {entry['tokens']} uint16"
            )
        if not verify:
            return
        if sha256_of(shard.path) != entry["sha256"]:
            raise MegactxError(f"shard {shard.path} does not match its recorded SHA-256")
        if (largest := shard.largest()) >= vocab_size:
            raise MegactxError(f"shard {shard.path} holds id {largest}, outside the vocabulary of {vocab_size}")

    shards, skipped = read_shards(list(expected), skip_bad=skip_bad, check=check)
    return ShardedTokens(shards), skipped


def write_shard_set(
    path: str | Path,
    contexts: Sequence[NewContext],
    source: dict[str, Any],
    *,
    tokens_per_shard: int = TOKENS_PER_SHARD,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one categorical context as a folder of shards and return its description (`shards.json`).

    As with bundles, an existing dataset is replaced only with `overwrite`, and only once the new one is complete.
    """
    if len(contexts) != 1:
        raise MegactxError(
            f"shards hold one context, got {len(contexts)} ({', '.join(c.name for c in contexts)}): write a bundle"
        )
    context = contexts[0]
    check_name(context.name)
    if context.kind != "categorical":
        raise MegactxError(f"context {context.name!r} is numeric, and shards hold ids: write a bundle")
    refuse_wide(context.name, context.vocab_size)
    if not 1 <= tokens_per_shard <= MAX_TOKENS:
        raise MegactxError(f"tokens_per_shard must lie in 1..{MAX_TOKENS}, got {tokens_per_shard}")
    return write_folder(path, lambda folder: _write(folder, context, source, tokens_per_shard), overwrite=overwrite)


def refuse_wide(name: str, vocab_size: int) -> None:
    """Refuses a vocabulary that the ids of shards cannot hold."""
    if vocab_size > 1 << 16:
        raise MegactxError(
            f"context {name!r} has {vocab_size:,} symbols, and the uint16 ids of shards hold 65,536: write a bundle"
        )


def _write(folder: Path, context: NewContext, source: dict[str, Any], tokens_per_shard: int) -> dict[str, Any]:
    info = measure_context(context.name, context.kind, context.vocab_size, context.tokenizer, context.arrays)
    folder.mkdir()
    listed: dict[str, list[dict[str, Any]]] = {}
    for split, ids in zip(SPLITS, context.arrays, strict=True):
        listed[split] = []
        for number, at in enumerate(range(0, ids.size, tokens_per_shard)):
            part = ids[at : at + tokens_per_shard]
            name = f"{split}_{number:06d}.bin"
            listed[split].append({"file": name, "tokens": part.size, "sha256": write_shard(folder / name, part)})
    sha256 = {
        split: _joint_hash((entry["file"], entry["tokens"], entry["sha256"]) for entry in entries)
        for split, entries in listed.items()
    }
    used = [token for token in document_separators(context.tokenizer) if _occurs(token, context.arrays)]
    description = {
        "format": SHARDS_FORMAT,
        "version": SHARDS_VERSION,
        "source": source,
        "delimiter": used[0] if used else None,
        "context": replace(info, sha256=sha256).to_json(),
        "shards": listed,
    }
    write_json(folder / SHARDS, description)
    sync(folder)
    return description


def _occurs(token: int, arrays: Sequence[Array]) -> bool:
    return any(bool((np.asarray(ids) == token).any()) for ids in arrays)


def document_separators(tokenizer: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that may stand between documents in a text of this tokenizer: the end-of-text token of an encoding
    that has one, and the NUL that `megactx prepare` joins documents by."""
    match tokenizer["kind"]:
        case "byte":
            return (0,)
        case "char":
            at = tokenizer["chars"].find("\0")
            return (at,) if at >= 0 else ()
        case "tiktoken":
            encoding = TiktokenTokenizer(tokenizer["name"])
            nul = encoding.encode("\0").tolist()
            between = [] if encoding.end_of_text is None else [encoding.end_of_text]
            return tuple(between + (nul if len(nul) == 1 else []))
    return ()
