"""Sampling: the filters against plain Python, the noise against its definition, the draws against probabilities."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megactx import kernels
from megactx.kernels.sampling import op, reference

BACKENDS = ["reference", "auto"]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    """Every test runs on the plain function and on whatever the dispatcher has for the CPU."""
    with kernels.use_backend(request.param):
        yield request.param


def draw(
    logits: Tensor, sizes: tuple[int, ...] | None = None, *, seeds: Any = 0, step: Any = 0, **knobs: Any
) -> Tensor:
    sizes = (logits.shape[1],) if sizes is None else sizes
    return kernels.sample_contexts(logits, sizes, seeds=seeds, step=step, **knobs)


def survivors(z: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The tokens left and their probabilities, straight from the contract, in Python floats."""
    order = sorted(range(len(z)), key=lambda i: (-z[i], i))
    order = order[: top_k or len(z)]
    mass = [math.exp((z[i] - z[order[0]]) / temperature) for i in order]
    total = sum(mass)
    kept, so_far = [], 0.0
    for i, m in zip(order, mass, strict=True):
        kept.append(i)
        so_far += m / total
        if so_far >= top_p:
            break
    weight = {i: math.exp((z[i] - z[order[0]]) / temperature) for i in kept}
    weight = {i: w for i, w in weight.items() if w >= min_p}
    return {i: w / sum(weight.values()) for i, w in weight.items()}


FILTERS = [
    {},
    {"temperature": 0.7},
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.2},
    {"temperature": 1.7, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
    {"top_k": 99},
]


@pytest.mark.parametrize("knobs", FILTERS, ids=str)
def test_frequencies_are_the_exact_probabilities(knobs: dict[str, Any]) -> None:
    z = [0.3, -1.2, 2.0, 0.0, 1.1, -0.4, 0.9, -3.0]
    full = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | knobs
    expected = survivors(z, **full)
    rows = 20_000
    ids = draw(torch.tensor(z).expand(rows, -1), seeds=torch.arange(rows), step=7, **knobs)[:, 0]
    counts = torch.bincount(ids, minlength=len(z)).tolist()
    assert {i for i, n in enumerate(counts) if n} <= set(expected)
    chi_square = sum((counts[i] - rows * p) ** 2 / (rows * p) for i, p in expected.items())
    # Mean n - 1, variance 2 (n - 1); the seeds are fixed, so this either holds or does not.
    degrees = len(expected) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees) + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    z=st.lists(st.integers(-8, 8).map(float), min_size=1, max_size=12),
    temperature=st.sampled_from([0.25, 1.0, 4.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1e-6, 0.3, 0.77, 1.0]),
    min_p=st.sampled_from([0.0, 0.013, 0.35, 1.0]),
)
def test_every_draw_survives_the_filters(
    z: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    allowed = survivors(z, temperature, top_k, top_p * (1 - 1e-6), min_p * (1 - 1e-6))
    logits = torch.tensor(z).expand(32, -1)
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p * (1 - 1e-6), "min_p": min_p * (1 - 1e-6)}
    ids = draw(logits, seeds=torch.arange(32), **knobs)
    assert set(ids.flatten().tolist()) <= set(allowed)


def test_ties_keep_exactly_k_and_the_lowest_ids() -> None:
    ids = draw(torch.zeros(4000, 10), seeds=torch.arange(4000), top_k=3)
    assert ids.unique().tolist() == [0, 1, 2]
    assert draw(torch.zeros(5, 10), temperature=0.0).eq(0).all()
    assert draw(torch.zeros(5, 10), top_k=1).eq(0).all()
    wide = draw(torch.zeros(300, 5000), seeds=torch.arange(300), top_k=2000)  # where an unstable sort would show
    assert wide.max() < 2000
    assert wide.max() > 1900
    # 0.25 each: two tokens reach 0.5 exactly, and the second is the one that crosses.
    assert draw(torch.zeros(4000, 4), seeds=torch.arange(4000), top_p=0.5).unique().tolist() == [0, 1]
    assert draw(torch.zeros(400, 4), seeds=torch.arange(400), top_p=1e-9).eq(0).all()


def test_the_noise_is_its_definition() -> None:
    """Against scalar Python: Philox in integers, the uniform and the logarithms in float64."""

    def philox(counter: list[int], key: list[int]) -> list[int]:
        for _ in range(10):
            a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
            counter = [(b >> 32) ^ counter[1] ^ key[0], b % 2**32, (a >> 32) ^ counter[3] ^ key[1], a % 2**32]
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        return counter

    for seed, context, step in ((0, 0, 0), (-5, 2, 3), (2**63 - 1, 1, 2**40 + 17), (-(2**63), 7, -1)):
        noise = reference.gumbel_noise(9, torch.tensor([[seed]]), context, torch.tensor(step))[0]
        for token in range(9):
            words = philox(
                [token >> 1, context, step % 2**32, (step >> 32) % 2**32], [seed % 2**32, (seed >> 32) % 2**32]
            )
            high, low = words[2:] if token & 1 else words[:2]
            u = min(max(high * 2.0**-32 + low * 2.0**-64, 2.0**-64), 1 - 2.0**-24)
            assert noise[token].item() == pytest.approx(-math.log(-math.log1p(-u)), rel=1e-5, abs=1e-6)


def test_philox_gives_the_published_vectors() -> None:
    """The known answers of the Random123 distribution."""
    ones = 0xFFFFFFFF
    cases = [
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, [ones] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, answer in cases:
        got = reference.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
        assert [int(word) for word in got] == answer


def test_the_draw_is_the_argmax_of_logits_plus_noise() -> None:
    torch.manual_seed(0)
    logits, seeds = torch.randn(64, 33), torch.randint(-(2**62), 2**62, (64, 1))
    score = logits / torch.tensor(0.8) + reference.gumbel_noise(33, seeds, 0, torch.tensor(11))
    top = score.topk(2).values
    clear = top[:, 0] - top[:, 1] > 1e-5
    ids = draw(logits, seeds=seeds, step=11, temperature=0.8)[:, 0]
    assert torch.equal(ids[clear], score.argmax(-1)[clear])
    assert clear.sum() > 60


def test_a_row_draws_the_same_in_any_batch_order_and_packing() -> None:
    torch.manual_seed(1)
    sizes, rows = (7, 300, 41), 16
    logits, seeds = torch.randn(rows, sum(sizes)), torch.randint(0, 2**40, (rows, 3))
    knobs = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "min_p": 0.01}
    all_at_once = draw(logits, sizes, seeds=seeds, step=5, **knobs)
    one_by_one = torch.cat(
        [draw(logits[i : i + 1], sizes, seeds=seeds[i : i + 1], step=5, **knobs) for i in range(rows)]
    )
    order = torch.randperm(rows)
    shuffled = draw(logits[order], sizes, seeds=seeds[order], step=5, **knobs)
    # Context 0 alone, and context 0 beside other neighbours.
    alone = draw(logits[:, :7].clone(), (7,), seeds=seeds[:, :1], step=5, **knobs)
    assert torch.equal(all_at_once, one_by_one)
    assert torch.equal(all_at_once[order], shuffled)
    assert torch.equal(all_at_once[:, :1], alone)


def test_seed_step_and_context_each_change_the_draw() -> None:
    logits = torch.zeros(200, 2000)
    ids = draw(logits, (1000, 1000), seeds=torch.arange(200), step=0)
    assert (ids[:, 0] == ids[:, 1]).sum() < 5
    assert (ids == draw(logits, (1000, 1000), seeds=torch.arange(200), step=1)).sum() < 5
    assert (ids == draw(logits, (1000, 1000), seeds=torch.arange(200) + 2**32, step=0)).sum() < 5
    assert torch.equal(ids, draw(logits, (1000, 1000), seeds=torch.arange(200), step=torch.tensor(0)))


def test_rows_without_a_draw_give_minus_one_and_spare_their_neighbours() -> None:
    inf, nan = math.inf, math.nan
    logits = torch.tensor([[0.0, nan, 1.0], [-inf, -inf, -inf], [0.0, inf, inf], [-inf, 0.0, -inf], [nan, inf, 0.0]])
    for knobs in ({}, {"temperature": 0.0}, {"top_k": 2, "top_p": 0.9, "min_p": 0.1}):
        ids = draw(logits, seeds=torch.arange(5), **knobs)[:, 0].tolist()
        assert ids[0] == ids[1] == ids[4] == -1
        assert ids[2] in (1, 2)
        assert ids[3] == 1
    many = draw(logits[2].expand(400, 3), seeds=torch.arange(400))
    assert many.unique().tolist() == [1, 2]


def test_a_masked_token_is_never_drawn() -> None:
    logits = torch.tensor([0.0, -math.inf, 0.0, -math.inf]).expand(2000, 4)
    for top_k, top_p in itertools.product((0, 3), (1.0, 0.99)):
        assert draw(logits, seeds=torch.arange(2000), top_k=top_k, top_p=top_p).unique().tolist() == [0, 2]


def test_knobs_go_by_context_and_by_row() -> None:
    torch.manual_seed(2)
    sizes, rows = (5, 9), 6
    logits, seeds = torch.randn(rows, 14), torch.arange(rows)
    temperature = torch.rand(rows, 2) + 0.5
    top_k = torch.tensor([[2, 0]]).expand(rows, 2)
    got = draw(logits, sizes, seeds=seeds, temperature=temperature, top_k=top_k, top_p=[0.5, 1.0])
    for row, context in itertools.product(range(rows), range(2)):
        single = draw(
            logits[row : row + 1],
            sizes,
            seeds=seeds[row : row + 1],
            temperature=temperature[row, context].item(),
            top_k=(2, 0)[context],
            top_p=(0.5, 1.0)[context],
        )
        assert single[0, context] == got[row, context]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_strides_do_not_change_the_draw(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    logits = torch.randn(8, 24).to(dtype)
    expected = draw(logits.float(), (10, 14), seeds=torch.arange(8), top_p=0.9)
    wide = torch.zeros(16, 48, dtype=dtype)
    wide[::2, ::2] = logits
    for view in (logits, wide[::2, ::2], logits.T.contiguous().T):
        assert torch.equal(draw(view, (10, 14), seeds=torch.arange(8), top_p=0.9), expected)
    one = draw(logits[:1].expand(8, -1), (10, 14), seeds=torch.zeros(8, dtype=torch.int64), top_p=0.9)
    assert torch.equal(one, expected[:1].expand(8, -1))


def test_empty_batches_single_symbols_and_tiny_temperatures() -> None:
    assert draw(torch.empty(0, 12), (5, 7), seeds=torch.empty(0, dtype=torch.int64)).shape == (0, 2)
    assert draw(torch.randn(3, 2), (1, 1), seeds=torch.arange(3), top_k=5, top_p=0.1).eq(0).all()
    cold = draw(torch.tensor([[-5.0, -3.0, -4.0], [5.0, 3.0, 9.0]]), seeds=1, temperature=1e-42)
    assert cold.flatten().tolist() == [1, 2]


def test_logits_that_require_grad_are_drawn_from_like_any_other() -> None:
    logits = torch.randn(4, 9)
    drawn = draw(logits.clone().requires_grad_(), seeds=torch.arange(4))
    assert not drawn.requires_grad
    assert torch.equal(drawn, draw(logits, seeds=torch.arange(4)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -1.0}, "temperature must be finite and >= 0, got -1.0"),
        ({"temperature": math.nan}, "temperature must be finite and >= 0, got nan"),
        ({"temperature": torch.tensor([1.0, -2.0])}, "temperature must be finite and >= 0 everywhere"),
        ({"top_k": -1}, "top_k must be an integer >= 0"),
        ({"top_k": 2.5}, "top_k must be an integer >= 0"),
        ({"temperature": None}, "temperature must be a number, a sequence or a tensor, finite and >= 0, got None"),
        ({"temperature": "ab"}, "temperature must be finite and >= 0, got 'a'"),
        ({"temperature": True}, "temperature must be finite and >= 0, got True"),
        ({"temperature": torch.ones(2, dtype=torch.complex64)}, "temperature must be .* torch.complex64"),
        ({"top_p": torch.tensor([0.5, 1.5])}, r"top_p must be in \(0, 1\] \(1 = off\) everywhere"),
        ({"min_p": torch.tensor([0.5, 1.5])}, r"min_p must be in \[0, 1\] \(0 = off\) everywhere"),
        ({"top_k": 2**63}, "top_k must be an integer >= 0"),
        ({"top_k": torch.tensor([0.5, 1.0])}, "top_k must be an integer >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": [0.5, 1.5]}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 1.5}, r"min_p must be in \[0, 1\]"),
        ({"min_p": [0.1]}, "min_p must have one value per context"),
        ({"top_p": torch.ones(3)}, r"top_p must have shape \(2,\) or \(4, 2\), got \(3,\)"),
        ({"seeds": torch.arange(3)}, "seeds must have shape"),
        ({"seeds": torch.zeros(4)}, "seeds must be int64"),
        ({"seeds": 2**63}, "seeds must be an integer or an int64 tensor of 64 bits"),
        ({"seeds": None}, "seeds must be an integer or an int64 tensor, got None"),
        ({"step": torch.tensor([1])}, "step must be a 0-d int64 tensor"),
        ({"step": None}, "step must be an integer or a 0-d int64 tensor, got None"),
        ({"step": 1.7}, "step must be an integer or a 0-d int64 tensor, got 1.7"),
        ({"step": 2**63}, "step must be an integer or a 0-d int64 tensor of 64 bits"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.sample_contexts(torch.zeros(4, 12), (5, 7), **({"seeds": 0, "step": 0} | arguments))


def test_bad_logits_and_sizes_are_named() -> None:
    with pytest.raises(ValueError, match=r"vocab_sizes must add up to the width of logits = 12, got \[5, 6\]"):
        draw(torch.zeros(4, 12), (5, 6))
    with pytest.raises(ValueError, match="vocab_sizes must be positive"):
        draw(torch.zeros(4, 12), (12, 0))
    with pytest.raises(TypeError, match="vocab_sizes must be a sequence of integers, got 12"):
        draw(torch.zeros(4, 12), 12)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"vocab_sizes must be integers, got 4\.9"):
        draw(torch.zeros(4, 10), (4.9, 6.2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="logits must be float16"):
        draw(torch.zeros(4, 12, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits must have 2 dimensions"):
        draw(torch.zeros(4, 12, 1), (12,))


def test_a_number_is_checked_though_an_equal_one_was_kept() -> None:
    logits = torch.zeros(2, 9)
    draw(logits, top_k=3)
    with pytest.raises(TypeError, match=r"top_k must be an integer >= 0 \(0 = off\), got 3.0"):
        draw(logits, top_k=3.0)


def test_numbers_of_numpy_are_numbers() -> None:
    logits = torch.randn(4, 12)
    expected = draw(logits, (5, 7), temperature=0.75, top_k=4, top_p=0.5, seeds=3, step=2)
    knobs = {"temperature": np.float32(0.75), "top_k": np.int64(4), "top_p": np.array([0.5, 0.5])}
    sizes = tuple(np.array([5, 7]))
    assert torch.equal(draw(logits, sizes, **knobs, seeds=np.int64(3), step=np.int32(2)), expected)


def test_a_prepared_draw_is_the_same_draw() -> None:
    logits = torch.randn(3, 12)
    knobs = op.prepare_knobs(3, 2, logits.device, temperature=0.7, top_k=4)
    seeds = op.prepare_seeds(9, 3, 2, logits.device)
    prepared = op.draw(logits, (5, 7), knobs, seeds, torch.tensor(2))
    assert torch.equal(prepared, draw(logits, (5, 7), seeds=9, step=2, temperature=0.7, top_k=4))
