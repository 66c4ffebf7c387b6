"""Tokenizers: how the text (or the cells) of one context become ids, and back.

A tokenizer is fully described by a small JSON object, so a bundle and a checkpoint carry theirs along and nothing has
to be looked up again at sampling. Three kinds read text (`byte`, `char`, `tiktoken`); `labels` names the classes of a
derived context and gives each one display character; `integer` and `numeric` read comma-joined cells.

Besides encode and decode every tokenizer has `glyphs`: exactly one printable character per token, so that the lanes
of a multi-context sample can be printed under each other. Text tokenizers also have `text_and_starts`, from which
derived contexts are computed.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megactx.data.numeric import format_number
from megactx.errors import MegactxError

Ids = NDArray[Any]

_CONTROL_GLYPHS = {"\n": "↵", "\t": "→", "\r": "␍", "\0": "␀", "\x0c": "␌"}
_UNKNOWN = "\ufffd".encode()


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package relies on."""

    kind: str

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> Ids:
        """Ids of `text`, int64 [n]; an unknown symbol raises MegactxError with the symbol and its position."""
        ...

    def decode(self, ids: ArrayLike) -> str: ...

    def glyphs(self, ids: ArrayLike) -> str:
        """One printable character per token."""
        ...

    def to_json(self) -> dict[str, Any]: ...


@runtime_checkable
class TextTokenizer(Tokenizer, Protocol):
    """A tokenizer of running text, the kind a main context has."""

    def text_and_starts(self, ids: ArrayLike) -> tuple[bytes | str, Ids | None]:
        """The exact text behind `ids`, and where in it each token begins (None: one unit of text per token)."""
        ...


def _checked(ids: ArrayLike, vocab_size: int, kind: str) -> Ids:
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    bad = (array < 0) | (array >= vocab_size)
    if bad.any():
        at = int(bad.argmax())
        raise MegactxError(f"id {int(array[at])} at position {at} is outside the {kind} vocabulary of {vocab_size}")
    return array


def _glyph(character: str) -> str:
    if character in _CONTROL_GLYPHS:
        return _CONTROL_GLYPHS[character]
    return character if len(character) == 1 and character.isprintable() else "·"


def to_utf8(text: str) -> bytes:
    """UTF-8 bytes of `text`. Bytes a terminal could not decode (surrogate escapes) come back as they were."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise MegactxError(f"unknown symbol {text[error.start]!r} at position {error.start}: not a character") from None


class ByteTokenizer:
    """UTF-8 bytes: 256 symbols, any text, nothing to learn."""

    kind = "byte"
    vocab_size = 256

    def encode(self, text: str) -> Ids:
        return np.frombuffer(to_utf8(text), np.uint8).astype(np.int64)

    def decode(self, ids: ArrayLike) -> str:
        return _checked(ids, 256, "byte").astype(np.uint8).tobytes().decode("utf-8", "replace")

    def glyphs(self, ids: ArrayLike) -> str:
        return "".join(_glyph(chr(i)) if i < 128 else "·" for i in _checked(ids, 256, "byte").tolist())

    def text_and_starts(self, ids: ArrayLike) -> tuple[bytes, None]:
        return _checked(ids, 256, "byte").astype(np.uint8).tobytes(), None

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}


class CharTokenizer:
    """One id per character, for the characters seen when the dataset was made (`chars[i]` has id i)."""

    kind = "char"

    def __init__(self, chars: str) -> None:
        if not chars:
            raise MegactxError("a char vocabulary needs at least one character")
        self.chars = chars
        self._codes = _code_points(chars)
        self._order = np.argsort(self._codes, kind="stable")
        self._sorted = self._codes[self._order]
        if (self._sorted[1:] == self._sorted[:-1]).any():
            raise MegactxError("a char vocabulary holds the same character twice")

    @classmethod
    def from_text(cls, text: str) -> CharTokenizer:
        return cls("".join(map(chr, np.unique(_code_points(text)).tolist())))

    @property
    def vocab_size(self) -> int:
        return len(self.chars)

    def encode(self, text: str) -> Ids:
        codes = _code_points(text)
        place = np.searchsorted(self._sorted, codes).clip(max=len(self._sorted) - 1)
        unknown = self._sorted[place] != codes
        if unknown.any():
            at = int(unknown.argmax())
            raise MegactxError(
                f"unknown symbol {text[at]!r} at position {at}: not in the vocabulary of {self.vocab_size} characters"
            )
        return self._order[place].astype(np.int64)

    def decode(self, ids: ArrayLike) -> str:
        codes = self._codes[_checked(ids, self.vocab_size, "char")]
        return codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def glyphs(self, ids: ArrayLike) -> str:
        return "".join(_glyph(c) for c in self.decode(ids))

    def text_and_starts(self, ids: ArrayLike) -> tuple[str, None]:
        return self.decode(ids), None

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "chars": self.chars}


def _code_points(text: str) -> Ids:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


class TiktokenTokenizer:
    """One of tiktoken's byte-pair encodings. Special tokens are ordinary text here: a corpus cannot inject them.

    `vocab_size` may be larger than the encoding: a vocabulary padded for speed (GPT-2's 50,257 to 50,304). A model may
    draw such an id before it has learned that nothing uses them; it shows as U+FFFD.
    """

    kind = "tiktoken"

    def __init__(self, name: str, vocab_size: int | None = None) -> None:
        self.name = name
        self._encoding = _tiktoken_encoding(name)
        used = int(self._encoding.n_vocab)
        self.vocab_size = used if vocab_size is None else vocab_size
        if self.vocab_size < used:
            raise MegactxError(f"vocab_size {vocab_size} is less than the {used} of the tiktoken encoding {name!r}")

    def encode(self, text: str) -> Ids:
        to_utf8(text)  # an undecodable symbol is named here, with its position
        return np.asarray(self._encoding.encode_ordinary(text), dtype=np.int64)

    def decode(self, ids: ArrayLike) -> str:
        array = _checked(ids, self.vocab_size, "tiktoken")
        if (array >= self._encoding.n_vocab).any():
            return b"".join(self._shown(array)).decode("utf-8", "replace")
        text, _ = self.text_and_starts(array)
        return text.decode("utf-8", "replace")

    def glyphs(self, ids: ArrayLike) -> str:
        pieces = self._shown(_checked(ids, self.vocab_size, "tiktoken"))
        return "".join(_glyph(piece.decode("utf-8", "replace")[:1]) for piece in pieces)

    def text_and_starts(self, ids: ArrayLike) -> tuple[bytes, Ids]:
        array = _checked(ids, self._encoding.n_vocab, "tiktoken")
        lengths = self._lengths[array]
        if (lengths == 0).any():
            at = int((lengths == 0).argmax())
            raise MegactxError(f"id {int(array[at])} at position {at} is not in use in the encoding {self.name!r}")
        return self._encoding.decode_bytes(array.tolist()), np.cumsum(lengths) - lengths

    @property
    def end_of_text(self) -> int | None:
        """The special token that stands between documents, None where the encoding has none."""
        try:
            return int(self._encoding.eot_token)
        except KeyError:
            return None

    def to_json(self) -> dict[str, Any]:
        padded = {"vocab_size": self.vocab_size} if self.vocab_size != self._encoding.n_vocab else {}
        return {"kind": "tiktoken", "name": self.name, **padded}

    def _shown(self, ids: Ids) -> list[bytes]:
        """The bytes of each token, those of U+FFFD for the padding."""
        used = ids < self._encoding.n_vocab
        text, starts = self.text_and_starts(ids[used])
        pieces = iter(_pieces(text, starts))
        return [next(pieces) if known else _UNKNOWN for known in used.tolist()]

    @functools.cached_property
    def _lengths(self) -> Ids:
        """Bytes of each token, 0 for the gaps some encodings have in their ids."""
        lengths = np.zeros(self._encoding.n_vocab, np.int64)
        for i in range(lengths.size):
            with contextlib.suppress(KeyError):
                lengths[i] = len(self._encoding.decode_single_token_bytes(i))
        return lengths


def _pieces(text: bytes, starts: Ids) -> list[bytes]:
    stops = [*starts[1:].tolist(), len(text)]
    return [text[start:stop] for start, stop in zip(starts.tolist(), stops, strict=True)]


@functools.lru_cache(maxsize=4)
def _tiktoken_encoding(name: str) -> Any:
    try:
        import tiktoken
    except ImportError:
        raise MegactxError(f"tokenizer {name!r} needs the package tiktoken: pip install tiktoken") from None
    names = tiktoken.list_encoding_names()
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # tiktoken lets the errors of its network layer through, whatever they are
        if name not in names:
            raise MegactxError(
                f"unknown tokenizer {name!r}: expected byte, char or one of tiktoken's {', '.join(names)}"
            ) from None
        raise MegactxError(
            f"the vocabulary of the tiktoken encoding {name!r} cannot be had (tiktoken downloads it once, "
            f"into TIKTOKEN_CACHE_DIR): {type(error).__name__}"
        ) from None


class LabelTokenizer:
    """Named classes with one display character each; text is a string of display characters."""

    kind = "labels"

    def __init__(self, names: Sequence[str], display: str) -> None:
        if len(names) != len(display) or len(set(display)) != len(display) or not display:
            raise MegactxError(
                f"labels need one distinct display character each, got {len(names)} names and {display!r}"
            )
        self.names = tuple(names)
        self.display = display
        self._ids = {character: i for i, character in enumerate(display)}

    @property
    def vocab_size(self) -> int:
        return len(self.display)

    def encode(self, text: str) -> Ids:
        out = np.empty(len(text), np.int64)
        for at, character in enumerate(text):
            if character not in self._ids:
                raise MegactxError(f"unknown symbol {character!r} at position {at}: expected one of {self.display!r}")
            out[at] = self._ids[character]
        return out

    def decode(self, ids: ArrayLike) -> str:
        return "".join(self.display[i] for i in _checked(ids, self.vocab_size, "labels").tolist())

    glyphs = decode

    def to_json(self) -> dict[str, Any]:
        return {"kind": "labels", "names": list(self.names), "display": self.display}


def _cells(text: str) -> list[str]:
    return text.split(",") if text.strip() else []


class IntegerTokenizer:
    """Whole numbers `minimum..maximum`, one category each; text is comma-joined."""

    kind = "integer"

    def __init__(self, minimum: int, maximum: int) -> None:
        if maximum < minimum:
            raise MegactxError(f"an integer range needs minimum <= maximum, got {minimum}..{maximum}")
        self.minimum, self.maximum = minimum, maximum

    @property
    def vocab_size(self) -> int:
        return self.maximum - self.minimum + 1

    def encode(self, text: str) -> Ids:
        out = []
        for at, cell in enumerate(_cells(text)):
            value = int(cell) if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", cell) else None
            if value is None or not self.minimum <= value <= self.maximum:
                raise MegactxError(
                    f"unknown symbol {cell.strip()!r} at position {at}: expected a whole number in "
                    f"{self.minimum}..{self.maximum}"
                )
            out.append(value - self.minimum)
        return np.asarray(out, dtype=np.int64)

    def decode(self, ids: ArrayLike) -> str:
        return ",".join(str(i + self.minimum) for i in _checked(ids, self.vocab_size, "integer").tolist())

    def glyphs(self, ids: ArrayLike) -> str:
        return "".join(str(abs(i + self.minimum) % 10) for i in _checked(ids, self.vocab_size, "integer").tolist())

    def to_json(self) -> dict[str, Any]:
        return {"kind": "integer", "minimum": self.minimum, "maximum": self.maximum}


class NumericTokenizer:
    """Real numbers on the grid `minimum + step * code`, code in [0, codes - 1]; text is comma-joined."""

    kind = "numeric"

    def __init__(self, minimum: float, step: float, codes: int) -> None:
        if not (np.isfinite(minimum) and np.isfinite(step) and step > 0 and codes >= 1):
            raise MegactxError(
                f"a numeric grid needs a finite minimum, step > 0 and at least one code, got {minimum}, {step}, {codes}"
            )
        self.minimum, self.step, self.codes = float(minimum), float(step), codes

    @property
    def vocab_size(self) -> int:
        return self.codes

    def encode(self, text: str) -> Ids:
        out = []
        top = self.minimum + self.step * (self.codes - 1)
        for at, cell in enumerate(_cells(text)):
            try:
                code = round((float(cell) - self.minimum) / self.step)
            except (ValueError, OverflowError):
                code = -1
            if not 0 <= code < self.codes:
                raise MegactxError(
                    f"unknown symbol {cell.strip()!r} at position {at}: expected a number in "
                    f"{format_number(self.minimum, self.step)}..{format_number(top, self.step)}"
                )
            out.append(code)
        return np.asarray(out, dtype=np.int64)

    def decode(self, ids: ArrayLike) -> str:
        values = self.minimum + self.step * _checked(ids, self.codes, "numeric")
        return ",".join(format_number(value, self.step) for value in values.tolist())

    def glyphs(self, ids: ArrayLike) -> str:
        return "".join(str(code % 10) for code in _checked(ids, self.codes, "numeric").tolist())

    def to_json(self) -> dict[str, Any]:
        return {"kind": "numeric", "minimum": self.minimum, "step": self.step, "codes": self.codes}


def tokenizer_from_json(data: dict[str, Any]) -> Tokenizer:
    """The tokenizer a bundle or a checkpoint recorded with `to_json`."""
    try:
        match data["kind"]:
            case "byte":
                return ByteTokenizer()
            case "char":
                return CharTokenizer(data["chars"])
            case "tiktoken":
                return TiktokenTokenizer(data["name"], data.get("vocab_size"))
            case "labels":
                return LabelTokenizer(data["names"], data["display"])
            case "integer":
                return IntegerTokenizer(data["minimum"], data["maximum"])
            case "numeric":
                return NumericTokenizer(data["minimum"], data["step"], data["codes"])
            case kind:
                raise MegactxError(f"unknown tokenizer kind {kind!r}")
    except (KeyError, TypeError) as error:
        raise MegactxError(f"damaged tokenizer description ({type(error).__name__}: {error})") from None


def make_tokenizer(name: str, text: str | None = None) -> TextTokenizer:
    """`byte`, `char` (the vocabulary is the characters of `text`) or the name of a tiktoken encoding."""
    if name == "byte":
        return ByteTokenizer()
    if name == "char":
        if not text:
            raise MegactxError("tokenizer 'char' takes its vocabulary from the text, and there is none")
        return CharTokenizer.from_text(text)
    return TiktokenTokenizer(name)
