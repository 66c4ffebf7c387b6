"""Sampling speed: positions per second of `megactx.generate` against the loop it replaces.

    python bench/sampling.py [--rounds 5] [--threads N] [--json FILE]

The loop it replaces is written out below as such systems have it: no cache, every head over all positions, and per
context a division, a top-k, a softmax, a multinomial and a concatenation. Both draw with temperature 0.8 and top-k 20
from 4 layers of width 128 and a window of 256, a prompt of 4 and 256 new positions, float32 on the CPU. Rounds of all
cases alternate, so that a change of the machine's mood meets all alike; the table shows medians over rounds. The old
loop is timed at evenly spaced lengths of the window, `--naive_lengths` of them a round, and averaged.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from timing import interleave, provenance, save
from torch import Tensor, nn

from megactx.config import ContextConfig, GPTConfig
from megactx.generate import generate
from megactx.model import GPT

CASES = {
    "1 context": (76,),
    "3 contexts": (76, 3, 6),
    "8 contexts": (76, 3, 6, 5, 64, 12, 256, 256),
    "3 x 50,257": (50257,) * 3,
}
LAYERS, HEADS, WIDTH, WINDOW, PROMPT, POSITIONS = 4, 4, 128, 256, 4, 256
TEMPERATURE, TOP_K = 0.8, 20


class NaiveNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(2, dim=-1, keepdim=True) * WIDTH**0.5 * self.gain


class NaiveBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = NaiveNorm(), NaiveNorm()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class NaiveModel(nn.Module):
    """One table and one tied head per context, learned positions."""

    def __init__(self, vocab_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(size, WIDTH) for size in vocab_sizes)
        self.positions = nn.Embedding(WINDOW, WIDTH)
        self.blocks = nn.ModuleList(NaiveBlock() for _ in range(LAYERS))
        self.norm = NaiveNorm()

    def forward(self, streams: list[Tensor]) -> list[Tensor]:
        x = sum(table(tokens) for table, tokens in zip(self.tables, streams, strict=True))
        x = x + self.positions(torch.arange(streams[0].shape[1]))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return [F.linear(x, table.weight)[:, [-1]] for table in self.tables]


@torch.no_grad()
def naive_step(model: NaiveModel, streams: list[Tensor]) -> list[Tensor]:
    """One position of the old loop."""
    cropped = [tokens[:, -WINDOW:] for tokens in streams]
    out = []
    for tokens, logits in zip(streams, model(cropped), strict=True):
        scaled = logits[:, -1] / TEMPERATURE
        kept, _ = torch.topk(scaled, min(TOP_K, scaled.shape[-1]))
        scaled[scaled < kept[:, [-1]]] = -torch.inf
        drawn = torch.multinomial(scaled.softmax(-1), 1)
        out.append(torch.cat((tokens, drawn), dim=1))
    return out


def naive_run(vocab_sizes: tuple[int, ...], lengths: int) -> Callable[[], None]:
    """One position of the old loop at each of `lengths` lengths, spread evenly over the window."""
    model = NaiveModel(vocab_sizes).eval()
    at = [PROMPT + (2 * i + 1) * (WINDOW - PROMPT) // (2 * lengths) for i in range(lengths)]
    histories = [[torch.randint(size, (1, length)) for size in vocab_sizes] for length in at]

    def run() -> None:
        for streams in histories:
            naive_step(model, streams)

    return run


def cached_run(vocab_sizes: tuple[int, ...]) -> Callable[[], None]:
    """One whole sample, its set-up and its prefills included."""
    contexts = tuple(ContextConfig(f"c{i}", vocab_size=size) for i, size in enumerate(vocab_sizes))
    config = GPTConfig(contexts, block_size=WINDOW, n_layer=LAYERS, n_head=HEADS, n_embd=WIDTH)
    model = GPT(config).eval()
    prompt = torch.zeros(1, PROMPT, len(contexts), dtype=torch.int64)

    def run() -> None:
        for _ in generate(model, prompt, POSITIONS, temperature=TEMPERATURE, top_k=TOP_K, seeds=1):
            pass

    return run


def measure(rounds: int, lengths: int) -> list[dict[str, Any]]:
    """Per case the microseconds a position takes, cached and in the old loop, and what follows from their medians."""
    torch.manual_seed(0)
    runs = {}
    for name, sizes in CASES.items():
        runs[f"{name}, cached"] = cached_run(sizes)
        runs[f"{name}, old loop"] = naive_run(sizes, lengths)
    seconds = interleave(runs, rounds)
    results: list[dict[str, Any]] = []
    for name, sizes in CASES.items():
        cached = [1e6 * t / POSITIONS for t in seconds[f"{name}, cached"]]
        naive = [1e6 * t / lengths for t in seconds[f"{name}, old loop"]]
        results.append(
            {
                "case": name,
                "vocab_sizes": sizes,
                "cached_us": median(cached),
                "cached_best_us": min(cached),
                "positions_per_second": 1e6 / median(cached),
                "old_loop_us": median(naive),
                "old_loop_positions_per_second": 1e6 / median(naive),
                "speedup": median(naive) / median(cached),
                "over_single": median(cached) / (results[0]["cached_us"] if results else median(cached)),
                "rounds_us": {"cached": cached, "old_loop": naive},
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default: 5)")
    parser.add_argument("--naive_lengths", type=int, default=12, help="lengths the old loop is timed at (default: 12)")
    parser.add_argument("--threads", type=int, help="CPU threads of both (default: torch's)")
    parser.add_argument("--json", metavar="FILE", help="write all timings and where they come from")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = provenance()
    print(f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, load {facts['load']:.1f}")
    results = measure(args.rounds, args.naive_lengths)
    print(f"{'':12}  cached us    best    pos/s  old loop us   pos/s  speed-up  /single")
    for row in results:
        print(
            f"{row['case']:12}{row['cached_us']:11.0f}{row['cached_best_us']:8.0f}{row['positions_per_second']:9.0f}"
            f"{row['old_loop_us']:13.0f}{row['old_loop_positions_per_second']:8.0f}{row['speedup']:9.1f}x"
            f"{row['over_single']:9.3f}"
        )
    if args.json:
        save(args.json, "sampling", facts, results)


if __name__ == "__main__":
    main()
