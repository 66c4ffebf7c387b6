"""What every benchmark here shares: interleaved rounds, and JSON that says where its numbers come from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def interleave(
    cases: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1, calls: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Seconds per call of each case, one figure a round.

    The cases take turns within a round, so that a machine that slows down slows all of them. `calls` repeats a quick
    case within its turn.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(warmup + rounds):
        for name, run in cases.items():
            repeats = (calls or {}).get(name, 1)
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            if index >= warmup:
                times[name].append((time.perf_counter() - start) / repeats)
    return times


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile, in milliseconds."""
    marks = quantiles(seconds, n=5) if len(seconds) > 1 else [seconds[0]] * 4
    return {"median_ms": 1e3 * median(seconds), "p20_ms": 1e3 * marks[0], "p80_ms": 1e3 * marks[-1]}


def provenance() -> dict[str, Any]:
    """Where and with what a measurement was made."""
    import torch

    from megactx import __version__

    return {
        "megactx": __version__,
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }


def save(path: str | Path, name: str, facts: dict[str, Any], results: Any) -> None:
    """Writes `{"benchmark", "provenance", "results"}` to `path`; `facts` is `provenance()` from before the run."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "provenance": facts, "results": results}, indent=1) + "\n")


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
