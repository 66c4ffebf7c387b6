"""`megactx doctor`: the facts are right, readable by a program, and a missing part is a line and not an error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import megactx
from megactx import doctor, kernels

ROOT = Path(__file__).resolve().parent.parent


def command(*arguments: str, **environment: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-m", "megactx.cli", "doctor", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def shown(facts: dict[str, Any]) -> str:
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    doctor.show(facts, console)
    return console.export_text()


def test_json_holds_the_truth() -> None:
    facts = json.loads(command("--json"))
    assert facts["versions"]["megactx"] == megactx.__version__
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["operators"] == kernels.backends()
    assert len(facts["cuda"]) == torch.cuda.device_count()


def test_every_operator_and_every_reason_is_shown() -> None:
    text = shown(doctor.examine())
    for operator, states in kernels.backends().items():
        assert operator in text
        for state in states.values():
            assert state in text


def test_a_wrong_switch_is_explained() -> None:
    text = command(MEGACTX_BACKEND="cuda13", COLUMNS="200")
    assert "MEGACTX_BACKEND must be one of" in text
    assert "cuda13" in text


def test_a_machine_without_torch_or_compiler_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "megactx.kernels._library", None)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(kernels, "backends", _no_backends)
    facts = doctor.examine()
    assert facts["versions"]["compiler"] is None
    text = shown(facts)
    assert "torch cannot be imported" in text
    assert "no operators here" in text


def _no_backends() -> dict[str, dict[str, str]]:
    raise ImportError("no operators here")


def test_devices_and_brackets_are_shown_as_they_are() -> None:
    facts = doctor.examine()
    facts["cuda"] = [{"name": "A [GPU]", "capability": "8.9", "memory_gib": 23.6, "multiprocessors": 128}]
    facts["extension"] = {"path": "/home/[me]/_C.abi3.so", "error": None}
    text = shown(facts)
    assert "A [GPU], capability 8.9, 23.6 GiB, 128 multiprocessors" in text
    assert "/home/[me]/_C.abi3.so" in text
