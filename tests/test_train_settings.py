"""The settings of a run: what is wrong is one line that names the flag, and no run is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from megactx import checkpoint, cli

MODEL = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--batch_size=4"]
RUN = ["--max_iters=8", "--eval_iters=2", "--sample_tokens=0", "--report=false", "--device=cpu"]
SMALL = [*MODEL, *RUN, "--learning_rate=3e-3"]


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "input.txt").write_text("def f(x):\n    return x + 1\n\n" * 100)
    arguments = ["--input_file", str(folder / "input.txt"), "--contexts", "case", "depth", "column"]
    assert cli.main(["prepare", *arguments, "--out_dir", str(folder / "bundle")]) == 0
    return folder / "bundle"


def train(bundle: Path, out_dir: Path, *extra: str) -> int:
    return cli.main(["train", "--dataset", str(bundle), "--out_dir", str(out_dir), *SMALL, *extra])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--learning_rate=inf"], "learning_rate: expected a finite number, got inf"),
        (["--weight_decay=nan"], "weight_decay: expected a finite number, got nan"),
        (["--min_lr=-1"], "min_lr: expected a number of at least 0, got -1.0"),
        (["--seed=-1"], "seed: expected a number in [0, 2^63), got -1"),
        (["--context_weights", "text=1", "text=2"], "context_weights: 'text' is given twice"),
        (["--max_iters=0"], "max_iters: expected a number above 0, got 0"),
        (["--dropout=1.5"], "dropout: expected a number in [0, 1), got 1.5"),
        (["--keep_checkpoints=1"], "keep_checkpoints: expected at least 2, got 1"),
        (["--init_from=resume"], "out_dir: "),
        (["--context_weights", "1", "2"], "context_weights: expected 4 weights (text, case, depth, column), got 2"),
        (["--context_weights", "txt=1"], "context_weights: unknown context 'txt'"),
        (["--context_weights", "text=much"], "context_weights: expected a number for 'text', got 'much'"),
        (["--device=tpu"], "device: "),
        (["--device=cuda:99"], "device: 'cuda:99' was asked for"),
        (["--n_head=5"], "n_embd"),
        (["--use_flash_lobo_per_head"], "use_flash_lobo_per_head must not be set without use_flash_lobo"),
        (["--flash_lobo_log_const=1"], "flash_lobo_log_const must not be set without use_flash_lobo"),
        (["--lod_pairs=2"], "lod_pairs must be None where position = 'simple'"),
        (["--rope_sigma=power"], "rope_sigma must be 'uniform' where position = 'simple'"),
        (["--alibi_rule=geometric", "--position=gaussian"], "alibi_rule must be 'press' where position = 'gaussian'"),
        (["--lod_block_size=10000000000000000000", "--position=gaussian"], "lod_block_size must be at most 2147483647"),
        (["--lod_pairs=8", "--position=gaussian_lod2d"], "lod_pairs must be at most 7"),
        (["--flash_lobo_fixed"], "flash_lobo_fixed must not be set without use_flash_lobo"),
        (["--block_size=100000"], "block_size"),
        (["--multicontext_datasets", "text", "nothing"], "nothing"),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert train(bundle, tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_a_config_file_sets_what_the_command_line_does_not(bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("n_embd = 64\nlearning_rate = 1\nmax_iters = 3\n")
    flags = [flag for flag in SMALL if not flag.startswith(("--n_embd", "--learning_rate", "--max_iters"))]
    places = ["--dataset", str(bundle), "--out_dir", str(tmp_path / "run"), "--config_file", str(file)]
    assert cli.main(["train", *places, *flags, "--max-iters", "2"]) == 0
    state = checkpoint.load(checkpoint.find(tmp_path / "run")).state
    assert state["train_config"]["n_embd"] == 64
    assert state["train_config"]["learning_rate"] == 1.0
    assert state["train_config"]["max_iters"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"n_layers": 2}', "unknown field 'n_layers' (did you mean 'n_layer'?)"),
        ('{"n_layer": "two"}', "n_layer: expected int, got 'two'"),
        ('{"n_layer": true}', "n_layer: expected int, got True"),
        ('{"optimizer": "sgd"}', "optimizer: expected one of adamw, muon, got 'sgd'"),
        ("[1]", "expected an object of settings"),
        ("{", "is not valid"),
        ("[" * 100_000, "is not valid"),
        ('{"learning_rate": 1' + "0" * 400 + "}", "learning_rate: expected float"),
        ('{"min_lr": Infinity}', "min_lr: expected a finite number"),
    ],
)
def test_a_bad_config_file_is_refused_by_field(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    (tmp_path / "bad.json").write_text(text)
    assert train(bundle, tmp_path / "run", "--config_file", str(tmp_path / "bad.json")) == 2
    assert message in capsys.readouterr().err
