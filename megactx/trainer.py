"""The training loop.

Everything that decides the next update is a function of the step number (windows, learning rate) or is stored in the
checkpoint (parameters, moments, the dropout generator), so a run that was killed anywhere continues to the same bits
on the CPU. Weights stay float32; bfloat16 is autocast around the forward pass and the loss is float32 either way.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from megactx import checkpoint
from megactx.data.bundle import Bundle
from megactx.data.loader import WindowLoader
from megactx.errors import MegactxError
from megactx.files import finite
from megactx.metrics import Sink, yardsticks
from megactx.model import GPT
from megactx.optim import build_optimizers, learning_rate_at, pack_state, set_learning_rate, unpack_state
from megactx.progress import Progress
from megactx.train_config import TrainConfig

MAX_SKIPPED_IN_A_ROW = 20


class StopSignal(AbstractContextManager["StopSignal"]):
    """Turns the first SIGINT or SIGTERM into a request to save and leave; a second one ends the process at once."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.number = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class Trainer:
    """One run on one device. `fit` returns when the run is complete, out of time, or told to stop."""

    def __init__(self, config: TrainConfig, model: GPT, bundle: Bundle, device: torch.device) -> None:
        self.config, self.model, self.bundle, self.device = config, model, bundle, device
        self.sinks: Sequence[Sink] = ()
        self.forward: Callable[..., Any] = torch.compile(model) if config.compile else model
        self.optimizers = build_optimizers(
            model,
            kind=config.optimizer,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
            muon_learning_rate=config.muon_learning_rate,
        )
        self.names = [context.name for context in bundle.contexts]
        size = (config.batch_size, config.block_size)
        self.loader = WindowLoader(bundle, "train", *size, seed=config.seed)
        # Evaluation windows come from their own stream, the same ones every time, so that losses are comparable.
        self.eval_loaders = {
            split: WindowLoader(bundle, split, *size, seed=config.seed + 1) for split in ("train", "val")
        }
        self.step = 0
        self.evaluated_step = -1  # the metrics of the run know it: whoever resumes sets it
        self.window = _Window()
        self.skipped_in_a_row = 0
        self.skipped = 0
        self.seconds = 0.0  # spent in updates, over all sittings of the run
        self.data_seconds = 0.0
        self._rng = self._generators()

    # -- state ---------------------------------------------------------------------------------------------------

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Puts a run back to the end of the step that `found` was saved at."""
        self.model.load_state_dict(found.model)
        moments = {k: v for k, v in found.optimizer.items() if not k.startswith("rng/")}
        unpack_state(self.model, self.optimizers, moments)
        torch.set_rng_state(found.optimizer["rng/cpu"])
        if self.device.type == "cuda" and "rng/cuda" in found.optimizer:
            torch.cuda.set_rng_state(found.optimizer["rng/cuda"], self.device)
        self._rng = self._generators()
        progress = found.state["progress"]
        self.step = found.step
        self.skipped, self.skipped_in_a_row = progress["skipped"], progress["skipped_in_a_row"]
        self.seconds, self.data_seconds = progress["seconds"], progress["data_seconds"]
        self.window = _Window(progress["window"])

    def save(self) -> Path:
        # The generators as they stood after the last finished step: a signal may have cut the next one short.
        tensors = pack_state(self.model, self.optimizers) | self._rng
        progress = {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": self.seconds,
            "data_seconds": self.data_seconds,
            "window": self.window.to_json(),
        }
        state = {
            "model_config": self.model.config.to_json(),
            "manifest": self.bundle.manifest_json(),
            "train_config": self.config.to_json(),
            "progress": progress,
        }
        return checkpoint.save(
            Path(self.config.out_dir),
            self.step,
            model=self.model.state_dict(),
            optimizer=tensors,
            state=state,
            keep=self.config.keep_checkpoints,
        )

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self, progress: Progress, stop: StopSignal, sinks: Sequence[Sink] = ()) -> bool:
        """Trains up to `max_iters`; True when it got there (or ran out of `max_minutes`), False when signalled."""
        self.sinks = sinks
        try:
            return self._loop(progress, stop)
        except OSError:
            # The terminal or the disk under the metrics went away. That happens between updates, so the state is whole.
            with contextlib.suppress(MegactxError):
                self.save()
            raise

    def _loop(self, progress: Progress, stop: StopSignal) -> bool:
        config = self.config
        save_interval = config.save_interval or config.eval_interval
        deadline = time.monotonic() + config.max_minutes * 60 if config.max_minutes else None
        while self.step < config.max_iters and stop.number is None:
            if self.step % config.eval_interval == 0:
                self.report_evaluation(progress, stop)
            if deadline is not None and time.monotonic() >= deadline:
                progress.note(f"max_minutes reached at step {self.step}")
                break
            row = self.update(stop)
            if row is None:
                break
            if not row["applied"]:
                progress.note(f"step {self.step}: non-finite {row['cause']}: this update is skipped")
            self.window.rows.append(row)
            if self.step % config.log_interval == 0 or self.step == config.max_iters:
                summary = self.window.summary(self)
                self.window = _Window()
                self._write(summary)
                progress.show(summary)
            if self.step % save_interval == 0:
                self.save()
        if stop.number is None:
            self.report_evaluation(progress, stop)
        path = self.save()
        progress.note(f"saved {path}")
        return stop.number is None

    def update(self, stop: StopSignal) -> dict[str, Any] | None:
        """One optimizer step over all micro-batches; None when a signal came in between (nothing is changed then)."""
        config, begin, waited = self.config, time.perf_counter(), 0.0
        learning_rate = self.learning_rate()
        set_learning_rate(self.optimizers, learning_rate)
        self.model.train()
        losses: Tensor | None = None
        total = torch.zeros((), device=self.device)
        for micro in range(config.gradient_accumulation_steps):
            if stop.number is not None:
                self._zero_grad()
                return None
            start = time.perf_counter()
            x, y = self._batch(self.loader, self.step * config.gradient_accumulation_steps + micro)
            waited += time.perf_counter() - start
            with self._autocast():
                out = self.forward(x, y)
            loss = out.loss / config.gradient_accumulation_steps
            loss.backward()
            total += loss.detach()
            part = out.context_losses / config.gradient_accumulation_steps
            losses = part if losses is None else losses + part
        norm = self._clip()
        # One read of two numbers decides whether the update is applied: the only host sync of a step.
        loss_value, norm_value = torch.stack((total, norm)).tolist()
        cause = _non_finite(loss_value, norm_value)
        if cause is None:
            for optimizer in self.optimizers.values():
                optimizer.step()
        self._zero_grad()
        self._count_skip(cause)
        self.step += 1
        self._rng = self._generators()
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        self.data_seconds += waited
        return {
            "applied": cause is None,
            "cause": cause,
            "loss": total,
            "losses": losses,
            "norm": norm_value,
            "lr": learning_rate,
            "seconds": seconds,
            "data_seconds": waited,
        }

    def learning_rate(self) -> float:
        config = self.config
        return learning_rate_at(
            self.step,
            peak=config.learning_rate,
            floor=config.learning_rate / 10 if config.min_lr is None else config.min_lr,
            warmup_steps=config.warmup_iters,
            decay_steps=config.lr_decay_iters or config.max_iters,
        )

    @torch.no_grad()
    def evaluate(self, stop: StopSignal) -> dict[str, dict[str, float]] | None:
        """Mean losses per context on `eval_iters` fixed batches of each split; None when a signal cut it short."""
        self.model.eval()
        found = {}
        for split, loader in self.eval_loaders.items():
            total = torch.zeros(len(self.names), device=self.device)
            for index in range(self.config.eval_iters):
                if stop.number is not None:
                    return None
                with self._autocast():
                    total += self.forward(*self._batch(loader, index)).context_losses
            found[split] = dict(zip(self.names, (total / self.config.eval_iters).tolist(), strict=True))
        return found

    def report_evaluation(self, progress: Progress, stop: StopSignal) -> None:
        """Evaluates the current step, once: a resumed run does not repeat what it already reported."""
        if self.evaluated_step == self.step:
            return
        losses = self.evaluate(stop)
        if losses is not None:
            self.evaluated_step = self.step
            row = {"event": "eval", "step": self.step, **losses, "seconds": self.seconds}
            self._write(row)
            progress.evaluation(row, yardsticks(self.bundle.contexts))

    # -- helpers -------------------------------------------------------------------------------------------------

    def _batch(self, loader: WindowLoader, index: int) -> tuple[Tensor, Tensor]:
        x, y = loader.batch(index)
        if self.device.type == "cuda":
            return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in (x, y))  # type: ignore[return-value]
        return x, y

    def _autocast(self) -> AbstractContextManager[Any]:
        low = self.config.dtype == "bfloat16" or (self.config.dtype == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16) if low else nullcontext()

    def _clip(self) -> Tensor:
        limit = self.config.grad_clip or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).float()

    def _generators(self) -> dict[str, Tensor]:
        """The states that dropout draws from, as the checkpoint stores them."""
        found = {"rng/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            found["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        return found

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def _count_skip(self, cause: str | None) -> None:
        if cause is None:
            self.skipped_in_a_row = 0
            return
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise MegactxError(
                f"training: {MAX_SKIPPED_IN_A_ROW} updates in a row had a non-finite {cause}, the last at step "
                f"{self.step + 1}; lower learning_rate, or check the data. The last checkpoint is untouched"
            )

    def _write(self, row: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.write(row)


class _Window:
    """The updates since the last log line. Losses stay on the device until `summary` reads them.

    It travels in the checkpoint, so that a run resumed in mid-interval logs the same average as one that never stopped.
    """

    def __init__(self, rows: Sequence[dict[str, Any]] = ()) -> None:
        self.rows = [row | {"loss": _tensor([row["loss"]])[0], "losses": _tensor(row["losses"])} for row in rows]

    def to_json(self) -> list[dict[str, Any]]:
        return finite([row | {"loss": row["loss"].item(), "losses": row["losses"].tolist()} for row in self.rows])

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        rows, config = self.rows, trainer.config
        applied = [row for row in rows if row["applied"]] or rows
        seconds = sum(row["seconds"] for row in rows)
        tokens = len(rows) * config.batch_size * config.block_size * config.gradient_accumulation_steps
        losses = torch.stack([row["losses"].cpu() for row in applied]).mean(0).tolist()
        return {
            "event": "train",
            "step": trainer.step,
            "loss": torch.stack([row["loss"].cpu() for row in applied]).mean().item(),
            "losses": dict(zip(trainer.names, losses, strict=True)),
            "lr": rows[-1]["lr"],
            "grad_norm": applied[-1]["norm"],
            "skipped": trainer.skipped,
            "ms": 1e3 * seconds / len(rows),
            "data_ms": 1e3 * sum(row["data_seconds"] for row in rows) / len(rows),
            "tokens_per_second": tokens / seconds,
            "seconds": trainer.seconds,
        }


def _tensor(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([float("nan") if value is None else value for value in values])


def _non_finite(loss: float, norm: float) -> str | None:
    for name, value in (("loss", loss), ("gradient", norm)):
        if not abs(value) < float("inf"):  # NaN compares false
            return name
    return None
