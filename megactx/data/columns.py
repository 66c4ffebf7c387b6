"""Contexts from the columns of a CSV file: one context per column, one token per row.

A column of whole numbers is categorical, one symbol for each number of its range; any other column of numbers is
numeric. A cell that is neither is refused with its row and column: a gap silently filled would be learnt as a fact.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megactx.data.bundle import refuse_duplicates
from megactx.data.numeric import quantise
from megactx.data.tokenizers import IntegerTokenizer, NumericTokenizer
from megactx.data.write import NewContext, split_at
from megactx.errors import MegactxError

MAX_AUTOMATIC = 1 << 16  # a wider range of whole numbers is a quantity, not a set of categories
MAX_CATEGORIES = 1 << 20
_WHOLE = re.compile(r"\s*[+-]?[0-9]{1,18}\s*", re.ASCII)
_REAL = re.compile(r"\s*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?\s*", re.ASCII)


def read_csv(
    path: str | Path,
    *,
    header: bool = True,
    columns: Sequence[str] | None = None,
    numeric: Sequence[str] = (),
    categorical: Sequence[str] = (),
    val_fraction: float = 0.1,
) -> tuple[list[NewContext], dict[str, Any]]:
    """The contexts of `path`, split, and the note on their source.

    `columns` picks and orders; `numeric` and `categorical` override the kind that the cells suggest. Columns go by
    the name in the header row (`column0`, ... without one), or by that name as a context is called (letters, digits
    and `_`).
    """
    path = Path(path)
    names, lines, rows = _read_rows(path, header)
    contexts = [re.sub(r"[^A-Za-z0-9_+-]+", "_", name).strip("_")[:64] or f"column{i}" for i, name in enumerate(names)]
    refuse_duplicates(contexts)
    both = set(_find(numeric, names, contexts, path)) & set(_find(categorical, names, contexts, path))
    if both:
        raise MegactxError(f"column {names[min(both)]!r} is asked for both as numeric and as categorical")
    picked = range(len(names)) if columns is None else _find(columns, names, contexts, path)
    forced = {
        **dict.fromkeys(_find(numeric, names, contexts, path), "numeric"),
        **dict.fromkeys(_find(categorical, names, contexts, path), "categorical"),
    }
    made = [_context(contexts[i], names[i], [row[i] for row in rows], lines, forced.get(i)) for i in picked]
    cut = split_at(len(rows), val_fraction)
    split = [replace(context, arrays=(ids[:cut], ids[cut:])) for context, ids in made]
    return split, {"kind": "csv", "rows": len(rows), "columns": [names[i] for i in picked]}


def _read_rows(path: Path, header: bool) -> tuple[list[str], list[int], list[list[str]]]:
    """Column names, the file's line number of each row, and the rows, all of one length."""
    lines: list[int] = []
    rows: list[list[str]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for row in reader:
                lines.append(reader.line_num)
                rows.append(row)
    except FileNotFoundError:
        raise MegactxError(f"CSV file {path} does not exist") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MegactxError(f"CSV file {path} cannot be read: {error}") from None
    while rows and not rows[-1]:
        rows.pop()
    if not rows:
        raise MegactxError(f"CSV file {path} is empty")
    names = [name.strip() for name in rows[0]] if header else [f"column{i}" for i in range(len(rows[0]))]
    if header:
        del lines[0], rows[0]
    for line, row in zip(lines, rows, strict=False):
        if len(row) != len(names):
            raise MegactxError(f"CSV file {path}: row at line {line} has {len(row)} cells, expected {len(names)}")
    if not names or not rows:
        raise MegactxError(f"CSV file {path} has no rows of data")
    return names, lines[: len(rows)], rows


def _find(wanted: Sequence[str], names: Sequence[str], contexts: Sequence[str], path: Path) -> list[int]:
    found = []
    for name in wanted:
        places = [i for i in range(len(names)) if name in (names[i], contexts[i])]
        if not places:
            raise MegactxError(f"CSV file {path} has no column {name!r} (columns: {', '.join(names)})")
        found.append(places[0])
    return found


def _context(
    name: str, column: str, cells: Sequence[str], lines: Sequence[int], forced: str | None
) -> tuple[NewContext, NDArray[np.int64]]:
    """What the column is, still without ids, and the ids of all its cells."""
    none = np.empty(0, np.int64)
    whole = all(map(_WHOLE.fullmatch, cells))
    if whole and forced != "numeric":
        values = np.asarray([int(cell) for cell in cells], np.int64)
        low, high = int(values.min()), int(values.max())
        size = high - low + 1
        if forced and size > MAX_CATEGORIES:
            raise MegactxError(
                f"column {column!r}: the range {low}..{high} makes {size:,} categories, at most "
                f"{MAX_CATEGORIES:,} are possible: use it as a numeric column"
            )
        if forced or size <= MAX_AUTOMATIC:
            tokenizer = IntegerTokenizer(low, high).to_json()
            return NewContext(name, "categorical", size, tokenizer, (none, none)), values - low
    elif forced == "categorical":
        at = next(i for i, cell in enumerate(cells) if not _WHOLE.fullmatch(cell))
        raise _bad_cell(column, lines[at], cells[at], "a whole number")
    numbers = np.empty(len(cells), np.float64)
    for i, cell in enumerate(cells):
        number = float(cell) if _REAL.fullmatch(cell) else math.nan
        if not math.isfinite(number):
            raise _bad_cell(column, lines[i], cell, "a number")
        numbers[i] = number
    codes, minimum, step, size = quantise(numbers, name)
    tokenizer = NumericTokenizer(minimum, step, size).to_json()
    return NewContext(name, "numeric", size, tokenizer, (none, none), grid=(minimum, step)), codes


def _bad_cell(column: str, line: int, cell: str, expected: str) -> MegactxError:
    found = f"{cell!r}" if cell.strip() else "nothing"
    return MegactxError(f"column {column!r}, line {line}: expected {expected}, found {found}")
