"""Fixtures shared by the families' tests: a fixed seed for each test, and a tiny bundle to train on."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers run side by side; tests must not fight for cores


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(1234)
