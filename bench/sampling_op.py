"""Times `sample_contexts` on this CPU: C++, the reference, and the loop one writes without it, eager and compiled.

    python bench/sampling_op.py [--rounds 15] [--threads N] [--case NAME] [--json FILE]

The loop is the usual one, for each context: divide by the temperature, `topk`, softmax, sort and cut for top-p,
`multinomial`. Its compiled form is the same function under `torch.compile`. All providers of a case are timed in
turns, so that a slow moment of the machine hits each of them, and the median of the rounds is shown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from timing import interleave, provenance, repeats, save
from torch import Tensor

from megactx import kernels


@dataclass(frozen=True)
class Case:
    name: str
    rows: int
    vocab_sizes: tuple[int, ...]
    top_k: int = 0
    top_p: float = 1.0
    spread: float = 2.0  # standard deviation of the logits: 2 gives the entropy of a half-trained model


CASES = (
    Case("3 x 50257, top-k 20", 1, (50257,) * 3, top_k=20),
    Case("3 x 50257, no filter", 1, (50257,) * 3),
    Case("3 x 50257, top-p 0.9", 1, (50257,) * 3, top_p=0.9),
    Case("8 rows, 8 x 50304, top-k 50, top-p 0.95", 8, (50304,) * 8, top_k=50, top_p=0.95),
    Case("1 x 262144, no filter", 1, (262144,)),
    Case("64 x 256, top-k 20", 1, (256,) * 64, top_k=20),
    Case("1 x 256, top-k 20", 1, (256,), top_k=20),
    Case("256 + 12 + 17, no filter", 1, (256, 12, 17)),
)


def loop(logits: Tensor, vocab_sizes: tuple[int, ...], top_k: int, top_p: float) -> Tensor:
    """What a sampler without the operator does, one context after the other."""
    drawn = []
    for z in logits.split(vocab_sizes, dim=1):
        z = z / 0.8
        if top_k:
            kth = torch.topk(z, min(top_k, z.shape[1])).values[:, -1:]
            z = z.masked_fill(z < kth, -torch.inf)
        p = torch.softmax(z, dim=-1)
        if top_p < 1:
            p, order = p.sort(dim=-1, descending=True)
            p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0.0)
            drawn.append(order.gather(1, torch.multinomial(p, 1)))
        else:
            drawn.append(torch.multinomial(p, 1))
    return torch.cat(drawn, dim=1)


def providers(case: Case) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(case.rows, sum(case.vocab_sizes), generator=generator) * case.spread
    step = torch.tensor(0)
    compiled_loop = torch.compile(loop, dynamic=False)

    def operator() -> Tensor:  # C++ where it was built
        return kernels.sample_contexts(
            logits, case.vocab_sizes, temperature=0.8, top_k=case.top_k, top_p=case.top_p, seeds=1, step=step
        )

    def reference() -> Tensor:
        with kernels.use_backend("reference"):
            return operator()

    found = {
        "C++": operator,
        "reference": reference,
        "eager loop": lambda: loop(logits, case.vocab_sizes, case.top_k, case.top_p),
        "compiled loop": lambda: compiled_loop(logits, case.vocab_sizes, case.top_k, case.top_p),
    }
    if kernels.backends()["sample_contexts"]["cpp"] != "live":
        del found["C++"]
    else:
        assert torch.equal(operator(), reference()), "the backends draw different ids"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--case", default="", help="only the cases whose name holds this text")
    parser.add_argument("--json", help="also write every round, and where it ran, to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = provenance()

    names = ["C++", "reference", "eager loop", "compiled loop"]
    table = Table("case (microseconds a call)", *names, "C++ against eager", "against compiled", box=None)
    results = []
    for case in (case for case in CASES if args.case in case.name):
        calls = providers(case)
        seconds = interleave(calls, args.rounds, calls={name: repeats(call) for name, call in calls.items()})
        medians = {name: median(values) for name, values in seconds.items()}
        ratios = [f"{medians[name] / medians['C++']:.1f}x" if "C++" in medians else "" for name in names[2:]]
        table.add_row(case.name, *(f"{medians[n] * 1e6:,.1f}" if n in medians else "not built" for n in names), *ratios)
        results.append({"case": asdict(case), "seconds": seconds})
        print(f"timed {case.name}", file=sys.stderr)
    Console(width=160).print(table)
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}, median of {args.rounds} rounds")
    if args.json:
        save(args.json, "sampling_op", where, results)


if __name__ == "__main__":
    main()
