"""The updates since the last log line, and what is said of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megactx.evaluation import named_steps
from megactx.files import finite


class Window:
    """Rows of `Trainer.update`. Their losses stay on the device until `summary` reads them.

    It travels in the checkpoint, so that a run resumed in mid-interval logs the same average as one that never stopped.
    """

    def __init__(self, rows: Sequence[dict[str, Any]] = ()) -> None:
        self.rows = list(rows)

    @classmethod
    def from_json(cls, rows: Sequence[dict[str, Any]], contexts: int, steps: int) -> Window:
        """The inverse of `to_json`. Rows with another number of steps, of before the setting was changed, are left
        out: no average is over both."""
        found = []
        for row in rows:
            # Older checkpoints have only the next token's.
            losses = row["steps"] if "steps" in row else [[loss] for loss in row["losses"]]
            tensor = torch.tensor([[_number(loss) for loss in line] for line in losses])
            if tensor.shape == (contexts, steps):
                found.append(row | {"loss": torch.tensor(_number(row["loss"])), "steps": tensor})
        return cls(found)

    def to_json(self) -> list[dict[str, Any]]:
        return finite([row | {"loss": row["loss"].item(), "steps": row["steps"].tolist()} for row in self.rows])

    def summary(self, names: Sequence[str], context_weights: Sequence[float], tokens_per_update: int) -> dict[str, Any]:
        """Means over the updates that were applied; `ntp_loss`, `mtp_loss_k` and `mtp_weight` where K > 1.

        Of a loss, over those updates that had a target for it, and NaN where none had. `mtp_weight` is a mean too, so
        that `loss` is close to `ntp_loss + mtp_weight * mean of mtp_loss_k`, and equal to it in a window of one.
        """
        rows = self.rows
        applied = [row for row in rows if row["applied"]] or rows
        seconds = sum(row["seconds"] for row in rows)
        steps = _mean([row["steps"] for row in applied]).tolist()
        found = {
            "loss": _mean([row["loss"] for row in applied]).item(),
            "losses": {name: line[0] for name, line in zip(names, steps, strict=True)},
        }
        if len(steps[0]) > 1:
            found |= named_steps(steps, context_weights)
            found["mtp_weight"] = sum(row["mtp_weight"] for row in applied) / len(applied)
        return found | {
            "lr": rows[-1]["lr"],
            "grad_norm": applied[-1]["norm"],
            "ms": 1e3 * seconds / len(rows),
            "data_ms": 1e3 * sum(row["data_seconds"] for row in rows) / len(rows),
            "tokens_per_second": len(rows) * tokens_per_update / seconds,
        }


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.cpu() for tensor in tensors]).nanmean(0)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
