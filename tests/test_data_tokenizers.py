"""Tokenizers: round trips, descriptions that restore them, and errors that name the symbol and its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from megactx.data import tokenizers
from megactx.data.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    IntegerTokenizer,
    LabelTokenizer,
    NumericTokenizer,
    TextTokenizer,
    Tokenizer,
    make_tokenizer,
    tokenizer_from_json,
)
from megactx.errors import MegactxError

TEXT = "Grüße, 世界!\n\tdef f(x): return '🙂'\0end"


def local_encoding(name: str = "tiny") -> tiktoken.Encoding:
    """A byte-pair encoding that needs no download: 256 bytes, three merges, and a gap before its special token."""
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b"  ": 258}
    return tiktoken.Encoding(name, pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|end|>": 262})


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[TextTokenizer]:
    tokenizers._tiktoken_encoding.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", local_encoding)
    yield make_tokenizer("tiny")
    tokenizers._tiktoken_encoding.cache_clear()


@given(st.text())
def test_byte_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int64
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.glyphs(ids)) == len(ids)


def test_byte_reads_what_a_terminal_could_not_decode() -> None:
    assert ByteTokenizer().encode("a\udcff").tolist() == [97, 255]
    with pytest.raises(MegactxError, match="position 1"):
        ByteTokenizer().encode("a\ud800")


@given(st.text(min_size=1))
def test_char_round_trip(text: str) -> None:
    tokenizer = make_tokenizer("char", text)
    assert tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_char_names_the_unknown_symbol_and_its_position() -> None:
    with pytest.raises(MegactxError, match=r"'z' at position 3"):
        make_tokenizer("char", "abc").encode("abczab")


def test_char_keeps_the_order_it_is_given() -> None:
    assert CharTokenizer("zab").encode("abz").tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [
        (ByteTokenizer(), TEXT),
        (CharTokenizer.from_text(TEXT), TEXT),
        (LabelTokenizer(("none", "lower", "upper"), "_LU"), "ULL_L"),
        (IntegerTokenizer(-2, 9), "-2,0,9,4"),
        (NumericTokenizer(36.5, 0.1, 30), "36.5,37,39.4"),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_description_restores_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    restored = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    ids = tokenizer.encode(text)
    assert restored.vocab_size == tokenizer.vocab_size
    assert restored.decode(ids) == text
    glyphs = restored.glyphs(ids)
    assert len(glyphs) == len(ids)
    assert glyphs.isprintable()


@pytest.mark.parametrize("step", [1e-6, 0.1, 0.25, 1.0, 3.0, 12.5, 0.00137, 7 / 65535, 1e9 / 65535])
@pytest.mark.parametrize("minimum", [0.0, -0.05, 36.6, -1234.5678])
def test_numeric_text_gives_every_code_back(minimum: float, step: float) -> None:
    tokenizer = NumericTokenizer(minimum, step, 500)
    codes = np.arange(500)
    assert (tokenizer.encode(tokenizer.decode(codes)) == codes).all()


@pytest.mark.parametrize(
    ("tokenizer", "text", "message"),
    [
        (LabelTokenizer(("a", "b"), "ab"), "abx", "'x' at position 2"),
        (IntegerTokenizer(0, 9), "1,10", r"'10' at position 1.*0\.\.9"),
        (IntegerTokenizer(0, 9), "1,2.5", "'2.5' at position 1"),
        (NumericTokenizer(0, 0.5, 3), "0,1.6", r"'1.6' at position 1.*0\.\.1"),
        (NumericTokenizer(0, 0.5, 3), "nan", "'nan' at position 0"),
        (NumericTokenizer(0, 0.5, 3), "0,inf", "'inf' at position 1"),
    ],
)
def test_unknown_symbols_are_named(tokenizer: Tokenizer, text: str, message: str) -> None:
    with pytest.raises(MegactxError, match=message):
        tokenizer.encode(text)


@pytest.mark.parametrize("ids", [[0, 3], [-1]])
def test_ids_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    for tokenizer in (CharTokenizer("abc"), LabelTokenizer("abc", "abc"), IntegerTokenizer(0, 2)):
        with pytest.raises(MegactxError, match="outside"):
            tokenizer.decode(ids)


@pytest.mark.parametrize(
    "data",
    [{}, {"kind": "nope"}, {"kind": "char"}, {"kind": "char", "chars": "aa"}, {"kind": "labels", "names": ["a"]},
     {"kind": "integer", "minimum": 3, "maximum": 1}, {"kind": "numeric", "minimum": 0, "step": 0, "codes": 2}],
)  # fmt: skip
def test_damaged_descriptions_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(MegactxError):
        tokenizer_from_json(data)


def test_tiktoken_round_trip_and_starts(tiny: TextTokenizer) -> None:
    text = "then  the thé <|end|>"
    ids = tiny.encode(text)
    assert 257 in ids
    assert 262 not in ids  # special tokens are text
    assert tiny.decode(ids) == text
    assert len(tiny.glyphs(ids)) == len(ids)
    raw, starts = tiny.text_and_starts(ids)
    assert raw == text.encode()
    assert starts is not None
    assert [tiny.decode([i]).encode() for i in ids[:2]] == [raw[a:b] for a, b in pairwise(starts[:3])]


def test_tiktoken_id_in_a_gap_is_refused(tiny: TextTokenizer) -> None:
    with pytest.raises(MegactxError, match="id 260 at position 1"):
        tiny.decode([5, 260])


def test_tiktoken_vocabulary_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> tiktoken.Encoding:
        raise ConnectionError("no route\nto host")

    tokenizers._tiktoken_encoding.cache_clear()
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(MegactxError, match=r"^the vocabulary of the tiktoken encoding 'gpt2' cannot be had.*$"):
        make_tokenizer("gpt2")
    with pytest.raises(MegactxError, match=r"^unknown tokenizer 'gpt2000': expected byte, char or .*gpt2.*$"):
        make_tokenizer("gpt2000")
