"""The README's figures, made from the committed measurements.

    python bench/figures.py            prints them
    python bench/figures.py --write    puts them between the markers in README.md

Each table says which file it was made from; a test compares the README with what this prints.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HISTORY = ROOT / "bench" / "history"
BEGIN, END = "<!-- figures: python bench/figures.py --write -->\n", "<!-- end of figures -->\n"


def load(path: Path) -> tuple[str, Any]:
    """The caption of a measurement and its results."""
    data = json.loads(path.read_text(encoding="utf-8"))
    facts = data["provenance"]
    if "cuda" in facts:
        where = f"{facts['device']}, driver {facts['driver']}, torch {facts['torch']}, triton {facts['triton']}"
    else:
        where = f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads, torch {facts['torch']}"
    name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
    return f"`{name}`: {where}, commit {facts['commit']}", data["results"]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def sampling(path: Path) -> str:
    caption, results = load(path)
    rows = [
        [
            row["case"],
            f"{row['positions_per_second']:,.0f}",
            f"{row['old_loop_positions_per_second']:,.0f}",
            f"{row['speedup']:.1f}x",
            f"{row['over_single']:.2f}x",
        ]
        for row in results
    ]
    head = ["generation", "positions/s", "uncached loop per context", "speed-up", "time of one context"]
    return (
        "One prompt of 4, 256 positions, window 256, 4 layers, width 128, top-k 20; `python bench/sampling.py`.\n\n"
        + table(head, rows)
        + f"\n{caption}\n"
    )


def sampling_op(path: Path) -> str:
    caption, results = load(path)
    rows = []
    for row in results:
        times = {name: 1e6 * median(values) for name, values in row["seconds"].items()}
        ours = times["C++"]
        cells = [f"{times[name]:,.0f}" for name in ("C++", "eager loop", "compiled loop", "reference")]
        rivals = min(times["eager loop"], times["compiled loop"])
        rows.append([row["case"]["name"], *cells, f"{rivals / ours:.1f}x"])
    head = ["`sample_contexts`, µs a call", "C++", "eager loop", "compiled loop", "reference", "best rival / C++"]
    return f"`python bench/sampling_op.py`.\n\n{table(head, rows)}\n{caption}\n"


def training(path: Path) -> str:
    caption, results = load(path)
    loader = {name: f"{marks['median_ms']:.3f} ms" for name, marks in results["loader"].items()}
    rows = [
        ["update, batch 16 x 256, 4 contexts, 4 layers, width 128", f"{results['update_ms']:.0f} ms"],
        ["throughput", f"{results['tokens_per_second']:,.0f} tokens/s"],
        ["share of the update spent on data", f"{results['data_share_percent']:.2f} %"],
        ["one batch from our loader", loader["megactx"]],
        ["one batch, sliced row by row as nanoGPT does", loader["naive"]],
    ]
    return f"`python bench/training.py`.\n\n{table(['training', 'figure'], rows)}\n{caption}\n"


def rotary(path: Path) -> str:
    caption, results = load(path)
    rivals = _timed(results, ("eager", "compiled", "Liger"))
    rows = []
    for row in results:
        ours = median(row["seconds"]["auto"])
        rate = row["case"]["bytes"] / ours
        share = f"{100 * rate / row['copy_bytes_per_second']:.0f} %"
        rows.append([row["case"]["name"], *_microseconds(row, ("auto", *rivals)), share, _advantage(row, rivals)])
    head = [f"`gaussian_rope` ({_backends(results)}), µs", "ours", *rivals, "of a copy's GB/s", "best rival / ours"]
    return f"`python bench/rotary.py`.\n\n{table(head, rows)}\n{_reasons(results, ('Liger',))}{caption}\n"


def attention(path: Path) -> str:
    caption, results = load(path)
    rivals = _timed(results, ("FlexAttention", "SDPA, mask"))
    floors = _timed(results, ("SDPA, no bias", "SDPA flash, no bias"))
    rows = [
        [
            row["case"]["name"],
            *_microseconds(row, ("auto", *rivals)),
            _advantage(row, rivals),
            *_microseconds(row, floors),
            *(_megabytes(row, name) for name in ("auto", "SDPA, mask")),
        ]
        for row in results
    ]
    head = [f"`alibi_attention` ({_backends(results)}), µs", "ours", *rivals, "best rival / ours", *floors]
    head += ["ours, MB over inputs", "SDPA, mask, MB over inputs"]
    reasons = _reasons(results, ("FlexAttention", "SDPA, mask"))
    return f"`python bench/attention.py`.\n\n{table(head, rows)}\n{reasons}{caption}\n"


MTP_RIVALS = {
    "seed": ("seed",),
    "compiled": ("compiled",),
    "native": ("native", "native, its chunks", "native, chunks"),
    "Liger": ("Liger", "Liger, larger chunks"),
    "CCE": ("CCE",),
}


def mtp(path: Path) -> str:
    """Times, then memory; a rival with several settings is its best one in either."""
    caption, results = load(path)
    rivals = {name: settings for name, settings in MTP_RIVALS.items() if _timed(results, settings)}
    times, memory = [], []
    for row in results:
        taken = {name: median(seconds) for name, seconds in row["seconds"].items()}
        ours, fastest = taken["auto"], [_least(taken, settings) for settings in rivals.values()]
        cells = [_milliseconds(x) for x in (ours, *fastest)]
        best = min((x for x in fastest if x is not None), default=None)
        cells += ["n/a" if x is None else f"{x / ours:.2f}x" for x in (taken.get("seed"), best)]
        cells.append(f"{100 * taken['GEMMs'] / ours:.0f} %" if "GEMMs" in taken else "")
        cells.append(f"{ours / taken['auto, K = 1']:.3f}x" if "auto, K = 1" in taken else "")
        times.append([row["case"]["name"], *cells])
        least = [_least(row["peak_bytes"], settings) for settings in (("auto",), *rivals.values())]
        memory.append([row["case"]["name"], *("n/a" if x is None else f"{1e-6 * x:,.0f}" for x in least)])
    head = [f"cross-entropy ({_backends(results)}), ms", "ours", *rivals, "seed / ours", "best rival / ours"]
    head += ["the GEMMs' share of ours", "ours, K targets / one"]
    explained = (
        "`python bench/mtp.py`. N rows, vocabulary V, K targets a row; of hidden states of width d, products included, "
        "or of given logits. seed: K calls of `F.cross_entropy` on one set of logits; compiled: the same under "
        "`torch.compile`; native: `F.linear_cross_entropy`, its best setting, once a target; CCE: Apple's, its filter "
        "off, which drops small gradients, as nearly all of an untrained model are.\n\n"
    )
    held = table(["peak memory over inputs, MB", "ours", *rivals], memory)
    return f"{explained}{table(head, times)}\n{held}\n{_reasons(results, ('Liger', 'CCE'))}{caption}\n"


def mtp_step(path: Path) -> str:
    caption, results = load(path)
    rows = []
    for row in results:
        held, peaks = row["held_bytes"], row["peak_bytes"]
        for name, seconds in row["seconds"].items():
            cells = [_milliseconds(median(seconds)), f"{row['ratios'][name]:.3f}x"]
            if None not in peaks.values():
                first = peaks["K = 1"]
                cells += [f"{1e-6 * peaks[name]:,.0f}", f"{peaks[name] / first:.3f}x"]
                cells.append(f"{(peaks[name] + held) / (first + held):.3f}x")
            rows.append([f"{row['case']['name']}: {name}", *(cells + ["n/a"] * 3)[:5]])
    head = ["training step", "ms", "of K = 1", "peak MB over weights and optimizer", "of K = 1", "all memory, of K = 1"]
    return f"`python bench/mtp_step.py`.\n\n{table(head, rows)}\n{caption}\n"


def audit(path: Path) -> str:
    """Per kernel the range over its configurations, architecture by architecture."""
    data = json.loads(path.read_text(encoding="utf-8"))
    facts, results = data["provenance"], data["results"]
    groups: dict[tuple[str, int], list[Any]] = {}
    for row in results:
        groups.setdefault((row["kernel"].split()[0], row["arch"]), []).append(row)
    rows = []
    for (kernel, arch), found in sorted(groups.items()):
        registers, occupancy = [row["registers"] for row in found], [row["occupancy"] for row in found]
        cells = [f"{min(registers)} to {max(registers)}", f"{max(row['shared'] for row in found):,}"]
        cells.append(f"{100 * min(occupancy):.0f} to {100 * max(occupancy):.0f} %")
        cells.append(str(max(row["local"] for row in found)))
        rows.append([f"{kernel}, sm_{arch}", str(len(found)), *cells])
    head = ["kernel", "configurations", "registers", "shared memory up to, bytes", "occupancy", "spilled bytes"]
    where = f"`{path.relative_to(ROOT)}`: compiled without a GPU by triton {facts['triton']}, commit {facts['commit']}"
    return f"`python bench/audit.py` (which prints every configuration).\n\n{table(head, rows)}\n{where}\n"


def _timed(results: Any, names: Iterable[str]) -> list[str]:
    """Those of the providers that ran somewhere, in order."""
    return [name for name in names if any(name in row["seconds"] for row in results)]


def _backends(results: Any) -> str:
    return ", ".join(sorted({row["runs"] for row in results}))


def _microseconds(row: Any, names: Iterable[str]) -> list[str]:
    return [f"{1e6 * median(row['seconds'][name]):,.0f}" if name in row["seconds"] else "n/a" for name in names]


def _least(measured: Any, names: Iterable[str]) -> Any:
    return min((measured[name] for name in names if measured.get(name) is not None), default=None)


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "n/a"
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.1 else f"{1e3 * seconds:.3g}"


def _advantage(row: Any, rivals: list[str]) -> str:
    times = [median(row["seconds"][name]) for name in rivals if name in row["seconds"]]
    return f"{min(times) / median(row['seconds']['auto']):.2f}x" if times else "n/a"


def _megabytes(row: Any, name: str) -> str:
    """The peak beyond the inputs, and what was prepared before the call."""
    peak = row["peak_bytes"].get(name)
    return "n/a" if peak is None else f"{1e-6 * (peak + row['prepared_bytes'][name]):,.0f}"


def _reasons(results: Any, names: tuple[str, ...]) -> str:
    """Why a provider is missing, one line for each reason."""
    found = {f"{name}: {row['unavailable'][name]}" for row in results for name in names if name in row["unavailable"]}
    return "".join(f"n/a, {reason}.\n\n" for reason in sorted(found))


DRAWN = {
    "rotary": rotary,
    "attention": attention,
    "mtp": mtp,
    "mtp_step": mtp_step,
    "sampling": sampling,
    "sampling_op": sampling_op,
    "training": training,
    "audit": audit,
}


def figures(history: Path = HISTORY) -> str:
    """Every table, device by device, of the measurements that are there."""
    sections = []
    for folder in sorted(path for path in history.iterdir() if path.is_dir()):
        for name, draw in DRAWN.items():
            if (folder / f"{name}.json").is_file():
                sections.append(draw(folder / f"{name}.json"))
    return "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="rewrite the figures in README.md")
    args = parser.parse_args()
    if not args.write:
        print(figures(), end="")
        return
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    readme.write_text(before + BEGIN + "\n" + figures() + "\n" + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
