"""Every training setting once: its flag, its default, its help, its type.

The command line, `--config_file` and the settings stored in a checkpoint are all views of this dataclass, so a name
that is not a field here is refused wherever it turns up. Precedence, weakest first: the defaults below, the settings
of the run being resumed, the config file, the command line.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import tomllib
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from megactx.config import AlibiRule, MTPHeads, Position, Sigma
from megactx.errors import MegactxError

MAX_MTP_STEPS = 8
MAX_MTP_WEIGHT = 1e6  # far beyond use, far below what times a loss would leave float32
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def parse_bool(text: str) -> bool:
    """`--flag`, `--flag=true` and `--flag=False` all mean what they say."""
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def _flag(default: Any, group: str, text: str, kind: Any = str, **extra: Any) -> Any:
    metadata = {"group": group, "help": text, "type": kind, **extra}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """Settings of `megactx train`. Names and most defaults are those of the nanoGPT family."""

    dataset: str | None = _flag(None, "data", "bundle, or folder of shards, written by `megactx prepare`")
    input_bin: str | None = _flag(
        None, "data", "in place of --dataset: training shards (.bin with a header, as of llm.c), a glob"
    )
    input_val_bin: str | None = _flag(None, "data", "with --input_bin: validation shards, a glob")
    input_vocab_size: int | None = _flag(
        None, "data", "with --input_bin: symbols in the vocabulary (default: 50304, GPT-2's padded)", int
    )
    shard_delimiter: int | None = _flag(
        None,
        "data",
        "with --input_bin: id of the token between documents, -1 where there is none (default: that of GPT-2, where "
        "the vocabulary is GPT-2's, else none)",
        int,
    )
    skip_bad_shards: bool = _flag(
        False,
        "data",
        "leave damaged shards out and say so, instead of stopping. Damaged is one whose header is wrong, whose size is "
        "not what that says, or that cannot be read; an id outside the vocabulary is met in training only, and stops "
        "the run by the shard's name. A run goes on only with the shards it began with",
        bool,
    )
    loader: str | None = _flag(
        None,
        "data",
        "windows: at random places; stream: in order, every token once an epoch (default: stream for shards, windows "
        "for bundles)",
        choices=("windows", "stream"),
    )
    multicontext_datasets: list[str] | None = _flag(
        None, "data", "context folders to train on, or, with --dataset, names of contexts of that bundle", nargs="+"
    )
    training_mode: str = _flag(
        "multicontext", "data", "multicontext: all contexts; single: only the first", choices=("multicontext", "single")
    )
    numerical_multicontext: bool = _flag(False, "data", "treat every context as numeric", bool)
    context_weights: list[str] | None = _flag(
        None, "data", "loss weights, one per context or NAME=WEIGHT; relative (default: all equal)", nargs="+"
    )
    block_size: int = _flag(256, "data", "window length in tokens", int)
    batch_size: int = _flag(64, "data", "windows per micro-batch and process", int)
    gradient_accumulation_steps: int = _flag(1, "data", "micro-batches per update", int)

    n_layer: int = _flag(6, "model", "transformer blocks", int)
    n_head: int = _flag(6, "model", "query heads", int)
    n_kv_head: int | None = _flag(None, "model", "key/value heads (default: n_head)", int)
    n_embd: int = _flag(384, "model", "width", int)
    dropout: float = _flag(
        0.0, "model", "dropout probability (attention weights are dropped too, unless ALiBi or flash lobo is on)", float
    )
    activation: str = _flag("gelu", "model", "MLP activation", choices=("gelu", "relu2", "silu", "swiglu"))
    position: str = _flag(
        "simple",
        "model",
        "simple: rotary; gaussian: rotary that damps coarse levels of detail (LOD); _lod2d: and some pairs turn by the "
        "LOD; _alibi: and near tokens weigh more; learned: a table; none",
        choices=get_args(Position),
    )
    rope_base: float = _flag(10000.0, "model", "base of the rotary frequencies", float)
    rope_sigma: str = _flag(
        "uniform",
        "model",
        "spread of a token of some LOD in the gaussian kinds: that of an even span (0 for plain tokens), or the power "
        "lod_block_size^LOD itself",
        choices=get_args(Sigma),
    )
    lod_block_size: int = _flag(
        32, "model", "tokens that one token of the next LOD stands for (a plain text is all LOD 0)", int
    )
    lod_pairs: int | None = _flag(
        None,
        "model",
        "of the head size / 2 pairs of a head, how many turn by the LOD in the lod2d kinds (default: head size / 8)",
        int,
    )
    alibi_rule: str = _flag(
        "press",
        "model",
        "slopes of the alibi kinds: press, 2^(-8(h+1)/heads); geometric, 2^-h",
        choices=get_args(AlibiRule),
    )
    use_flash_lobo: bool = _flag(
        False, "model", "learn a constant C in the denominator of each attention softmax, one a layer", bool
    )
    use_flash_lobo_per_head: bool = _flag(False, "model", "with use_flash_lobo: one a head", bool)
    flash_lobo_log_const: float = _flag(0.0, "model", "with use_flash_lobo: where log C starts", float)
    flash_lobo_fixed: bool = _flag(False, "model", "with use_flash_lobo: log C stays there, it is not learned", bool)
    qk_norm: bool = _flag(True, "model", "RMS-normalise queries and keys", bool)
    tie_weights: bool = _flag(True, "model", "share the embedding table with the head", bool)
    numerical_mlp_hidden_dim: int = _flag(64, "model", "hidden width of the numeric contexts' MLPs", int)
    numerical_mlp_num_layers: int = _flag(2, "model", "hidden layers of the numeric contexts' MLPs", int)

    mtp_enabled: bool = _flag(
        False, "multi-token prediction", "train on targets 2..K tokens ahead too, with a weight that ends at 0", bool
    )
    mtp_max_steps: int = _flag(2, "multi-token prediction", "K, how many tokens ahead, 2 to 8", int)
    mtp_weight: float = _flag(
        0.1, "multi-token prediction", "weight of the mean loss of the targets 2..K; the next token's has 1", float
    )
    mtp_rampup_steps: int = _flag(
        64, "multi-token prediction", "updates in which the weight rises from 0, linearly", int
    )
    mtp_decay_start: int | None = _flag(
        None,
        "multi-token prediction",
        "update from which the weight falls to 0, linearly (default: 2/3 of max_iters; with heads of their own, which "
        "do not disturb the next token's, never)",
        int,
    )
    mtp_decay_end: int | None = _flag(
        None, "multi-token prediction", "update at which it is 0 (default: max_iters)", int
    )
    mtp_heads: str = _flag(
        "shared",
        "multi-token prediction",
        "what answers for the targets 2..K: shared, the next token's logits; parallel, a block of its own for each; "
        "sequential, a chain of blocks, each given one more token. Only the last two could draft tokens",
        choices=get_args(MTPHeads),
    )

    max_iters: int = _flag(5000, "schedule", "updates in all", int)
    max_minutes: float | None = _flag(None, "schedule", "stop (and save) after this much time", float)
    learning_rate: float = _flag(1e-3, "schedule", "peak learning rate of AdamW", float)
    min_lr: float | None = _flag(None, "schedule", "final learning rate (default: a tenth of the peak)", float)
    warmup_iters: int = _flag(100, "schedule", "linear warm-up, in updates", int)
    lr_decay_iters: int | None = _flag(None, "schedule", "end of the cosine (default: max_iters)", int)
    optimizer: str = _flag(
        "adamw", "schedule", "muon: Muon on the blocks' matrices, AdamW on the rest", choices=("adamw", "muon")
    )
    muon_learning_rate: float = _flag(0.02, "schedule", "peak learning rate of Muon", float)
    weight_decay: float = _flag(0.1, "schedule", "decoupled weight decay of matrices", float)
    beta1: float = _flag(0.9, "schedule", "AdamW's first beta", float)
    beta2: float = _flag(0.99, "schedule", "AdamW's second beta", float)
    grad_clip: float = _flag(1.0, "schedule", "clip the gradient norm here (0: never)", float)

    out_dir: str = _flag("out", "run", "folder of checkpoints, metrics and report")
    init_from: str = _flag(
        "auto",
        "run",
        "auto: resume when out_dir has a checkpoint; resume: it must; scratch: it must not",
        choices=("auto", "resume", "scratch"),
    )
    eval_interval: int = _flag(250, "run", "updates between evaluations", int)
    eval_iters: int = _flag(20, "run", "batches per split in an evaluation", int)
    save_interval: int | None = _flag(None, "run", "updates between checkpoints (default: eval_interval)", int)
    keep_checkpoints: int = _flag(2, "run", "newest checkpoints to keep, at least 2", int)
    log_interval: int = _flag(10, "run", "updates between metric rows", int)
    sample_tokens: int = _flag(256, "run", "tokens of the samples drawn for the report (0: none)", int)
    seed: int = _flag(1337, "run", "seed of initialisation, windows and dropout", int)
    device: str = _flag("auto", "run", "auto, cpu, cuda (under torchrun each process has its own) or cuda:N")
    parallel: str | None = _flag(
        None,
        "run",
        "for processes started by torchrun: ddp, a copy of the model in each; fsdp, a slice of it (default: ddp under "
        "torchrun, else none)",
        choices=("none", "ddp", "fsdp"),
    )
    dtype: str = _flag(
        "auto", "run", "auto: bfloat16 autocast on CUDA, float32 elsewhere", choices=("auto", "float32", "bfloat16")
    )
    compile: bool = _flag(False, "run", "torch.compile the model", bool)
    report: bool = _flag(True, "run", "write report.html and losses.png at the end", bool)
    tensorboard_log: bool = _flag(False, "run", "also log to TensorBoard (extra: tensorboard)", bool)
    wandb_log: bool = _flag(False, "run", "also log to Weights & Biases (extra: wandb)", bool)
    wandb_project: str = _flag("megactx", "run", "Weights & Biases project")
    wandb_run_name: str | None = _flag(None, "run", "Weights & Biases run name")

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise MegactxError(f"{item.name}: expected a finite number, got {value}")
        positive = (
            "block_size batch_size gradient_accumulation_steps n_layer n_head n_embd max_iters learning_rate "
            "muon_learning_rate eval_interval eval_iters log_interval"
        )
        for name in positive.split():
            if not getattr(self, name) > 0:
                raise MegactxError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        at_least_0 = (
            "warmup_iters weight_decay grad_clip sample_tokens min_lr mtp_weight mtp_rampup_steps mtp_decay_start "
            "mtp_decay_end"
        )
        for name in at_least_0.split():
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise MegactxError(f"{name}: expected a number of at least 0, got {value}")
        for name in ("beta1", "beta2", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise MegactxError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        for name in ("max_minutes", "lr_decay_iters", "save_interval", "input_vocab_size"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise MegactxError(f"{name}: expected a number above 0, got {value}")
        if self.keep_checkpoints < 2:
            raise MegactxError(f"keep_checkpoints: expected at least 2, got {self.keep_checkpoints}")
        if not 0 <= self.seed < 1 << 63:
            raise MegactxError(f"seed: expected a number in [0, 2^63), got {self.seed}")
        self._check_mtp()
        self._check_input()
        try:
            self.out_dir.encode()
        except UnicodeEncodeError:  # safetensors could write there, but not read
            raise MegactxError(f"out_dir: expected a path that is valid UTF-8, got {self.out_dir!r}") from None

    def _check_mtp(self) -> None:
        if not 2 <= self.mtp_max_steps <= MAX_MTP_STEPS:
            raise MegactxError(f"mtp_max_steps: expected a number in 2..{MAX_MTP_STEPS}, got {self.mtp_max_steps}")
        if self.mtp_weight > MAX_MTP_WEIGHT:
            raise MegactxError(f"mtp_weight: expected a number in 0..{MAX_MTP_WEIGHT:g}, got {self.mtp_weight}")
        if self.mtp_enabled and self.mtp_max_steps > self.block_size:
            raise MegactxError(
                f"mtp_max_steps: expected at most block_size = {self.block_size}, got {self.mtp_max_steps}"
            )
        start, end = self.mtp_decay
        if end < start:
            raise MegactxError(f"mtp_decay_end: expected at least mtp_decay_start = {start}, got {end}")

    def _check_input(self) -> None:
        if self.input_bin is None:
            for name in _SHARDS[1:]:
                if getattr(self, name) is not None:
                    raise MegactxError(f"{name}: expected --input_bin with it, got {name} alone")
            return
        if self.input_val_bin is None:
            raise MegactxError("input_val_bin: expected validation shards besides --input_bin, got none")
        for name in _FOLDERS:
            if getattr(self, name) is not None:
                raise MegactxError(f"input_bin: expected it without {name}, got both")
        if self.shard_delimiter is not None and self.shard_delimiter < -1:
            raise MegactxError(f"shard_delimiter: expected an id, or -1 for none, got {self.shard_delimiter}")

    @property
    def mtp_steps(self) -> int:
        """K: how many tokens ahead the model is trained to predict."""
        return self.mtp_max_steps if self.mtp_enabled else 1

    @property
    def mtp_decay(self) -> tuple[int, int]:
        """The updates between which the weight of multi-token prediction falls to 0."""
        start, end = self.mtp_decay_start, self.mtp_decay_end
        if start is None:
            # Logits of their own cost the next token's nothing (see `mtp_weight_at`), and heads that are no longer
            # trained would fall behind the rest of the model. An end that is asked for is kept, though.
            never = self.mtp_heads != "shared" and end is None
            start = self.max_iters + 1 if never else 2 * self.max_iters // 3
            start = start if end is None else min(start, end)
        return start, max(self.max_iters, start) if end is None else end

    def tokens_per_update(self, world_size: int) -> int:
        """Positions of all micro-batches of all processes."""
        return self.batch_size * self.block_size * self.gradient_accumulation_steps * world_size

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One argument per field. Nothing has an argparse default: the namespace holds just what the user typed."""
    groups: dict[str, Any] = {}
    for item in fields(TrainConfig):
        meta = item.metadata
        if meta["group"] not in groups:
            groups[meta["group"]] = parser.add_argument_group(meta["group"])
        options: dict[str, Any] = {"help": _help_text(item), "default": argparse.SUPPRESS}
        if meta["type"] is bool:
            options |= {"nargs": "?", "const": True, "type": parse_bool, "metavar": "BOOL"}
        else:
            options |= {"type": meta["type"]} | {key: meta[key] for key in ("nargs", "choices") if key in meta}
        groups[meta["group"]].add_argument(f"--{item.name}", **options)


def _help_text(item: Field[Any]) -> str:
    return f"{item.metadata['help']}" + (f" [{item.default}]" if item.default is not None else "")


def read_config_file(path: str) -> dict[str, Any]:
    """Settings from a JSON or TOML file.

    Raises:
        MegactxError: the file cannot be read, or has a field that is not a setting (the nearest one is named).
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
        values = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise MegactxError(f"config_file: cannot read {path!r}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise MegactxError(f"config_file: {path!r} is not valid {file.suffix or 'JSON'}: {error}") from None
    if not isinstance(values, dict):
        raise MegactxError(f"config_file: expected an object of settings in {path!r}, got {type(values).__name__}")
    return {name: _checked(name, value, path) for name, value in values.items()}


def _checked(name: str, value: Any, source: str) -> Any:
    """`value` as the field's type; the same strictness as on the command line."""
    known = {item.name: item for item in fields(TrainConfig)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise MegactxError(f"config_file: {source!r} has the unknown field {name!r}{hint}")
    meta = known[name].metadata
    if value is None and known[name].default is None:
        return None
    wanted: Any = list if "nargs" in meta else meta["type"]
    accepted: Any = (int, float) if wanted is float else wanted
    if not isinstance(value, accepted) or (isinstance(value, bool) and wanted is not bool):
        raise MegactxError(f"config_file: {name}: expected {wanted.__name__}, got {value!r}")
    if "choices" in meta and value not in meta["choices"]:
        raise MegactxError(f"config_file: {name}: expected one of {', '.join(meta['choices'])}, got {value!r}")
    if wanted is list:
        return [str(entry) for entry in value]
    try:
        return wanted(value)
    except OverflowError:
        raise MegactxError(f"config_file: {name}: expected {wanted.__name__}, got a number beyond its range") from None


# What belongs to one sitting at one machine, and is not taken over when a run is resumed.
_NOT_INHERITED = ("out_dir", "init_from", "device", "parallel")
# The two ways to say where the data is. A run that goes on with data that is named the other way forgets the first.
_FOLDERS = ("dataset", "multicontext_datasets")
_SHARDS = ("input_bin", "input_val_bin", "input_vocab_size", "shard_delimiter")
# What processes of one run may have each for itself: places of their own machine (the data found there is compared),
# and what is read by rank 0 alone.
_OWN = ("out_dir", "device", "dataset", "multicontext_datasets", "input_bin", "input_val_bin")
_RANK_0 = ("init_from", "keep_checkpoints", "sample_tokens", "report")
_LOGS = ("tensorboard_log", "wandb_log", "wandb_project", "wandb_run_name")


def resolve(typed: dict[str, Any], file: dict[str, Any], saved: dict[str, Any]) -> TrainConfig:
    """The settings of a run; see the module's first paragraph for the precedence."""
    known = {item.name for item in fields(TrainConfig)}.difference(_NOT_INHERITED)
    given = file | typed
    for named, others in ((_FOLDERS, _SHARDS), (_SHARDS, _FOLDERS)):
        if any(given.get(name) is not None for name in named):
            known = known.difference(others)
    return TrainConfig(**({k: v for k, v in saved.items() if k in known} | given))


def of_this_sitting(typed: dict[str, Any], file: dict[str, Any]) -> TrainConfig:
    """What is known before the run is: where it lives, and on what it is to run. The rest are defaults."""
    return TrainConfig(**{name: value for name, value in (file | typed).items() if name in _NOT_INHERITED})


def shared_settings(config: TrainConfig) -> dict[str, Any]:
    """What has to be the same in all processes of a run. (How they share it is in `parallel.Group.mode`.)"""
    own = {*_OWN, *_RANK_0, *_LOGS, "parallel"}
    return {name: value for name, value in config.to_json().items() if name not in own}


def refuse_unused(config: TrainConfig, given: dict[str, Any]) -> None:
    """Settings of multi-token prediction `given` for a run that has none."""
    if config.mtp_enabled or "mtp_enabled" in given:
        return
    for name in given:
        if name.startswith("mtp_"):
            raise MegactxError(f"{name}: expected --mtp_enabled with it, got {name} alone")
