"""Derived contexts: total on any text, aligned, causal where they say so, and right on known text."""

from __future__ import annotations

import io
import keyword
import random
import sysconfig
import tokenize
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megactx.data.derive import (
    DERIVATIONS,
    MAX_SYMBOLS,
    DerivedSpec,
    derive,
    derive_many,
    derive_tokens,
    find_derivation,
)
from megactx.data.python_lexer import KIND_DISPLAY, KINDS, python_kinds
from megactx.data.tokenizers import ByteTokenizer, CharTokenizer, NumericTokenizer
from megactx.errors import MegactxError

# Text made of the pieces that lexers stumble on.
PIECES = ["'", '"', "'''", '"""', "\\", "\n", "\r", "\r\n", "#", "(", ")", "[", "]", "{", "}", " ", "    ", "\t", "\f"]
PIECES += [
    "\0",
    "f",
    "rb",
    "U",
    "if",
    "name",
    "0x1f",
    "1e",
    "1_0",
    ".5",
    ".",
    "...",
    "!",
    "!=",
    "$",
    "é",
    "世",
    "_",
    ":",
]
hard_text = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join))

SAMPLE = "def f(a, b):\n    return [a,\n  'x(']  # (\nB = 1.5\n"


def lane(spec: str, text: str | bytes) -> str:
    parsed = DerivedSpec.parse(spec)
    return parsed.tokenizer.glyphs(derive_many(text, [parsed])[0])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # ---------------def f(a, b):/    return [a,/  'x(']  # (/B = 1.5/
        ("case",          "LLL_L_L__L_______LLLLLL__L_____L_________U_______"),
        ("char_class",    "cvc_c.v._c../____cvcvcc_.v./__.c...__._./c_._0.0/"),
        ("kind",          "kkk.n+n+.n++/....kkkkkk.+n+/..tttt+..###/n.+.000/"),
        ("depth",         "0000011111100000111111112222222222211111100000000"),
        ("word_position", "1230101001000000012345600100000100000000010001010"),
        ("newline_count", "0000000000000111111111111111222222222222233333333"),
        ("index_mod:m=3", "0120120120120120120120120120120120120120120120120"),
        ("column",        "0123456789012012345678901234012345678901201234567"),
    ],
)  # fmt: skip
def test_known_text(spec: str, expected: str) -> None:
    assert lane(spec, SAMPLE.encode()) == expected
    assert lane(spec, SAMPLE) == expected


def test_column_counts_from_the_line_start_and_is_capped() -> None:
    assert derive("column", "ab\n\nc").tolist() == [0, 1, 2, 0, 0]
    assert derive("column", "abcdef", cap=3).tolist() == [0, 1, 2, 3, 3, 3]


def test_depth_counts_blocks_and_brackets_up_to_its_cap() -> None:
    assert lane("depth", "if x:\n\t((\n)\n    )\ny") == "0000001233322222210"
    assert lane("depth:cap=2", "((((") == "1222"
    assert lane("depth:indent=2", "  a") == "011"
    assert lane("depth", "))(a") == "0011"  # unmatched closing brackets do not count


@pytest.mark.parametrize("name", DERIVATIONS)
@given(text=hard_text)
@settings(max_examples=60)
def test_total_and_inside_the_vocabulary(name: str, text: str) -> None:
    tokenizer = find_derivation(name).tokenizer({})
    for raw in (text, text.encode("utf-8", "surrogatepass")):
        values = derive(name, raw)
        assert values.shape == (len(raw),)
        assert values.max(initial=0) < tokenizer.vocab_size
        assert len(tokenizer.glyphs(values)) == len(raw)


@given(st.binary())
def test_kinds_are_total_on_any_bytes(data: bytes) -> None:
    assert python_kinds(data).shape == (len(data),)


@pytest.mark.parametrize("name", [name for name, derivation in DERIVATIONS.items() if derivation.causal])
@given(text=hard_text, cut=st.integers(0, 40))
@example(text="'''(", cut=3)
@example(text="''(", cut=2)
@example(text="'\\\r\n(", cut=3)
@example(text='f"{(', cut=2)
@settings(max_examples=150)
def test_causal(name: str, text: str, cut: int) -> None:
    data = text.encode("utf-8", "surrogatepass")
    assert derive(name, data[:cut]).tolist() == derive(name, data)[:cut].tolist()


def test_kind_is_not_causal_and_says_so() -> None:
    assert not DERIVATIONS["python_kind"].causal
    assert lane("kind", "i") != lane("kind", "if")[:1]


@pytest.mark.parametrize("name", DERIVATIONS)
@given(first=hard_text, second=hard_text)
@settings(max_examples=60)
def test_a_document_is_derived_as_if_it_stood_alone(name: str, first: str, second: str) -> None:
    joined = derive(name, first + "\0" + second)
    assert joined[len(first) + 1 :].tolist() == derive(name, second).tolist()
    assert joined[: len(first) + 1].tolist() == derive(name, first + "\0").tolist()


@given(st.lists(hard_text, max_size=6))
@settings(max_examples=30)
def test_chunks_do_not_show(documents: list[str]) -> None:
    text = "\0".join(documents)
    specs = [DerivedSpec.parse(name) for name in DERIVATIONS]
    whole = derive_many(text, specs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megactx.data.derive._CHUNK", 3)
        pieces = derive_many(text, specs)
    assert [v.tolist() for v in pieces] == [v.tolist() for v in whole]


@pytest.mark.parametrize("name", [n for n in DERIVATIONS if n not in ("index_mod",)])
@given(text=st.text(st.characters(codec="ascii")))
@settings(max_examples=60)
def test_bytes_and_characters_agree_on_ascii(name: str, text: str) -> None:
    assert derive(name, text).tolist() == derive(name, text.encode()).tolist()


def test_characters_beyond_ascii() -> None:
    assert lane("case", "éÉ世") == "LU_"
    assert lane("kind", "é = '世'") == "n.+.ttt"
    assert lane("column", "世世\n世") == "0120"


def test_tokens_take_the_value_of_their_first_unit() -> None:
    class Pairs(ByteTokenizer):
        def text_and_starts(self, ids: np.ndarray) -> tuple[bytes, np.ndarray]:  # type: ignore[override]
            return b"ab" * len(ids), np.arange(len(ids)) * 2

    specs = [DerivedSpec.parse("column")]
    assert derive_tokens(Pairs(), np.zeros(4), specs)[0].tolist() == [0, 2, 4, 6]
    assert derive_tokens(CharTokenizer("a\n"), np.array([0, 1, 0]), specs)[0].tolist() == [0, 1, 0]


class NestedQuotes(Exception):
    """An f-string holds its own quote: Python 3.12 and later allow it, the lexer does not follow."""


def reference_kinds(source: str) -> np.ndarray:
    """Classes from Python's own tokenize; 255 where it has no token."""
    lines = io.StringIO(source, newline="").readlines()
    offsets = np.cumsum([0, *(len(line.encode()) for line in lines)])

    def offset(place: tuple[int, int]) -> int:
        row, column = place
        return int(offsets[row - 1]) + (len(lines[row - 1][:column].encode()) if row <= len(lines) else 0)

    classes = {"NUMBER": "number", "STRING": "string", "OP": "operator", "COMMENT": "comment"}
    classes |= {"NL": "newline", "NEWLINE": "newline"}
    kinds = np.full(len(source.encode()), 255, np.uint8)
    opened: list[tuple[int, str]] = []  # f-strings of Python 3.12 and later come in parts
    for token in tokenize.generate_tokens(iter(lines).__next__):
        name, start, stop = tokenize.tok_name[token.type], offset(token.start), offset(token.end)
        if opened and name.endswith(("STRING", "STRING_START")) and token.string.rstrip()[-1] in opened[-1][1]:
            raise NestedQuotes
        if name.endswith("STRING_START"):
            opened.append((start, token.string[-1]))
        elif name.endswith("STRING_END"):
            kinds[opened.pop()[0] : stop] = KINDS.index("string")
        elif name == "NAME":
            kinds[start:stop] = KINDS.index("keyword" if token.string in keyword.kwlist else "name")
        elif name in classes:
            kinds[start:stop] = KINDS.index(classes[name])
    return kinds


def test_kinds_are_those_of_tokenize_on_the_standard_library() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in root.rglob("*.py") if not {"site-packages", "test", "lib2to3"} & set(file.parts))
    compared = 0
    for file in random.Random(0).sample(files, 60):
        source = file.read_bytes()
        if len(source) > 100_000:
            continue
        try:
            expected = reference_kinds(source.decode())
        except (UnicodeDecodeError, SyntaxError, tokenize.TokenError, NestedQuotes):
            continue
        found = python_kinds(source)
        known = expected != 255
        assert (found[known] == expected[known]).all(), file
        assert (found[~known] == KINDS.index("whitespace")).all(), file
        compared += 1
    assert compared >= 40


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ('print("hello wor', 'nnnnn+tttttttttt'),
        ("x = '''a\n b", "n.+.ttttttt"),
        ("x = 'a\ny", "n.+.tt/n"),
        ("a\\\nb", "n..n"),
        ("a\0b", "n|n"),
        ("'a\0b '", "tt|n.t"),
        ("'\\", "tt"),
        ('Rb"\\""+f\'{x}\'', "tttttt+tttttt"),
        ("1.5e-3j.x 0xff_f", "0000000+n.000000"),
        ("a$?b", "n??n"),
        ("# if\r\n", "####//"),
    ],
)  # fmt: skip
def test_kinds_of_cut_and_broken_code(code: str, expected: str) -> None:
    assert "".join(KIND_DISPLAY[i] for i in python_kinds(code.encode())) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("colum", "did you mean 'column'"),
        ("depth:cap", "'cap' is not argument=whole number"),
        ("depth:cap=x", "'cap=x'"),
        ("depth:cup=3", "no argument 'cup'"),
        ("depth:cap=0", r"cap must be a whole number in 1\.\.511"),
        ("index_mod:m=1", r"m must be a whole number in 2\.\.512"),
        ("case:m=3", "no argument 'm'"),
        ("a=b=c", "cannot read"),
        ("", "unknown derived context ''"),
    ],
)
def test_bad_specs_are_named(spec: str, message: str) -> None:
    with pytest.raises(MegactxError, match=message):
        DerivedSpec.parse(spec)


def test_spec_with_name_and_arguments() -> None:
    spec = DerivedSpec.parse("mod7=index_mod:m=7")
    assert spec == DerivedSpec("mod7", "index_mod", {"m": 7})
    assert DerivedSpec.from_json("mod7", spec.to_json("text")) == spec
    assert DerivedSpec.parse("kind").function == "python_kind"
    assert DerivedSpec.parse("depth:cap=3").args == {"cap": 3, "indent": 4}


def test_every_count_has_its_own_character() -> None:
    tokenizer = DerivedSpec.parse(f"index_mod:m={MAX_SYMBOLS}").tokenizer
    glyphs = tokenizer.glyphs(np.arange(MAX_SYMBOLS))
    assert len(set(glyphs)) == MAX_SYMBOLS
    assert glyphs.isprintable()
    assert isinstance(DerivedSpec.parse("column").tokenizer, NumericTokenizer)
