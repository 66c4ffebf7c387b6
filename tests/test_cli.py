"""The command line: help that answers at once, errors of one line, flags in either spelling."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megactx import __version__, cli


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_of_every_command_explains_every_flag(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: megactx {command}" in text
    for action in cli.build_parser(command)._actions:
        assert action.help, f"{command} {action.option_strings} has no help"
        for flag in action.option_strings:
            assert flag in text


def test_top_level_help_lists_the_commands_without_loading_torch() -> None:
    code = "import sys; from megactx import cli; cli.main([]); print('torch' in sys.modules)"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert lines[-1] == "False"
    for command in cli.COMMANDS:
        assert any(line.strip().startswith(command) for line in lines)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"megactx {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian' (did you mean 'train'?)"),
        (["train", "--batch_sise=3"], "unknown argument '--batch_sise' (did you mean '--batch_size'?)"),
        (["train", "--batch_size=three"], "argument --batch_size: invalid int value: 'three'"),
        (["train", "--compile=maybe"], "expected true or false, got 'maybe'"),
        (["train"], "dataset: expected --dataset BUNDLE, --multicontext_datasets FOLDER ... or --input_bin"),
        (["train", "--dataset", "does/not/exist"], "does/not/exist"),
        (["sample", "--out_dir", "does/not/exist"], "does/not/exist"),
        (["inspect", "does/not/exist"], "does/not/exist"),
        (["report", "--out_dir", "does/not/exist"], "does/not/exist"),
    ],
)
def test_bad_input_is_one_line_on_stderr_and_exit_code_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megactx.cli", "sample", "--out_dir", str(tmp_path / "none"), "--debug"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_hyphens_underscores_and_equals_signs_mean_the_same() -> None:
    parser = cli.build_parser("train")
    spellings = (["--batch-size", "8"], ["--batch_size=8"], ["--batch-size=8"], ["--batch_size", "8"])
    assert {parser.parse_strictly(s).batch_size for s in spellings} == {8}
    assert parser.parse_strictly(["--compile"]).compile is True
    assert parser.parse_strictly(["--compile=False"]).compile is False
    assert parser.parse_strictly(["--wandb-project=my-own-name"]).wandb_project == "my-own-name"
