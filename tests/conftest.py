"""What every test has: a fixed seed, one thread, and Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers run side by side; tests must not fight for cores
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton is imported: its decorator reads it


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(1234)
