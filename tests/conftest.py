"""What every test has: a fixed seed and one thread."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers run side by side; tests must not fight for cores


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(1234)
