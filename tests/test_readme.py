"""The README stays true: its Python runs, its commands parse, its figures are in committed files."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megactx import cli

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"`megactx ([a-z][^`]*)`", TEXT)))


def test_the_python_example_runs_and_prints_ids_of_both_contexts(tmp_path: Path) -> None:
    code, *_ = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    drawn = [[int(number) for number in pair] for pair in re.findall(r"\[(\d+), (\d+)\]", result.stdout)]
    assert len(drawn) == 5
    assert all(text < 256 and case < 3 for text, case in drawn)


def test_the_operators_example_runs_and_prints_its_shapes() -> None:
    _, code, _ = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.split("\n")[0] == "torch.Size([2, 6, 12, 64]) torch.Size([2, 6, 768])"


def test_the_loss_example_runs_and_prints_its_shapes() -> None:
    *_, code = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "torch.Size([1, 3]) torch.Size([])"


def test_there_are_commands_to_check() -> None:
    assert {command.split()[0] for command in COMMANDS} >= {"prepare", "train", "sample", "inspect", "doctor"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if "--help" not in c])
def test_every_command_is_understood(command: str) -> None:
    name, *arguments = shlex.split(command)
    assert callable(cli.build_parser(name).parse_strictly(arguments).run)


def test_its_figures_are_those_of_the_committed_measurements() -> None:
    command = [sys.executable, str(ROOT / "bench" / "figures.py")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(printed) > 500
    assert printed in TEXT


def test_every_file_it_names_is_there() -> None:
    for path in re.findall(r"\b(?:bench|kernels|megactx|csrc|tests)/[\w./-]*\.(?:py|json|cpp|h)\b", TEXT):
        assert (ROOT / path).is_file(), path


def test_every_make_target_it_names_is_there() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in re.findall(r"\bmake (\w+)", TEXT):
        assert target in targets, target
