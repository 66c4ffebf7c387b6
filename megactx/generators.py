"""The random generators that dropout draws from: their states, in a checkpoint and out of one.

A rank has its own, or all would drop the same places of different batches. Rank 0's bear plain names in a checkpoint,
so that one process reads what one wrote.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megactx.parallel import Group

PREFIX = "rng/"  # of their names in a checkpoint


class Generators:
    """Those of this process: the CPU's, and on a GPU that one's too."""

    def __init__(self, group: Group, seed: int) -> None:
        self.group, self.seed = group, seed
        self.device = group.device

    def states(self) -> dict[str, Tensor]:
        found = {"rng/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            found["rng/cuda"] = torch.cuda.get_rng_state(self.device)
        return found

    def gather(self, states: dict[str, Tensor]) -> dict[str, Tensor]:
        """The `states` of all processes, by their names in a checkpoint."""
        found: dict[str, Tensor] = {}
        for name, state in states.items():
            found |= {_name(name, rank): value for rank, value in enumerate(self.group.collect(state))}
        return found

    def restore(self, saved: dict[str, Tensor], step: int) -> None:
        """This rank's, as they were; a rank that the checkpoint does not know gets its own new ones."""
        self.part(step)
        cpu, cuda = (saved.get(_name(name, self.group.rank)) for name in ("rng/cpu", "rng/cuda"))
        if cpu is not None:
            torch.set_rng_state(cpu)
        if cuda is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda, self.device)

    def part(self, step: int) -> None:
        """Sets every rank but 0 on a way of its own. Until then they are alike, and so are the weights they draw."""
        if self.group.rank > 0:
            text = f"{self.seed} {step} {self.group.rank}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1)


def _name(name: str, rank: int) -> str:
    return name if rank == 0 else f"{name}/{rank}"
