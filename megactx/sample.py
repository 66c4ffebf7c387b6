"""Continue a prompt in all contexts of a trained model.

A checkpoint carries its model config, contexts and tokenizers, so a run folder is all that is needed. Give one prompt
per context, or one for the main context (the first): contexts derived from it are then computed.

  megactx sample --out_dir runs/first --start "def "
  megactx sample --out_dir runs/first --multicontext_start "text=The " "case=ULL_" --num_samples 3 --top_p 0.95
  megactx sample --out_dir runs/first --start FILE:prompt.txt --temperature text=0.8 depth=0 --json

On a terminal the contexts are shown aligned under the text, in colour; into a pipe each context is written as it is,
byte for byte.
"""

from __future__ import annotations

import argparse
import json
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
    prompt.add_argument("--start", help="prompt of the main context, or FILE:path (default: a newline, if it has one)")
    prompt.add_argument(
        "--multicontext_start",
        nargs="+",
        metavar="[NAME=]TEXT",
        help="one prompt per context, by name or in order; or one for the main context, the derived ones "
        "are computed. FILE:path reads a file",
    )
    prompt.add_argument("--multicontext", action="store_true", help="accepted: a checkpoint knows its contexts")
    prompt.add_argument(
        "--multicontext_datasets",
        nargs="+",
        metavar="NAME",
        help="the model's contexts in the order in which unnamed prompts and knobs are given",
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
    from megactx.prompts import context_order, default_prompt, encode_prompts, read_prompts

    device = _device(args.device)
    found = checkpoint.load(checkpoint.find(Path(args.out_dir)))
    contexts = contexts_from_manifest(found.state["manifest"])
    config = GPTConfig.from_json(found.state["model_config"])
    if config.names != tuple(info.name for info in contexts):
        raise MegactxError(f"checkpoint {found.path}: the contexts of its model and its manifest differ")
    order = context_order(args.multicontext_datasets, contexts)
    given = read_prompts(args.start, args.multicontext_start, order, contexts[0].name)
    prompt = encode_prompts(given, contexts) if given else default_prompt(contexts)
    length = len(prompt[0])
    if length > config.block_size:
        raise MegactxError(f"the prompt holds {length} tokens, more than the model's window of {config.block_size}")
    knobs = {name: read_knob(name, getattr(args, name), contexts, order) for name in KNOBS}
    _check_writable(args.sample_file)

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


# --- knobs -----------------------------------------------------------------------------------------------------------


class _Knob(NamedTuple):
    default: float
    low: float
    high: float
    words: str


# the ends of the ranges are those of the draw's own types, float32 and int64
KNOBS = {
    "temperature": _Knob(0.8, 0.0, (2 - 2**-23) * 2.0**127, "a number from 0 to 3.4e38"),
    "top_k": _Knob(0, 0, 2**63 - 1, "a whole number >= 0"),
    "top_p": _Knob(1.0, 2.0**-149, 1.0, "a number from 1.4e-45 to 1"),
    "min_p": _Knob(0.0, 0.0, 1.0, "a number in [0, 1]"),
}


def read_knob(
    name: str, given: Sequence[str] | None, contexts: Sequence[ContextInfo], order: Sequence[str]
) -> list[float]:
    """One value per context, in the model's order, from a flag's words: one for all, one for each in `order`, or
    NAME=VALUE (the others: the default).

    A top_k past a vocabulary's end is refused where it was meant for that context; one value for all must fit the
    largest.
    """
    values = {info.name: KNOBS[name].default for info in contexts}
    words = [word.rpartition("=") for word in given or ()]
    named = [target for target, equals, _ in words if equals]
    for target in named:
        if target not in values:
            raise MegactxError(f"{name}: unknown context {target!r}, the model has {', '.join(values)}")
        if named.count(target) > 1:
            raise MegactxError(f"{name}: context {target!r} has two values")
    if named and len(named) != len(words):
        raise MegactxError(f"{name}: name all values or none")
    numbers = [_number(name, value) for *_, value in words]
    shared = not named and len(numbers) == 1
    if not named and len(numbers) not in (0, 1, len(order)):
        each = f" or {len(order)}, one per context" if len(order) > 1 else ""
        raise MegactxError(f"{name} needs 1 value{each}, got {len(numbers)}")
    values.update(zip(named or order, numbers * len(order) if shared else numbers, strict=False))
    if name == "top_k":
        _check_top_k(values, contexts, shared=shared)
    return list(values.values())


def _number(name: str, word: str) -> float:
    knob = KNOBS[name]
    try:
        value = int(word) if name == "top_k" else float(word)
    except ValueError:
        value = float("nan")
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


def _check_writable(path: str | None) -> None:
    """A file that cannot be written is found out before the drawing, not after it."""
    if path is None:
        return
    try:
        open(path, "ab").close()
    except OSError as error:
        raise MegactxError(f"sample_file {path}: {error.strerror}") from None


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
    plain = b"\n".join(_plain(contexts, ids, number, len(samples)) for number, ids in enumerate(samples, 1))
    try:
        if args.json:
            by_name = {name: dict(zip((c.name for c in contexts), v, strict=True)) for name, v in knobs.items()}
            report = {
                "checkpoint": str(found.path),
                "step": found.step,
                "seed": args.seed,
                "prompt_tokens": prompt_tokens,
                **by_name,
                "samples": [_columns(contexts, ids) for ids in samples],
            }
            print(json.dumps(report, indent=1))
        elif sys.stdout.isatty():
            from megactx.display import harmless

            shown = (_shown(contexts, ids, n, len(samples), prompt_tokens) for n, ids in enumerate(samples, 1))
            text = "".join(shown) if _coloured(args) else harmless(plain.decode("utf-8", "replace"))
            _write(text.encode(sys.stdout.encoding or "utf-8", "replace"))
        else:
            _write(plain)
    finally:  # also when whoever read the pipe has gone
        if args.sample_file:
            Path(args.sample_file).write_bytes(plain)


def _coloured(args: argparse.Namespace) -> bool:
    """An empty NO_COLOR counts as none (no-color.org)."""
    return not args.no_color and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _write(data: bytes) -> None:
    """As bytes: a text stream would refuse what its encoding, or UTF-8 itself, has no word for."""
    sys.stdout.flush()
    binary = getattr(sys.stdout, "buffer", None)
    if binary is None:  # something else in place of the stream
        sys.stdout.write(data.decode("utf-8", "replace"))
    else:
        binary.write(data)
        binary.flush()


def _columns(contexts: Sequence[ContextInfo], ids: list[list[int]]) -> dict[str, Any]:
    columns = zip(contexts, zip(*ids, strict=True), strict=True)
    return {info.name: {"text": info.load_tokenizer().decode(column), "ids": list(column)} for info, column in columns}


def _plain(contexts: Sequence[ContextInfo], ids: list[list[int]], number: int, count: int) -> bytes:
    """Each context's text as it is, under its name. Bytes that are no UTF-8 stay what they are."""
    from megactx.data.tokenizers import TextTokenizer

    texts = []
    for info, column in zip(contexts, zip(*ids, strict=True), strict=True):
        tokenizer = info.load_tokenizer()
        text: str | bytes = tokenizer.decode(column)
        if isinstance(tokenizer, TextTokenizer):
            text, _ = tokenizer.text_and_starts(column)
        raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        texts.append(f"{info.name}:\n".encode() + raw + b"\n")
    title = f"--- sample {number} of {count} ---\n" if count > 1 else ""
    return title.encode() + b"\n".join(texts)


def _shown(contexts: Sequence[ContextInfo], ids: list[list[int]], number: int, count: int, prompt_tokens: int) -> str:
    """For a terminal: the text, the prompt in bold, then all contexts aligned. Made raw: a console would wrap it."""
    import shutil

    from megactx.display import Span, aligned_lanes, text_spans, to_terminal

    title = f"--- sample {number} of {count} ---\n" if count > 1 else ""
    text = to_terminal([Span(title, "label"), *text_spans(contexts, ids, prompt_tokens=prompt_tokens)]) + "\n"
    if len(contexts) > 1:
        width = shutil.get_terminal_size((100, 24)).columns
        lines = aligned_lanes(contexts, ids, prompt_tokens=prompt_tokens, width=width)
        text += "\n" + "\n".join(map(to_terminal, lines)) + "\n"
    return text
