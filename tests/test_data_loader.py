"""The window loader: aligned, shifted by one, and a function of the batch number alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megactx.data import Bundle, WindowLoader
from megactx.data.write import NewContext, write_bundle
from megactx.errors import MegactxError

TRAIN, VAL = 1000, 200


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two contexts that tell their position: the index itself, and the index modulo 7."""
    path = tmp_path_factory.mktemp("data") / "set"
    index = np.arange(TRAIN + VAL)
    contexts = [
        NewContext(
            name,
            "categorical",
            size,
            {"kind": "integer", "minimum": 0, "maximum": size - 1},
            (values[:TRAIN], values[TRAIN:]),
        )
        for name, size, values in (("index", TRAIN + VAL, index), ("seven", 7, index % 7))
    ]
    write_bundle(path, contexts, {"kind": "test"})
    return Bundle.open(path)


def test_targets_are_inputs_one_token_later_in_every_context(bundle: Bundle) -> None:
    x, y = WindowLoader(bundle, "train", 8, 32, seed=3).batch(5)
    assert x.shape == y.shape == (8, 32, 2)
    assert x.dtype == y.dtype == torch.int64
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(y[..., 0], x[..., 0] + 1)
    assert torch.equal(x[..., 1], x[..., 0] % 7)
    assert torch.equal(x[..., 0] - x[:, :1, 0], torch.arange(32).expand(8, 32))


def test_a_batch_depends_on_its_number_and_the_seed_alone(bundle: Bundle) -> None:
    loader = WindowLoader(bundle, "train", 4, 16, seed=1)
    first = [loader.batch(i)[0] for i in range(5)]
    fresh = WindowLoader(bundle, "train", 4, 16, seed=1)
    for i in (3, 0, 4, 4):
        assert torch.equal(fresh.batch(i)[0], first[i])
    assert not torch.equal(WindowLoader(bundle, "train", 4, 16, seed=2).batch(0)[0], first[0])
    assert not torch.equal(first[0], first[1])


def test_known_starts(bundle: Bundle) -> None:
    """Frozen: another stream would silently change what a resumed run sees."""
    assert WindowLoader(bundle, "train", 4, 16, seed=1337).starts(7).tolist() == [971, 434, 942, 541]


def test_neighbouring_batches_share_no_random_words(bundle: Bundle) -> None:
    starts = [tuple(WindowLoader(bundle, "train", 64, 1, seed=0).starts(i)) for i in range(3)]
    for shift in range(1, 64):
        assert starts[0][shift:] != starts[1][:-shift]
        assert starts[1][shift:] != starts[2][:-shift]


def test_every_window_can_come_and_none_runs_over_the_end(bundle: Bundle) -> None:
    loader = WindowLoader(bundle, "val", 64, VAL - 3, seed=0)  # three windows fit
    seen = np.concatenate([loader.starts(i) for i in range(20)])
    assert sorted(set(seen.tolist())) == [0, 1, 2]
    _, y = loader.batch(0)
    assert int(y[..., 0].max()) == TRAIN + VAL - 1


def test_starts_are_uniform(bundle: Bundle) -> None:
    loader = WindowLoader(bundle, "train", 10_000, 500, seed=9)
    counts = np.bincount(loader.starts(0) // 50, minlength=10)
    assert counts.size == 10
    assert np.abs(counts - 1000).max() < 150  # 5 standard deviations


def test_one_window_is_enough_and_one_token_less_is_refused(bundle: Bundle) -> None:
    x, _ = WindowLoader(bundle, "val", 2, VAL - 1, seed=0).batch(0)
    assert x[0, 0, 0] == TRAIN
    with pytest.raises(MegactxError, match=r"val split .* has 200 tokens .* block_size of 200 needs at least 201"):
        WindowLoader(bundle, "val", 2, VAL, seed=0)
    with pytest.raises(MegactxError, match="block_size of 199 needs at least 202"):
        WindowLoader(bundle, "val", 2, VAL - 1, seed=0, steps=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"batch_size": 0}, "batch_size"), ({"block_size": 0}, "block_size"), ({"seed": -1}, "seed")],
)
def test_bad_arguments_are_named(bundle: Bundle, changes: dict[str, int], message: str) -> None:
    arguments = {"batch_size": 2, "block_size": 8, "seed": 0} | changes
    with pytest.raises(ValueError, match=message):
        WindowLoader(bundle, "train", **arguments)
    for place in ({"rank": 2, "world_size": 2}, {"rank": -1}):
        with pytest.raises(ValueError, match="rank must lie in 0"):
            WindowLoader(bundle, "train", 2, 8, 0, **place)
    with pytest.raises(MegactxError, match="steps must be at most block_size = 8, got 9"):
        WindowLoader(bundle, "train", 2, 8, 0, steps=9)
    with pytest.raises(ValueError, match="batch index"):
        WindowLoader(bundle, "train", 2, 8, 0).batch(-1)
