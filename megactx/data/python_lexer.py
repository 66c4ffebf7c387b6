"""The class of the Python token each byte belongs to, for any bytes at all.

On text that Python's own `tokenize` accepts, the classes are those of its tokens (keywords split from names); a test
compares them on the standard library. `tokenize` itself is no base for a dataset: its answers differ between Python
versions, and it gives up on text that is cut or is not Python, where a prompt always is cut. This lexer is one
regular expression, so it is total, the same everywhere, and linear in the text. What it decides where Python would
report an error: an unterminated string ends with its line (a triple-quoted one with the document), a stray symbol is
`other`. An f-string is one string, quote to quote, as Python before 3.12 read it.

A NUL byte, which Python source cannot contain, ends the document: no token spans it.
"""

from __future__ import annotations

import re
from array import array
from typing import Any

import numpy as np
from numpy.typing import NDArray

KINDS = ("end", "whitespace", "newline", "name", "string", "number", "operator", "comment", "other", "keyword")
KIND_DISPLAY = "|./nt0+#?k"
OPERATOR = KINDS.index("operator")
NEWLINE = KINDS.index("newline")

_NAME = KINDS.index("name")
_KEYWORD = KINDS.index("keyword")

# The hard keywords of every Python since 3.7: written out, so that the answer does not hang on the Python that runs.
_KEYWORDS = frozenset(
    b"False None True and as assert async await break class continue def del elif else except finally for from global"
    b" if import in is lambda nonlocal not or pass raise return try while with yield".split()
)

_STRING_PREFIX = rb"(?i:[bft]r|r[bft]?|[bftu])?"
_TRIPLE = rb"%(q)s{3}[^%(q)s\\\0]*+(?:(?:\\[^\0]|%(q)s(?!%(q)s%(q)s))[^%(q)s\\\0]*+)*+(?:%(q)s{3}|\\)?"
_SINGLE = rb"%(q)s[^%(q)s\\\r\n\0]*+(?:\\(?:\r\n|[^\0])[^%(q)s\\\r\n\0]*+)*+(?:%(q)s|\\)?"
_STRING = b"|".join(pattern % {b"q": quote} for pattern in (_TRIPLE, _SINGLE) for quote in (b"'", b'"'))
_DIGITS = rb"[0-9](?:_?[0-9])*+"
_NUMBER = (
    rb"0[xX](?:_?[0-9a-fA-F])++|0[bB](?:_?[01])++|0[oO](?:_?[0-7])++"
    rb"|(?:" + _DIGITS + rb"(?:\.(?:" + _DIGITS + rb")?)?|\." + _DIGITS + rb")(?:[eE][-+]?" + _DIGITS + rb")?[jJ]?"
)
# One group per kind, in the order of KINDS from 1 on; NUL is group 9 and folded to 0 below.
_TOKEN = re.compile(
    rb"((?:[ \t\x0c]|\\\r?\n)++)"
    rb"|(\r?\n|\r)"
    rb"|((?!" + _STRING_PREFIX + rb"['\"])[A-Za-z_\x80-\xff][A-Za-z0-9_\x80-\xff]*+)"
    rb"|(" + _STRING_PREFIX + rb"(?:" + _STRING + rb"))"
    rb"|(" + _NUMBER + rb")"
    rb"|([-+*/%@<>=&|^~:;,()\[\]{}]++|\.|!=)"
    rb"|(#[^\r\n\0]*+)"
    rb"|([^\0])"
    rb"|(\0++)"
)
_END_GROUP = 9


def python_kinds(text: bytes) -> NDArray[Any]:
    """Index into `KINDS` for every byte of `text`, uint8 [len(text)]."""
    kinds, ends = array("B"), array("q")
    add_kind, add_end = kinds.append, ends.append
    for match in _TOKEN.finditer(text):
        kind = match.lastindex or 0
        if kind == _NAME and match.group() in _KEYWORDS:
            kind = _KEYWORD
        elif kind == _END_GROUP:
            kind = 0
        add_kind(kind)
        add_end(match.end())
    stops = np.frombuffer(ends, np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), stops])[: stops.size]
    return np.repeat(np.frombuffer(kinds, np.uint8), stops - starts)
