"""Derived contexts: streams computed from the main text, one value per unit of it.

A unit is a byte for `bytes` and a character for `str`. Every derivation is total (any text, also one cut in the
middle of a token) and starts afresh after a NUL, which is how a corpus joins its documents: so the derivation of a
prompt is the derivation of a document that begins with it, and the derivation of a corpus that of its documents,
joined. The NUL itself belongs to the document it ends.

Causal derivations depend at unit i on text[: i + 1] alone, so a sampler can extend them token by token. `python_kind`
is the one that is not: the class of a token shows at its end (a name may become a keyword, or the prefix of a
string).
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megactx.data.python_lexer import KIND_DISPLAY, KINDS, NEWLINE, OPERATOR, python_kinds
from megactx.data.tokenizers import LabelTokenizer, NumericTokenizer, TextTokenizer, Tokenizer
from megactx.errors import MegactxError

Array = NDArray[Any]

# One printable, single-width character for each value of a counting context: 0-9, a-z, A-Z, then Latin and Cyrillic
# letters.
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS += "".join(map(chr, [*range(0x100, 0x250), *range(0x400, 0x482)]))
MAX_SYMBOLS = 512

_CHUNK = 1 << 20
_LINE_FEED, _NUL = 10, 0


class Text:
    """A text as an array of units, with the intermediate results that several derivations share."""

    def __init__(self, raw: bytes | str) -> None:
        self.raw = raw

    @cached_property
    def units(self) -> Array:
        """uint8 bytes or uint32 code points, [n]."""
        if isinstance(self.raw, bytes):
            return np.frombuffer(self.raw, np.uint8)
        return np.frombuffer(self.raw.encode("utf-32-le", "surrogatepass"), "<u4")

    @cached_property
    def index(self) -> Array:
        return np.arange(self.units.size, dtype=np.int64)

    @cached_property
    def kinds(self) -> Array:
        """Python token kinds; those of a character are those of its first UTF-8 byte."""
        if isinstance(self.raw, bytes):
            return python_kinds(self.raw)
        utf8 = self.raw.encode("utf-8", "surrogatepass")
        return python_kinds(utf8)[(np.frombuffer(utf8, np.uint8) & 0xC0) != 0x80]

    @cached_property
    def document_start(self) -> Array:
        return self.last(_after(self.units == _NUL))

    def last(self, marks: Array) -> Array:
        """The largest marked index <= i for each i (0 before the first mark)."""
        return np.maximum.accumulate(np.where(marks, self.index, 0))


def _after(mask: Array) -> Array:
    """True where the unit before is marked, and at the first unit."""
    shifted = np.ones_like(mask)
    shifted[1:] = mask[:-1]
    return shifted


def _between(units: Array, first: str, last: str) -> Array:
    return (units >= ord(first)) & (units <= ord(last))


def _case(text: Text) -> Array:
    units = text.units
    upper, lower = _between(units, "A", "Z"), _between(units, "a", "z")
    if units.dtype != np.uint8:  # a byte past ASCII is only part of a character, and has no case of its own
        for code in np.unique(units[units >= 128]).tolist():
            if chr(code).isupper():
                upper |= units == code
            elif chr(code).islower():
                lower |= units == code
    return np.where(upper, 2, np.where(lower, 1, 0))


_CLASSES = (
    ("space", "_", " \t\v\f"),
    ("newline", "/", "\n\r"),
    ("digit", "0", "0123456789"),
    ("vowel", "v", "aeiouAEIOU"),
)


def _class_table() -> Array:
    table = np.zeros(129, np.uint8)  # 0: control characters; entry 128 stands for everything past ASCII
    for code in range(128):
        if chr(code).isalpha():
            table[code] = 5
        elif 32 < code < 127:
            table[code] = 6
    for i, (_, _, members) in enumerate(_CLASSES):
        table[[ord(c) for c in members]] = i + 1
    table[128] = 7
    return table


_CLASS_NAMES = ("control", *(name for name, _, _ in _CLASSES), "consonant", "punctuation", "non_ascii")
_CLASS_DISPLAY = "?" + "".join(glyph for _, glyph, _ in _CLASSES) + "c.x"
_CLASS_TABLE = _class_table()


def _char_class(text: Text) -> Array:
    return _CLASS_TABLE[np.minimum(text.units, 128)]


def _python_kind(text: Text) -> Array:
    return text.kinds


def _depth(text: Text, *, cap: int = 15, indent: int = 4) -> Array:
    """Open brackets plus indentation: `min(cap, brackets + columns // indent)`.

    A bracket, opening or closing, carries the depth of what it encloses; brackets in strings and comments do not
    count, nor do unmatched closing ones. Columns are those of the white space a logical line begins with, as far as
    it has been read (a tab counts `indent`); a line that continues a bracket or a string keeps the columns of the
    line it continues.
    """
    units, is_operator = text.units, text.kinds == OPERATOR
    opens = is_operator & ((units == ord("(")) | (units == ord("[")) | (units == ord("{")))
    closes = is_operator & ((units == ord(")")) | (units == ord("]")) | (units == ord("}")))
    brackets = _matched_depth(text, opens.astype(np.int64) - closes)

    line_end = ((text.kinds == NEWLINE) & (brackets == 0)) | (units == _NUL)
    line_start = text.last(_after(line_end))
    is_tab = units == ord("\t")
    blank = is_tab | (units == ord(" ")) | (units == ord("\f"))
    leading = blank & (text.last(_after(~blank)) == line_start)
    columns = np.cumsum(leading * np.where(is_tab, indent, units != ord("\f")))
    columns -= np.where(line_start > 0, columns[line_start - 1], 0)
    outside = np.where(_after(units == _NUL), 0, np.roll(brackets, 1))
    return np.minimum(np.maximum(brackets, outside) + columns // indent, cap)


def _matched_depth(text: Text, steps: Array) -> Array:
    """Running sum of `steps` that never falls below 0 and starts at 0 in each document."""
    total = np.cumsum(steps)
    start = text.document_start
    total -= np.where(start > 0, total[start - 1], 0)
    # The floor of a document is its own running minimum: shifting each document below all before it separates them.
    shift = np.cumsum(_after(text.units == _NUL)) * (2 * text.units.size + 2)
    floor = np.minimum.accumulate(np.minimum(total, 0) - shift) + shift
    return total - floor


def _column(text: Text, *, cap: int = 255) -> Array:
    breaks = (text.units == _LINE_FEED) | (text.units == _NUL)
    return np.minimum(text.index - text.last(_after(breaks)), cap)


def _word_position(text: Text, *, cap: int = 63) -> Array:
    units = text.units
    word = _between(units, "a", "z") | _between(units, "A", "Z") | _between(units, "0", "9") | (units >= 128)
    word |= units == ord("_")
    return np.where(word, np.minimum(text.index - text.last(_after(~word)) + 1, cap), 0)


def _newline_count(text: Text, *, m: int = 256) -> Array:
    newlines = text.units == _LINE_FEED
    before = np.cumsum(newlines) - newlines
    return (before - before[text.document_start]) % m


def _index_mod(text: Text, *, m: int = 2) -> Array:
    return (text.index - text.document_start) % m


@dataclass(frozen=True)
class Derivation:
    """A derived context: what computes it, how many values it takes, and how they are shown."""

    name: str
    compute: Callable[..., Array] = field(repr=False)
    summary: str
    causal: bool = True
    labels: tuple[tuple[str, ...], str] | None = None
    size: Callable[[dict[str, int]], int] | None = None
    numeric: bool = False

    @property
    def defaults(self) -> dict[str, int]:
        """The arguments and their defaults, from the signature of the function."""
        parameters = inspect.signature(self.compute).parameters.values()
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}

    def arguments(self, given: dict[str, Any]) -> dict[str, int]:
        """All arguments, checked: whole numbers in 1..511 (`m`: 2..512)."""
        defaults = self.defaults
        for key, value in given.items():
            if key not in defaults:
                known = ", ".join(defaults) or "none"
                raise MegactxError(f"derived context {self.name!r} has no argument {key!r} (it has: {known})")
            low, high = (2, MAX_SYMBOLS) if key == "m" else (1, MAX_SYMBOLS - 1)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise MegactxError(
                    f"derived context {self.name!r}: {key} must be a whole number in {low}..{high}, got {value!r}"
                )
        return {**defaults, **given}

    def tokenizer(self, given: dict[str, Any]) -> Tokenizer:
        arguments = self.arguments(given)
        if self.labels is not None:
            return LabelTokenizer(*self.labels)
        assert self.size is not None
        size = self.size(arguments)
        return (
            NumericTokenizer(0, 1, size) if self.numeric else LabelTokenizer(list(map(str, range(size))), DIGITS[:size])
        )


def _up_to_cap(arguments: dict[str, int]) -> int:
    return arguments["cap"] + 1


def _modulus(arguments: dict[str, int]) -> int:
    return arguments["m"]


DERIVATIONS: dict[str, Derivation] = {
    d.name: d
    for d in (
        Derivation("case", _case, "no letter case, lower, upper", labels=(("none", "lower", "upper"), "_LU")),
        Derivation(
            "char_class",
            _char_class,
            "space, newline, digit, vowel, consonant, punctuation, ...",
            labels=(_CLASS_NAMES, _CLASS_DISPLAY),
        ),
        Derivation(
            "python_kind",
            _python_kind,
            "class of the Python token around the unit",
            causal=False,
            labels=(KINDS, KIND_DISPLAY),
        ),
        Derivation("depth", _depth, "open brackets + indentation / indent, at most cap", size=_up_to_cap),
        Derivation(
            "column", _column, "units since the line began, at most cap (numeric)", size=_up_to_cap, numeric=True
        ),
        Derivation(
            "word_position", _word_position, "1-based place in the word, 0 outside, at most cap", size=_up_to_cap
        ),
        Derivation("newline_count", _newline_count, "newlines so far in the document, modulo m", size=_modulus),
        Derivation("index_mod", _index_mod, "units so far in the document, modulo m", size=_modulus),
    )
}
ALIASES = {"kind": "python_kind"}


def find_derivation(function: str) -> Derivation:
    name = ALIASES.get(function, function)
    if name not in DERIVATIONS:
        known = [*DERIVATIONS, *ALIASES]
        near = difflib.get_close_matches(function, known, 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise MegactxError(f"unknown derived context {function!r}{hint} (known: {', '.join(known)})")
    return DERIVATIONS[name]


@dataclass(frozen=True)
class DerivedSpec:
    """One derived context to compute: its name, the derivation, and all arguments."""

    name: str
    function: str
    args: dict[str, int]

    @classmethod
    def parse(cls, text: str) -> DerivedSpec:
        """`[name=]function[:arg=value[,arg=value...]]`, as `depth`, `depth:cap=7` or `mod3=index_mod:m=3`."""
        match = re.fullmatch(r"(?:([^=:]*)=)?([^=:]*)(?::(.*))?", text)
        if match is None:
            raise MegactxError(f"cannot read the derived context {text!r}: expected [name=]function[:arg=value,...]")
        function, given = match[2], {}
        for part in filter(None, (match[3] or "").split(",")):
            key, _, value = part.partition("=")
            if not re.fullmatch(r"[+-]?[0-9]{1,9}", value):
                raise MegactxError(f"derived context {text!r}: {part!r} is not argument=whole number")
            if key in given:
                raise MegactxError(f"derived context {text!r}: {key!r} is given twice")
            given[key] = int(value)
        derivation = find_derivation(function)
        return cls(match[1] if match[1] is not None else function, derivation.name, derivation.arguments(given))

    @property
    def tokenizer(self) -> Tokenizer:
        return find_derivation(self.function).tokenizer(self.args)

    def to_json(self, main: str) -> dict[str, Any]:
        return {"from": main, "function": self.function, "args": dict(self.args)}

    @classmethod
    def from_json(cls, name: str, data: dict[str, Any]) -> DerivedSpec:
        return cls(name, data["function"], find_derivation(data["function"]).arguments(data["args"]))


def derive(function: str, text: str | bytes, **args: int) -> Array:
    """Values of one derivation for each unit of `text`: uint16 [len(text)].

    `function` is a key of `DERIVATIONS` (or `kind`), `args` its arguments; MegactxError names what is unknown.
    """
    derivation = find_derivation(function)
    return derive_many(text, [DerivedSpec(function, derivation.name, derivation.arguments(args))])[0]


def derive_many(text: str | bytes, specs: Sequence[DerivedSpec]) -> list[Array]:
    """Like `derive`, for several derivations at once; bounded memory on a corpus of many documents."""
    parts: list[list[Array]] = [[] for _ in specs]
    for chunk in _document_chunks(text):
        shared = Text(chunk)
        for spec, out in zip(specs, parts, strict=True):
            out.append(DERIVATIONS[spec.function].compute(shared, **spec.args).astype(np.uint16))
    return [np.concatenate(out) if out else np.empty(0, np.uint16) for out in parts]


def _document_chunks(text: str | bytes) -> Iterator[str | bytes]:
    """Slices of about a million units that end where a document does (or the text)."""
    start = 0
    while start < len(text):
        stop = start + _CHUNK
        nul = text.find(b"\0", stop) if isinstance(text, bytes) else text.find("\0", stop)
        stop = len(text) if nul < 0 else nul + 1
        yield text[start:stop]
        start = stop


def derive_tokens(tokenizer: TextTokenizer, ids: Array, specs: Sequence[DerivedSpec]) -> list[Array]:
    """Derived contexts aligned with the tokens `ids` of the main context: each takes the value at its token's first
    unit."""
    text, starts = tokenizer.text_and_starts(ids)
    values = derive_many(text, specs)
    return values if starts is None else [value[starts] for value in values]
