"""The line a training run shows while it works: live on a terminal, one line per log interval elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from megactx.console import make_console

_LANE_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red")


def duration(seconds: float) -> str:
    """`3725` -> `1:02:05`, `65` -> `1:05`."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def quantity(value: float) -> str:
    """`48120.0` -> `48.1k`."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def loss_text(value: float | None, digits: int = 4) -> str:
    """`-` for a loss that nothing was measured for: NaN, which is null in a file of metrics."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def ahead_losses(row: dict[str, Any], prefix: str = "") -> dict[int, float | None]:
    """The losses of a row for the targets k = 2..K, by k; none where only the next token is predicted."""
    start = f"{prefix}mtp_loss_"
    return {int(name.removeprefix(start)): value for name, value in row.items() if name.startswith(start)}


class Progress:
    """Prints rows of metrics. Use as a context manager, so that the live line is taken down before an error shows."""

    def __init__(self, max_steps: int, max_seconds: float | None, *, quiet: bool = False) -> None:
        self.console = make_console(quiet=quiet)
        self.max_steps, self.max_seconds = max_steps, max_seconds
        self._started = time.monotonic()
        live = self.console.is_terminal and not quiet
        self._live = Live(console=self.console, refresh_per_second=4, transient=True) if live else None

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        if sys.stdout:  # None where the shell closed it
            sys.stdout.flush()

    def note(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def show(self, row: dict[str, Any]) -> None:
        """One row of training metrics: `step`, `loss`, `losses`, `lr`, `grad_norm`, `ms`, `tokens_per_second`, and
        `mtp_loss_k` with `mtp_weight` where several tokens are predicted."""
        line = self._line(row)
        if self._live:
            self._live.update(line)
        else:
            self.console.print(line, soft_wrap=True)

    def _line(self, row: dict[str, Any]) -> Text:
        """What matters most comes first, so that a narrow terminal's second line holds the rest."""
        line = Text()
        line.append(f"step {row['step']}/{self.max_steps}", style="bold")
        line.append(f" | eta {duration(self._remaining(row))} | ")
        line.append(f"{quantity(row['tokens_per_second'])} tok/s", style="bold")
        line.append(f" | loss {loss_text(row['loss'])} |")
        for index, (name, value) in enumerate(row["losses"].items()):
            line.append(f" {name} ", style="dim").append(loss_text(value, 3), style=_LANE_COLOURS[index % 6])
        ahead = ahead_losses(row)
        if ahead:
            line.append(" | ahead", style="dim")
            for k, value in ahead.items():
                line.append(f" +{k} ", style="dim").append(loss_text(value, 3))
            line.append(f" x {row['mtp_weight']:.3g}")
        line.append(f" | lr {row['lr']:.1e} | norm {row['grad_norm']:.2f} | {row['ms']:.0f} ms")
        return line

    def _remaining(self, row: dict[str, Any]) -> float:
        by_steps = (self.max_steps - row["step"]) * row["ms"] / 1e3
        if self.max_seconds is None:
            return by_steps
        return min(by_steps, self.max_seconds - (time.monotonic() - self._started))

    def evaluation(self, row: dict[str, Any], yardsticks: dict[str, dict[str, float]]) -> None:
        """Losses per context beside the entropies that `prepare` computed, numeric contexts beside their variance, and
        under the table those of the targets further ahead."""
        table = Table(title=f"evaluation at step {row['step']}", title_justify="left", title_style="bold")
        table.add_column("context")
        for name in ("train", "val", "val bits", "unigram", "bigram"):
            table.add_column(name, justify="right")
        for name, value in row["val"].items():
            marks = yardsticks[name]
            numeric = "variance" in marks
            good = marks and value < min(marks.values())
            cells = [f"{marks[mark]:.4f}" if mark in marks else "-" for mark in ("unigram", "bigram")]
            if numeric:
                cells[0] = f"{marks['variance']:.4f} (variance)"
            table.add_row(
                name,
                loss_text(row["train"][name]),
                Text(loss_text(value), style="green" if good else ""),
                "-" if numeric else loss_text(value / math.log(2), 3),
                *cells,
            )
        self.console.print(table)
        ahead = ahead_losses(row, "val_")
        if ahead:
            losses = " ".join(f"+{k} {loss_text(value)}" for k, value in ahead.items())
            self.note(
                f"val ahead: {losses} | with the next token's, at weight {row['mtp_weight']:.3g}: "
                f"{loss_text(row['val_mtp_loss'])}"
            )
