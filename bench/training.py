"""How long an update takes on this machine, and how much of it is spent on data.

    python bench/training.py [--json FILE]

Trains the demo's model for some updates on a bundle made from the standard library (two megabytes of it) and prints the
trainer's own clock: the median update, tokens per second, and the share that went into gathering windows. The naive
loader beside ours gathers the same windows as nanoGPT does: a slice, a cast and a stack for every row and context.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from timing import interleave, provenance, save, spread

from megactx import cli
from megactx.data.bundle import Bundle
from megactx.data.loader import WindowLoader
from megactx.metrics import read_rows

MODEL = ["--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=256", "--batch_size=16"]


def naive_batch(bundle: Bundle, generator: np.random.Generator, rows: int, length: int) -> Any:
    parts = bundle.split("train")
    starts = generator.integers(0, len(parts[0]) - length, rows)
    x, y = {}, {}
    for context, part in zip(bundle.contexts, parts, strict=True):
        x[context.name] = torch.stack([torch.from_numpy(part[i : i + length].astype(np.int64)) for i in starts])
        y[context.name] = torch.stack([torch.from_numpy(part[i + 1 : i + 1 + length].astype(np.int64)) for i in starts])
    return x, y


def run(*arguments: str) -> None:
    if cli.main(list(arguments)) != 0:
        raise SystemExit(f"megactx {arguments[0]} failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    facts = provenance()
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "run"
        source = ["--source", "python-stdlib", "--max_bytes", "2000000", "--contexts", "kind", "depth", "column"]
        run("prepare", *source, "--out_dir", str(data))
        flags = [f"--max_iters={args.updates}", "--log_interval=1", f"--eval_interval={args.updates + 1}"]
        quiet = ["--eval_iters=1", "--sample_tokens=0", "--report=false"]
        run("train", "--dataset", str(data), "--out_dir", str(out), *MODEL, *flags, *quiet)
        rows = [row for row in read_rows(out / "metrics.jsonl") if row["event"] == "train"][5:]
        bundle = Bundle.open(data)
        loader, generator = WindowLoader(bundle, "train", 16, 256, seed=0), np.random.default_rng(0)
        counter = iter(range(10**9))
        times = interleave(
            {"megactx": lambda: loader.batch(next(counter)), "naive": lambda: naive_batch(bundle, generator, 16, 256)},
            rounds=30,
            calls={"megactx": 20, "naive": 20},
        )
    results = {
        "update_ms": median(row["ms"] for row in rows),
        "tokens_per_second": median(row["tokens_per_second"] for row in rows),
        "data_share_percent": 100 * sum(row["data_ms"] for row in rows) / sum(row["ms"] for row in rows),
        "loader": {name: spread(seconds) for name, seconds in times.items()},
    }
    table = Table("what", "figure", title="training, 4 contexts, 4 layers, width 128, batch 16 x 256")
    table.add_row("median update", f"{results['update_ms']:.1f} ms")
    table.add_row("throughput", f"{results['tokens_per_second']:,.0f} tokens/s")
    table.add_row("share of data loading", f"{results['data_share_percent']:.2f} %")
    for name, marks in results["loader"].items():
        table.add_row(f"one batch, {name} loader", f"{marks['median_ms']:.3f} ms")
    Console().print(table)
    if args.json:
        save(args.json, "training", facts, results)


if __name__ == "__main__":
    main()
