"""Every shipped Triton kernel, compiled for sm_89 and sm_90 without a GPU: no spills, within the card's limits."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("arch", [89, 90])
def test_no_shipped_kernel_breaks_a_rule(arch: int, tmp_path: Path) -> None:
    """In a process of its own, since in this one the kernels may be interpreted."""
    out = tmp_path / "audit.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "bench/audit.py", "--arch", str(arch), "--jobs", "1", "--json", str(out)]
    answer = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    assert out.is_file(), answer.stderr
    audits = json.loads(out.read_text())["results"]
    assert {audit["kernel"].replace(".", " ").split()[0] for audit in audits} == {"rotary", "attention", "mtp"}
    assert [f"{audit['kernel']}: {fault}" for audit in audits for fault in audit["faults"]] == []
    assert all(audit["local"] == 0 and audit["shared"] <= 101_376 and audit["blocks"] >= 1 for audit in audits)
    assert answer.returncode == 0, answer.stderr
