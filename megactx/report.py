"""Draw the report of a training run: losses.png and report.html in its folder.

Everything comes from files the run left behind (metrics.jsonl, the newest checkpoint, samples.json), so a report can be
redrawn at any time. The page is one file that opens from disk: the plot is embedded and nothing is fetched.
"""

from __future__ import annotations

import argparse
import base64
import html
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megactx import __version__, checkpoint
from megactx.data.bundle import ContextInfo, contexts_from_manifest
from megactx.errors import MegactxError
from megactx.files import read_json
from megactx.metrics import METRICS, read_rows, yardsticks
from megactx.progress import ahead_losses, duration, loss_text, quantity

SAMPLES = "samples.json"  # what training leaves for the report: ids, and how many of them are the prompt
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #d9dee3; }
th:first-child, td:first-child { text-align: left; } td.good { color: #11702f; font-weight: 600; }
img { max-width: 100%; } pre { background: #f5f7f9; padding: .8rem; overflow-x: auto; line-height: 1.35; }
.prompt { color: #77818c; } .note { color: #57606a; }
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out_dir", required=True, help="folder of the run")


def run(args: argparse.Namespace) -> None:
    print(write_report(Path(args.out_dir)))


def write_report(out_dir: Path) -> Path:
    """Writes losses.png and report.html; returns the page's path.

    Raises:
        MegactxError: the folder has no valid checkpoint or no metrics.
    """
    found = checkpoint.load(checkpoint.find(out_dir))
    rows = read_rows(out_dir / METRICS)
    if not any(row.get("event") == "eval" for row in rows):
        raise MegactxError(f"report: no evaluation in {str(out_dir / 'metrics.jsonl')!r} yet")
    contexts = contexts_from_manifest(found.state["manifest"])
    picture = out_dir / "losses.png"
    plot_losses(rows, contexts, picture)
    page = out_dir / "report.html"
    temporary = page.with_suffix(".tmp")
    temporary.write_text(_page(out_dir, found, rows, picture), encoding="utf-8")
    os.replace(temporary, page)
    return page


def plot_losses(rows: list[dict[str, Any]], contexts: Sequence[ContextInfo], path: Path) -> None:
    """One panel per context: training and validation loss over steps, with the entropies as horizontal lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    train = [row for row in rows if row["event"] == "train"]
    evals = [row for row in rows if row["event"] == "eval"]
    columns = min(2, len(contexts))
    lines = -(-len(contexts) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(5.2 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat[len(contexts) :]:
        axis.set_visible(False)
    marks = yardsticks(contexts)
    for axis, context in zip(axes.flat, contexts, strict=False):
        name = context.name
        curves = (
            ("train", [(row["step"], row["losses"][name]) for row in train], "#9ab6d6", 1),
            ("validation", [(row["step"], row["val"][name]) for row in evals], "#1f5fa8", 2),
        )
        for label, points, colour, width in curves:
            axis.plot(*zip(*points, strict=True), color=colour, lw=width, label=label)
        for (mark, value), dashes in zip(marks[name].items(), ((4, 2), (1, 1)), strict=False):
            axis.axhline(value, color="#b3541e", lw=1, dashes=dashes, label=mark)
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("step")
        axis.set_ylabel("MSE, standardised" if context.kind == "numeric" else "nats per token")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _page(out_dir: Path, found: checkpoint.Checkpoint, rows: list[dict[str, Any]], picture: Path) -> str:
    contexts = contexts_from_manifest(found.state["manifest"])
    image = base64.b64encode(picture.read_bytes()).decode("ascii")
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>megactx: {html.escape(out_dir.name)}</title>",
        f"<style>{STYLE}</style><h1>Training run {html.escape(str(out_dir))}, step {found.step}</h1>",
        "<h2>Losses per context</h2>",
        _losses_table([row for row in rows if row["event"] == "eval"][-1], contexts),
        "<p class='note'>Unigram and bigram are the entropies of the training split: what a model with no history, and "
        "one that sees only the previous token, could reach at best. A value below all of them is green.</p>",
        f"<img alt='loss per context over steps' src='data:image/png;base64,{image}'>",
        _ahead_section(rows),
        _sample_section(out_dir, found.state["manifest"]),
        "<h2>Timings</h2>",
        _table(("what", "value"), _timings(rows)),
        "<h2>Data</h2>",
        _table(("context", "kind", "tokenizer", "symbols", "train tokens", "sha256"), _data_rows(contexts)),
        "<h2>Settings</h2>",
        _table(("setting", "value"), sorted(found.state["train_config"].items())),
        "<h2>Versions</h2>",
        _table(("what", "version"), _versions()),
        "</html>",
    ]
    return "\n".join(parts)


def _losses_table(evaluation: dict[str, Any], contexts: Sequence[ContextInfo]) -> str:
    lines = ["<table><tr>"]
    lines += [f"<th>{head}</th>" for head in ("context", "train", "validation", "bits", "unigram", "bigram")]
    lines.append("</tr>")
    for context in contexts:
        name, numeric = context.name, context.kind == "numeric"
        marks = list(yardsticks([context])[name].values())
        value = evaluation["val"][name]
        good = " class='good'" if value is not None and marks and value < min(marks) else ""
        cells = [f"<td>{loss_text(evaluation['train'][name])}</td>", f"<td{good}>{loss_text(value)}</td>"]
        bits = None if numeric or value is None else value / math.log(2)
        cells.append(f"<td>{loss_text(bits, 3)}</td>")
        cells += [f"<td>{mark:.4f}</td>" for mark in marks] + (["<td>(variance)</td>"] if numeric else [])
        cells += ["<td>-</td>"] * (5 - len(cells))
        lines.append(f"<tr><td>{html.escape(name)}</td>{''.join(cells)}</tr>")
    return "".join(lines) + "</table>"


def _ahead_section(rows: list[dict[str, Any]]) -> str:
    """Losses of the targets further ahead, and how their weight ran; nothing where only the next token is predicted."""
    evaluation = [row for row in rows if row["event"] == "eval"][-1]
    ahead = ahead_losses(evaluation, "val_")
    if not ahead:
        return ""
    named = [("the next token (val_loss)", loss_text(evaluation["val_loss"]))]
    named += [(f"{k} tokens ahead", loss_text(value)) for k, value in ahead.items()]
    together = f"together, at weight {evaluation['mtp_weight']:.3g} (val_mtp_loss)"
    named.append((together, loss_text(evaluation["val_mtp_loss"])))
    weights = [row["mtp_weight"] for row in rows if "mtp_weight" in row]
    return (
        "<h2>Multi-token prediction</h2>"
        + _table(("validation loss of", "nats"), named)
        + f"<p class='note'>The weight of the targets further ahead was at most {max(weights):.3g} and is "
        f"{weights[-1]:.3g} at the end. Only the first line compares with other runs.</p>"
    )


def _timings(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    train = [row for row in rows if row["event"] == "train"]
    if not train:
        return []
    steady = train[len(train) // 5 :]  # the first rows pay for warm-up
    rate = sorted(row["tokens_per_second"] for row in steady)[len(steady) // 2]
    step = sorted(row["ms"] for row in steady)[len(steady) // 2]
    data = sum(row["data_ms"] for row in steady) / sum(row["ms"] for row in steady)
    return [
        ("updates", str(train[-1]["step"])),
        ("time in updates", duration(train[-1]["seconds"])),
        ("median time of an update", f"{step:.1f} ms"),
        ("median throughput", f"{quantity(rate)} tokens/s"),
        ("share of data loading", f"{100 * data:.2f} %"),
        ("updates skipped as non-finite", str(train[-1]["skipped"])),
    ]


def _data_rows(contexts: Sequence[ContextInfo]) -> list[tuple[str, ...]]:
    return [
        (
            context.name,
            context.kind,
            context.tokenizer["kind"],
            f"{context.vocab_size:,}",
            f"{context.tokens['train']:,}",
            context.sha256["train"][:16],
        )
        for context in contexts
    ]


def _versions() -> list[tuple[str, str]]:
    import numpy
    import torch

    return [
        ("megactx", __version__),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("numpy", numpy.__version__),
        ("platform", platform.platform()),
    ]


def _sample_section(out_dir: Path, manifest: dict[str, Any]) -> str:
    path = out_dir / SAMPLES
    if not path.exists():
        return ""
    from megactx.display import to_html

    sample = read_json(path)
    if not {"step", "samples", "prompt_tokens"} <= sample.keys():
        raise MegactxError(f"{path} does not hold samples that training wrote")
    lanes = [to_html(manifest, ids, prompt_tokens=sample["prompt_tokens"]) for ids in sample["samples"]]
    return (
        f"<h2>Samples at step {sample['step']}</h2><p class='note'>The first {sample['prompt_tokens']} tokens of each, "
        "in bold, are the prompt, from the validation split. Each line of text has its other contexts under it.</p>"
        + "".join(f"<pre>{text}</pre>" for text in lanes)
    )


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(v))}</td>" for v in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{body}</table>"
