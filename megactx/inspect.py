"""Show what is in a dataset bundle, in a folder of shards or in one shard, and check whether it is intact.

  megactx inspect data/stdlib
  megactx inspect data/stdlib --verify
  megactx inspect data/fineweb_train_000001.bin

Every file is read and compared with its recorded hash. Damage is named by context on one line, with exit code 2. A
shard alone has no recorded hash: its header and size are checked, and its largest id is shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from rich.text import Text

from megactx.console import Console, make_console
from megactx.data.bundle import SHARDS, SPLITS, Bundle, ContextInfo, find_damage
from megactx.data.derive import DerivedSpec, derive_tokens
from megactx.data.shard_file import Shard, read_shard
from megactx.data.shards import BARE, ShardSet
from megactx.data.tokenizers import TextTokenizer
from megactx.errors import MegactxError
from megactx.prepare import context_table

QUICK = 1 << 20
LOOKAHEAD = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="a bundle or a folder of shards, or one shard")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also recompute all of every derived context from the main one (default: its first million tokens)",
    )
    parser.add_argument(
        "--sample",
        type=int,
        default=70,
        metavar="N",
        help="tokens to show from the start of the aligned contexts, one character each (default: 70)",
    )


def run(args: argparse.Namespace) -> None:
    if args.sample < 0:
        raise MegactxError(f"sample must be at least 0, got {args.sample}")
    console = make_console()
    if args.path.is_file():
        print_shard(console, read_shard(args.path), args.sample)
        return
    bundle = Bundle.open(args.path)
    print_summary(console, bundle)
    if isinstance(bundle, ShardSet):
        inspect_shards(console, bundle, args.sample)
        return
    damage = {info.name: find_damage(args.path / info.name, info, contents=True) for info in bundle.contexts}
    damaged = {name for name, problems in damage.items() if problems}
    print_lanes(console, bundle, args.sample, skip=damaged)
    problems = [problem for found in damage.values() for problem in found]
    problems += contradictions(bundle, None if args.verify else QUICK, skip=damaged)
    if problems:
        raise MegactxError(f"{args.path}: {'; '.join(problems)}")
    derived = "derived contexts" if args.verify else "the beginnings of derived contexts"
    console.print(f"intact: sizes, hashes, id ranges and {derived} agree with the manifest", markup=False)


def print_summary(console: Console, bundle: Bundle) -> None:
    source = ", ".join(f"{key} {value}" for key, value in bundle.source.items())
    console.print(
        f"{bundle.path}: {bundle.length('train'):,} training and {bundle.length('val'):,} validation tokens per "
        f"context; source: {source}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    console.print(context_table(bundle))
    for info in bundle.contexts:
        hashes = ", ".join(f"{split} {info.sha256.get(split, '')[:12]}" for split in SPLITS)
        console.print(f"  {info.name} ({info.dtype}): sha256 {hashes}", markup=False, soft_wrap=True)


def inspect_shards(console: Console, shards: ShardSet, count: int) -> None:
    between = "no token stands" if shards.delimiter is None else f"token {shards.delimiter} stands"
    console.print(f"  {between} between documents", markup=False)
    for split in SPLITS:
        for shard in shards.shards(split):
            console.print(f"  {shard.path.name}: {shard.tokens:,} tokens", markup=False, soft_wrap=True)
    ShardSet.open(shards.path, verify=True)
    print_lanes(console, shards, count)
    console.print(f"intact: sizes, hashes and id ranges agree with {SHARDS}", markup=False)


def print_shard(console: Console, shard: Shard, count: int) -> None:
    """What one shard says of itself and holds. No file beside it tells of what its ids mean."""
    ids = shard.map()
    for line in (
        f"{shard.path}: {shard.tokens:,} tokens of {shard.dtype}, header and size agree",
        f"  largest id {shard.largest():,}; {shard.count(BARE[shard.dtype][2]):,} of them are {BARE[shard.dtype][2]}, "
        f"the end of a document in the shards of the nanoGPT speed-run family",
        *([f"  begins with {' '.join(map(str, ids[:count].tolist()))}"] if count else []),
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def print_lanes(console: Console, bundle: Bundle, count: int, skip: Collection[str] = ()) -> None:
    """The first `count` tokens of every context, one character per token, under each other."""
    width = max(len(info.name) for info in bundle.contexts)
    for info, ids in zip(bundle.contexts, bundle.split("train"), strict=True):
        if info.name in skip:
            continue
        try:
            glyphs = info.load_tokenizer().glyphs(np.asarray(ids[:count]))
        except MegactxError as error:
            raise MegactxError(f"context {info.name!r}: {error}") from None
        console.print(Text(f"{info.name:>{width}} ", style="bold") + Text(glyphs, style="none"), soft_wrap=True)


def contradictions(bundle: Bundle, limit: int | None, skip: Collection[str] = ()) -> list[str]:
    """Derived contexts that do not follow from their main one, within the first `limit` tokens (None: all).

    Contexts named in `skip` are damaged already: nothing is computed from them or compared with them.
    """
    problems = []
    for main in bundle.contexts:
        derived = [
            i for i in bundle.contexts if i.derived and i.derived.get("from") == main.name and i.name not in skip
        ]
        if derived and main.name not in skip:
            try:
                problems += _compare(bundle, main, derived, limit)
            except (MegactxError, KeyError) as error:
                problems.append(f"context {main.name!r}: nothing can be derived from it ({error})")
    return problems


def _compare(bundle: Bundle, main: ContextInfo, derived: Sequence[ContextInfo], limit: int | None) -> list[str]:
    tokenizer = main.load_tokenizer()
    if not isinstance(tokenizer, TextTokenizer):
        raise MegactxError(f"its tokenizer is {tokenizer.kind}")
    specs = [DerivedSpec.from_json(info.name, info.derived or {}) for info in derived]
    expected = derive_tokens(tokenizer, _ids(bundle, main.name, limit), specs)
    problems = []
    for info, values in zip(derived, expected, strict=True):
        found = _ids(bundle, info.name, limit)
        cut = found.size < bundle.length("train") + bundle.length("val")
        # The class of a token may hang on what follows, so the last stretch before a cut proves nothing.
        end = max(0, found.size - LOOKAHEAD) if cut else found.size
        wrong = np.flatnonzero(found[:end] != values[:end])
        if wrong.size:
            problems.append(
                f"context {info.name!r} does not follow from {main.name!r}: {wrong.size:,} of {end:,} tokens differ, "
                f"the first at {wrong[0]:,}"
            )
    return problems


def _ids(bundle: Bundle, name: str, limit: int | None) -> np.ndarray:
    """The first `limit` ids of a context, on through the validation split."""
    index = [info.name for info in bundle.contexts].index(name)
    train, val = (bundle.split(split)[index] for split in SPLITS)
    return np.concatenate([train[:limit], val[: None if limit is None else max(0, limit - train.size)]])
