"""What every shipped Triton kernel asks of a GPU, found without one: compiled ahead of time for sm_89 and sm_90.

    python bench/audit.py [--arch 89 90] [--kernel TEXT] [--jobs N] [--json FILE]

For each configuration that the package ships: registers, shared memory, how many blocks of it fit on a multiprocessor
and the share of its warps they fill, and counts of the instructions that tell how it was compiled. Ends in exit code 1
where a kernel breaks a rule: it spills or touches local memory, asks for more than 101,376 bytes of shared memory,
needs more registers than a multiprocessor has, lacks matrix instructions where its products should be some, or waits
for most of them one by one.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # before triton is imported: interpreted functions cannot be compiled

import triton
from rich.console import Console
from rich.table import Table
from timing import provenance, save
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megactx.kernels._tune import ARCHITECTURES, SHARED_LIMIT, Variant

FAMILIES = ("rotary", "attention", "mtp")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MATRIX = ("HMMA", "HGMMA", "IMMA", "QGMMA")
# Matrix instructions of sm_90 run beside the rest, but the compiler has each waited for where it cannot tell what they
# share; then it says so, by a barrier that the instruction itself names.
SERIALISED = "HGMMA waited for"
MOST_SERIALISED = 0.6
COUNTED = (*MATRIX, SERIALISED, "I2F.S64", "MUFU.EX2", "MUFU.SIN", "MUFU.COS", "LDG", "STG", "LDGSTS", "LDSM", "BAR")


@dataclass(frozen=True)
class Multiprocessor:
    """The limits of one multiprocessor (CUDA C++ Programming Guide, technical specifications per capability)."""

    warps: int
    blocks: int
    shared: int  # bytes; each block costs `reserved` more than it asks for
    registers: int = 65_536
    reserved: int = 1_024


LIMITS = {89: Multiprocessor(warps=48, blocks=24, shared=102_400), 90: Multiprocessor(64, 32, 233_472)}


@dataclass(frozen=True)
class Audit:
    """What one kernel asks for."""

    kernel: str
    arch: int
    warps: int
    registers: int  # per thread
    shared: int  # bytes per block
    local: int  # bytes per thread: spills, stacks, arrays that did not fit into registers
    blocks: int  # resident on one multiprocessor
    occupancy: float  # share of the multiprocessor's warps
    instructions: int
    counts: dict[str, int]
    faults: list[str]


def variants(arch: int, wanted: str = "") -> Iterator[Variant]:
    for family in FAMILIES:
        for variant in import_module(f"megactx.kernels.{family}.variants").variants(arch):
            if wanted in variant.name:
                yield variant


def compiled(variant: Variant, arch: int) -> Any:
    """The kernel as Triton compiles it for the usual call: tensors begin at multiples of 16 bytes."""
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    aligned = [i for i, name in enumerate(names) if signature[name].startswith("*") or name in variant.aligned]
    source = ASTSource(
        variant.kernel,
        signature,
        {(names.index(name),): value for name, value in variant.constexprs.items()},
        {(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def audit(variant: Variant, arch: int) -> Audit:
    kernel = compiled(variant, arch)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage, sass = tool("cuobjdump", "-res-usage", cubin), tool("nvdisasm", "-c", cubin)
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    opcodes = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(MUFU\.\w+|[A-Z][A-Z0-9_]*)", sass))
    total = sum(opcodes.values())
    opcodes[SERIALISED] = len(re.findall(r"\bHGMMA\b.*\bgsb0\b", sass))
    opcodes["I2F.S64"] = len(re.findall(r"\bI2F\b\S*\.S64\b", sass))
    local = found["STACK"] + found["LOCAL"]
    shared, registers = int(kernel.metadata.shared), found["REG"]
    blocks = resident(LIMITS[arch], variant.num_warps, registers, shared)
    faults = []
    if local or opcodes["LDL"] or opcodes["STL"]:
        faults.append(f"{local} bytes of local memory, {opcodes['LDL']} loads and {opcodes['STL']} stores of it")
    if shared > SHARED_LIMIT:
        faults.append(f"{shared} bytes of shared memory, more than {SHARED_LIMIT}")
    if not blocks:
        faults.append(f"{registers} registers for {variant.num_warps} warps do not fit a multiprocessor")
    if variant.matrix and not any(opcodes[name] for name in MATRIX):
        faults.append("no matrix instructions")
    if opcodes[SERIALISED] > MOST_SERIALISED * opcodes["HGMMA"]:
        faults.append(f"{opcodes[SERIALISED]} of {opcodes['HGMMA']} matrix instructions are waited for one by one")
    counts = {name: opcodes[name] for name in COUNTED if opcodes[name]}
    share = blocks * variant.num_warps / LIMITS[arch].warps
    return Audit(variant.name, arch, variant.num_warps, registers, shared, local, blocks, share, total, counts, faults)


def resident(limits: Multiprocessor, warps: int, registers: int, shared: int) -> int:
    """Blocks that fit at once: registers are handed out to warps in units of 256."""
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = limits.registers // per_warp // warps
    by_shared = limits.shared // (shared + limits.reserved)
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared)


def tool(name: str, *arguments: object) -> str:
    return subprocess.run([TOOLS / name, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def run(job: tuple[int, str]) -> Audit:
    """In a worker: a kernel travels by its name."""
    arch, name = job
    return audit(next(v for v in variants(arch) if v.name == name), arch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--kernel", default="", metavar="TEXT", help="only kernels whose name holds this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    parser.add_argument("--json", metavar="FILE", help="write the figures here")
    args = parser.parse_args()
    facts = provenance() | {"triton": triton.__version__}
    jobs = [(arch, variant.name) for arch in args.arch for variant in variants(arch, args.kernel)]
    if not jobs:
        parser.error(f"--kernel: no shipped kernel has {args.kernel!r} in its name")
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(run, jobs))
    show(results)
    if args.json:
        save(args.json, "audit", facts, [asdict(result) for result in results])
    return 1 if any(result.faults for result in results) else 0


def show(results: list[Audit]) -> None:
    console = Console(width=None if Console().is_terminal else 160)
    table = Table("kernel", "sm", "warps", "registers", "shared", "blocks", "occupancy", "instructions", "of which")
    for r in results:
        counts = " ".join(f"{name} {count}" for name, count in r.counts.items())
        cells = (r.warps, r.registers, f"{r.shared:,}", r.blocks, f"{r.occupancy:.0%}", r.instructions, counts)
        table.add_row(r.kernel, str(r.arch), *map(str, cells), style="red" if r.faults else None)
    console.print(table)
    for r in results:
        for fault in r.faults:
            console.print(f"[red]{r.kernel}, sm_{r.arch}: {fault}[/]")


if __name__ == "__main__":
    raise SystemExit(main())
