"""What a run reads: the micro-batches of its updates and of its evaluations, from random windows or from a stream.

Windows are a function of the update's number and need no state. A stream has a position, counted over all processes,
which travels in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from megactx.data.bundle import Bundle, Split
from megactx.data.loader import WindowLoader
from megactx.data.shards import ShardSet, document_separators
from megactx.data.stream import DistributedDataLoader
from megactx.errors import MegactxError
from megactx.tokens import IGNORE_INDEX


class Batch(Protocol):
    """One micro-batch of this process. `counts` int64 `[C, K]`, on the CPU: how many targets are not ignored."""

    @property
    def x(self) -> Tensor: ...
    @property
    def counts(self) -> Tensor: ...
    def targets(self, *, copy: bool = False) -> Tensor: ...
    def to(self, device: torch.device) -> Batch: ...


class WindowBatch:
    """A batch of random windows, `x` `[B, T, C]` and targets `[B, T, C]` or `[B, T, C, K]`."""

    def __init__(self, x: Tensor, y: Tensor, counts: Tensor | None = None) -> None:
        self.x, self._y = x, y
        if counts is None:
            if y.dim() == 3:  # nothing hides the next token
                counts = torch.full((x.shape[-1], 1), x.shape[0] * x.shape[1])
            else:
                counts = y.ne(IGNORE_INDEX).sum((0, 1))
        self.counts = counts

    def targets(self, *, copy: bool = False) -> Tensor:
        return self._y

    def to(self, device: torch.device) -> WindowBatch:
        if device.type == "cpu":
            return self
        x, y = (tensor.pin_memory().to(device, non_blocking=True) for tensor in (self.x, self._y))
        return WindowBatch(x, y, self.counts)


class Feed(Protocol):
    """Micro-batches of one split for one process of a run."""

    def take(self, step: int) -> list[Batch]:
        """All micro-batches of update `step`, on the CPU."""
        ...

    def prepare(self, step: int) -> None:
        """Reads what `take(step)` will be asked for next, while the device is busy."""
        ...

    def evaluation(self, count: int) -> Iterator[Batch]:
        """The first `count` batches, the same ones every time, whatever was taken."""
        ...

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on behind the last batch taken, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None: ...


class _Ahead:
    """Keeps the micro-batches of one update that were read before they were asked for."""

    def __init__(self, accumulation: int) -> None:
        self.accumulation = accumulation
        self._ready: tuple[int, list[Batch]] | None = None

    def _read(self, step: int) -> list[Batch]:
        raise NotImplementedError

    def take(self, step: int) -> list[Batch]:
        ready, self._ready = self._ready, None
        return ready[1] if ready is not None and ready[0] == step else self._read(step)

    def prepare(self, step: int) -> None:
        self._ready = (step, self._read(step))


class WindowFeed(_Ahead):
    def __init__(self, loader: WindowLoader, accumulation: int) -> None:
        super().__init__(accumulation)
        self.loader = loader

    def _read(self, step: int) -> list[Batch]:
        first = step * self.accumulation
        return [WindowBatch(*self.loader.batch(first + micro)) for micro in range(self.accumulation)]

    def evaluation(self, count: int) -> Iterator[Batch]:
        return (WindowBatch(*self.loader.batch(index)) for index in range(count))

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        self._ready = None


class StreamFeed(_Ahead):
    def __init__(self, loader: DistributedDataLoader, accumulation: int) -> None:
        super().__init__(accumulation)
        self.loader = loader

    def _read(self, step: int) -> list[Batch]:
        return [self.loader.next_buffer() for _ in range(self.accumulation)]

    def evaluation(self, count: int) -> Iterator[Batch]:
        return iter(self.loader.batches(count))

    def state(self) -> dict[str, Any]:
        unused = 0 if self._ready is None else self.accumulation * self.loader.global_tokens
        state = self.loader.state_dict()
        return state | {"position": state["position"] - unused}

    def restore(self, state: dict[str, Any]) -> None:
        """An empty state, of a run that read windows so far, is the beginning of the stream."""
        self._ready = None
        if state:
            self.loader.load_state_dict(state)
        else:
            self.loader.position = 0


def open_feed(
    bundle: Bundle,
    split: Split,
    kind: str | None,
    *,
    batch_size: int,
    block_size: int,
    accumulation: int,
    steps: int,
    seed: int,
    rank: int,
    world_size: int,
) -> Feed:
    """A feed of `split` by `kind`, "windows" or "stream"; None is the latter for shards, the former for bundles.

    Raises:
        MegactxError: the split is too short for the batch, or for the window, or has nothing to predict.
    """
    place: dict[str, Any] = {"steps": steps, "rank": rank, "world_size": world_size}
    if (kind or ("stream" if isinstance(bundle, ShardSet) else "windows")) == "stream":
        _refuse_single_tokens(bundle, split)
        stream = DistributedDataLoader(bundle, batch_size, block_size, split=split, **place)
        return StreamFeed(stream, accumulation)
    windows = WindowLoader(bundle, split, batch_size, block_size, seed, delimiters=_delimiters(bundle), **place)
    return WindowFeed(windows, accumulation)


def _refuse_single_tokens(bundle: Bundle, split: Split) -> None:
    """In a stream the last token of a shard is followed by none."""
    shards = bundle.shards(split) if isinstance(bundle, ShardSet) else ()
    if shards and bundle.length(split) == len(shards):
        raise MegactxError(
            f"the {split} split of {bundle.path} has no next token to predict: each of its shards ({len(shards)}) "
            "holds one token"
        )


def _delimiters(bundle: Bundle) -> tuple[int, ...]:
    if isinstance(bundle, ShardSet):
        return () if bundle.delimiter is None else (bundle.delimiter,)
    return document_separators(bundle.contexts[0].tokenizer)
