"""The training loop.

Everything that decides the next update is a function of the step number (windows, learning rate, the weight of
multi-token prediction) or is stored in the checkpoint (parameters, moments, the dropout generators, the place in a
stream), so a run that was killed anywhere continues to the same bits on the CPU. Weights stay float32; bfloat16 is
autocast around the forward pass and the loss is float32 either way.

With several processes each runs this loop. What one of them alone can know (a signal, the time, a full disk) is agreed
on before it decides anything, so that all take the same turn.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megactx import checkpoint
from megactx.block import Block
from megactx.data.bundle import SPLITS, Bundle, Split
from megactx.errors import MegactxError
from megactx.evaluation import evaluation_row, mean_losses
from megactx.feed import Batch, Feed, open_feed
from megactx.generators import PREFIX, Generators
from megactx.metrics import Sink, yardsticks
from megactx.model import GPT
from megactx.optim import build_optimizers, pack_state, set_learning_rate, unpack_state
from megactx.parallel import Group, clip_grad_norm, load_whole
from megactx.progress import Progress
from megactx.schedule import learning_rate_at, mtp_weight_at
from megactx.stop import StopSignal
from megactx.train_config import TrainConfig
from megactx.window import Window

MAX_SKIPPED_IN_A_ROW = 20


class OutputLost(Exception):
    """The terminal or the disk under the metrics went away; `cause` is what to tell the user in this process."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


class Trainer:
    """This process's part of one run. `fit` returns when the run is complete, out of time, or told to stop.

    `model` has not been moved to a device yet, and is the same in every process.
    """

    def __init__(self, config: TrainConfig, model: GPT, bundle: Bundle, group: Group) -> None:
        self.config, self.model, self.bundle, self.group = config, model, bundle, group
        self.device = group.device
        self.sinks: Sequence[Sink] = ()
        blocks = [module for module in model.modules() if isinstance(module, Block)]
        group.place(model, blocks, compile_blocks=config.compile)
        self.forward: Callable[..., Any] = group.wrap(model, compiled=config.compile)
        self.optimizers = build_optimizers(
            model,
            kind=config.optimizer,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=(config.beta1, config.beta2),
            muon_learning_rate=config.muon_learning_rate,
        )
        self.names = [context.name for context in bundle.contexts]
        self.feed = self._open_feed("train", config.seed)
        # Evaluation windows come from their own stream, the same ones every time, so that losses are comparable.
        self.eval_feeds = {split: self._open_feed(split, config.seed + 1) for split in SPLITS}
        self.step = 0
        self.evaluated_step = -1  # the metrics of the run know it: whoever resumes sets it
        self.window = Window()
        self.skipped_in_a_row = 0
        self.skipped = 0
        self.seconds = 0.0  # spent in updates, over all sittings of the run
        self.data_seconds = 0.0
        self._output_error: OSError | None = None
        self.generators = Generators(group, config.seed)
        self.generators.part(self.step)  # the weights are the same in every process, what dropout drops is not
        self._mark()

    def _open_feed(self, split: Split, seed: int) -> Feed:
        config, group = self.config, self.group
        return open_feed(
            self.bundle,
            split,
            config.loader,
            batch_size=config.batch_size,
            block_size=config.block_size,
            accumulation=config.gradient_accumulation_steps,
            steps=self.model.config.mtp_steps,
            seed=seed,
            rank=group.rank,
            world_size=group.world_size,
        )

    # -- state ---------------------------------------------------------------------------------------------------

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Puts a run back to the end of the step that `found` was saved at, by however many processes. Its tensors are
        looked at in rank 0 alone."""
        load_whole(self.model.state_dict(), self.group.share_tensors(found.model))
        generators: dict[str, Tensor] = {}

        def moments() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in self.group.share_tensors(found.optimizer):
                if name.startswith(PREFIX):
                    generators[name] = tensor
                else:
                    yield name, tensor

        unpack_state(self.model, self.optimizers, moments())
        progress = found.state["progress"]
        self.step = found.step
        self.feed.restore(progress.get("feed", {}))
        self.skipped, self.skipped_in_a_row = progress["skipped"], progress["skipped_in_a_row"]
        self.seconds, self.data_seconds = progress["seconds"], progress["data_seconds"]
        self.window = Window.from_json(progress["window"], len(self.names), self.model.config.mtp_steps)
        self.generators.restore(generators, self.step)
        self._mark()

    def save(self) -> Path:
        """Writes the state after the last finished update; every process takes part, rank 0 writes."""
        group, config = self.group, self.config
        tensors = group.gather(pack_state(self.model, self.optimizers)) | self.generators.gather(self._rng)
        progress = {
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": self.seconds,
            "data_seconds": self.data_seconds,
            "window": self.window.to_json(),
            "feed": self._feed_state,
        }
        content = {
            "model_config": self.model.config.to_json(),
            "manifest": self.bundle.manifest_json(),
            "train_config": config.to_json(),
            "processes": group.world_size,
            "progress": progress,
        }
        model = group.gather(self.model.state_dict())
        out_dir, keep = Path(config.out_dir), config.keep_checkpoints
        path = group.on_main(
            lambda: checkpoint.save(out_dir, self.step, model=model, optimizer=tensors, state=content, keep=keep)
        )
        return path or out_dir

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self, progress: Progress, stop: StopSignal, sinks: Sequence[Sink] = ()) -> bool:
        """Trains up to `max_iters`; True when it got there (or ran out of `max_minutes`), False when signalled."""
        self.sinks = sinks
        try:
            return self._loop(progress, stop)
        except OutputLost as lost:
            with contextlib.suppress(MegactxError):
                self.save()
            raise lost.cause from None

    def _loop(self, progress: Progress, stop: StopSignal) -> bool:
        config = self.config
        save_interval = config.save_interval or config.eval_interval
        deadline = time.monotonic() + config.max_minutes * 60 if config.max_minutes else None
        while self.step < config.max_iters:
            if self.step % config.eval_interval == 0:
                self.report_evaluation(progress, stop)
            if self._leaving(progress, stop, deadline):
                break
            row = self.update(stop)
            if row is None:
                break
            if not row["applied"]:
                self._show(progress.note, f"step {self.step}: non-finite {row['cause']}: this update is skipped")
            self.window.rows.append(row)
            if self.step % config.log_interval == 0 or self.step == config.max_iters:
                summary = self._summary()
                self.window = Window()
                self._write(summary)
                self._show(progress.show, summary)
            if self.step % save_interval == 0:
                self.save()
        self.report_evaluation(progress, stop)
        path = self.save()
        self._show(progress.note, f"saved {path}")
        self._leaving(progress, stop, None)
        return stop.number is None

    def _leaving(self, progress: Progress, stop: StopSignal, deadline: float | None) -> bool:
        """Whether to stop here, for a signal that any of the processes got or because the time is up for any of them.

        Raises:
            OutputLost: rank 0 could not write; in all processes, so that they save together.
        """
        late = deadline is not None and time.monotonic() >= deadline
        number, late_anywhere, failed = self.group.highest(stop.number or 0, late, self._output_error is not None)
        if failed:
            raise OutputLost(self._output_error or MegactxError("leaving, for rank 0 cannot write"))
        if number:
            stop.number = number
        elif late_anywhere:
            self._show(progress.note, f"max_minutes reached at step {self.step}")
        return bool(number or late_anywhere)

    def _interrupted(self, stop: StopSignal) -> bool:
        """The same for a signal alone, where no decision of the loop is at stake."""
        number = self.group.highest(stop.number or 0)[0]
        if number:
            stop.number = number
        return bool(number)

    def update(self, stop: StopSignal) -> dict[str, Any] | None:
        """One optimizer step over all micro-batches; None when a signal came in between (nothing is changed then)."""
        begin = time.perf_counter()
        learning_rate, mtp_weight = self.learning_rate(), self.mtp_weight()
        set_learning_rate(self.optimizers, learning_rate)
        self.model.set_mtp_weight(mtp_weight)
        self.model.train()
        batches = self.feed.take(self.step)
        waited = time.perf_counter() - begin
        found = self._backward(batches, stop)
        if found is None:
            self._zero_grad()
            return None
        loss, steps = found
        norm = self._clip()
        if self.device.type == "cuda":
            self.feed.prepare(self.step + 1)  # while the GPU works: what follows waits for it
        # One read of two numbers, the same in every process, decides whether the update is applied: the only host sync
        # of a step.
        loss_value, norm_value = torch.stack((loss, norm)).tolist()
        cause = _non_finite(loss_value, norm_value)
        if cause is None:
            for optimizer in self.optimizers.values():
                optimizer.step()
        self._zero_grad()
        self._count_skip(cause)
        self.step += 1
        self._mark()
        seconds = time.perf_counter() - begin
        self.seconds += seconds
        self.data_seconds += waited
        return {
            "applied": cause is None,
            "cause": cause,
            # Not the 0 that the loss is where there was nothing to predict: that would look perfect.
            "loss": loss.masked_fill(steps[:, 0].isnan().all(), float("nan")),
            "steps": steps,
            "norm": norm_value,
            "lr": learning_rate,
            "mtp_weight": mtp_weight,
            "seconds": seconds,
            "data_seconds": waited,
        }

    def _backward(self, batches: Sequence[Batch], stop: StopSignal) -> tuple[Tensor, Tensor] | None:
        """The gradient of the whole update, its loss and its losses float32 `[C, K]`, NaN for those without any target;
        None when a signal came."""
        group = self.group
        # The loss of an update is the mean over all its valid targets. Micro-batches, and the parts of the processes,
        # do not hold equally many (a document's end hides some), and the mean of their means would weigh a target more
        # where its neighbours are hidden. So each part is divided by the count of the whole. It is shared before the
        # first forward pass, from the CPU, where the data was counted: no GPU is waited for.
        counts = group.sum(torch.stack([batch.counts for batch in batches]).sum(0))
        # DDP and FSDP average gradients over the processes: the sum is wanted, so each part is made larger by that.
        divisor = (counts.float() / group.world_size).to(self.device, non_blocking=True)
        loss = torch.zeros((), device=self.device)
        steps = torch.zeros(counts.shape, device=self.device)
        for micro, batch in enumerate(batches):
            if group.world_size == 1 and stop.number is not None:
                return None
            here = batch.to(self.device)
            with group.accumulating(self.forward, last=micro + 1 == len(batches)):
                with self._autocast():
                    out = self.forward(here.x, here.targets(copy=self.config.compile), counts=divisor)
                out.loss.backward()
            loss += out.loss.detach()
            steps += out.step_losses
        totals = group.sum(torch.cat((loss.view(1), steps.flatten()))) / group.world_size
        return totals[0], totals[1:].view_as(steps).masked_fill(divisor == 0, float("nan"))

    def learning_rate(self) -> float:
        config = self.config
        return learning_rate_at(
            self.step,
            peak=config.learning_rate,
            floor=config.learning_rate / 10 if config.min_lr is None else config.min_lr,
            warmup_steps=config.warmup_iters,
            decay_steps=config.lr_decay_iters or config.max_iters,
        )

    def mtp_weight(self) -> float:
        if not self.config.mtp_enabled:
            return 0.0
        start, end = self.config.mtp_decay
        rampup = self.config.mtp_rampup_steps
        return mtp_weight_at(
            self.step, weight=self.config.mtp_weight, rampup_steps=rampup, decay_start=start, decay_end=end
        )

    @torch.no_grad()
    def evaluate(self, stop: StopSignal) -> dict[Split, list[list[float]]] | None:
        """Mean losses `[C][K]` on `eval_iters` fixed batches of each split; None when a signal cut it short."""
        self.model.eval()
        found = {}
        for split, feed in self.eval_feeds.items():
            with self._autocast():
                losses = mean_losses(
                    self.forward,
                    feed.evaluation(self.config.eval_iters),
                    self.group,
                    copy_targets=self.config.compile,
                    interrupted=lambda: self._interrupted(stop),
                )
            if losses is None:
                break
            found[split] = losses.tolist()
        self.group.settle(self.model)
        return found if len(found) == len(self.eval_feeds) else None

    def report_evaluation(self, progress: Progress, stop: StopSignal) -> None:
        """Evaluates the current step, once: a resumed run does not repeat what it already reported."""
        if self.evaluated_step == self.step:
            return
        losses = self.evaluate(stop)
        if losses is not None:
            self.evaluated_step = self.step
            weight = self.mtp_weight()
            row = evaluation_row(self.names, self.model.config.loss_weights, losses, weight)
            row = {"event": "eval", "step": self.step, **row, "seconds": self.seconds}
            self._write(row)
            self._show(progress.evaluation, row, yardsticks(self.bundle.contexts))

    # -- helpers -------------------------------------------------------------------------------------------------

    def _summary(self) -> dict[str, Any]:
        config = self.config
        tokens = config.tokens_per_update(self.group.world_size)
        losses = self.window.summary(self.names, self.model.config.loss_weights, tokens)
        return {"event": "train", "step": self.step} | losses | {"skipped": self.skipped, "seconds": self.seconds}

    def _autocast(self) -> AbstractContextManager[Any]:
        low = self.config.dtype == "bfloat16" or (self.config.dtype == "auto" and self.device.type == "cuda")
        return torch.autocast(self.device.type, torch.bfloat16) if low else nullcontext()

    def _clip(self) -> Tensor:
        return clip_grad_norm(self.model.parameters(), self.config.grad_clip or float("inf"))

    def _mark(self) -> None:
        """Keeps what a checkpoint of this moment needs and the next update moves on before it is finished: a signal
        may cut that one short."""
        self._rng = self.generators.states()
        self._feed_state = self.feed.state()

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
            self._show(sink.write, row)

    def _show(self, write: Callable[..., None], *arguments: Any) -> None:
        """Output, of rank 0. Where it fails the others are in the middle of something: `_leaving` tells them."""
        if not self.group.main:
            return
        try:
            write(*arguments)
        except OSError as error:
            self._output_error = self._output_error or error


def _non_finite(loss: float, norm: float) -> str | None:
    """What of an update is not a number, or None."""
    for name, value in (("loss", loss), ("gradient", norm)):
        if not math.isfinite(value):
            return name
    return None
