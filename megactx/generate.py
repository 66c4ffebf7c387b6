"""Generation: positions of all contexts, one after the other, cached and exact.

**The window.** A model reads at most `block_size` positions. The window starts at the prompt's first token and grows;
when one more token would not fit, it jumps so that the last `block_size // 2` tokens remain, counted from position 0
again, and the cache is rebuilt from them by one prefill. That costs one prefill per half window instead of one per
token, and it is a rule about tokens, not about caches: `generate(cached=False)` follows it with plain forward passes,
and both give the same tokens.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megactx.decoder import Decoder, kept_tokens
from megactx.kernels.sampling.op import draw, prepare_knobs, prepare_seeds
from megactx.model import GPT

__all__ = ["Decoder", "generate", "kept_tokens", "row_seeds"]

Knob = float | Sequence[float] | Tensor


def row_seeds(seed: int, rows: int) -> Tensor:
    """One independent 64-bit seed a row, int64 `[rows]`: row i depends on `seed` and i alone, whatever the batch."""
    words = [np.random.SeedSequence(seed % 2**64, spawn_key=(row,)).generate_state(1, np.uint64) for row in range(rows)]
    return torch.from_numpy(np.concatenate(words).view(np.int64)) if rows else torch.zeros(0, dtype=torch.int64)


def generate(
    model: GPT,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: Knob = 1.0,
    top_k: Knob = 0,
    top_p: Knob = 1.0,
    min_p: Knob = 0.0,
    seeds: int | Sequence[int] | Tensor = 0,
    cached: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """Yield the next symbols of all contexts, int64 `[B, C]` a position in the config's order, `max_new_tokens` times.

    `prompt` integer `[B, P, C]`, 1 <= P <= block_size. The knobs are those of `megactx.kernels.sample_contexts`: one
    value for all contexts, or one per context (those of numeric contexts are not used: they give the rounded
    prediction, clamped to the recorded range). `seeds`: one integer, from which every row derives its own, or one per
    row. What a row draws depends on its own tokens and seed alone, never on the rest of the batch.

    A context whose outputs are not finite yields -1, and the row goes on as if that were symbol 0: the other rows of
    the batch need not end with it. Autocast is off in here, as it would make a cache and a fresh pass disagree.

    `cached=False` runs the model itself over the whole window each time: slow, the specification. ValueError or
    TypeError: a prompt that is empty, longer than the window, or holds an id outside its vocabulary; a knob or a seed
    of the wrong kind.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, got {max_new_tokens}")
    tokens = model.pack(prompt).clone()  # read when the first symbol is asked for: the caller may reuse the prompt
    rows, length, _ = tokens.shape
    if rows < 1:
        raise ValueError("prompt must hold at least one row, got B = 0")
    if not 1 <= length <= model.config.block_size:
        raise ValueError(f"prompt must hold 1 to block_size = {model.config.block_size} positions, got {length}")
    model.check_ids(tokens, "prompt")
    knobs = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    symbols = _Draw(model, rows, knobs, seeds)
    if cached:
        return _cached(model, tokens, max_new_tokens, symbols, dtype)
    return _uncached(model, tokens, max_new_tokens, symbols)


def _cached(model: GPT, tokens: Tensor, count: int, symbols: _Draw, dtype: torch.dtype) -> Iterator[Tensor]:
    decoder = Decoder(model, tokens.shape[0], dtype=dtype)
    for step in range(count):
        outputs = decoder.step(tokens) if step else decoder.prefill(tokens)
        drawn = symbols(*outputs)
        tokens = drawn.relu()  # -1 is read as 0; and a tensor of our own: what is yielded is the caller's to change
        yield drawn


def _uncached(model: GPT, tokens: Tensor, count: int, symbols: _Draw) -> Iterator[Tensor]:
    config = model.config
    start = 0
    for _ in range(count):
        if tokens.shape[1] - start > config.block_size:
            start = tokens.shape[1] - kept_tokens(config.block_size)
        with torch.inference_mode(), torch.autocast(tokens.device.type, enabled=False), _evaluating(model):
            named = model(tokens[:, start:]).logits
            logits = [named[c.name][:, -1] for c in config.contexts if c.kind == "categorical"]
            scaled = [named[c.name][:, -1] for c in config.contexts if c.kind == "numeric"]
        drawn = symbols(torch.cat(logits, -1) if logits else None, torch.stack(scaled, -1) if scaled else None)
        tokens = torch.cat((tokens, drawn.relu()[:, None]), dim=1)
        yield drawn


@contextlib.contextmanager
def _evaluating(model: GPT) -> Iterator[None]:
    """Evaluation mode, and afterwards every module as it was: parts of a model may be frozen in theirs."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class _Draw:
    """From a position's outputs to its symbols; the knobs are checked and spread once, not once a position."""

    def __init__(self, model: GPT, rows: int, knobs: dict[str, Knob], seeds: int | Sequence[int] | Tensor) -> None:
        self.model = model
        device = model.limits.device
        self.vocab_sizes = model.config.vocab_sizes
        spread: dict[str, Any] = {name: self._spread(name, knob).to(device) for name, knob in knobs.items()}
        contexts = len(self.vocab_sizes)
        self.knobs = prepare_knobs(rows, contexts, device, **spread)
        self.seeds = prepare_seeds(_seeds_of_rows(seeds, rows).to(device), rows, contexts, device)
        self.step = 0
        self.mean, self.std, _ = model.numeric_scales
        self.top = (model.limits.index_select(0, model.numeric_index) - 1).float()
        self.order = torch.cat((model.categorical_index, model.numeric_index)).argsort()

    def _spread(self, name: str, knob: Knob) -> Tensor:
        """One value per categorical context, `[C]`, in the type it was given in: a top_k of 1.5 is not 1."""
        values = torch.as_tensor(knob)
        contexts = len(self.model.config.contexts)
        if values.dim() == 0:
            return values.expand(len(self.vocab_sizes)).contiguous()
        if values.shape != (contexts,):
            raise ValueError(f"{name} must be one value or one per context, [{contexts}], got {list(values.shape)}")
        return values[self.model.categorical]

    def __call__(self, logits: Tensor | None, scaled: Tensor | None) -> Tensor:
        found = []
        if logits is not None:
            # not one tensor advanced in place: the caller may enter or leave inference mode between two symbols
            step = torch.full((), self.step, device=logits.device)
            found.append(draw(logits, self.vocab_sizes, self.knobs, self.seeds, step))
            self.step += 1
        if scaled is not None:
            found.append(_round_to_codes(scaled, self.mean, self.std, self.top))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1).index_select(1, self.order)


def _seeds_of_rows(seeds: int | Sequence[int] | Tensor, rows: int) -> Tensor:
    """int64 `[rows]`: derived from one integer of any type, or one per row as given."""
    if not isinstance(seeds, Sequence) and getattr(seeds, "ndim", 0) == 0:
        try:
            return row_seeds(operator.index(seeds), rows)
        except TypeError:
            raise TypeError(f"seeds must be one integer or one per row, got {seeds!r}") from None
    by_row = torch.as_tensor(seeds)
    if by_row.is_floating_point() or by_row.is_complex():
        raise TypeError(f"seeds must be integers, got {by_row.dtype}")
    if by_row.shape != (rows,):
        raise ValueError(f"seeds must be one integer or one per row, [{rows}], got {list(by_row.shape)}")
    return by_row.long()


def _round_to_codes(values: Tensor, mean: Tensor, std: Tensor, top: Tensor) -> Tensor:
    """Standardised predictions as codes: rounded, and clamped to 0 and `top`, the context's last code. NaN gives -1,
    like a draw from logits that are not finite."""
    return torch.addcmul(mean, values, std).round_().clamp_(torch.zeros_like(top), top).nan_to_num_(-1.0).long()
