"""The sizes at which the cross-entropies are measured, what they ask for, and their truth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from cases import DTYPES
from torch import Tensor

from megactx import kernels

AUXILIARY = 0.3  # the weight that the targets behind the first share, as MTP training has it
BLOCK = 2**24  # logits at a time in float64
EXPECTED = 4.0  # standard deviations of a logit

# What a provider that is only a yardstick computes instead (`Provider.plain`).
PRODUCTS = "the matrix products alone"
ONE_TARGET = "the first target alone"


@dataclass(frozen=True)
class MTPCase:
    """Mean cross-entropy of `rows` positions against their next `steps` tokens, in each context.

    With a `width` the logits are hidden [rows, width] times weight [sum of vocab_sizes, width], and the gradients that
    are asked for are theirs; without, the logits are given.
    """

    rows: int
    vocab_sizes: tuple[int, ...]
    width: int | None = None
    steps: int = 1
    dtype: str = "fp32"
    backward: bool = True
    graph: bool = False
    alone: bool = False  # on the CPU each provider's memory is measured in a process of its own

    @property
    def name(self) -> str:
        sizes = "+".join(map(str, self.vocab_sizes))
        shape = f"N{self.rows} V{sizes} " + (f"d{self.width} " if self.width else "")
        words = f"K{self.steps} {self.dtype} {'fwd+bwd' if self.backward else 'fwd'}"
        return ("" if self.width else "logits ") + shape + words

    @property
    def bytes(self) -> int:
        """Inputs once, the loss, and with a backward the gradients; given logits are read again by the backward.

        Logits that are computed need not be in memory, and since the loss is a mean their gradients can be made in the
        same pass.
        """
        item, vocabulary = DTYPES[self.dtype].itemsize, sum(self.vocab_sizes)
        tokens = 8 * (self.rows + self.steps - 1) * len(self.vocab_sizes)
        small = tokens + 4 * self.steps + 4  # and the weights of the steps and the loss
        if self.width:
            return item * (self.rows + vocabulary) * self.width * (2 if self.backward else 1) + small
        return item * self.rows * vocabulary * (3 if self.backward else 1) + small * (2 if self.backward else 1)

    @property
    def flops(self) -> int:
        """The matrix products where there are any: one, or three.  Over given logits four operations an element.

        Those are a maximum, a difference, an exponential and a sum; backward another three: a difference, an
        exponential and a product.
        """
        logits = self.rows * sum(self.vocab_sizes)
        if self.width:
            return 2 * logits * self.width * (3 if self.backward else 1)
        return logits * (7 if self.backward else 4)

    @property
    def step_weights(self) -> tuple[float, ...]:
        return (1.0, *(AUXILIARY / (self.steps - 1) for _ in range(self.steps - 1)))

    @property
    def leaves(self) -> tuple[str, ...]:
        """The inputs whose gradients are asked for."""
        return ("hidden", "weight") if self.width else ("logits",)

    def inputs(self, device: str) -> dict[str, Tensor]:
        """Logits of a standard deviation of 1, and tokens [rows + steps - 1, C], of which `targets` is a view.

        Half of the rows expect their first target, a quarter their second, and so on: no step has the mean of another,
        so that who takes one for another is found out.
        """
        dtype, vocabulary = DTYPES[self.dtype], sum(self.vocab_sizes)

        def x(rows: int, columns: int) -> Tensor:
            return torch.randn(rows, columns, device=device, dtype=dtype)

        if self.width:
            made = {"hidden": x(self.rows, self.width), "weight": x(vocabulary, self.width).div_(self.width**0.5)}
        else:
            made = {"logits": x(self.rows, vocabulary)}
        length = self.rows + self.steps - 1
        made["tokens"] = torch.stack([torch.randint(v, (length,), device=device) for v in self.vocab_sizes], dim=1)
        made["step_weights"] = torch.tensor(self.step_weights, device=device)
        self._expect(made)
        return made

    def _expect(self, made: dict[str, Tensor]) -> None:
        """Raises the logit of a target by about `EXPECTED`, of step k + 1 in one row of 2^(k + 1)."""
        for index, part, _ in self.segments():
            context = made["tokens"][:, index] + part.start
            for k in range(self.steps):
                rows = torch.arange(2**k - 1, self.rows, 2 ** (k + 1), device=context.device)
                symbols = context[rows + k]
                if self.width:
                    made["hidden"][rows] += EXPECTED * made["weight"][symbols]
                else:
                    made["logits"][rows, symbols] += EXPECTED

    def targets(self, inputs: dict[str, Tensor]) -> Tensor:
        """[N, C, K]: entry k of row n is token n + k, in memory once."""
        return inputs["tokens"].unfold(0, self.steps, 1)

    def segments(self) -> Iterator[tuple[int, slice, float]]:
        """The number of each context, its place in the packed vocabulary, and its weight."""
        start = 0
        for index, size in enumerate(self.vocab_sizes):
            yield index, slice(start, start + size), 1 / len(self.vocab_sizes)
            start += size

    def truth(self, inputs: dict[str, Tensor], plain: str = "") -> tuple[Tensor, ...]:
        """The loss and the gradients, some rows at a time: no entry is ignored, so that the mean is the sum over N."""
        leaves = [inputs[name].detach().double().requires_grad_(self.backward) for name in self.leaves]
        if plain == PRODUCTS:
            return self._products(*(x.detach() for x in leaves))
        steps = 1 if plain == ONE_TARGET else self.steps
        targets, weights = self.targets(inputs)[..., :steps], inputs["step_weights"][:steps]
        first, *rest = leaves
        operator = kernels.linear_mtp_cross_entropy if self.width else kernels.mtp_cross_entropy
        total = torch.zeros((), dtype=torch.float64, device=first.device)
        block = max(1, BLOCK // sum(self.vocab_sizes))
        for rows in (slice(start, start + block) for start in range(0, self.rows, block)):
            with kernels.use_backend("reference"):
                options = {"vocab_sizes": self.vocab_sizes, "step_weights": weights, "reduction": "sum"}
                loss = operator(first[rows], *rest, targets[rows], **options).loss / self.rows  # type: ignore[arg-type]
            total += loss.detach()
            if self.backward:
                loss.backward()
        return total, *(x.grad for x in leaves if x.grad is not None)

    def _products(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """What `providers` multiplies for a floor: the logits stand in for their own gradient."""
        if not self.backward:
            return (hidden @ weight[::64].T,)
        return hidden @ (weight.T @ weight), weight @ (hidden.T @ hidden)


_SMALL = (
    MTPCase(4096, (256,), 128, steps=1),
    MTPCase(4096, (256,), 128, steps=4),
    MTPCase(4096, (256, 12, 17), 128, steps=4),
)
MTP = {
    "cpu": (
        *(MTPCase(2048, (50304,), 768, steps, alone=True) for steps in (1, 2, 4)),
        *(MTPCase(2048, (50304,), 768, steps, "bf16") for steps in (1, 4)),
        *(MTPCase(2048, (50304,), 768, steps, backward=False) for steps in (1, 4)),
        *_SMALL,
        *(MTPCase(512, (50304,), None, steps, dtype) for dtype in ("fp32", "bf16") for steps in (1, 4)),
    ),
    "cuda": (
        *(MTPCase(16384, (50304,), 768, steps, "bf16") for steps in (1, 4)),
        *(MTPCase(16384, (50304,), 768, steps, "bf16", backward=False) for steps in (1, 4)),
        *_SMALL,
        *(MTPCase(16384, (50304,), None, steps, "bf16") for steps in (1, 4)),
        MTPCase(16, (50304,), None, 4, "bf16", graph=True),
    ),
}
