"""The stream of batches: every token once an epoch, ranks disjoint, targets that never leave their document, and all of
it a function of one position."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megactx.data import Bundle
from megactx.data.shard_file import write_shard
from megactx.data.shards import ShardSet, write_shard_set
from megactx.data.stream import DistributedDataLoader, TokenBuffer, targets_dict
from megactx.data.write import NewContext, write_bundle
from megactx.errors import MegactxError

BYTES: dict[str, Any] = {"kind": "byte"}
INTEGERS = {"kind": "integer", "minimum": 0, "maximum": 65_535}


@dataclasses.dataclass
class Case:
    """A stream and a way to cut it."""

    shards: list[np.ndarray]
    batch_size: int
    block_size: int
    steps: int
    world_size: int
    delimiter: int | None

    def loaders(self, folder: Path, **changes: Any) -> list[DistributedDataLoader]:
        for number, ids in enumerate(self.shards):
            write_shard(folder / f"{number:03d}.bin", ids)
        arguments = {"steps": self.steps, "world_size": self.world_size, "delimiter": self.delimiter} | changes
        return [
            DistributedDataLoader(str(folder / "*.bin"), self.batch_size, self.block_size, rank=rank, **arguments)
            for rank in range(arguments["world_size"])
        ]

    @property
    def stream(self) -> np.ndarray:
        return np.concatenate(self.shards)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    # few symbols, so that the delimiter is often met; or each position its own symbol
    symbols = draw(st.sampled_from([3, 12, 60_000]))
    total = sum(sizes)
    ids = np.arange(total) if symbols == 60_000 else np.array(draw(
        st.lists(st.integers(0, symbols - 1), min_size=total, max_size=total)))  # fmt: skip
    block = draw(st.integers(1, 8))
    batch = draw(st.integers(1, max(1, min(4, total // block))))
    world = draw(st.integers(1, 3))
    while total < batch * block * world:
        batch, block, world = (batch - 1, block, world) if batch > 1 else (batch, block, world - 1) if world > 1 else (
            batch, block - 1, world)  # fmt: skip
    return Case(
        np.split(ids, np.cumsum(sizes)[:-1]), batch, block, draw(st.integers(1, min(block, 8))), world,
        draw(st.sampled_from([None, 0, 2])),
    )  # fmt: skip


def naive_target(case: Case, position: int, k: int) -> int:
    """The definition: the token k ahead in the repeated stream, -1 behind the end of a shard or of a document."""
    stream = case.stream
    shard_of = np.repeat(np.arange(len(case.shards)), [ids.size for ids in case.shards])
    for p in range(position + 1, position + k + 1):
        if p % stream.size == 0 or shard_of[p % stream.size] != shard_of[(p - 1) % stream.size]:
            return -1
    between = [stream[p % stream.size] for p in range(position + 1, position + k)]
    return -1 if case.delimiter in between else int(stream[(position + k) % stream.size])


@settings(max_examples=150, deadline=None)
@given(case=cases(), start=st.integers(0, 500))
def test_batches_are_what_the_definition_says(case: Case, start: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        loaders = case.loaders(Path(folder))
        per_rank = case.batch_size * case.block_size
        for round_ in range(2):
            for rank, loader in enumerate(loaders):
                loader.position = start + round_ * loader.global_tokens
                first = loader.position + rank * per_rank
                buffer = loader.next_buffer()
                positions = range(first, first + per_rank)
                x = [case.stream[p % case.stream.size] for p in positions]
                y = [[naive_target(case, p, k) for k in range(1, case.steps + 1)] for p in positions]
                assert buffer.x.shape == (case.batch_size, case.block_size, 1)
                assert buffer.y.shape == (case.batch_size, case.block_size, 1, case.steps)
                assert buffer.x.reshape(-1).tolist() == x
                assert buffer.y.reshape(per_rank, case.steps).tolist() == y
                assert torch.equal(buffer.targets(copy=True), buffer.y)
                assert torch.equal(buffer.counts, (buffer.y >= 0).sum((0, 1)))
                assert buffer.x.dtype == buffer.y.dtype == torch.int64


@settings(max_examples=100, deadline=None)
@given(case=cases(), epochs=st.integers(1, 3))
def test_every_token_is_an_input_once_an_epoch_and_of_one_rank(case: Case, epochs: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        length = case.stream.size
        case.shards = np.split(np.arange(length), np.cumsum([ids.size for ids in case.shards])[:-1])
        loaders = case.loaders(Path(folder), delimiter=None)
        seen = np.zeros(length, int)
        while loaders[0].position < epochs * length:
            parts = [loader.next_batch()[0].reshape(-1).numpy() for loader in loaders]
            taken = np.concatenate(parts)
            assert np.unique(taken).size == taken.size  # ranks are disjoint
            assert (taken == np.arange(loaders[0].position - taken.size, loaders[0].position) % length).all()
            np.add.at(seen, taken, 1)
        over = loaders[0].position - epochs * length  # the last batch runs into the next epoch
        expected = np.full(length, epochs)
        expected[:over] += 1
        assert (seen == expected).all()


@settings(max_examples=60, deadline=None)
@given(case=cases(), batches=st.integers(0, 9), data=st.data())
def test_a_resumed_run_continues_whatever_its_ranks_and_batch(case: Case, batches: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = case.loaders(Path(folder))[0]
        for _ in range(batches):
            first.next_batch()
        state = first.state_dict()
        world = data.draw(st.integers(1, max(1, min(3, case.stream.size // case.block_size))))
        changed = dataclasses.replace(case, batch_size=1, world_size=world)
        resumed = changed.loaders(Path(folder), steps=1)
        for loader in resumed:
            loader.load_state_dict(state)
        x = np.concatenate([loader.next_batch()[0].reshape(-1).numpy() for loader in resumed])
        start = batches * first.global_tokens
        assert x.tolist() == [case.stream[p % case.stream.size] for p in range(start, start + x.size)]
        fresh = case.loaders(Path(folder))[0]
        fresh.load_state_dict(state)
        for _ in range(3):
            for a, b in zip(first.next_batch(), fresh.next_batch(), strict=True):
                assert torch.equal(a, b)


@pytest.fixture
def ramp(tmp_path: Path) -> Callable[..., DistributedDataLoader]:
    """A loader over one shard whose ids tell their positions."""
    write_shard(tmp_path / "a.bin", np.arange(1000))

    def make(*size: int, **arguments: Any) -> DistributedDataLoader:
        return DistributedDataLoader(tmp_path / "a.bin", *size, **arguments)

    return make


def test_targets_are_views_of_one_buffer_where_nothing_is_masked(ramp: Any) -> None:
    buffer = ramp(4, 16, steps=3).next_buffer()
    x, y = buffer.x, buffer.y
    assert buffer.tokens.shape == (4 * 16 + 3, 1)
    assert x.data_ptr() == buffer.tokens.data_ptr()
    assert y.data_ptr() == buffer.tokens.data_ptr() + 8
    assert y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert y.stride() == (16, 1, 1, 1)
    assert torch.equal(y[:, :, 0, 2], x[:, :, 0] + 3)
    copy = buffer.targets(copy=True)
    assert copy.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert torch.equal(copy, y)


def test_masking_leaves_the_inputs_alone(ramp: Any) -> None:
    buffer = ramp(2, 8, steps=3, delimiter=5).next_buffer()
    assert buffer.x.reshape(-1).tolist() == list(range(16))
    targets = targets_dict(buffer.y)
    assert list(targets) == ["target_1", "target_2", "target_3"]
    assert targets["target_1"].reshape(-1).tolist() == list(range(1, 17))  # also 5 itself, and what follows 5
    assert targets["target_2"].reshape(-1).tolist()[:7] == [2, 3, 4, 5, -1, 7, 8]
    assert targets["target_3"].reshape(-1).tolist()[:7] == [3, 4, 5, -1, -1, 8, 9]
    assert buffer.counts.tolist() == [[16, 15, 14]]
    assert buffer.masked.tolist() == [16 + 4, 32 + 3, 32 + 4]


def test_evaluation_is_the_same_every_time_and_leaves_the_position(ramp: Any) -> None:
    loader = ramp(2, 50, world_size=2, rank=1)
    loader.next_batch()
    first = [buffer.x for buffer in loader.batches(7)]  # longer than the epoch: it begins again
    second = [buffer.x for buffer in loader.batches(7)]
    assert loader.position == 200
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [int(x[0, 0, 0]) for x in first] == [100, 300, 500, 700, 900, 100, 300]
    assert torch.equal(loader.batch(3)[0], first[3])
    assert loader.epoch == 0.2


def test_far_positions_are_exact(ramp: Any) -> None:
    """Trillions of tokens: the position is a whole number and stays one."""
    loader = ramp(1, 4)
    loader.position = 10**18 + 998
    x, y = loader.next_batch()
    assert x.reshape(-1).tolist() == [998, 999, 0, 1]
    assert y.reshape(-1).tolist() == [999, -1, 1, 2]
    assert loader.position == 10**18 + 1002


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Two aligned contexts, a text of documents joined by NUL and the position."""
    text = np.arange(300) % 10
    contexts = [
        NewContext("text", "categorical", 256, BYTES, (text[:200], text[200:])),
        NewContext("position", "categorical", 65_536, INTEGERS, (np.arange(200), np.arange(200, 300))),
    ]
    write_bundle(tmp_path / "set", contexts, {})
    return Bundle.open(tmp_path / "set")


def test_a_bundle_is_a_stream_of_all_its_contexts(bundle: Bundle) -> None:
    loader = DistributedDataLoader(bundle, 2, 20, steps=3)
    x, y = loader.next_batch()
    assert x.shape == (2, 20, 2)
    assert y.shape == (2, 20, 2, 3)
    assert x[..., 1].reshape(-1).tolist() == list(range(40))
    assert torch.equal(x[..., 0], x[..., 1] % 10)
    # a NUL of the text ends a document in every context
    masked = torch.tensor([[9 - k + 1 < p % 10 <= 9 and k > 1 for k in (1, 2, 3)] for p in range(40)])
    assert torch.equal((y == -1).reshape(40, 2, 3), masked[:, None].expand(40, 2, 3))
    ahead = x[..., 1, None] + torch.arange(1, 4)
    assert torch.equal(y[:, :, 1], torch.where(masked.view(2, 20, 3), -1, ahead))
    assert DistributedDataLoader(bundle, 2, 20, steps=3, delimiter=None).next_buffer().masked.numel() == 0
    val = DistributedDataLoader(bundle, 1, 20, split="val")
    assert int(val.next_batch()[0][0, 0, 1]) == 200
    assert sorted(targets_dict(y)) == ["target_1", "target_2", "target_3"]
    assert targets_dict(y)["target_2"].shape == (2, 20, 2)


def test_a_folder_or_its_bundle_give_the_same_stream(bundle: Bundle, tmp_path: Path) -> None:
    ids = np.arange(300) % 10
    write_shard_set(
        tmp_path / "shards", [NewContext("text", "categorical", 256, BYTES, (ids[:200], ids[200:]))], {},
        tokens_per_shard=64,
    )  # fmt: skip
    opened = ShardSet.open(tmp_path / "shards")
    for source in (opened, tmp_path / "shards", str(tmp_path / "shards")):
        loader = DistributedDataLoader(source, 2, 40, steps=2)
        a = loader.next_buffer()
        assert a.x.reshape(-1).tolist() == ids[:80].tolist()
        assert a.masked.tolist() == sorted([63, *(80 + p for p in (*range(9, 80, 10), 62, 63))])
    state = loader.state_dict()
    DistributedDataLoader(opened, 1, 10).load_state_dict(state)
    whole = DistributedDataLoader(bundle, 2, 40)
    assert torch.equal(whole.next_batch()[0][..., 0], a.x[..., 0])
    with pytest.raises(MegactxError, match=r"another stream than the one before \(200 tokens, other contents"):
        whole.load_state_dict(state)


def test_the_state_of_another_stream_is_refused(ramp: Any, tmp_path: Path) -> None:
    state = ramp(2, 8).state_dict()
    write_shard(tmp_path / "a.bin", np.arange(900))
    with pytest.raises(MegactxError, match=r"another stream .*\(900 tokens, that one had 1000\)"):
        ramp(2, 8).load_state_dict(state)
    write_shard(tmp_path / "a.bin", np.arange(1000)[::-1].copy())
    with pytest.raises(MegactxError, match="other contents"):
        ramp(2, 8).load_state_dict(state)
    with pytest.raises(MegactxError, match="position None"):
        ramp(2, 8).load_state_dict({})


@pytest.mark.parametrize(
    ("size", "arguments", "message"),
    [
        ((0, 8), {}, "batch_size must be at least 1, got 0"),
        ((1, 0), {}, "block_size must be at least 1, got 0"),
        ((1, 8), {"steps": 0}, "steps must be at least 1, got 0"),
        ((1, 8), {"steps": 9}, "steps must not exceed the block_size of 8, got 9"),
        ((1, 8), {"world_size": 0}, "world_size must be at least 1"),
        ((1, 8), {"rank": 2, "world_size": 2}, r"rank must lie in 0\.\.1, got 2"),
        ((1, 8), {"split": "test"}, "split must be 'train' or 'val', got 'test'"),
        ((1, 8), {"delimiter": 70_000, "steps": 2}, "delimiter 70000 is outside the vocabulary of 65536"),
        ((10, 101), {}, r"1000 tokens, less than one batch of 10 x 101 = 1010; at most batch_size 9 or block_size 100"),
        ((10, 60), {"world_size": 2}, r"10 x 60 x 2 = 1200; at most batch_size 8 or block_size 50 fits"),
        ((1, 2000), {}, r"1 x 2000 = 2000; at most block_size 1000 fits"),
    ],
)
def test_bad_arguments_are_named(ramp: Any, size: tuple[int, int], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(MegactxError, match=message):
        ramp(*size, **arguments)


def test_one_batch_is_enough(ramp: Any) -> None:
    x, y = ramp(10, 100, steps=2).next_batch()
    assert x.reshape(-1).tolist() == list(range(1000))
    assert y[-1, -2:, 0].tolist() == [[999, -1], [-1, -1]]
    with pytest.raises(MegactxError, match="position must be at least 0, got -1"):
        ramp(1, 8).position = -1
    with pytest.raises(ValueError, match="batch index"):
        ramp(1, 8).batch(-1)


def test_damaged_shards_are_left_out_of_the_stream_and_reported(tmp_path: Path) -> None:
    for number in range(3):
        write_shard(tmp_path / f"{number}.bin", np.full(100, number))
    (tmp_path / "1.bin").write_bytes(b"")
    with pytest.raises(MegactxError, match=r"1\.bin is empty"):
        DistributedDataLoader(str(tmp_path / "*.bin"), 1, 100)
    with pytest.warns(UserWarning, match=r"1\.bin is empty"):
        loader = DistributedDataLoader(str(tmp_path / "*.bin"), 1, 100, skip_bad=True)
    assert loader.length == 200
    assert len(loader.skipped) == 1
    assert [int(loader.next_batch()[0][0, 0, 0]) for _ in range(3)] == [0, 2, 0]


def test_an_id_outside_the_vocabulary_names_its_shard(tmp_path: Path) -> None:
    """An embedding on a GPU would read out of bounds."""
    for number, top in enumerate((10, 50_400)):
        write_shard(tmp_path / f"{number}.bin", np.append(np.arange(99), top))
    tokenizer = {"kind": "integer", "minimum": 0, "maximum": 50_303}
    write_shard(tmp_path / "v.bin", np.arange(99))
    shards = ShardSet.from_files(str(tmp_path / "[01].bin"), tmp_path / "v.bin", tokenizer=tokenizer)
    loader = DistributedDataLoader(shards, 1, 100)
    loader.next_batch()
    with pytest.raises(MegactxError, match=r"1\.bin holds id 50400, outside the vocabulary of 50304 .*token 199"):
        loader.next_batch()


def test_bare_shards_end_documents_at_gpt_2s_token(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.bin", np.array([50_256, 1, 2, 50_256, 4, 5, 6, 7]))
    y = DistributedDataLoader(tmp_path / "a.bin", 1, 6, steps=2).next_batch()[1]
    assert y[0, :, 0].tolist() == [[1, 2], [2, 50_256], [50_256, -1], [4, 5], [5, 6], [6, 7]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_buffer_crosses_to_the_gpu_whole(ramp: Any) -> None:
    buffer = ramp(4, 16, steps=3, delimiter=5).next_buffer()
    there: TokenBuffer = buffer.to("cuda")
    assert there.y.is_cuda
    assert there.counts.device.type == "cpu"
    assert torch.equal(there.x.cpu(), buffer.x)
    assert torch.equal(there.y.cpu(), buffer.y)
