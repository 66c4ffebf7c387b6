"""Shows what this installation can do: versions, devices, and which backend is live for which operator.

Nothing is downloaded or changed. Whatever is missing is named with the reason, and the exit code is 0 all the same:
a machine without a GPU, a compiler or even torch is a fact, not an error. With --json the same facts are printed for
a program, or for a bug report.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from megactx import __version__
from megactx.console import Console

PACKAGES = ("torch", "triton", "numpy", "tiktoken", "safetensors", "rich", "matplotlib", "wandb", "tensorboard")
SWITCHES = {
    "MEGACTX_BACKEND": "auto, reference, triton or cpp: which implementation of the operators runs",
    "MEGACTX_BUILD_CPP": "1, 0 or auto: whether installing builds the C++ extension",
    "TRITON_INTERPRET": "1 runs Triton kernels in the interpreter, without a GPU",
    "CUDA_VISIBLE_DEVICES": "the GPUs that torch may see",
    "OMP_NUM_THREADS": "the CPU threads of torch and of the C++ operators",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> None:
    facts = examine()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        show(facts, Console(soft_wrap=True))


def examine() -> dict[str, Any]:
    """Every fact that `doctor` shows, as JSON values."""
    torch_facts, torch_error = _torch_facts()
    operators, operators_error = _operators()
    return {
        "versions": _versions(),
        "cpu": {"model": _cpu_model(), "cores": os.cpu_count(), **torch_facts.pop("cpu", {})},
        "cuda": torch_facts.get("cuda", []),
        "torch_error": torch_error,
        "extension": _extension(),
        "operators": operators,
        "operators_error": operators_error,
        "switches": {name: os.environ.get(name) for name in SWITCHES},
    }


def _versions() -> dict[str, str | None]:
    """Versions as installed, read from metadata: importing each package would take seconds."""
    found: dict[str, str | None] = {
        "megactx": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "compiler": _compiler(),
    }
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _compiler() -> str | None:
    path = shutil.which(os.environ.get("CXX") or "c++")
    if path is None:
        return None
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return path
    return next(iter(answer.stdout.splitlines()), path)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _torch_facts() -> tuple[dict[str, Any], str | None]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of torch's own libraries does not load
        return {}, f"torch cannot be imported: {error}"
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    cpu = {"threads": torch.get_num_threads(), "vector": torch.backends.cpu.get_cpu_capability()}
    return {"cpu": cpu, "cuda": devices}, None


def _extension() -> dict[str, str | None]:
    """Where the compiled operators lie and whether they loaded; `error` is None when they did."""
    try:
        from megactx.kernels import _library
    except (ImportError, OSError, ValueError) as error:  # ValueError: MEGACTX_BACKEND is not a backend
        return {"path": None, "error": str(error)}
    found = sorted(Path(_library.__file__).parent.glob("_C*.so"))
    return {"path": str(found[-1]) if found else None, "error": _library.EXTENSION_ERROR or None}


def _operators() -> tuple[dict[str, dict[str, str]], str | None]:
    try:
        from megactx.kernels import backends

        return backends(), None
    except (ImportError, OSError, ValueError) as error:
        return {}, str(error)


def show(facts: dict[str, Any], console: Console) -> None:
    """The facts as tables. Text from the machine is escaped: a path may hold square brackets."""

    def table(title: str, rows: dict[str, str]) -> None:
        grid = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False)
        for name, text in rows.items():
            grid.add_row(name, text)
        console.print(grid, "")

    table("versions", {name: escape(text) if text else "[dim]none[/]" for name, text in facts["versions"].items()})
    cpu = facts["cpu"]
    devices = {"cpu": escape(f"{cpu['model']}, {cpu['cores']} cores")}
    if "threads" in cpu:
        devices["cpu"] += f", {cpu['threads']} threads in use, {cpu['vector']}"
    for index, gpu in enumerate(facts["cuda"]):
        memory = f"{gpu['memory_gib']} GiB, {gpu['multiprocessors']} multiprocessors"
        devices[f"cuda:{index}"] = escape(f"{gpu['name']}, capability {gpu['capability']}, {memory}")
    if not facts["cuda"]:
        devices["cuda"] = f"[yellow]{escape(facts['torch_error'] or 'no device')}[/]"
    table("devices", devices)

    error = facts["extension"]["error"]
    where = escape(str(facts["extension"]["path"]))
    table("C++ extension", {"state": f"[yellow]{escape(error)}[/]" if error else f"[green]loaded[/] {where}"})
    if facts["operators_error"]:
        table("operators", {"state": f"[yellow]{escape(facts['operators_error'])}[/]"})
    else:
        _show_operators(facts["operators"], console)
    table(
        "switches",
        {k: f"{escape(v) if v else '[dim]unset[/]'}  [dim]{SWITCHES[k]}[/]" for k, v in facts["switches"].items()},
    )


def _show_operators(operators: dict[str, dict[str, str]], console: Console) -> None:
    """One row for each operator; a reason that many operators share is written once, under the table."""
    reasons: list[str] = []
    names = list(next(iter(operators.values()), {}))
    grid = Table("operator", *names, title="operators", title_justify="left", title_style="bold", box=None)
    for operator, states in operators.items():
        cells = []
        for name in names:
            if states[name] == "live":
                cells.append("[green]live[/]")
                continue
            if states[name] not in reasons:
                reasons.append(states[name])
            cells.append(f"[yellow]no ({reasons.index(states[name]) + 1})[/]")
        grid.add_row(operator, *cells)
    console.print(grid)
    for number, reason in enumerate(reasons, 1):
        console.print(f"  ({number}) {escape(reason)}")
    console.print()
