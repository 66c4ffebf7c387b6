"""Train a multi-context GPT.

The dataset is a bundle written by `megactx prepare`; the run lives in --out_dir: checkpoints (step-XXXXXXXX),
metrics.jsonl, losses.png and report.html. Started again with the same --out_dir it continues from the newest valid
checkpoint, bit for bit on the CPU; flags you give override the run's stored settings. SIGINT (Ctrl-C) and SIGTERM save
and leave; the exit code is then 128 + the signal's number.

On several GPUs or machines it is started by torchrun, and --batch_size is that of each process:

  torchrun --nproc-per-node 4 -m megactx.train --dataset data/text --parallel ddp

A checkpoint can be continued by any number of processes, with --parallel ddp, fsdp or none.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megactx.config import ContextConfig, GPTConfig
from megactx.errors import MegactxError
from megactx.files import lock
from megactx.train_config import (
    TrainConfig,
    add_flags,
    of_this_sitting,
    read_config_file,
    refuse_unused,
    resolve,
    shared_settings,
)

if TYPE_CHECKING:
    from megactx.checkpoint import Checkpoint
    from megactx.data.bundle import Bundle
    from megactx.metrics import Sink
    from megactx.parallel import Group


# The fields of a model's config that are flags of the same name.
_FLAGS = {item.name for item in fields(TrainConfig)} - {"context_weights"}  # which are given by name, too
SAME = [item.name for item in fields(GPTConfig) if item.name in _FLAGS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config_file", help="JSON or TOML file of settings, named as the flags are")
    add_flags(parser)


def run(args: argparse.Namespace) -> int:
    from megactx.parallel import Group

    typed = {k: v for k, v in vars(args).items() if k in TrainConfig.__dataclass_fields__}
    file = read_config_file(args.config_file) if args.config_file else {}
    first = of_this_sitting(typed, file)
    with Group.join(first.parallel, first.device) as group:
        found = group.on_main(lambda: _find_run(first))
        found = _share_found(group, found)
        config = resolve(typed, file, found.state["train_config"] if found else {})
        refuse_unused(config, file | typed)
        _check_same_settings(group, config)
        bundle = open_bundle(config)
        _refuse_unheeded(config, bundle)
        model_config = _check_run(found, config, bundle)
        _check_same_data(group, bundle)
        with ExitStack() as held:
            group.on_main(lambda: held.enter_context(lock(Path(config.out_dir), "out_dir")))
            stopped_by = _train(group, config, model_config, bundle, found)
    if stopped_by:
        return 128 + stopped_by
    if not group.main:  # rank 0 draws samples and writes the report, alone
        return 0
    if config.sample_tokens:
        _draw_samples(config, bundle, group)
    if config.report:
        from megactx.report import write_report

        print(f"report: {write_report(Path(config.out_dir))}")
    return 0


def _train(group: Group, config: TrainConfig, model_config: GPTConfig, bundle: Bundle, found: Checkpoint | None) -> int:
    """Trains to the end, or until a signal comes: its number then, else 0."""
    import torch

    from megactx.metrics import METRICS, read_rows
    from megactx.model import GPT
    from megactx.progress import Progress
    from megactx.stop import StopSignal
    from megactx.trainer import Trainer

    torch.manual_seed(config.seed)  # initialisation and dropout; the windows have their own counter-based generator
    with StopSignal(echo_seconds=0.0 if group.mode == "none" else 2.0) as stop:
        trainer = Trainer(config, GPT(model_config), bundle, group)
        if found:
            trainer.restore(found)
        sinks = group.on_main(lambda: open_sinks(config, found.step if found else None)) or []
        if found:
            rows = read_rows(Path(config.out_dir) / METRICS) if group.main else []
            evaluated = max((row["step"] for row in rows if row["event"] == "eval"), default=-1)
            trainer.evaluated_step = group.highest(evaluated)[0]
        seconds = config.max_minutes and config.max_minutes * 60
        with Progress(config.max_iters, seconds, quiet=not group.main) as progress:
            progress.note(describe(config, trainer.model, bundle, group, found))
            try:
                finished = trainer.fit(progress, stop, sinks)
            except BaseException:  # the process may end at once, with what a sink has not written yet
                for sink in sinks:
                    with suppress(Exception):
                        sink.close()
                raise
        for sink in sinks:
            sink.close()
    if finished:
        return 0
    text = f"stopped by signal {stop.number} at step {trainer.step}; the same command continues"
    # Together: torchrun ends the others as soon as one has left with an exit code.
    group.on_main(lambda: print(text, file=sys.stderr, flush=True))
    return stop.number or 0


def open_bundle(config: TrainConfig) -> Bundle:
    """The bundle, or the aligned folders, that the settings name."""
    from megactx.data.bundle import SHARDS, Bundle
    from megactx.data.shards import ShardSet

    if config.input_bin is not None:
        return _open_shards(config)
    names = config.multicontext_datasets or []
    single = config.training_mode == "single"
    if config.dataset is None:
        if not names:
            raise MegactxError(
                "dataset: expected --dataset BUNDLE, --multicontext_datasets FOLDER ... or --input_bin SHARDS, got none"
            )
        return Bundle.from_folders(names[:1] if single else names, numerical=config.numerical_multicontext)
    if (Path(config.dataset) / SHARDS).is_file():
        return ShardSet.open(config.dataset, names=names or None, skip_bad=config.skip_bad_shards)
    bundle = Bundle.open(config.dataset, names=names or None)
    if single:
        bundle = Bundle.open(config.dataset, names=[bundle.contexts[0].name])
    if config.numerical_multicontext:
        return Bundle.from_folders([bundle.path / c.name for c in bundle.contexts], numerical=True)
    return bundle


def _refuse_unheeded(config: TrainConfig, bundle: Bundle) -> None:
    """Settings that would change nothing for data of this kind."""
    from megactx.data.shards import ShardSet

    shards = isinstance(bundle, ShardSet)
    if shards and config.numerical_multicontext:
        raise MegactxError(f"numerical_multicontext: expected numbers, got {str(bundle.path)!r}: shards hold ids")
    if config.skip_bad_shards and not shards:
        raise MegactxError(f"skip_bad_shards: expected shards, got {str(bundle.path)!r}, which is a bundle")


def _open_shards(config: TrainConfig) -> Bundle:
    from megactx.data.shards import ShardSet

    assert config.input_bin is not None  # the settings have been checked
    assert config.input_val_bin is not None
    between = config.shard_delimiter
    return ShardSet.from_files(
        config.input_bin,
        config.input_val_bin,
        vocab_size=config.input_vocab_size,
        delimiter="auto" if between is None else None if between == -1 else between,
        skip_bad=config.skip_bad_shards,
    )


def build_model_config(config: TrainConfig, bundle: Bundle) -> GPTConfig:
    contexts = tuple(
        ContextConfig(c.name, c.kind, c.vocab_size, *((c.numeric.mean, c.numeric.std) if c.numeric else ()))
        for c in bundle.contexts
    )
    weights = parse_context_weights(config.context_weights, [c.name for c in contexts])
    if config.mtp_enabled and all(c.kind == "numeric" for c in contexts):
        raise MegactxError(
            "mtp_enabled: expected a context of symbols, got numeric ones alone "
            f"({', '.join(c.name for c in contexts)}), of which the next value is all that is predicted"
        )
    same = {name: getattr(config, name) for name in SAME}
    return GPTConfig(contexts=contexts, context_weights=weights, mtp_steps=config.mtp_steps, **same)


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


def describe(config: TrainConfig, model: Any, bundle: Bundle, group: Group, found: Checkpoint | None) -> str:
    tokens = config.tokens_per_update(group.world_size)
    contexts = ", ".join(f"{c.name} ({'numeric' if c.kind == 'numeric' else c.vocab_size})" for c in bundle.contexts)
    start = f"resuming {found.path}" if found else "starting from scratch"
    processes = f" in {group.world_size} processes ({group.mode})" if group.mode != "none" else ""
    ahead = f" | {config.mtp_steps} tokens ahead ({config.mtp_heads})" if config.mtp_enabled else ""
    lines = [
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters on {group.device}{processes} | "
        f"contexts: {contexts}{ahead}",
        f"{bundle.length('train'):,} train and {bundle.length('val'):,} validation tokens | "
        f"{tokens:,} tokens per update, {config.max_iters * tokens / bundle.length('train'):.2f} epochs | {start}",
    ]
    lines += [f"skipped: {problem}" for problem in getattr(bundle, "skipped", ())]
    if found:
        before = resolve({}, {}, found.state["train_config"]).tokens_per_update(found.state.get("processes", 1))
        if before != tokens:
            lines.append(f"an update was of {before:,} tokens before")
    return "\n".join(lines)


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
    _check_out_dir(out_dir)
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


def _share_found(group: Group, found: Checkpoint | None) -> Checkpoint | None:
    """What rank 0 found, in every process, without the tensors: the others may have no access to its disk."""
    from megactx.checkpoint import Checkpoint

    shared = group.share_json(found and [str(found.path), found.step, found.state])
    if found or shared is None:
        return found
    path, step, state = shared
    return Checkpoint(Path(path), step, {}, {}, state)


def _check_run(found: Checkpoint | None, config: TrainConfig, bundle: Bundle) -> GPTConfig:
    """The model's settings, which are those of the run that is continued."""
    try:
        model_config = build_model_config(config, bundle)
    except ValueError as error:
        if found is None or isinstance(error, MegactxError):
            raise
        raise _no_longer_fits(found, config, error) from None
    if found:
        _check_same_run(found, config, model_config, bundle)
    return model_config


def _check_same_settings(group: Group, config: TrainConfig) -> None:
    """Where they differ the processes would wait for each other without end, or each train on its own terms."""
    own = shared_settings(config) | {"device": group.device.type, "parallel": group.mode}
    by_rank = group.collect_json(own)
    differing = [
        f"{name}: {by_rank[0][name]!r} in rank 0, {other[name]!r} in rank {rank}"
        for name in own
        for rank, other in enumerate(by_rank)
        if other[name] != by_rank[0][name]
    ]
    if differing:
        raise MegactxError("all processes of a run need the same settings: " + "; ".join(differing))


def _check_same_data(group: Group, bundle: Bundle) -> None:
    """Each machine reads its own copy, and they have to be one."""
    own = [[context.name, context.sha256] for context in bundle.contexts]
    differs = own != group.share_json(own)
    if group.highest(differs)[0]:
        raise MegactxError(
            "the data here is not that of rank 0" if differs else "leaving, for not all processes have the same data"
        )


def _check_same_run(found: Checkpoint, config: TrainConfig, model_config: GPTConfig, bundle: Bundle) -> None:
    """A run continues on the model and the data it was started with, or not at all."""
    old = {c["name"]: c["sha256"] for c in found.state["manifest"]["contexts"]}
    new = {c.name: c.sha256 for c in bundle.contexts}
    if list(old) != list(new):
        raise MegactxError(f"cannot resume {found.path}: it has the contexts {', '.join(old)}, got {', '.join(new)}")
    for name, digest in new.items():
        if old.get(name) != digest:
            shards = _skipped_then_and_now(found, bundle)
            raise MegactxError(f"cannot resume {found.path}: the data of context {name!r} has changed since{shards}")
    defaults = {field.name: field.default for field in fields(GPTConfig)}  # of fields that an older version had not
    saved = defaults | found.state["model_config"] | {"optimizer": found.state["train_config"]["optimizer"]}
    asked = model_config.to_json() | {"optimizer": config.optimizer}
    free = ["context_weights", "dropout"]  # these change no tensor's shape and may be changed in mid-run
    if saved["mtp_heads"] == asked["mtp_heads"] == "shared":
        free.append("mtp_steps")
    changed = [
        f"{name}: checkpoint has {saved.get(name)!r}, asked for {asked[name]!r}"
        for name in asked
        if name not in free and saved.get(name) != asked[name]
    ]
    if changed:
        raise MegactxError(f"cannot resume {found.path}: " + "; ".join(changed))


def _skipped_then_and_now(found: Checkpoint, bundle: Bundle) -> str:
    """What may explain that shards are not those of the checkpoint."""
    now, then = getattr(bundle, "skipped", None), found.state["manifest"].get("skipped")
    if now is None:
        return ""
    before = "not recorded" if then is None else ", ".join(then) or "nothing"
    return f": a run goes on only with the same shards (left out then: {before}; now: {', '.join(now) or 'nothing'})"


def _no_longer_fits(found: Checkpoint, config: TrainConfig, error: ValueError) -> MegactxError:
    """Settings given now that contradict those of the run: they are named, for the error may name one that was kept."""
    saved = resolve({}, {}, found.state["train_config"])
    changed = [
        f"{name}: checkpoint has {getattr(saved, name)!r}, asked for {getattr(config, name)!r}"
        for name in SAME
        if getattr(saved, name) != getattr(config, name)
    ]
    return MegactxError(f"cannot resume {found.path}: " + "; ".join([*changed, str(error)]))


def _draw_samples(config: TrainConfig, bundle: Bundle, group: Group) -> None:
    """Continuations of two places of the validation split, kept for the report as ids. The model is the one that was
    just saved: where it was trained in slices, no process has it whole."""
    import json

    import numpy as np
    import torch

    from megactx import checkpoint
    from megactx.generate import generate
    from megactx.model import GPT
    from megactx.report import SAMPLES

    found = checkpoint.load(checkpoint.find(Path(config.out_dir)))
    model = GPT(GPTConfig.from_json(found.state["model_config"]))
    model.load_state_dict(found.model)
    model.to(group.device).eval()
    parts, length = bundle.split("val"), bundle.length("val")
    size = min(32, length // 2, config.block_size)
    places = [np.stack([part[at : at + size] for part in parts], axis=-1) for at in (0, length // 2)]
    prompts = torch.from_numpy(np.stack(places).astype(np.int64))
    drawn = generate(model, prompts.to(group.device), config.sample_tokens, temperature=0.8, seeds=config.seed)
    ids = torch.cat([prompts, torch.stack([row.cpu() for row in drawn], dim=1)], dim=1)
    samples = {"step": found.step, "prompt_tokens": size, "samples": ids.tolist()}
    (Path(config.out_dir) / SAMPLES).write_text(json.dumps(samples))


if __name__ == "__main__":
    from megactx.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
