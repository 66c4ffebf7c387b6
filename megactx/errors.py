"""The exceptions that the command line knows: one line of text, an exit code, no traceback."""

from __future__ import annotations


class MegactxError(ValueError):
    """Bad input to a command: the message names the argument or file, what was expected and what was found."""


class ProcessGroupError(Exception):
    """`error` ended one of several processes that work together. Whoever catches this reports it and ends the process
    at once (`os._exit`), while this exception still lives: what its traceback holds must not be freed."""

    def __init__(self, error: BaseException, rank: int) -> None:
        super().__init__(str(error))
        self.error, self.rank = error, rank
