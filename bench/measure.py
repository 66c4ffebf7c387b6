"""Times every provider of a case, after each has shown that it computes what the case asks for.

A provider that cannot run, or whose result is further from the float64 truth than its dtype explains, is not timed:
its row says why.  The others take turns, round by round, together with a plain copy, whose bandwidth is the ceiling
that bytes are held against.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from cases import DTYPES, MEAN_TOLERANCES, TOLERANCES, Case, describe
from providers import Call, Inputs, Provider
from rich.console import Console
from rich.table import Table
from timing import (
    copy,
    copy_bandwidth,
    interleave_cuda,
    interleave_warm,
    launch_seconds,
    peak_bytes,
    provenance,
    replayed,
    save,
    spread,
)
from torch import Tensor

Peak = Callable[[Case, str, Call, str], int | None]


def admit(case: Case, providers: Sequence[Provider], device: str) -> tuple[dict[str, Any], dict[str, Call]]:
    """What is known of each provider before it is timed, and the calls that are worth timing.

    The facts: `error`, relative to the truth, `prepared_bytes`, and `unavailable`, the reasons of those left out.
    """
    torch.manual_seed(0)
    given = case.inputs(device)
    truths: dict[str, tuple[Tensor, ...]] = {}
    facts: dict[str, Any] = {"error": {}, "prepared_bytes": {}, "unavailable": {}}
    calls: dict[str, Call] = {}
    for provider in providers:
        reason = provider.why_not(case, device)
        if not reason:
            try:
                call, prepared = provider.build(case, _copies(given))  # some write over their inputs
                results = call()
            except Exception as error:  # whatever goes wrong in a rival is this row's news, not the run's end
                reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        if not reason:
            if provider.plain not in truths:
                truths[provider.plain] = case.truth(given, provider.plain)
            errors = relative_errors(results, truths[provider.plain])
            allowed = [tolerance(case, provider, x) for x in truths[provider.plain]]
            del results
            wrong = [(off, most) for off, most in zip(errors, allowed, strict=True) if not off <= most]
            if not wrong:
                calls[provider.name] = call
                facts["error"][provider.name] = max(errors)
                facts["prepared_bytes"][provider.name] = sum(x.numel() * x.element_size() for x in prepared)
                continue
            off, most = max(wrong, key=lambda found: found[0] / found[1])
            reason = f"wrong: off by {off:.1e}, where {case.dtype} explains {most:.0e}"
        facts["unavailable"][provider.name] = reason
    return facts, calls


def relative_errors(results: Sequence[Tensor], truth: Sequence[Tensor]) -> list[float]:
    """||result - truth|| / ||truth|| of each output and gradient; infinite where one is NaN or missing."""
    if [x.shape for x in results] != [x.shape for x in truth]:
        return [float("inf")] * len(truth)
    errors = [(x.detach().double() - t).norm() / t.norm() for x, t in zip(results, truth, strict=True)]
    return [float(torch.nan_to_num(error, nan=float("inf"))) for error in errors]


def tolerance(case: Case, provider: Provider, truth: Tensor) -> float:
    """What an output or gradient may be off by, a mean by less than a tensor of rounded numbers."""
    if truth.dim():
        return TOLERANCES[case.dtype]
    return torch.finfo(DTYPES[case.dtype]).eps if provider.rounds_mean else MEAN_TOLERANCES[case.dtype]


def peak(case: Case, name: str, call: Call, device: str) -> int | None:
    """How `measure` learns the memory of a provider, whose call has run before."""
    return peak_bytes(call, device, warm=True)


def measure(
    case: Case, providers: Sequence[Provider], device: str, rounds: int | None = None, peak: Peak = peak
) -> dict[str, Any]:
    """The case, the facts of `admit`, and per provider `seconds` of each round and `peak_bytes`."""
    torch._dynamo.reset()  # what was compiled for other cases counts against a limit
    facts, calls = admit(case, providers, device)
    facts["peak_bytes"] = {name: peak(case, name, call, device) for name, call in calls.items()}
    if device == "cuda":
        facts["launch_seconds"] = {name: launch_seconds(call) for name, call in calls.items()}
        if case.graph:
            calls = _graphs(calls, facts["unavailable"])
        seconds = interleave_cuda({**calls, "copy": copy(device)}, rounds or 50)
    else:
        seconds = interleave_warm({**calls, "copy": copy(device)}, rounds)
    copied = copy_bandwidth(seconds.pop("copy"))
    return {"case": describe(case), "copy_bytes_per_second": copied, "seconds": seconds, **facts}


def show(result: dict[str, Any]) -> Table:
    """One case as a table: times, rates against the declared bytes and operations, memory, error."""
    case = result["case"]
    on_cuda = "launch_seconds" in result
    operations = ("TFLOP/s", 1e-12) if on_cuda else ("GFLOP/s", 1e-9)
    head = ["ms", "p20", "p80", "GB/s", "% of a copy", operations[0], "extra MB", "prepared MB", "error"]
    table = Table(case["name"], *head, *(["launch us"] if on_cuda else []), box=None, title_justify="left")
    for name, seconds in result["seconds"].items():
        marks = spread(seconds)
        rate = 1e3 / marks["median_ms"]
        peak = result["peak_bytes"][name]
        cells = [f"{marks[key]:,.4g}" for key in ("median_ms", "p20_ms", "p80_ms")]
        cells += [
            f"{1e-9 * rate * case['bytes']:.4g}",
            f"{100 * rate * case['bytes'] / result['copy_bytes_per_second']:.0f}",
            f"{operations[1] * rate * case['flops']:.4g}",
            "n/a" if peak is None else f"{1e-6 * peak:,.2f}",
            f"{1e-6 * result['prepared_bytes'][name]:,.2f}",
            f"{result['error'][name]:.1e}",
        ]
        cells += [f"{1e6 * result['launch_seconds'][name]:.1f}"] if on_cuda else []
        table.add_row(name, *cells)
    return table


def main(
    name: str,
    description: str | None,
    cases: Mapping[str, Sequence[Case]],
    providers: Sequence[Provider],
    runs: Callable[[str], str],
    peak: Peak = peak,
) -> None:
    """The command line of one benchmark; `runs` says which backend `auto` is on a device."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, help="default: 50 on CUDA; 15 on the CPU, down to 3 past half a minute")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", default="", help="only the cases whose name holds this text")
    parser.add_argument("--json", help="also write every round, and where it ran, to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [case for case in cases[device] if args.case in case.name]
    if not chosen:
        parser.error(
            f"--case: no {device} case holds {args.case!r}; there are " + "; ".join(c.name for c in cases[device])
        )
    where = provenance(device)
    console = Console(width=160)
    results = []
    for case in chosen:
        print(f"{case.name} ...", file=sys.stderr)
        result = {**measure(case, providers, device, args.rounds, peak), "runs": runs(device)}
        console.print(show(result))
        for other, reason in result["unavailable"].items():
            console.print(f"  {other}: n/a, {reason}", markup=False, highlight=False)
        rounds = max(map(len, result["seconds"].values()), default=0)
        copied = f"{1e-9 * result['copy_bytes_per_second']:.4g} GB/s"
        console.print(f"  a copy: {copied}; medians of {rounds} rounds\n", highlight=False)
        results.append(result)
    threads = "" if device == "cuda" else f"{where['threads']} threads, "
    print(f"{where['device']}, {threads}torch {where['torch']}, auto is {runs(device)}")
    if args.json:
        save(args.json, name, where, results)


def _graphs(calls: dict[str, Call], unavailable: dict[str, str]) -> dict[str, Call]:
    """Each call as a CUDA graph; those that cannot be captured are moved to `unavailable`."""
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = replayed(call)
        except RuntimeError as error:
            unavailable[name] = f"cannot be captured in a CUDA graph: {str(error).splitlines()[0]}"
    return graphs


def _copies(inputs: Inputs) -> Inputs:
    return {name: x.clone() for name, x in inputs.items()}
