"""Where the numbers of a run go: a JSONL file always, wandb and TensorBoard when asked for.

The JSONL is the record that the report is drawn from. A run that was killed and resumed repeats the steps after its
last checkpoint, so on resume the rows past that step are dropped: the file reads as if nothing had happened.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megactx.errors import MegactxError
from megactx.files import finite

if TYPE_CHECKING:
    from megactx.data.bundle import ContextInfo

METRICS = "metrics.jsonl"
EVENTS = ("train", "eval")


def yardsticks(contexts: Iterable[ContextInfo]) -> dict[str, dict[str, float]]:
    """Per context what a model without history would reach: entropies in nats, or the variance of a numeric one. Empty
    where it is not known."""
    found: dict[str, dict[str, float]] = {}
    for context in contexts:
        if context.kind == "numeric":
            found[context.name] = {"variance": 1.0}  # the loss is on the standardised value
        else:
            marks = ("unigram", "bigram")  # nobody may have counted them: shards come without
            found[context.name] = {name: context.entropy[name] for name in marks if name in context.entropy}
    return found


class Sink(Protocol):
    def write(self, row: dict[str, Any]) -> None: ...
    def close(self) -> None: ...


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a last line torn by a crash is left out. A missing file has no rows."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and row.get("event") in EVENTS and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class JsonLines:
    """Appends one JSON object a line. `resume_step` first drops the rows of later steps; None starts afresh, and sets
    the rows of an earlier run aside."""

    def __init__(self, path: Path, resume_step: int | None = None) -> None:
        self._path = path
        if resume_step is None:
            _set_aside(path)
        else:
            rows = [row for row in read_rows(path) if row["step"] <= resume_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by close)

    def write(self, row: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(finite(row)) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self) -> None:
        self._file.close()


def _set_aside(path: Path) -> None:
    if path.exists() and path.stat().st_size:
        numbers = range(1, 10**6)
        path.rename(next(free for n in numbers if not (free := path.with_name(f"{path.stem}-{n}.jsonl")).exists()))


class TensorBoard:
    """Scalars by name, one point a row. Needs the `tensorboard` extra."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MegactxError(
                "--tensorboard_log: tensorboard is not installed (pip install 'megactx[tensorboard]')"
            ) from None
        self._writer = SummaryWriter(str(folder))

    def write(self, row: dict[str, Any]) -> None:
        for name, value in _scalars(row):
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """The same scalars to Weights & Biases. Needs the `wandb` extra."""

    def __init__(self, project: str, run_name: str | None, folder: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise MegactxError("--wandb_log: wandb is not installed (pip install 'megactx[wandb]')") from None
        self._run = wandb.init(project=project, name=run_name, dir=str(folder), config=config)

    def write(self, row: dict[str, Any]) -> None:
        self._run.log(dict(_scalars(row)), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    """`{"event": "eval", "val": {"text": 1.0}}` -> `[("eval/val/text", 1.0)]`."""
    found: list[tuple[str, float]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix, float(value)))

    for key, value in row.items():
        if key not in ("event", "step"):
            walk(f"{row.get('event', 'train')}/{key}", value)
    return found
