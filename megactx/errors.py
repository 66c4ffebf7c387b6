"""The one exception a user can cause from the command line: one line of text, exit code 2, no traceback."""

from __future__ import annotations


class MegactxError(ValueError):
    """Bad input to a command: the message names the argument or file, what was expected and what was found."""
