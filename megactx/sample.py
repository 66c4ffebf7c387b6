"""Continue a prompt in all contexts of a trained model.

A checkpoint carries its model config, contexts and tokenizers, so a run folder is all that is needed. Give one prompt
per context, or one for the main context (the first): contexts derived from it are then computed.

  megactx sample --out_dir runs/first --start "def "
  megactx sample --out_dir runs/first --multicontext_start "text=The " "case=ULL_" --num_samples 3 --top_p 0.95
  megactx sample --out_dir runs/first --start FILE:prompt.txt --temperature text=0.8 depth=0 --json

On a terminal the contexts are shown aligned under the text, in colour; into a pipe each context is written as it is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megactx.errors import MegactxError

if TYPE_CHECKING:
    import torch

    from megactx.data.bundle import ContextInfo
    from megactx.model import GPT

DEFAULT_PROMPT = "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `megactx sample`."""
    model = parser.add_argument_group("model")
    model.add_argument("--out_dir", default="out", help="run folder (its newest valid step) or one step folder")
    model.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run (default: auto)")
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="type of the weight matrices; only float32 gives exactly what the model gives (default)",
    )
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--start", help="prompt of the main context, or FILE:path (default: a newline)")
    prompt.add_argument(
        "--multicontext_start",
        nargs="+",
        metavar="[NAME=]TEXT",
        help="one prompt per context, by name or in the model's order; or one for the main context, the derived ones "
        "are computed. FILE:path reads a file",
    )
    prompt.add_argument("--multicontext", action="store_true", help="accepted: a checkpoint knows its contexts")
    prompt.add_argument(
        "--multicontext_datasets", nargs="+", metavar="NAME", help="the model's contexts, checked by name; any order"
    )
    draw = parser.add_argument_group("sampling", "each knob takes one value, one value per context, or NAME=VALUE")
    draw.add_argument("--num_samples", type=int, default=1, help="continuations, drawn in one batch (default: 1)")
    draw.add_argument("--max_new_tokens", type=int, default=500, help="positions to generate (default: 500)")
    for name, text in {
        "temperature": "divides the logits; 0 takes the likeliest (default: 0.8)",
        "top_k": "keep the k likeliest, 0: all (default: 0)",
        "top_p": "keep the likeliest that hold this mass (default: 1, all)",
        "min_p": "keep what has this share of the likeliest one's probability (default: 0, all)",
    }.items():
        draw.add_argument(f"--{name}", nargs="+", metavar="[NAME=]VALUE", help=text)
    draw.add_argument("--seed", type=int, default=1337, help="same seed, same samples (default: 1337)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object: texts and ids of every context")
    output.add_argument("--sample_file", metavar="PATH", help="also write all samples to a file, as plain text")
    output.add_argument("--no_color", action="store_true", help="no colour and no alignment, also on a terminal")


def run(args: argparse.Namespace) -> None:
    """Draw the samples and print them; MegactxError for whatever the user can get wrong."""
    _check_counts(args)
    import torch

    from megactx import checkpoint
    from megactx.config import GPTConfig
    from megactx.data.bundle import contexts_from_manifest
    from megactx.model import GPT

    device = _device(args.device)
    found = checkpoint.load(checkpoint.find(Path(args.out_dir)))
    contexts = contexts_from_manifest(found.state["manifest"])
    config = GPTConfig.from_json(found.state["model_config"])
    if config.names != tuple(info.name for info in contexts):
        raise MegactxError(f"checkpoint {found.path}: the contexts of its model and its manifest differ")
    order = _order(args.multicontext_datasets, contexts)
    prompt = encode_prompts(read_prompts(args.start, args.multicontext_start, order), contexts)
    length = len(prompt[0])
    if length > config.block_size:
        raise MegactxError(f"the prompt holds {length} tokens, more than the model's window of {config.block_size}")
    knobs = {name: read_knob(name, getattr(args, name), contexts) for name in KNOBS}

    model = GPT(config)
    model.load_state_dict(found.model)
    model.to(device).eval()
    ids = _generate(model, torch.tensor(prompt, device=device).T, args, knobs)
    _print(args, found, contexts, ids.cpu().tolist(), length, knobs)


def _check_counts(args: argparse.Namespace) -> None:
    if args.num_samples < 1:
        raise MegactxError(f"num_samples must be at least 1, got {args.num_samples}")
    if args.max_new_tokens < 0:
        raise MegactxError(f"max_new_tokens must be at least 0, got {args.max_new_tokens}")


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise MegactxError("device cuda was asked for, and torch sees no GPU (megactx doctor tells why)")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


# --- prompts ---------------------------------------------------------------------------------------------------------


def _order(names: Sequence[str] | None, contexts: Sequence[ContextInfo]) -> list[str]:
    """The contexts in the order the user thinks of them in; a leading data/ of a name is a folder, not a name."""
    known = [info.name for info in contexts]
    if names is None:
        return known
    given = [Path(name).name for name in names]
    for name in given:
        if name not in known:
            raise MegactxError(f"unknown context {name!r}, the model has {', '.join(known)}")
    for name in known:
        if name not in given:
            raise MegactxError(f"context {name!r} of the model is missing in multicontext_datasets")
    if len(given) != len(known):
        raise MegactxError("multicontext_datasets names a context twice")
    return given


def read_prompts(start: str | None, many: Sequence[str] | None, order: Sequence[str]) -> dict[str, str]:
    """Prompt texts by context name, from `--start` and `--multicontext_start`; `order` are the contexts' names.

    `NAME=TEXT` belongs to that context if there is one of that name, else the `=` is text. Unnamed prompts must be as
    many as contexts, or one: that of the first.
    """
    if start is not None and many is not None:
        raise MegactxError("give either start or multicontext_start, not both")
    given = [DEFAULT_PROMPT if start is None else start] if many is None else list(many)
    split = [text.partition("=") for text in given] if many is not None else []
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
        return {order[0]: _read(given[0])}
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
        if info.name not in prompts:
            continue
        try:
            ids[info.name] = info.load_tokenizer().encode(prompts[info.name]).tolist()
        except MegactxError as error:
            raise MegactxError(f"prompt of context {info.name!r}: {error}") from None
        if not ids[info.name]:
            raise MegactxError(f"prompt of context {info.name!r} is empty: at least one token is needed")
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


def _derive(info: ContextInfo, ids: dict[str, list[int]], contexts: Sequence[ContextInfo]) -> list[int]:
    import numpy as np

    from megactx.data.derive import DerivedSpec, derive_tokens
    from megactx.data.tokenizers import TextTokenizer

    main = next((c for c in contexts if info.derived and c.name == info.derived["from"] and c.name in ids), None)
    if info.derived is None or main is None:
        raise MegactxError(f"context {info.name!r} has no prompt and cannot be derived from one that has")
    tokenizer = main.load_tokenizer()
    if not isinstance(tokenizer, TextTokenizer):
        raise MegactxError(f"context {info.name!r} cannot be derived: context {main.name!r} is not text")
    spec = DerivedSpec.from_json(info.name, info.derived)
    return derive_tokens(tokenizer, np.asarray(ids[main.name]), [spec])[0].tolist()


# --- knobs -----------------------------------------------------------------------------------------------------------


class _Knob(NamedTuple):
    default: float
    low: float
    high: float
    words: str


KNOBS = {
    "temperature": _Knob(0.8, 0.0, sys.float_info.max, "a number >= 0"),
    "top_k": _Knob(0, 0, 2**31, "a whole number >= 0"),
    "top_p": _Knob(1.0, math.ulp(0.0), 1.0, "a number in (0, 1]"),
    "min_p": _Knob(0.0, 0.0, 1.0, "a number in [0, 1]"),
}


def read_knob(name: str, given: Sequence[str] | None, contexts: Sequence[ContextInfo]) -> list[float]:
    """One value per context from a flag's words: one for all, one for each, or NAME=VALUE (the others: the default).

    A top_k past a vocabulary's end is refused where it was meant for that context; one value for all must fit the
    largest.
    """
    knob = KNOBS[name]
    values = {info.name: knob.default for info in contexts}
    words = [word.rpartition("=") for word in given or ()]
    plain = [_number(name, value) for target, _, value in words if not target]
    if plain and len(plain) != len(words):
        raise MegactxError(f"{name}: name all values or none")
    if plain and len(plain) not in (1, len(contexts)):
        raise MegactxError(f"{name} needs 1 value or {len(contexts)}, one per context, got {len(plain)}")
    for target, _, value in words:
        if target and target not in values:
            raise MegactxError(f"{name}: unknown context {target!r}, the model has {', '.join(values)}")
        if target:
            values[target] = _number(name, value)
    if plain:
        values = dict(zip(values, plain * len(contexts) if len(plain) == 1 else plain, strict=False))
    if name == "top_k":
        _check_top_k(values, contexts, shared=len(plain) == 1)
    return list(values.values())


def _number(name: str, word: str) -> float:
    knob = KNOBS[name]
    try:
        value = int(word) if name == "top_k" else float(word)
    except ValueError:
        value = math.nan
    if not knob.low <= value <= knob.high:
        raise MegactxError(f"{name} must be {knob.words}, got {word}")
    return value


def _check_top_k(values: dict[str, float], contexts: Sequence[ContextInfo], *, shared: bool) -> None:
    categorical = [info for info in contexts if info.kind == "categorical"]
    if shared:
        categorical = sorted(categorical, key=lambda info: info.vocab_size)[-1:]
    for info in categorical:
        if values[info.name] > info.vocab_size:
            raise MegactxError(
                f"top_k of context {info.name!r} must be at most its vocabulary of {info.vocab_size}, "
                f"got {values[info.name]}"
            )


# --- drawing and printing --------------------------------------------------------------------------------------------


def _generate(
    model: GPT, prompt: torch.Tensor, args: argparse.Namespace, knobs: dict[str, list[float]]
) -> torch.Tensor:
    """Prompt and continuation of every sample, `[num_samples, P + max_new_tokens, C]`."""
    import torch

    from megactx.generate import generate

    rows = prompt.expand(args.num_samples, -1, -1)
    drawn = [rows]
    for tokens in generate(
        model,
        rows,
        args.max_new_tokens,
        temperature=knobs["temperature"],
        top_k=knobs["top_k"],
        top_p=knobs["top_p"],
        min_p=knobs["min_p"],
        seeds=args.seed,
        dtype=getattr(torch, args.dtype),
    ):
        if tokens.min() < 0:
            raise MegactxError("the model's outputs are not finite: its training diverged")
        drawn.append(tokens[:, None])
    return torch.cat(drawn, dim=1)


def _print(
    args: argparse.Namespace,
    found: Any,
    contexts: Sequence[ContextInfo],
    samples: list[list[list[int]]],
    prompt_tokens: int,
    knobs: dict[str, list[float]],
) -> None:
    plain = "\n".join(_plain(contexts, ids, number, len(samples)) for number, ids in enumerate(samples, 1))
    if args.sample_file:
        Path(args.sample_file).write_bytes(plain.encode("utf-8", "surrogateescape"))
    if args.json:
        settings = {name: dict(zip((c.name for c in contexts), values, strict=True)) for name, values in knobs.items()}
        report = {
            "checkpoint": str(found.path),
            "step": found.step,
            "seed": args.seed,
            "prompt_tokens": prompt_tokens,
            **settings,
            "samples": [_columns(contexts, ids) for ids in samples],
        }
        print(json.dumps(report, indent=1))
    elif sys.stdout.isatty() and not args.no_color and "NO_COLOR" not in os.environ:
        for number, ids in enumerate(samples, 1):
            _show(contexts, ids, number, len(samples), prompt_tokens)
    else:
        sys.stdout.flush()
        sys.stdout.write(plain)


def _columns(contexts: Sequence[ContextInfo], ids: list[list[int]]) -> dict[str, Any]:
    columns = zip(contexts, zip(*ids, strict=True), strict=True)
    return {info.name: {"text": info.load_tokenizer().decode(column), "ids": list(column)} for info, column in columns}


def _plain(contexts: Sequence[ContextInfo], ids: list[list[int]], number: int, count: int) -> str:
    """Each context's text as it is, under its name."""
    texts = [f"{name}:\n{column['text']}\n" for name, column in _columns(contexts, ids).items()]
    return (f"--- sample {number} of {count} ---\n" if count > 1 else "") + "\n".join(texts)


def _show(contexts: Sequence[ContextInfo], ids: list[list[int]], number: int, count: int, prompt_tokens: int) -> None:
    """On a terminal: the text, the prompt in bold, then all contexts aligned. Written raw: a console would wrap it."""
    import shutil

    from megactx.display import Span, aligned_lanes, text_spans, to_terminal

    title = f"--- sample {number} of {count} ---\n" if count > 1 else ""
    text = to_terminal(text_spans(contexts, ids, prompt_tokens=prompt_tokens), colour=True)
    sys.stdout.write(to_terminal([Span(title, "label")], colour=True) + text + "\n")
    if len(contexts) > 1:
        width = shutil.get_terminal_size((100, 24)).columns
        lines = aligned_lanes(contexts, ids, prompt_tokens=prompt_tokens, width=width)
        sys.stdout.write("\n" + "\n".join(to_terminal(line, colour=True) for line in lines) + "\n")
