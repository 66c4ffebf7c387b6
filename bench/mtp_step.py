"""What predicting 4 tokens instead of 1 costs a whole training step: forward, backward and AdamW.

    python bench/mtp_step.py [--device auto|cpu|cuda] [--rounds N] [--threads N] [--dtype NAME] [--json FILE]

One GPT of 150 million parameters (16 layers, width 768, 12 heads, tied vocabulary of 50,304) takes steps of 1,024
tokens a row, one row on the CPU and eight on CUDA, with one target a position, with four, and with four in the seed's
form: the logits once, and a cross-entropy for each target.  The three take turns, and the ratio is the median of those
within a round.  bf16 is autocast over float32 weights.  Memory is the most a step holds beyond weights and the
optimizer's state, gradients included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from cases import DTYPES, MEAN_TOLERANCES
from rich.console import Console
from rich.table import Table
from timing import interleave, interleave_cuda, peak_bytes, provenance, save, spread
from torch import Tensor

from megactx.config import ContextConfig, GPTConfig
from megactx.model import GPT
from megactx.optim import build_optimizers

WEIGHT = 0.3  # of the targets behind the first, together
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class StepCase:
    """A model and its batch."""

    batch: int
    dtype: str
    tokens: int = 1024
    layers: int = 16
    width: int = 768
    heads: int = 12
    vocabulary: int = 50304
    steps: int = 4

    @property
    def name(self) -> str:
        batch = f"batch {self.batch} x {self.tokens}"
        return f"{self.layers} layers, d{self.width}, V{self.vocabulary}, {batch}, {self.dtype}"

    @property
    def turns(self) -> tuple[str, str, str]:
        return "K = 1", f"K = {self.steps}", f"K = {self.steps}, seed's form"


CASES = {"cpu": (StepCase(1, "fp32"), StepCase(1, "bf16")), "cuda": (StepCase(8, "bf16"), StepCase(8, "fp32"))}


def build(case: StepCase, device: str) -> tuple[dict[str, Step], int]:
    """The steps by name, all of one model, and the bytes of its weights and of the optimizer's state."""
    torch.manual_seed(0)
    contexts = (ContextConfig("text", vocab_size=case.vocabulary),)
    config = GPTConfig(
        contexts,
        block_size=case.tokens,
        n_layer=case.layers,
        n_head=case.heads,
        n_embd=case.width,
        mtp_steps=case.steps,
    )
    model = GPT(config).to(device)
    model.set_mtp_weight(WEIGHT)
    optimizers = build_optimizers(
        model, kind="adamw", learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95), muon_learning_rate=0.02
    )
    # Every token stands for a while, so that the far targets differ from the near ones in how well they are predicted:
    # a form that takes one for another has another loss.
    drawn = torch.randint(case.vocabulary, (case.batch, -(-case.tokens // case.steps) + 1), device=device)
    stream = drawn.repeat_interleave(case.steps, dim=1)[:, : case.tokens + case.steps]
    x, y = stream[:, : case.tokens], stream[:, 1:].unfold(1, case.steps, 1)

    def ours(steps: int) -> Tensor:
        return model(x, y[:, :, None, :steps]).loss

    def seed() -> Tensor:
        logits = model(x, last_only=False).logits["text"].flatten(0, 1)
        first, *rest = (F.cross_entropy(logits, y[..., k].flatten(), ignore_index=-1) for k in range(case.steps))
        return first + WEIGHT * torch.stack(rest).mean()

    def step(loss_of: Callable[[], Tensor]) -> Step:
        def run() -> Tensor:
            with torch.autocast(device, DTYPES[case.dtype], enabled=case.dtype != "fp32"):
                loss = loss_of()
            loss.backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()
            return loss.detach()

        return run

    losses: list[Callable[[], Tensor]] = [lambda: ours(1), lambda: ours(case.steps), seed]
    check(case, device, *losses[1:])
    turns = {name: step(loss_of) for name, loss_of in zip(case.turns, losses, strict=True)}
    turns[case.turns[0]]()  # makes the optimizer's state
    state = [x for optimizer in optimizers.values() for found in optimizer.state.values() for x in found.values()]
    held = sum(x.numel() * x.element_size() for x in [*model.parameters(), *state])
    return turns, held


def check(case: StepCase, device: str, *losses: Callable[[], Tensor]) -> None:
    """Both forms must agree before they are timed."""
    with torch.no_grad(), torch.autocast(device, DTYPES[case.dtype], enabled=case.dtype != "fp32"):
        ours, seed = (float(loss()) for loss in losses)
    if not abs(ours - seed) <= MEAN_TOLERANCES[case.dtype] * seed:
        raise SystemExit(f"{case.name}: the losses {ours} and {seed} of the two forms are not the same")


def measure(case: StepCase, device: str, rounds: int) -> dict[str, Any]:
    turns, held = build(case, device)
    peaks = {name: peak_bytes(run, device) for name, run in turns.items()}
    seconds = interleave_cuda(turns, rounds) if device == "cuda" else interleave(turns, rounds, warmup=0)
    return {
        "case": {"name": case.name, **asdict(case)},
        "held_bytes": held,
        "peak_bytes": peaks,
        "seconds": seconds,
        "ratios": {name: median(a / b for a, b in zip(seconds[name], seconds["K = 1"], strict=True)) for name in turns},
    }


def show(result: dict[str, Any]) -> Table:
    head = ["ms", "p20", "p80", "of K = 1", "peak MB", "of K = 1", "with weights and state"]
    table = Table(result["case"]["name"], *head, box=None)
    held, peaks = result["held_bytes"], result["peak_bytes"]
    for name, seconds in result["seconds"].items():
        marks = spread(seconds)
        cells = [f"{marks[key]:,.0f}" for key in ("median_ms", "p20_ms", "p80_ms")] + [f"{result['ratios'][name]:.3f}x"]
        if None not in peaks.values():
            own, first = peaks[name], peaks["K = 1"]
            cells += [f"{1e-6 * own:,.0f}", f"{own / first:.3f}x", f"{(own + held) / (first + held):.3f}x"]
        table.add_row(name, *cells)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rounds", type=int, help="default: 5 on the CPU, 20 on CUDA")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: both")
    parser.add_argument("--json", help="also write every round, and where it ran, to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    where = provenance(device)
    results = []
    for case in CASES[device]:
        if args.dtype in (None, case.dtype):
            print(f"{case.name} ...", file=sys.stderr)
            results.append(measure(case, device, args.rounds or (20 if device == "cuda" else 5)))
            Console(width=160).print(show(results[-1]))
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}")
    if args.json:
        save(args.json, "mtp_step", where, results)


if __name__ == "__main__":
    main()
