"""Train a multi-context GPT.

The dataset is a bundle written by `megactx prepare`; the run lives in --out_dir: checkpoints (step-XXXXXXXX),
metrics.jsonl, losses.png and report.html. Started again with the same --out_dir it continues from the newest valid
checkpoint, bit for bit on the CPU; flags you give override the run's stored settings. SIGINT (Ctrl-C) and SIGTERM save
and leave; the exit code is then 128 + the signal's number.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megactx.config import ContextConfig, GPTConfig
from megactx.errors import MegactxError
from megactx.files import lock
from megactx.train_config import TrainConfig, add_flags, read_config_file, resolve

if TYPE_CHECKING:
    import torch

    from megactx.checkpoint import Checkpoint
    from megactx.data.bundle import Bundle
    from megactx.metrics import Sink
    from megactx.trainer import Trainer


# The fields of a model's config that are flags of the same name.
_FLAGS = {item.name for item in fields(TrainConfig)} - {"context_weights"}  # which are given by name, too
SAME = [item.name for item in fields(GPTConfig) if item.name in _FLAGS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config_file", help="JSON or TOML file of settings, named as the flags are")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from megactx.metrics import METRICS, read_rows
    from megactx.model import GPT
    from megactx.progress import Progress
    from megactx.trainer import StopSignal, Trainer

    typed = {k: v for k, v in vars(args).items() if k in TrainConfig.__dataclass_fields__}
    file = read_config_file(args.config_file) if args.config_file else {}
    first = resolve(typed, file, {})
    _check_out_dir(Path(first.out_dir))
    found = _find_run(first)
    config = resolve(typed, file, found.state["train_config"] if found else {})
    bundle = open_bundle(config)
    try:
        model_config = build_model_config(config, bundle)
    except ValueError as error:
        if found is None or isinstance(error, MegactxError):
            raise
        raise _no_longer_fits(found, config, error) from None
    if found:
        _check_same_run(found, config, model_config, bundle)
    device = pick_device(config.device)
    torch.manual_seed(config.seed)  # initialisation and dropout; the windows have their own counter-based generator
    with StopSignal() as stop, lock(Path(config.out_dir), "out_dir"):
        trainer = Trainer(config, GPT(model_config).to(device), bundle, device)
        if found:
            trainer.restore(found)
        sinks = open_sinks(config, found.step if found else None)
        if found:
            rows = read_rows(Path(config.out_dir) / METRICS)
            trainer.evaluated_step = max((row["step"] for row in rows if row["event"] == "eval"), default=-1)
        with Progress(config.max_iters, config.max_minutes and config.max_minutes * 60) as progress:
            progress.note(describe(config, trainer.model, bundle, device, found))
            finished = trainer.fit(progress, stop, sinks)
        for sink in sinks:
            sink.close()
    if not finished:
        print(f"stopped by signal {stop.number} at step {trainer.step}; the same command continues", file=sys.stderr)
        return 128 + (stop.number or 0)
    if config.sample_tokens:
        _draw_samples(config, trainer)
    if config.report:
        from megactx.report import write_report

        print(f"report: {write_report(Path(config.out_dir))}")
    return 0


def open_bundle(config: TrainConfig) -> Bundle:
    """The bundle, or the aligned folders, that the settings name."""
    from megactx.data.bundle import Bundle

    names = config.multicontext_datasets or []
    single = config.training_mode == "single"
    if config.dataset is None:
        if not names:
            raise MegactxError("dataset: expected --dataset BUNDLE or --multicontext_datasets FOLDER ..., got neither")
        return Bundle.from_folders(names[:1] if single else names, numerical=config.numerical_multicontext)
    bundle = Bundle.open(config.dataset, names=names or None)
    if single:
        bundle = Bundle.open(config.dataset, names=[bundle.contexts[0].name])
    if config.numerical_multicontext:
        return Bundle.from_folders([bundle.path / c.name for c in bundle.contexts], numerical=True)
    return bundle


def build_model_config(config: TrainConfig, bundle: Bundle) -> GPTConfig:
    contexts = tuple(
        ContextConfig(c.name, c.kind, c.vocab_size, *((c.numeric.mean, c.numeric.std) if c.numeric else ()))
        for c in bundle.contexts
    )
    weights = parse_context_weights(config.context_weights, [c.name for c in contexts])
    return GPTConfig(contexts=contexts, context_weights=weights, **{name: getattr(config, name) for name in SAME})


def parse_context_weights(given: list[str] | None, names: list[str]) -> tuple[float, ...] | None:
    """`["1", "0.5"]` in context order, or `["text=1", ...]`; contexts not named keep 1."""
    if given is None:
        return None
    by_name = dict.fromkeys(names, 1.0)
    named = [entry for entry in given if "=" in entry]
    if named and len(named) != len(given):
        raise MegactxError(f"context_weights: expected numbers or NAME=WEIGHT throughout, got {' '.join(given)!r}")
    if not named and len(given) != len(names):
        raise MegactxError(f"context_weights: expected {len(names)} weights ({', '.join(names)}), got {len(given)}")
    if named:
        pairs = [(name, text) for name, _, text in (entry.partition("=") for entry in named)]
    else:
        pairs = list(zip(names, given, strict=True))
    for name, text in pairs:
        if [other for other, _ in pairs].count(name) > 1:
            raise MegactxError(f"context_weights: {name!r} is given twice")
        if name not in by_name:
            raise MegactxError(f"context_weights: unknown context {name!r}, expected one of {', '.join(names)}")
        try:
            by_name[name] = float(text)
        except ValueError:
            raise MegactxError(f"context_weights: expected a number for {name!r}, got {text!r}") from None
    return tuple(by_name.values())


def pick_device(name: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise MegactxError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise MegactxError(f"device: expected auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MegactxError(f"device: {name!r} was asked for, but {torch.cuda.device_count()} CUDA devices are visible")
    return device


def open_sinks(config: TrainConfig, resume_step: int | None) -> list[Sink]:
    from megactx.metrics import METRICS, JsonLines, TensorBoard, Wandb

    out_dir = Path(config.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    sinks: list[Sink] = [JsonLines(out_dir / METRICS, resume_step)]
    if config.tensorboard_log:
        sinks.append(TensorBoard(out_dir / "tensorboard"))
    if config.wandb_log:
        sinks.append(Wandb(config.wandb_project, config.wandb_run_name, out_dir, config.to_json()))
    return sinks


def describe(
    config: TrainConfig, model: Any, bundle: Bundle, device: torch.device, found: Checkpoint | None
) -> str:
    tokens = config.batch_size * config.block_size * config.gradient_accumulation_steps
    contexts = ", ".join(
        f"{c.name} ({'numeric' if c.kind == 'numeric' else c.vocab_size})" for c in bundle.contexts
    )
    start = f"resuming {found.path}" if found else "starting from scratch"
    return (
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {device} | contexts: {contexts}\n"
        f"{bundle.length('train'):,} train and {bundle.length('val'):,} validation tokens | "
        f"{tokens:,} tokens per update, {config.max_iters * tokens / bundle.length('train'):.2f} epochs | {start}"
    )


def _check_out_dir(out_dir: Path) -> None:
    from megactx import checkpoint

    if out_dir.exists() and not out_dir.is_dir():
        raise MegactxError(f"out_dir: expected a folder, got the file {str(out_dir)!r}")
    if checkpoint.is_step_folder(out_dir):
        raise MegactxError(f"out_dir: {str(out_dir)!r} is a checkpoint; give the folder of the run, its parent")


def _find_run(config: TrainConfig) -> Checkpoint | None:
    """The checkpoint to continue from, by `init_from`; None to start from scratch."""
    from megactx import checkpoint

    out_dir = Path(config.out_dir)
    if config.init_from == "scratch":
        if checkpoint.step_folders(out_dir):
            raise MegactxError(
                f"out_dir: {config.out_dir!r} already has checkpoints; "
                "choose another one, or leave out --init_from scratch to resume"
            )
        return None
    if config.init_from == "auto" and not checkpoint.step_folders(out_dir):
        return None
    found = checkpoint.load(checkpoint.find(out_dir), optimizer=True)
    for name in ("train_config", "progress"):
        if not isinstance(found.state.get(name), dict):
            raise checkpoint.Damaged(f"checkpoint {found.path}: {checkpoint.STATE} lacks {name}")
    return found


def _check_same_run(found: Checkpoint, config: TrainConfig, model_config: GPTConfig, bundle: Bundle) -> None:
    """A run continues on the model and the data it was started with, or not at all."""
    old = {c["name"]: c["sha256"] for c in found.state["manifest"]["contexts"]}
    new = {c.name: c.sha256 for c in bundle.contexts}
    if list(old) != list(new):
        raise MegactxError(f"cannot resume {found.path}: it has the contexts {', '.join(old)}, got {', '.join(new)}")
    for name, digest in new.items():
        if old.get(name) != digest:
            raise MegactxError(f"cannot resume {found.path}: the data of context {name!r} has changed since")
    defaults = {field.name: field.default for field in fields(GPTConfig)}  # of fields that an older version had not
    saved = defaults | found.state["model_config"] | {"optimizer": found.state["train_config"]["optimizer"]}
    asked = model_config.to_json() | {"optimizer": config.optimizer}
    free = ("context_weights", "dropout")  # these change no tensor's shape and may be changed in mid-run
    changed = [
        f"{name}: checkpoint has {saved.get(name)!r}, asked for {asked[name]!r}"
        for name in asked
        if name not in free and saved.get(name) != asked[name]
    ]
    if changed:
        raise MegactxError(f"cannot resume {found.path}: " + "; ".join(changed))


def _no_longer_fits(found: Checkpoint, config: TrainConfig, error: ValueError) -> MegactxError:
    """Settings given now that contradict those of the run: they are named, for the error may name one that was kept."""
    saved = resolve({}, {}, found.state["train_config"])
    changed = [
        f"{name}: checkpoint has {getattr(saved, name)!r}, asked for {getattr(config, name)!r}"
        for name in SAME
        if getattr(saved, name) != getattr(config, name)
    ]
    return MegactxError(f"cannot resume {found.path}: " + "; ".join([*changed, str(error)]))


def _draw_samples(config: TrainConfig, trainer: Trainer) -> None:
    """Continuations of two places of the validation split, kept for the report as ids."""
    import json

    import numpy as np
    import torch

    from megactx.generate import generate
    from megactx.report import SAMPLES

    parts, length = trainer.bundle.split("val"), trainer.bundle.length("val")
    size = min(32, length // 2, config.block_size)
    places = [np.stack([part[at : at + size] for part in parts], axis=-1) for at in (0, length // 2)]
    prompts = torch.from_numpy(np.stack(places).astype(np.int64))
    trainer.model.eval()
    drawn = generate(
        trainer.model, prompts.to(trainer.device), config.sample_tokens, temperature=0.8, seeds=config.seed
    )
    ids = torch.cat([prompts, torch.stack([row.cpu() for row in drawn], dim=1)], dim=1)
    samples = {"step": trainer.step, "prompt_tokens": size, "samples": ids.tolist()}
    (Path(config.out_dir) / SAMPLES).write_text(json.dumps(samples))


if __name__ == "__main__":
    from megactx.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
