"""What every benchmark here shares: interleaved rounds, and JSON that says where its numbers come from."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from statistics import median, quantiles
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COPIED = 256 * 2**20  # bytes: past the caches of the machines this runs on


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


def interleave_cuda(cases: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """`interleave` on the GPU: seconds between two events around each call, from a cold L2 cache.

    Before each call a buffer of four times the cache is written over. That also gives the caller time to enqueue the
    call before the GPU is ready for it, so that what is timed is the GPU, not the caller.
    """
    import torch

    cache = torch.cuda.get_device_properties().L2_cache_size
    flushed = torch.empty(max(4 * cache, COPIED), dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in cases}
    for index in range(warmup + rounds):
        marks = {name: [torch.cuda.Event(enable_timing=True) for _ in range(2)] for name in cases}
        for name, run in cases.items():
            flushed.zero_()
            marks[name][0].record()
            run()
            marks[name][1].record()
        torch.cuda.synchronize()
        if index >= warmup:
            for name, (start, end) in marks.items():
                times[name].append(1e-3 * start.elapsed_time(end))
    return times


def once(call: Callable[[], object]) -> float:
    """The seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def repeats(call: Callable[[], object], seconds: float = 0.02) -> int:
    """How many calls take about 20 ms: a round must not be shorter than what the clock and the caller cost."""
    call()  # compiles
    return max(1, int(seconds / once(call)))


def interleave_warm(cases: Mapping[str, Callable[[], Any]], rounds: int | None = None) -> dict[str, list[float]]:
    """`interleave` of calls that have run before: quick ones are repeated within their turns.

    Without `rounds` there are 15, fewer where those would take more than half a minute, but at least 3.
    """
    first = {name: once(run) for name, run in cases.items()}
    if rounds is None:
        rounds = min(15, max(3, int(30 / sum(first.values()))))
    calls = {name: max(1, int(0.02 / seconds)) for name, seconds in first.items()}
    if max(calls.values()) > 1:
        return interleave(cases, rounds, warmup=0, calls=calls)
    others = interleave(cases, rounds - 1, warmup=0)  # that was a round already: none is too short to be timed alone
    return {name: [seconds, *others[name]] for name, seconds in first.items()}


def alone(build: Callable[..., Callable[[], Any]], *arguments: Any) -> int | None:
    """`peak_bytes` on the CPU of `build(*arguments)`, which travels by its name, in a process that did nothing else."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_of, build, *arguments).result()


def _peak_of(build: Callable[..., Callable[[], Any]], *arguments: Any) -> int | None:
    return peak_bytes(build(*arguments), "cpu")


def replayed(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as a CUDA graph: what a call costs on the GPU where launching it costs more."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # whatever is compiled or tuned at the first calls cannot be captured
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def copy(device: str) -> Callable[[], Any]:
    """A copy of `COPIED` bytes, to be timed beside the others: `copy_bandwidth` of its median."""
    import torch

    source, target = (torch.ones(COPIED // 4, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def copy_bandwidth(seconds: list[float]) -> float:
    """Bytes a second, read and written."""
    return 2 * COPIED / median(seconds)


def launch_seconds(run: Callable[[], Any], calls: int = 50) -> float:
    """What one call costs its caller on CUDA, while the GPU is busy with the ones before."""
    import torch

    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return spent / calls


def peak_bytes(run: Callable[[], Any], device: str, warm: bool = False) -> int | None:
    """The most memory that `run` holds at a time, results included, beyond what was held before; None if unknown.

    On CUDA by the allocator's count. On Linux CPUs by resident memory, whose high-water mark can be set back: exact to
    a few pages, so that nothing below 100 KB means anything.  A first call, which compiles and sets up libraries, does
    not count; `warm` says that there was one.
    """
    if not warm:
        run()
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed and kept would hide what is allocated next
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except (AttributeError, OSError, TypeError):
        return None
    resident = _status("VmRSS")
    held = run()
    del held
    return max(0, _status("VmHWM") - resident)


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and the 20th and 80th percentile, in milliseconds."""
    marks = quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 4
    return {"median_ms": 1e3 * median(seconds), "p20_ms": 1e3 * marks[0], "p80_ms": 1e3 * marks[-1]}


def provenance(device: str = "auto") -> dict[str, Any]:
    """Where and with what a measurement was made; `device` is `cpu`, `cuda` or whichever is there."""
    import torch

    from megactx import __version__

    on_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    facts = {
        "megactx": __version__,
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if on_cuda else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
    }
    return facts | _cuda_facts() if on_cuda else facts


def save(path: str | Path, name: str, facts: dict[str, Any], results: Any) -> None:
    """Writes `{"benchmark", "provenance", "results"}` to `path`; `facts` is `provenance()` from before the run."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "provenance": facts, "results": results}, indent=1) + "\n")


def _cuda_facts() -> dict[str, Any]:
    import torch

    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, check=True)
        driver, clock, power = (field.strip() for field in result.stdout.splitlines()[0].split(","))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        driver = clock = power = ""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    return {"cuda": torch.version.cuda, "triton": triton, "driver": driver, "sm_clock": clock, "power_limit": power}


def _status(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


def _git(*arguments: str) -> str:
    result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
