"""Contexts from folders: the nanoGPT family's (`train.bin`, `val.bin`, `meta.pkl`), bundles, and parts of bundles.

`meta.pkl` is parsed, never executed. Which id type a bare file has is decided from the bytes, not from the vocabulary
size alone: writers and readers of the family disagree at 65,536 symbols, where reading uint16 data as uint32 gives
half as many ids, all of them wrong, without an error.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megactx.data.bundle import (
    DTYPES,
    FORMAT,
    MANIFEST,
    META,
    SPLITS,
    VERSION,
    Bundle,
    ContextInfo,
    Split,
    dtype_for,
    find_damage,
    map_ids,
    measure_context,
    refuse_duplicates,
)
from megactx.data.legacy_pickle import read_plain_pickle
from megactx.data.numeric import measure_scale, quantise
from megactx.data.tokenizers import CharTokenizer, IntegerTokenizer, NumericTokenizer
from megactx.errors import MegactxError
from megactx.files import read_json, sha256_of

Array = NDArray[Any]
Opened = tuple[ContextInfo, tuple[Array, Array]]

MAX_SYMBOLS = 1 << 24  # far above any vocabulary: a damaged size must not become an allocation
HALF_BITS = ("sinewave_fp16_bits", "csv_fp16_bits")
KINDS = ("(plain char)", "byte", "tiktoken", "csv_integer_range", "sinewave", "csv_quantized_int", *HALF_BITS)


def open_folders(paths: Sequence[str | Path], *, numerical: bool = False) -> Bundle:
    """`Bundle.from_folders`."""
    if not paths:
        raise MegactxError("no context folders were given")
    folders = [_resolve(Path(path)) for path in paths]
    names = _short_names(folders)
    opened: list[Opened] = []
    for folder, name in zip(folders, names, strict=True):
        if (folder / MANIFEST).is_file():
            bundle = Bundle.open(folder)
            arrays = zip(bundle.split("train"), bundle.split("val"), strict=True)
            opened += zip(bundle.contexts, arrays, strict=True)
        elif (folder / META).is_file():
            opened.append(_open_part(folder))
        else:
            opened.append(_open_legacy(folder, name))
    if numerical:
        opened = [_as_numeric(info, arrays) for info, arrays in opened]
    contexts = tuple(info for info, _ in opened)
    refuse_duplicates([info.name for info in contexts])
    by_split: dict[Split, list[Array]] = {split: [arrays[i] for _, arrays in opened] for i, split in enumerate(SPLITS)}
    manifest = {
        "format": FORMAT, "version": VERSION, "source": {"kind": "folders", "folders": [str(f) for f in folders]},
        "tokens": contexts[0].tokens, "contexts": [info.to_json() for info in contexts],
    }  # fmt: skip
    return Bundle(folders[0], contexts, manifest, by_split)


def _resolve(path: Path) -> Path:
    """The folder meant by `path`: the family's own commands disagree on a leading `data/`."""
    candidates = [path]
    if not path.is_absolute():
        candidates.append(Path(*path.parts[1:]) if path.parts[:1] == ("data",) else "data" / path)
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise MegactxError(f"no context folder at {' or '.join(map(str, candidates))}")


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path; joined with its parent's where two folders share it."""
    last = [folder.resolve().name for folder in folders]
    full = [f"{folder.resolve().parent.name}_{folder.resolve().name}" for folder in folders]
    names = [short if last.count(short) == 1 else long for short, long in zip(last, full, strict=True)]
    return [re.sub(r"[^A-Za-z0-9_+-]", "_", name)[:64] for name in names]


def _open_part(folder: Path) -> Opened:
    try:
        info = ContextInfo.from_json(read_json(folder / META))
    except MegactxError as error:
        raise MegactxError(f"{folder / META}: {error}") from None
    problems = find_damage(folder, info, contents=False)
    if problems:
        raise MegactxError(f"{folder}: {'; '.join(problems)}")
    return info, (map_ids(folder / "train.bin", info.dtype), map_ids(folder / "val.bin", info.dtype))


def _open_legacy(folder: Path, name: str) -> Opened:
    if not (folder / "meta.pkl").is_file():
        raise MegactxError(f"context {name!r}: {folder} holds neither {META} nor meta.pkl")
    meta = read_plain_pickle(folder / "meta.pkl")
    size = meta.get("vocab_size") if isinstance(meta, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_SYMBOLS:
        raise MegactxError(f"context {name!r}: meta.pkl has no usable vocab_size (found {reprlib.repr(size)})")
    dtype = _file_dtype(folder, name, size)
    arrays = (map_ids(folder / "train.bin", dtype), map_ids(folder / "val.bin", dtype))
    kind = meta.get("tokenizer")
    if kind in HALF_BITS or meta.get("numerical_multicontext_input_format") == "fp16_bits":
        return _from_half_bits(name, arrays, _hashes(folder))
    if kind == "csv_quantized_int":
        minimum, step = _quantisation(name, meta.get("quantization"))
        tokenizer = NumericTokenizer(minimum, step, size).to_json()
        return measure_context(
            name, "numeric", size, tokenizer, arrays, grid=(minimum, step), sha256=_hashes(folder)
        ), arrays
    return measure_context(
        name, "categorical", size, _tokenizer(name, kind, meta, size), arrays, sha256=_hashes(folder)
    ), arrays


def _hashes(folder: Path) -> dict[str, str]:
    return {split: sha256_of(folder / f"{split}.bin") for split in SPLITS}


def _file_dtype(folder: Path, name: str, vocab_size: int) -> str:
    """The id type of both files: uint16 up to 65,536 symbols, uint32 above, and only where the bytes bear it out."""
    dtype = dtype_for(vocab_size)
    width = DTYPES[dtype].itemsize
    looks_wide = False
    for split in SPLITS:
        path = folder / f"{split}.bin"
        size = path.stat().st_size if path.is_file() else 0
        if size == 0:
            raise MegactxError(f"context {name!r}: {path} is missing or empty")
        if size % width:
            raise MegactxError(f"context {name!r}: {path} has {size} bytes, which is no whole number of {dtype} ids")
        ids = map_ids(path, dtype)
        if int(ids.max()) >= vocab_size:
            raise MegactxError(
                f"context {name!r}: {path}, read as {dtype}, holds id {ids.max()}, outside the vocabulary of "
                f"{vocab_size}"
            )
        if dtype == "uint16":
            # uint32 ids of a small vocabulary, read as uint16: every second one is 0, and the others are not all 0.
            narrow = ids.size % 2 == 1 or bool(ids[1::2].any())
            looks_wide |= not narrow and bool(ids[::2].any())
    if looks_wide:
        raise MegactxError(
            f"context {name!r}: {folder} may hold uint16 or uint32 ids (every second 16-bit word is 0), and a "
            f"vocabulary of {vocab_size} fits both: write it anew as uint16"
        )
    return dtype


def _tokenizer(name: str, kind: Any, meta: dict[str, Any], size: int) -> dict[str, Any]:
    if kind is None and "itos" in meta:
        return CharTokenizer(_characters(name, meta["itos"], size)).to_json()
    if kind == "byte" and size == 256:
        return {"kind": "byte"}
    if kind == "tiktoken" and isinstance(meta.get("tiktoken_encoding"), str):
        return {"kind": "tiktoken", "name": meta["tiktoken_encoding"]}
    if kind == "sinewave":
        return IntegerTokenizer(0, size - 1).to_json()
    if kind == "csv_integer_range":
        low, high = meta.get("int_min"), meta.get("int_max")
        if not isinstance(low, int) or not isinstance(high, int) or high - low + 1 != size:
            bounds = f"int_min {reprlib.repr(low)} and int_max {reprlib.repr(high)}"
            raise MegactxError(f"context {name!r}: {bounds} do not make {size} symbols")
        return IntegerTokenizer(low, high).to_json()
    raise MegactxError(
        f"context {name!r}: meta.pkl describes a tokenizer {reprlib.repr(kind)} that cannot be read "
        f"(known: {', '.join(KINDS)})"
    )


def _characters(name: str, itos: Any, size: int) -> str:
    table = itos if isinstance(itos, dict) else dict(enumerate(itos)) if isinstance(itos, (list, tuple)) else {}
    if len(table) != size or set(table) != set(range(size)):
        raise MegactxError(f"context {name!r}: the itos table of meta.pkl does not hold ids 0..{size - 1}")
    for i in range(size):
        if not isinstance(table[i], str) or len(table[i]) != 1:
            raise MegactxError(f"context {name!r}: id {i} stands for {reprlib.repr(table[i])}, expected one character")
    return "".join(table[i] for i in range(size))


def _quantisation(name: str, data: Any) -> tuple[float, float]:
    """(minimum, step) with raw = minimum + step * code; a file that does not say has raw = code."""
    if data is None:
        return 0.0, 1.0
    try:
        match data["type"]:
            case "shift_scale_round_clip_uint16":
                minimum, step = -float(data["shift"]), 1.0 / float(data["scale"])
            case "auto_minmax_to_range_round_clip_uint16":
                target = float(data["target_max"]) - float(data["target_min"])
                step = (float(data["raw_max"]) - float(data["raw_min"])) / target
                minimum = float(data["raw_min"]) - step * float(data["target_min"])
            case kind:
                raise MegactxError(f"context {name!r}: unknown quantization {reprlib.repr(kind)}")
    except MegactxError:
        raise
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise MegactxError(f"context {name!r}: damaged quantization in meta.pkl ({reprlib.repr(error)})") from None
    if not (np.isfinite(minimum) and np.isfinite(step) and step > 0):
        raise MegactxError(f"context {name!r}: quantization in meta.pkl gives minimum {minimum} and step {step}")
    return minimum, step


def _from_half_bits(name: str, arrays: tuple[Array, Array], sha256: dict[str, str]) -> Opened:
    """IEEE half bit patterns become values, and the values codes of an even grid."""
    values = [np.asarray(ids).astype("<u2").view("<f2").astype(np.float64) for ids in arrays]
    codes, minimum, step, size = quantise(np.concatenate(values), name)
    cut = values[0].size
    coded = (codes[:cut], codes[cut:])
    tokenizer = NumericTokenizer(minimum, step, size).to_json()
    info = measure_context(name, "numeric", size, tokenizer, coded, grid=(minimum, step), sha256=sha256)
    return info, coded


def _as_numeric(info: ContextInfo, arrays: tuple[Array, Array]) -> Opened:
    if info.numeric is not None:
        return info, arrays
    if info.tokenizer["kind"] != "integer":
        raise MegactxError(
            f"context {info.name!r} cannot be read as numbers: its tokenizer is {info.tokenizer['kind']!r}"
        )
    minimum = float(info.tokenizer["minimum"])
    scale = measure_scale(arrays[0], minimum, 1.0)
    variance = float(np.std(arrays[0], dtype=np.float64) ** 2)
    tokenizer = NumericTokenizer(minimum, 1.0, info.vocab_size).to_json()
    return replace(
        info, kind="numeric", numeric=scale, tokenizer=tokenizer, entropy={**info.entropy, "variance": variance}
    ), arrays
