"""Entropies against closed forms, and the grids of numeric contexts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megactx.data import entropy
from megactx.data.entropy import entropies
from megactx.data.numeric import measure_scale, quantise
from megactx.errors import MegactxError


def test_constant_stream_has_no_entropy() -> None:
    assert entropies(np.zeros(100, np.uint16), 5) == dict.fromkeys(
        ("unigram", "bigram", "unigram_bits", "bigram_bits"), 0.0
    )


def test_a_cycle_is_uniform_alone_and_certain_in_pairs() -> None:
    measured = entropies(np.tile(np.arange(8), 500), 8)
    assert measured["unigram"] == pytest.approx(math.log(8))
    assert measured["unigram_bits"] == pytest.approx(3.0)
    assert measured["bigram"] == pytest.approx(0.0, abs=1e-6)


def test_a_markov_chain_has_its_rate() -> None:
    stay = 0.9  # two states, symmetric: the stationary law is uniform, the rate is the entropy of one biased coin
    flips = np.random.default_rng(0).random(200_000) > stay
    measured = entropies(np.cumsum(flips) % 2, 2)
    assert measured["unigram"] == pytest.approx(math.log(2), abs=1e-2)
    assert measured["bigram"] == pytest.approx(-stay * math.log(stay) - 0.1 * math.log(0.1), abs=5e-3)


def test_independent_symbols_gain_nothing_from_pairs() -> None:
    measured = entropies(np.random.default_rng(0).integers(0, 4, 100_000), 4)
    assert measured["bigram"] == pytest.approx(measured["unigram"], abs=1e-3)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=60), st.integers(1, 20))
def test_chunked_and_sparse_counting_agree_with_one_table(ids: list[int], chunk: int) -> None:
    array = np.asarray(ids, np.uint16)
    expected = entropies(array, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entropy, "_CHUNK", chunk)
        patch.setattr(entropy, "_DENSE_PAIRS", 0)
        assert entropies(array, 7) == pytest.approx(expected, abs=1e-12)


def test_pairs_of_a_vocabulary_past_16_bits() -> None:
    ids = np.tile(np.array([70_000, 0, 99_999], np.uint32), 50)
    assert entropies(ids, 100_000)["unigram"] == pytest.approx(math.log(3))
    assert entropies(ids, 100_000)["bigram"] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    ("values", "minimum", "step"),
    [([3, 1, 2], 1, 1), ([36.6, 37.0, 36.5], 36.5, 0.1), ([-0.25, 0.5], -0.25, 0.01), ([5.5, 5.5], 5.5, 1)],
)
def test_decimal_values_keep_their_exact_grid(values: list[float], minimum: float, step: float) -> None:
    codes, low, found, size = quantise(np.array(values), "x")
    assert (low, found) == (minimum, step)
    assert low + found * codes == pytest.approx(values, abs=1e-12)
    assert size == codes.max() + 1


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=50))
def test_any_values_are_within_half_a_step(values: list[float]) -> None:
    array = np.array(values)
    codes, minimum, step, size = quantise(array, "x")
    assert codes.min() >= 0
    assert codes.max() < size <= 65_536
    span = float(array.max() - array.min())
    assert step <= max(1.0, span / 65_535 * 1.0001) if size < 65_536 else step == pytest.approx(span / 65_535)
    assert np.abs(minimum + step * codes - array).max() <= max(step * 0.5001, 1e-9 * np.abs(array).max())


@pytest.mark.parametrize("unit", [1e-12, 1e-9, 0.25, 1.0, 1e9])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_values_that_differ_get_codes_that_differ(unit: float, offset: float) -> None:
    values = offset + (np.arange(500) % 97) * unit
    codes, minimum, step, _ = quantise(values, "x")
    assert np.unique(codes).size == np.unique(values).size
    assert np.abs(minimum + step * codes - values).max() <= 0.5001 * step


@pytest.mark.parametrize("values", [[1.0, math.nan], [math.inf, 1.0], [], [-1e308, 1e308]])
def test_values_without_a_grid_are_refused_by_name(values: list[float]) -> None:
    with pytest.raises(MegactxError, match="'speed'"):
        quantise(np.array(values), "speed")


def test_predicting_the_mean_costs_one() -> None:
    codes = np.random.default_rng(0).integers(0, 300, 10_000)
    scale = measure_scale(codes, 10.0, 0.5)
    assert np.mean(scale.scaled(codes) ** 2) == pytest.approx(1.0)
    assert scale.raw(np.array([0, 3])).tolist() == [10.0, 11.5]
    assert measure_scale(np.full(5, 7), 0, 1).std == 1.0
