"""Prompts of several contexts: what the user gives for some of them, equally long ids for all of them.

A context derived from another (the depth of brackets in a text) need not be given; neither need anything, as sampling
must work on a fresh model without a flag.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megactx.config import check_names
from megactx.data.bundle import ContextInfo
from megactx.data.derive import DerivedSpec, derive_tokens
from megactx.data.tokenizers import TextTokenizer
from megactx.errors import MegactxError


def context_order(names: Sequence[str] | None, contexts: Sequence[ContextInfo]) -> list[str]:
    """The contexts in the order the user thinks of them in; a leading data/ of a name is a folder, not a name."""
    known = [info.name for info in contexts]
    if names is None:
        return known
    given = [Path(name).name for name in names]
    check_names("multicontext_datasets", known, given)
    return given


def read_prompts(start: str | None, many: Sequence[str] | None, order: Sequence[str], main: str) -> dict[str, str]:
    """Prompt texts by context name, from `--start` and `--multicontext_start`; none where neither is given.

    `NAME=TEXT` belongs to that context if there is one of that name, else the `=` is text. Unnamed prompts must be as
    many as contexts, in `order`, or one: that of `main`, the model's first context.
    """
    if start is not None and many is not None:
        raise MegactxError("give either start or multicontext_start, not both")
    if many is None:
        return {} if start is None else {main: _read(start)}
    given = list(many)
    split = [text.partition("=") for text in given]
    named = [(name, text) for name, equals, text in split if equals and name in order]
    if named and len(named) == len(given):
        prompts: dict[str, str] = {}
        for name, text in named:
            if name in prompts:
                raise MegactxError(f"context {name!r} has two prompts")
            prompts[name] = _read(text)
        return prompts
    if named:
        raise MegactxError("multicontext_start: name all prompts or none")
    if len(given) == 1:
        return {main: _read(given[0])}
    if len(given) != len(order):
        raise MegactxError(
            f"multicontext_start holds {len(given)} prompts for {len(order)} contexts ({', '.join(order)}): "
            "give one for each, one for the main context, or name them (name=text)"
        )
    return {name: _read(text) for name, text in zip(order, given, strict=True)}


def _read(text: str) -> str:
    if not text.startswith("FILE:"):
        return text
    path = Path(text.removeprefix("FILE:"))
    try:
        return path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise MegactxError(f"prompt file {path}: {error.strerror}") from None


def encode_prompts(prompts: dict[str, str], contexts: Sequence[ContextInfo]) -> list[list[int]]:
    """Equally long ids for every context, in order: encoded where there is a prompt, derived where there is none."""
    ids: dict[str, list[int]] = {}
    for info in contexts:
        if info.name in prompts:
            ids[info.name] = _encode(info, prompts[info.name])
    for info in contexts:
        if info.name not in ids:
            ids[info.name] = _derive(info, ids, contexts)
    first = contexts[0].name
    for info in contexts[1:]:
        if len(ids[info.name]) != len(ids[first]):
            raise MegactxError(
                f"prompts must be equally long: context {first!r} has {len(ids[first])} tokens, "
                f"context {info.name!r} has {len(ids[info.name])}"
            )
    return [ids[info.name] for info in contexts]


def default_prompt(contexts: Sequence[ContextInfo]) -> list[list[int]]:
    """Where no prompt was given: a newline and what is derived from it. A context that cannot have that, as columns of
    numbers cannot, starts from its first symbol, and the user is told."""
    main = contexts[0]
    unknown = []
    try:
        ids = {main.name: _encode(main, "\n")}
    except MegactxError:
        ids = {main.name: [0]}
        unknown.append(main.name)
    for info in contexts[1:]:
        try:
            ids[info.name] = _derive(info, ids, contexts)
        except MegactxError:
            ids[info.name] = [0] * len(ids[main.name])
            unknown.append(info.name)
    if unknown:
        print(f"no prompt given: starting from the first symbol of {', '.join(unknown)}", file=sys.stderr)
    return [ids[info.name] for info in contexts]


def _encode(info: ContextInfo, text: str) -> list[int]:
    try:
        ids = info.load_tokenizer().encode(text).tolist()
    except MegactxError as error:
        raise MegactxError(f"prompt of context {info.name!r}: {error}") from None
    if not ids:
        raise MegactxError(f"prompt of context {info.name!r} is empty: at least one token is needed")
    return ids


def _derive(info: ContextInfo, ids: dict[str, list[int]], contexts: Sequence[ContextInfo]) -> list[int]:
    main = next((c for c in contexts if info.derived and c.name == info.derived["from"] and c.name in ids), None)
    if info.derived is None or main is None:
        raise MegactxError(f"context {info.name!r} has no prompt and cannot be derived from one that has")
    tokenizer = main.load_tokenizer()
    if not isinstance(tokenizer, TextTokenizer):
        raise MegactxError(f"context {info.name!r} cannot be derived: context {main.name!r} is not text")
    spec = DerivedSpec.from_json(info.name, info.derived)
    return derive_tokens(tokenizer, np.asarray(ids[main.name]), [spec])[0].tolist()
