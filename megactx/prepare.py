"""Make a dataset bundle: aligned contexts from text, CSV columns or existing folders. Or one context in shards.

  megactx prepare --source python-stdlib --contexts kind depth column --out_dir data/stdlib
  megactx prepare --input_file book.txt notes/ --tokenizer char --contexts case --out_dir data/book
  megactx prepare --csv log.csv --csv_numeric speed --out_dir data/log
  megactx prepare --input_file corpus/ --tokenizer gpt2 --shards --out_dir data/corpus

The table it prints holds the yardsticks of each context: the unigram entropy is the loss of the best constant
prediction, the bigram entropy that of the best table of pairs; a numeric context has an MSE of 1 for predicting its
mean.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from megactx.console import make_console
from megactx.data.bundle import SPLITS, Bundle, check_name, dtype_for, refuse_duplicates
from megactx.data.columns import read_csv
from megactx.data.derive import ALIASES, DERIVATIONS, DerivedSpec, derive_many
from megactx.data.shards import TOKENS_PER_SHARD, ShardSet, refuse_wide, write_shard_set
from megactx.data.sources import SOURCES, Corpus, read_files
from megactx.data.tokenizers import TextTokenizer, TiktokenTokenizer, make_tokenizer, tokenizer_from_json
from megactx.data.write import NewContext, check_target, split_at, write_bundle
from megactx.errors import MegactxError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out_dir", type=Path, required=True, metavar="FOLDER", help="the bundle to write")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing bundle, once the new one is complete"
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=0.1,
        metavar="F",
        help="the last part of every context, kept for validation (default: 0.1)",
    )
    _add_source_arguments(parser)
    group = parser.add_argument_group("shards")
    group.add_argument(
        "--shards",
        action="store_true",
        help="write shards with a header (as the nanoGPT speed-run family reads them) instead of a bundle: one "
        "context of at most 65,536 symbols",
    )
    group.add_argument("--tokens_per_shard", type=int, metavar="N", help=f"default: {TOKENS_PER_SHARD:,}")
    _add_text_arguments(parser.add_argument_group("text"))
    _add_csv_arguments(parser.add_argument_group("CSV"))


def _add_source_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where the data comes from (one of these)")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--input_file", nargs="+", metavar="PATH", help="text files, and folders of them (see --glob)")
    source.add_argument(
        "--source",
        choices=list(SOURCES),
        help="python-stdlib: the source code of the Python that runs, some 15 to 30 MB, no download",
    )
    source.add_argument("--csv", type=Path, metavar="FILE", help="one context per column, one token per row")
    source.add_argument(
        "--from_folders",
        nargs="+",
        metavar="FOLDER",
        help="nanoGPT-family folders (train.bin, val.bin, meta.pkl; the pickle is read, never executed), bundles or "
        "their context sub-folders; the split they have is kept",
    )
    group.add_argument(
        "--numerical", action="store_true", help="with --from_folders: read whole-number contexts as numeric ones"
    )


def _add_text_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--glob", default="*", metavar="PATTERN", help="which files of an input folder (default: all)")
    group.add_argument(
        "--tokenizer", default="byte", help="byte, char or a tiktoken encoding such as gpt2 (default: byte)"
    )
    group.add_argument("--main_name", default="text", metavar="NAME", help="name of the main context (default: text)")
    group.add_argument(
        "--contexts",
        nargs="+",
        default=[],
        metavar="SPEC",
        help="contexts derived from the main one, as [name=]function[:arg=value,...]: " + _derivation_help(),
    )
    group.add_argument("--max_bytes", type=int, metavar="N", help="use the first N bytes of the text only")


def _add_csv_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--csv_no_header", action="store_true", help="the first row is data; columns are named column0, ..."
    )
    group.add_argument("--csv_columns", nargs="+", metavar="COLUMN", help="the columns to use, in order (default: all)")
    group.add_argument(
        "--csv_numeric",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="read these as real numbers (default: columns with a cell that is not a whole number, and whole numbers "
        "that range over more than 65,536)",
    )
    group.add_argument(
        "--csv_categorical",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="read these as categories, one per whole number of their range",
    )


def _derivation_help() -> str:
    aliases = {name: alias for alias, name in ALIASES.items()}
    parts = []
    for name, derivation in DERIVATIONS.items():
        defaults = ",".join(f"{key}={value}" for key, value in derivation.defaults.items())
        parts.append(f"{aliases.get(name, name)}{':' + defaults if defaults else ''} ({derivation.summary})")
    return "; ".join(parts).replace("%", "%%")


def run(args: argparse.Namespace) -> None:
    began = time.perf_counter()
    if args.max_bytes is not None and args.max_bytes < 1:
        raise MegactxError(f"max_bytes must be at least 1, got {args.max_bytes}")
    if args.tokens_per_shard is not None and not args.shards:
        raise MegactxError("--tokens_per_shard needs --shards")
    if args.shards and args.contexts:
        raise MegactxError("--shards holds one context: leave out --contexts, or --shards for a bundle")
    if args.shards and args.tokenizer not in ("byte", "char"):
        refuse_wide(args.main_name, make_tokenizer(args.tokenizer).vocab_size)  # before the text is read
    check_target(args.out_dir, overwrite=args.overwrite)
    contexts, source = _collect(args)
    if args.shards:
        size = TOKENS_PER_SHARD if args.tokens_per_shard is None else args.tokens_per_shard
        if args.csv is None and args.from_folders is None:
            contexts = [_end_of_text(context) for context in contexts]
        write_shard_set(args.out_dir, contexts, source, tokens_per_shard=size, overwrite=args.overwrite)
    else:
        write_bundle(args.out_dir, contexts, source, overwrite=args.overwrite)
    bundle = Bundle.open(args.out_dir)
    console = make_console()
    console.print(context_table(bundle))
    what = f"{len(contexts)} contexts"
    if isinstance(bundle, ShardSet):
        train, val = (len(bundle.shards(split)) for split in SPLITS)
        what = f"{train} training and {val} validation shards"
    console.print(
        f"{args.out_dir}: {what}, {bundle.length('train'):,} training and {bundle.length('val'):,} validation "
        f"tokens each, written in {time.perf_counter() - began:.1f} s",
        markup=False,
        soft_wrap=True,
    )


def _collect(args: argparse.Namespace) -> tuple[list[NewContext], dict[str, Any]]:
    if args.csv is not None or args.from_folders is not None:
        if args.contexts:
            raise MegactxError("--contexts derives from text: it needs --input_file or --source")
        if args.csv is not None:
            return read_csv(
                args.csv,
                header=not args.csv_no_header,
                columns=args.csv_columns,
                numeric=args.csv_numeric,
                categorical=args.csv_categorical,
                val_fraction=args.val_fraction,
            )
        return _from_bundle(Bundle.from_folders(args.from_folders, numerical=args.numerical))
    specs = [DerivedSpec.parse(spec) for spec in args.contexts]
    if args.source is not None:
        corpus = SOURCES[args.source](args.max_bytes)
    else:
        corpus = read_files(args.input_file, args.glob, args.max_bytes, utf8=args.tokenizer != "byte")
    return text_contexts(corpus, args.tokenizer, specs, main_name=args.main_name, val_fraction=args.val_fraction)


def text_contexts(
    corpus: Corpus,
    tokenizer_name: str,
    specs: Sequence[DerivedSpec],
    *,
    main_name: str = "text",
    val_fraction: float = 0.1,
) -> tuple[list[NewContext], dict[str, Any]]:
    """The main context of a corpus and those derived from it, split, and the note on their source."""
    names = [main_name, *(spec.name for spec in specs)]
    refuse_duplicates(names)
    for name in names:
        check_name(name)
    ids, tokenizer, values = _tokenize(corpus, tokenizer_name, specs)
    cut = split_at(ids.size, val_fraction)
    contexts = [NewContext(main_name, "categorical", tokenizer.vocab_size, tokenizer.to_json(), (ids[:cut], ids[cut:]))]
    for spec, value in zip(specs, values, strict=True):
        derived = spec.tokenizer
        numeric = derived.kind == "numeric"
        contexts.append(
            NewContext(
                spec.name,
                "numeric" if numeric else "categorical",
                derived.vocab_size,
                derived.to_json(),
                (value[:cut], value[cut:]),
                grid=(0.0, 1.0) if numeric else None,
                derived=spec.to_json(main_name),
            )
        )
    return contexts, corpus.source


def _tokenize(
    corpus: Corpus, name: str, specs: Sequence[DerivedSpec]
) -> tuple[np.ndarray, TextTokenizer, list[np.ndarray]]:
    if name == "byte":  # the bytes are the ids: no detour over characters, which would refuse what is not UTF-8
        return np.frombuffer(corpus.data, np.uint8), make_tokenizer("byte"), derive_many(corpus.data, specs)
    text = corpus.text()
    tokenizer = make_tokenizer(name, text)
    if name == "char":
        return tokenizer.encode(text), tokenizer, derive_many(text, specs)
    # Document by document, NUL included: no token spans two of them, and the encoder never sees the whole corpus at
    # once.
    pieces = [tokenizer.encode(part) for document in text.split("\0") for part in (document, "\0")][:-1]
    ids = np.concatenate(pieces).astype(dtype_for(tokenizer.vocab_size))
    again, starts = tokenizer.text_and_starts(ids)
    if again != corpus.data:
        raise MegactxError(f"the tokenizer {name!r} does not give the text back")
    return ids, tokenizer, [value[starts] for value in derive_many(again, specs)]


def _end_of_text(context: NewContext) -> NewContext:
    """Every document begins with the end-of-text token of its encoding, where there is one, as in the shards of the
    family; so far a NUL joined them."""
    tokenizer = tokenizer_from_json(context.tokenizer)
    if not isinstance(tokenizer, TiktokenTokenizer) or tokenizer.end_of_text is None:
        return context
    nul, end = tokenizer.encode("\0"), tokenizer.end_of_text
    train, val = (np.where(ids == nul, ids.dtype.type(end), ids) for ids in context.arrays)
    return replace(context, arrays=(np.concatenate([np.full(1, end, train.dtype), train]), val))


def _from_bundle(bundle: Bundle) -> tuple[list[NewContext], dict[str, Any]]:
    contexts = []
    for info, train, val in zip(bundle.contexts, bundle.split("train"), bundle.split("val"), strict=True):
        grid = (info.numeric.minimum, info.numeric.step) if info.numeric else None
        contexts.append(
            NewContext(info.name, info.kind, info.vocab_size, info.tokenizer, (train, val), grid, info.derived)
        )
    return contexts, bundle.manifest.get("source", {})


def context_table(bundle: Bundle) -> Table:
    """Names, kinds, sizes and the yardsticks of every context, for the terminal."""
    table = Table(header_style="bold")
    for heading in ("context", "kind", "tokenizer"):
        table.add_column(heading, overflow="fold")
    for heading in ("symbols", "unigram nats", "bits", "bigram nats", "bits", "variance"):
        table.add_column(heading, justify="right")
    for info in bundle.contexts:
        tokenizer = info.tokenizer.get("name") or info.tokenizer["kind"]
        if info.derived is not None:
            arguments = ", ".join(f"{key}={value}" for key, value in info.derived["args"].items())
            tokenizer = f"{info.derived['function']}({arguments})"
        entropy = [
            f"{info.entropy.get(key, math.nan):.3f}" for key in ("unigram", "unigram_bits", "bigram", "bigram_bits")
        ]
        variance = f"{info.entropy.get('variance', math.nan):.4g}" if info.numeric else ""
        cells = (info.name, info.kind, tokenizer, f"{info.vocab_size:,}", *entropy, variance)
        table.add_row(*map(Text, cells))
    return table
