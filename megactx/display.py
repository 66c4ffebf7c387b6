"""Showing what a model wrote: text as it is, and its other contexts aligned under it.

`aligned_lanes` is a pure function from ids to lines of styled spans; a terminal (`to_terminal`) and an HTML page
(`to_html`) are two ways to print them. Nothing here parses markup: a generated `[bold]` or `<b>` is text. In the
aligned view every token takes one cell in every lane, control characters show as symbols, and the text is coloured by
what the first class-like context says about it, each class of a context having its own colour. Under a text a number
has one character, its last digit; where there is no text to line up with, numbers are written out.
"""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from rich.cells import cell_len

from megactx.data.bundle import ContextInfo, contexts_from_manifest
from megactx.data.tokenizers import TextTokenizer, Tokenizer

# style -> (ANSI parameters, CSS); eight colours that can be told apart on light and dark grounds
STYLES = {
    "plain": ("", ""),
    "label": ("2", "color:#888"),
    "c0": ("36", "color:#1b8a8f"),
    "c1": ("33", "color:#a87400"),
    "c2": ("32", "color:#2e8540"),
    "c3": ("35", "color:#a0379a"),
    "c4": ("34", "color:#3767c9"),
    "c5": ("31", "color:#c0392b"),
    "c6": ("96", "color:#5f7d8c"),
    "c7": ("93", "color:#8a7a00"),
}
COLOURS = 8
_CLASSES = 64  # a context with more symbols than this does not colour the text


class Span(NamedTuple):
    """A piece of one line: its text, a key of `STYLES`, and whether it was given rather than generated."""

    text: str
    style: str = "plain"
    prompt: bool = False


Line = list[Span]


def aligned_lanes(
    contexts: Sequence[ContextInfo], ids: ArrayLike, *, prompt_tokens: int = 0, width: int = 100
) -> list[Line]:
    """The lanes of `ids` `[T, C]` (in the order of `contexts`), cut after newlines and at `width` columns.

    Each cut gives one line per context, labelled with its name, the first context on top, and an empty line after.
    """
    table = np.asarray(ids, dtype=np.int64).reshape(-1, len(contexts))
    tokenizers = [context.load_tokenizer() for context in contexts]
    written_out = not isinstance(tokenizers[0], TextTokenizer)
    cells = [_cells(tokenizer, table[:, c], written_out) for c, tokenizer in enumerate(tokenizers)]
    styles = [_styles(contexts, table, c) for c in range(len(contexts))]
    widths = [max(1, *map(cell_len, column)) for column in zip(*cells, strict=True)]
    label = max(len(context.name) for context in contexts) + 1
    lines: list[Line] = []
    for start, stop in _cuts(cells[0], widths, max(8, width - label - 1)):
        for c, context in enumerate(contexts):
            spans = [Span(context.name.ljust(label) + " ", "label")]
            for t in range(start, stop):
                padding = " " * (widths[t] - cell_len(cells[c][t]))
                spans.append(Span(cells[c][t] + padding, styles[c][t], t < prompt_tokens))
            lines.append(_merged(spans))
        lines.append([])
    return lines


def text_spans(contexts: Sequence[ContextInfo], ids: ArrayLike, *, prompt_tokens: int = 0) -> list[Span]:
    """The first context's text with nothing added or taken away, the prompt marked."""
    main = np.asarray(ids, dtype=np.int64).reshape(-1, len(contexts))[:, 0]
    tokenizer = contexts[0].load_tokenizer()
    whole = tokenizer.decode(main)
    # a prompt that ends inside a character decodes to something else there
    pairs = zip(whole, tokenizer.decode(main[:prompt_tokens]), strict=False)
    length = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return [Span(whole[:length], prompt=True), Span(whole[length:])]


def to_terminal(spans: Sequence[Span]) -> str:
    """One line (or text) as a string with ANSI colours; control characters in it lose their power (`harmless`)."""
    out = []
    for span in spans:
        codes = ";".join(filter(None, (STYLES[span.style][0], "1" if span.prompt else "")))
        text = harmless(span.text)
        out.append(f"\x1b[{codes}m{text}\x1b[0m" if codes and text else text)
    return "".join(out)


def to_html(manifest: dict[str, Any], ids: ArrayLike, *, prompt_tokens: int = 0, width: int = 100) -> str:
    """The aligned lanes of a bundle manifest's contexts, escaped, for the inside of a `<pre>`."""
    lines = aligned_lanes(contexts_from_manifest(manifest), ids, prompt_tokens=prompt_tokens, width=width)
    return "\n".join("".join(map(_span_html, line)) for line in lines)


def _span_html(span: Span) -> str:
    css = ";".join(filter(None, (STYLES[span.style][1], "font-weight:bold" if span.prompt else "")))
    text = html.escape(span.text)
    return f'<span style="{css}">{text}</span>' if css else text


def _cells(tokenizer: Tokenizer, ids: np.ndarray, written_out: bool) -> list[str]:
    """What each token shows: its glyph, or its whole text where a token is more than a character."""
    if tokenizer.kind == "tiktoken":
        return [_visible(tokenizer.decode([i])) or "·" for i in ids.tolist()]
    if written_out and tokenizer.kind in ("integer", "numeric"):
        return [tokenizer.decode([i]) + " " for i in ids.tolist()]
    return list(tokenizer.glyphs(ids))


def _visible(text: str) -> str:
    names = {"\n": "↵", "\t": "→", "\r": "␍"}
    return "".join(names.get(c) or (c if c.isprintable() else "·") for c in text)


def harmless(text: str) -> str:
    """Without what a terminal obeys: controls that move the cursor or start a command, and the bidirectional overrides
    that show text in another order than it has. Newlines and tabs stay."""
    return re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "·", text)


def _styles(contexts: Sequence[ContextInfo], table: np.ndarray, index: int) -> list[str]:
    """One style a token: a context's own classes, and for the text those of the first context that has classes."""
    source = index
    if index == 0:
        classes = [c for c, info in enumerate(contexts[1:], 1) if info.kind == "categorical" and _is_classes(info)]
        if not classes:
            return ["plain"] * len(table)
        source = classes[0]
    if contexts[source].kind == "numeric":
        return ["label"] * len(table)
    return [f"c{i % COLOURS}" for i in table[:, source].tolist()]


def _is_classes(info: ContextInfo) -> bool:
    return info.vocab_size <= _CLASSES


def _cuts(cells: list[str], widths: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of tokens that share a line: up to and with a newline, or what fits."""
    start = used = 0
    for t, cell in enumerate(cells):
        if used + widths[t] > limit and t > start:
            yield start, t
            start, used = t, 0
        used += widths[t]
        if cell.endswith("↵"):
            yield start, t + 1
            start, used = t + 1, 0
    if start < len(cells):
        yield start, len(cells)


def _merged(spans: list[Span]) -> Line:
    """Neighbours of one style as one span."""
    groups = itertools.groupby(spans, key=lambda span: (span.style, span.prompt))
    return [Span("".join(span.text for span in group), *key) for key, group in groups]
