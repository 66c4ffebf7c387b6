"""Training data as one endless stream of tokens that several processes share.

All shards of an epoch, or one split of a bundle, are a stream of L tokens that repeats. A global micro-batch takes
B * T * world_size consecutive tokens of it, and rank r the r-th B * T of those: no two ranks read the same token, and
each token is an input exactly once an epoch, at the ends of shards and of the epoch too. What a batch holds is a
function of the position in the stream alone, so a run that resumes needs one number, whatever the number of ranks or
the size of the batch is by then.

The inputs and all K targets of a batch are views of one buffer of B * T + K tokens: target k of position p is the
token at p + k. Where a shard or a document ends in between, it is none of its text; those targets are -1, and the
only thing that is sent to a GPU beside the tokens is the list of these places.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megactx.data.bundle import SHARDS, SPLITS, Bundle, Split
from megactx.data.shard_file import Paths, ShardedTokens, find_shards, read_shards
from megactx.data.shards import BARE, Delimiter, ShardSet, document_separators
from megactx.errors import MegactxError

IGNORE = -1
Array = NDArray[Any]


@dataclass(frozen=True)
class TokenBuffer:
    """The tokens of one batch of B rows of T, and where a target is none.

    tokens: int64 [B*T + K, C], contiguous.
    masked: int64 [M]; place (k-1) * B*T + i stands for target k of position i (in all contexts).
    counts: int64 [C, K], on the CPU wherever the tokens are: the valid targets.
    """

    tokens: Tensor
    masked: Tensor
    counts: Tensor
    batch_size: int
    block_size: int
    steps: int

    @property
    def x(self) -> Tensor:
        """The inputs, a view [B, T, C]."""
        return self.tokens[: self.batch_size * self.block_size].view(self.batch_size, self.block_size, -1)

    @property
    def y(self) -> Tensor:
        """The targets [B, T, C, K], -1 where masked: a view where nothing is."""
        return self.targets()

    def targets(self, *, copy: bool = False) -> Tensor:
        """`y`; with `copy` never a view. The strides of the two differ, and torch.compile compiles for each."""
        b, t, k, c = self.batch_size, self.block_size, self.steps, self.tokens.shape[1]
        view = self.tokens.as_strided((k, b, t, c), (c, t * c, c, 1), self.tokens.storage_offset() + c)
        if copy or len(self.masked):
            view = view.clone(memory_format=torch.contiguous_format)
            view.view(k * b * t, c).index_fill_(0, self.masked, IGNORE)
        return view.permute(1, 2, 3, 0)

    def to(self, device: torch.device | str) -> TokenBuffer:
        """The same on `device`. To a GPU the copies are asynchronous, from pinned memory."""
        device = torch.device(device)
        return replace(self, tokens=_move(self.tokens, device), masked=_move(self.masked, device))


def _move(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor if tensor.is_pinned() else tensor.pin_memory()).to(device, non_blocking=True)


def targets_dict(y: Tensor) -> dict[str, Tensor]:
    """Targets [B, T, C, K] as `{"target_1": [B, T], ...}`; [B, T, C] where there are several contexts."""
    y = y[:, :, 0] if y.shape[2] == 1 else y
    return {f"target_{k + 1}": y[..., k] for k in range(y.shape[-1])}


@dataclass(frozen=True)
class _Source:
    """What a loader reads: one sequence of ids per context, and how to speak of it."""

    label: str
    parts: tuple[Array | ShardedTokens, ...]
    names: tuple[str, ...]
    vocab_sizes: tuple[int, ...]
    delimiters: tuple[int, ...]
    fingerprint: str
    skipped: tuple[str, ...] = ()


class DistributedDataLoader:
    """Batches for one rank from shards, a folder of them, or a bundle.

    source: a `Bundle` or the folder of one, bundles of shards included, of which `split` is read; or shard files: a
    path, a glob, or a list of them.
    steps: K, how many tokens ahead the targets go. Target k of position p is -1 where a shard ends in (p, p + k], or
    where a delimiter lies strictly between p and p + k: a delimiter may be predicted, what is behind it may not.
    delimiter: the token between documents, looked up in the first context. "auto": what the source says, the NUL that
    `megactx prepare` joins documents by, or an encoding's end-of-text token (for bare shards 50,256). None: none.
    skip_bad: leave damaged shards out, with a warning; `skipped` names them.

    Raises MegactxError where something does not fit, the same on every rank.
    """

    def __init__(
        self,
        source: Bundle | Paths,
        batch_size: int,
        block_size: int,
        *,
        steps: int = 1,
        rank: int = 0,
        world_size: int = 1,
        delimiter: Delimiter = "auto",
        skip_bad: bool = False,
        split: Split = "train",
        pin_memory: bool = False,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size), ("block_size", block_size), ("steps", steps), ("world_size", world_size),
        ):  # fmt: skip
            if value < 1:
                raise MegactxError(f"{name} must be at least 1, got {value}")
        if not 0 <= rank < world_size:
            raise MegactxError(f"rank must lie in 0..{world_size - 1}, got {rank}")
        if steps > block_size:
            raise MegactxError(f"steps must not exceed the block_size of {block_size}, got {steps}")
        # with one step no target is behind a delimiter, and an encoding need not be loaded to know its own
        self._source = _resolve(source, split, delimiter if steps > 1 else None, skip_bad)
        self.batch_size, self.block_size, self.steps = batch_size, block_size, steps
        self.rank, self.world_size, self.pin_memory = rank, world_size, pin_memory
        self.length = self._source.parts[0].size
        self.global_tokens = batch_size * block_size * world_size
        self.skipped = self._source.skipped
        self._position = 0
        if self.length < self.global_tokens:
            raise MegactxError(self._too_short())

    def _too_short(self) -> str:
        sizes = f"{self.batch_size} x {self.block_size}" + (f" x {self.world_size}" if self.world_size > 1 else "")
        rows = self.length // (self.block_size * self.world_size)
        columns = self.length // (self.batch_size * self.world_size)
        fits = [f"batch_size {rows}"] * (rows > 0) + [f"block_size {columns}"] * (columns > 0)
        return (
            f"{self._source.label} has {self.length} tokens, less than one batch of {sizes} = {self.global_tokens}"
            + (f"; at most {' or '.join(fits)} fits" if fits else "")
        )

    # -- where in the stream -------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Tokens that all ranks together have taken since the beginning, over all epochs."""
        return self._position

    @position.setter
    def position(self, value: int) -> None:
        if value < 0:
            raise MegactxError(f"position must be at least 0, got {value}")
        self._position = value

    @property
    def epoch(self) -> float:
        return self._position / self.length

    def state_dict(self) -> dict[str, Any]:
        """The position and which stream it is one of, for any number of ranks and size of the batch."""
        return {"position": self._position, "tokens": self.length, "fingerprint": self._source.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken. Refuses the state of another stream."""
        position = state.get("position")
        if not isinstance(position, int) or isinstance(position, bool):
            raise MegactxError(f"the state of a data loader has the position {position!r}, expected a whole number")
        if (state.get("tokens"), state.get("fingerprint")) != (self.length, self._source.fingerprint):
            other = state.get("tokens")
            raise MegactxError(
                f"cannot continue at token {position}: {self._source.label} is another stream than the one before "
                f"({self.length} tokens, " + ("other contents)" if other == self.length else f"that one had {other})")
            )
        self.position = position

    # -- batches -------------------------------------------------------------------------------------------------

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs [B, T, C] and targets [B, T, C, K] of the next batch, int64."""
        buffer = self.next_buffer()
        return buffer.x, buffer.y

    def next_buffer(self) -> TokenBuffer:
        """The next batch of this rank, for a loop that moves it to a GPU before it takes views of it."""
        buffer = self.buffer_at(self._position)
        self._position += self.global_tokens
        return buffer

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """This rank's part of the global micro-batch `index`, counted from the beginning of the stream."""
        if index < 0:
            raise ValueError(f"batch index must be at least 0, got {index}")
        buffer = self.buffer_at(index * self.global_tokens)
        return buffer.x, buffer.y

    def batches(self, count: int) -> Iterator[TokenBuffer]:
        """The first `count` batches of the stream, the same ones every time; `position` stays as it is."""
        return (self.buffer_at(index * self.global_tokens) for index in range(count))

    def buffer_at(self, position: int) -> TokenBuffer:
        """This rank's part of the global micro-batch that begins at `position`: a pure function."""
        inputs, contexts = self.batch_size * self.block_size, len(self._source.parts)
        tokens = torch.empty(inputs + self.steps, contexts, dtype=torch.int64, pin_memory=self.pin_memory)
        ids = tokens.numpy()
        start = (position + self.rank * inputs) % self.length
        shard_starts = self._read(start, ids)
        self._refuse_unknown(start, ids)
        masked = self._masked(ids[:, 0], shard_starts)
        places = np.concatenate([at + k * inputs for k, at in enumerate(masked)])
        counts = torch.tensor([inputs - at.size for at in masked]).repeat(contexts, 1)
        return TokenBuffer(tokens, torch.from_numpy(places), counts, self.batch_size, self.block_size, self.steps)

    def _read(self, start: int, out: Array) -> list[int]:
        """Fills `out` [n, C] from `start` on, over the end of the epoch; returns where in it a shard begins."""
        places: list[int] = []
        filled = 0
        while filled < len(out):
            count = min(len(out) - filled, self.length - start)
            for c, part in enumerate(self._source.parts):
                at = filled
                for piece in _pieces(part, start, count):
                    out[at : at + piece.size, c] = piece
                    if c == 0:
                        places.append(at)
                    at += piece.size
            filled, start = filled + count, 0
        return places[1:]  # what begins with the buffer is no boundary in it

    def _refuse_unknown(self, start: int, ids: Array) -> None:
        """An id outside the vocabulary would be read out of bounds on a GPU, and no header tells of it."""
        source = self._source
        for c, (largest, size) in enumerate(zip(ids.max(axis=0).tolist(), source.vocab_sizes, strict=True)):
            if largest >= size:
                position = (start + int((ids[:, c] >= size).argmax())) % self.length
                part = source.parts[c]
                where = f"shard {part.shard_at(position).path}" if isinstance(part, ShardedTokens) else source.label
                raise MegactxError(
                    f"{where} holds id {largest}, outside the vocabulary of {size} (context {source.names[c]!r}, "
                    f"token {position} of the stream)"
                )

    def _masked(self, ids: Array, shard_starts: list[int]) -> list[Array]:
        """For each step k the positions in the batch whose target k belongs to other text.

        Whatever comes between a position and its target k comes between it and the farther ones too, so one array of
        flags is carried from k to k + 1. A shard that begins at the target is between; a delimiter there is not yet.
        """
        inputs = self.batch_size * self.block_size
        begins, ends = np.zeros(0, bool), np.zeros(0, bool)
        if shard_starts:
            begins = np.zeros(len(ids), bool)
            begins[shard_starts] = True
        if self.steps > 1:
            for token in self._source.delimiters:
                found = ids == token
                ends = found if ends.size == 0 else ends | found
        crossed = np.zeros(inputs, bool)
        masked = []
        for k in range(1, self.steps + 1):
            if begins.size:
                crossed |= begins[k : k + inputs]
            masked.append(np.flatnonzero(crossed))
            if ends.size:
                crossed |= ends[k : k + inputs]
        return masked


def _pieces(part: Array | ShardedTokens, start: int, count: int) -> Iterable[Array]:
    return part.pieces(start, count) if isinstance(part, ShardedTokens) else (part[start : start + count],)


def _resolve(source: Bundle | Paths, split: Split, delimiter: Delimiter, skip_bad: bool) -> _Source:
    if split not in SPLITS:
        raise MegactxError(f"split must be 'train' or 'val', got {split!r}")
    if isinstance(source, (str, Path)) and Path(source).is_dir():
        is_shards = (Path(source) / SHARDS).is_file()
        source = ShardSet.open(source, skip_bad=skip_bad) if is_shards else Bundle.open(source)
    found = _from_bundle(source, split, delimiter) if isinstance(source, Bundle) else _from_files(source, skip_bad)
    if delimiter != "auto":
        found = replace(found, delimiters=() if delimiter is None else (delimiter,))
    for token in found.delimiters:
        if not 0 <= token < found.vocab_sizes[0]:
            raise MegactxError(f"delimiter {token} is outside the vocabulary of {found.vocab_sizes[0]}")
    return found


def _from_bundle(bundle: Bundle, split: Split, delimiter: Delimiter) -> _Source:
    delimiters: tuple[int, ...] = ()
    if isinstance(bundle, ShardSet):
        delimiters = () if bundle.delimiter is None else (bundle.delimiter,)
    elif delimiter == "auto" and bundle.contexts[0].kind == "categorical":
        try:
            delimiters = document_separators(bundle.contexts[0].tokenizer)
        except MegactxError as error:
            raise MegactxError(f"delimiter: give the token that stands between documents, or None ({error})") from None
    contents = [(info.name, info.tokens[split], info.sha256.get(split)) for info in bundle.contexts]
    return _Source(
        f"the {split} split of {bundle.path}",
        tuple(bundle.split(split)),
        tuple(info.name for info in bundle.contexts),
        tuple(info.vocab_size for info in bundle.contexts),
        delimiters,
        hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
        bundle.skipped if isinstance(bundle, ShardSet) else (),
    )


def _from_files(source: Paths, skip_bad: bool) -> _Source:
    shards, skipped = read_shards(find_shards(source), skip_bad=skip_bad)
    tokens = ShardedTokens(shards)
    contents = [(shard.path.name, shard.tokens, shard.digest()) for shard in shards]
    dtype = "uint32" if tokens.dtype.itemsize == 4 else "uint16"
    return _Source(
        f"the stream of {len(shards)} shards in {shards[0].path.parent}",
        (tokens,),
        ("text",),
        (1 << 8 * tokens.dtype.itemsize,),
        (BARE[dtype][2],),
        hashlib.sha256(json.dumps(contents).encode()).hexdigest(),
        skipped,
    )
