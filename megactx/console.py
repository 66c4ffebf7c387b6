"""The terminal as every command sees it."""

from __future__ import annotations

import rich.console

PIPE_WIDTH = 140  # where there is no terminal: wide enough that no table is cut


class Console(rich.console.Console):
    """rich's console, but a reader that has gone away (`| head`) is a BrokenPipeError, not the end of the process:
    whoever has work to save gets the chance to."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console(*, quiet: bool = False) -> Console:
    console = Console(highlight=False, quiet=quiet)
    return console if console.is_terminal else Console(highlight=False, quiet=quiet, width=PIPE_WIDTH)
