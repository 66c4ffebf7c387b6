"""Losses on fixed batches: sums and counts, added over batches and processes, and divided once at the end.

The mean of the batches' means would weigh a target more where few are valid; this is the mean over all targets, the
same number however many processes share the work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from megactx.data.bundle import Split
from megactx.feed import Batch
from megactx.parallel import Group


def mean_losses(
    forward: Callable[..., Any],
    batches: Iterable[Batch],
    group: Group,
    *,
    copy_targets: bool,
    interrupted: Callable[[], bool],
) -> Tensor | None:
    """Mean losses float64 `[C, K]` over all of `batches` and processes, on the CPU, NaN where there was no target at
    all; None when `interrupted`.

    One forward pass a batch gives all steps of all contexts. The caller has set the model's mode and autocast.
    """
    total: Tensor | None = None
    counts: Tensor | None = None
    for batch in batches:
        if interrupted():
            return None
        here = batch.to(group.device)
        # The "mean" that the model is asked for divides by the batch's positions, known without looking at any.
        positions = here.x.shape[0] * here.x.shape[1]
        divisor = torch.full(batch.counts.shape, float(positions), device=group.device)
        losses = forward(here.x, here.targets(copy=copy_targets), counts=divisor).step_losses.double() * positions
        total = losses if total is None else total + losses
        counts = batch.counts if counts is None else counts + batch.counts
    assert total is not None  # an evaluation has at least one batch
    assert counts is not None
    return group.sum(total.cpu()) / group.sum(counts.clone())


def evaluation_row(
    names: Sequence[str],
    context_weights: Sequence[float],
    losses: Mapping[Split, Sequence[Sequence[float]]],
    mtp_weight: float,
) -> dict[str, Any]:
    """The numbers of an evaluation from its losses `[C][K]` per split.

    `train` and `val`: the next token's loss of each context. `val_loss`: the same as one number, the mean by
    `context_weights`, which is what to compare runs by, however many tokens ahead they were trained on. With K > 1 also
    `val_ntp_loss`, which it is, under the name that it has in training rows, `val_mtp_loss_k` for each k >= 2, and
    `val_mtp_loss`, what training minimises: the former plus `mtp_weight` times the mean of the latter, to which a step
    without any target, whose own loss is NaN, adds nothing.
    """
    row: dict[str, Any] = {
        split: {name: steps[0] for name, steps in zip(names, by_context, strict=True)}
        for split, by_context in losses.items()
    }
    named = named_steps(losses["val"], context_weights)
    row["val_loss"] = named["ntp_loss"]
    if len(named) > 1:
        row |= {f"val_{name}": value for name, value in named.items()}
        ahead = list(named.values())[1:]
        there = sum(loss for loss in ahead if not math.isnan(loss))
        row["val_mtp_loss"] = row["val_loss"] + mtp_weight * there / len(ahead)
        row["mtp_weight"] = mtp_weight
    return row


def named_steps(losses: Sequence[Sequence[float]], context_weights: Sequence[float]) -> dict[str, float]:
    """`ntp_loss` and `mtp_loss_k` for k = 2..K from `[C][K]`: the sums over contexts that the training loss is made of.

    A numeric context has a loss for the next token alone, and adds nothing to the others."""
    names = ["ntp_loss", *(f"mtp_loss_{k}" for k in range(2, len(losses[0]) + 1))]
    columns = zip(*losses, strict=True)
    return {
        name: sum(w * loss for w, loss in zip(context_weights, column, strict=True))
        for name, column in zip(names, columns, strict=True)
    }
