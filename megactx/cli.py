"""The `megactx` command: one table of subcommands, each imported only when it is asked for.

Flags follow the nanoGPT family: underscores are canonical, hyphens are accepted, `--key value` and `--key=value` mean
the same. Whatever a user can get wrong ends in one line on stderr and exit code 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
import warnings
from typing import NoReturn

from megactx import __version__
from megactx.errors import MegactxError, ProcessGroupError

COMMANDS = {
    "prepare": ("megactx.prepare", "turn text, code, CSV columns or existing folders into an aligned dataset bundle"),
    "train": ("megactx.train", "train a multi-context GPT on a bundle; resumes by itself"),
    "sample": ("megactx.sample", "continue a prompt in all contexts of a trained model"),
    "inspect": ("megactx.inspect", "show what a bundle holds and check that it is whole"),
    "report": ("megactx.report", "redraw the report of a run: losses.png and report.html"),
    "doctor": ("megactx.doctor", "versions, devices, and which backends are live for which operator"),
}

OVERVIEW = """\
Train and sample small GPTs that read several aligned token streams at once.

commands:
{commands}

the usual order:
  megactx prepare --source python-stdlib --contexts kind depth column --out_dir data/stdlib
  megactx train   --dataset data/stdlib --out_dir runs/first
  megactx sample  --out_dir runs/first --start "def "

`megactx COMMAND --help` explains a command. Every command takes --debug (show tracebacks)."""


class Parser(argparse.ArgumentParser):
    """argparse that raises our error instead of printing its own, and names the nearest flag for an unknown one."""

    def error(self, message: str) -> NoReturn:
        raise MegactxError(message)

    def parse_strictly(self, arguments: list[str]) -> argparse.Namespace:
        args, rest = self.parse_known_args([_underscored(a) for a in arguments])
        if rest:
            flag = rest[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            self.error(f"unknown argument {flag!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
        return args


def _underscored(argument: str) -> str:
    """`--batch-size=8` -> `--batch_size=8`; a value is never touched."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def build_parser(command: str) -> Parser:
    module = importlib.import_module(COMMANDS[command][0])
    parser = Parser(
        prog=f"megactx {command}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=module.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 2 for bad input, 128 + N when signal N stopped a training run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = _one_line_warning  # a warning is for the user too: a line, not a source location
    debug = "--debug" in arguments
    try:
        return _dispatch(arguments)
    except ProcessGroupError as failure:  # before this block ends: see there
        _end_at_once(failure, debug)
    except (Exception, KeyboardInterrupt) as error:
        if debug and _exit_code(error) == 2:
            raise
        return _report(error)


def _exit_code(error: BaseException) -> int:
    return 0 if isinstance(error, BrokenPipeError) else 130 if isinstance(error, KeyboardInterrupt) else 2


def _report(error: BaseException, prefix: str = "") -> int:
    """Says what is wrong; returns the exit code."""
    if isinstance(error, BrokenPipeError):  # `megactx ... | head`: nobody reads on, and flushing must not complain
        if sys.__stdout__ is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
    elif isinstance(error, KeyboardInterrupt):
        print(f"{prefix}interrupted", file=sys.stderr)
    elif isinstance(error, Exception):
        print(f"error: {prefix}{_describe(error)}", file=sys.stderr)
    return _exit_code(error)


def _end_at_once(failure: ProcessGroupError, debug: bool) -> NoReturn:
    """Ends one of several processes without cleaning up. Its connections close, and the others hear of that."""
    code = _exit_code(failure.error)
    try:
        if debug and code == 2:
            traceback.print_exception(failure.error)
        else:
            _report(failure.error, f"rank {failure.rank}: " if failure.rank else "")
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    finally:
        os._exit(code)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        rows = "\n".join(f"  {name:<9}{text}" for name, (_, text) in COMMANDS.items())
        print("usage: megactx COMMAND [flags]\n\n" + OVERVIEW.format(commands=rows), flush=True)
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        print(f"megactx {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        raise MegactxError(f"unknown command {arguments[0]!r}" + (f" (did you mean {near[0]!r}?)" if near else ""))
    args = build_parser(arguments[0]).parse_strictly(arguments[1:])
    return args.run(args) or 0


def _describe(error: Exception) -> str:
    """One line. What we did not foresee keeps its type, and says how to see more."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    if isinstance(error, ValueError):  # MegactxError and the errors of bad arguments
        return text
    return f"{type(error).__name__}: {text[:300]} (unexpected; --debug shows where)"


def _one_line_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
