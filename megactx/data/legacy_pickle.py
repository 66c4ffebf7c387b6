"""The contents of a `meta.pkl`, read without executing anything.

A pickle is a program for a small stack machine, and some of its opcodes import and call whatever they name. This
reader runs the opcodes that build plain containers and scalars, which is all a metadata file needs, and refuses every
other one by its name before anything happens. The standard library's opcode parser, which executes nothing either,
splits the bytes.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megactx.errors import MegactxError

MAX_BYTES = 1 << 28

_MARK = object()
_IGNORED = {"PROTO", "FRAME"}
_LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict, "EMPTY_SET": set,
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "MARK": lambda: _MARK,
}  # fmt: skip
_FROM_MARK: dict[str, Callable[[list[Any]], Any]] = {
    "LIST": list, "TUPLE": tuple, "FROZENSET": frozenset, "DICT": lambda items: dict(_pairs(items)),
}  # fmt: skip
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_STORE = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_FETCH = {"GET", "BINGET", "LONG_BINGET"}
_FILL = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS"}


def read_plain_pickle(path: Path) -> Any:
    """The object in `path`, of dicts, lists, tuples, sets, str, bytes, int, float, bool and None.

    MegactxError names the first opcode of any other kind, or says that the file is damaged.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise MegactxError(
                f"{path} has {path.stat().st_size:,} bytes, more than a metadata file needs ({MAX_BYTES:,})"
            )
        data = path.read_bytes()
    except OSError as error:
        raise MegactxError(f"cannot read {path}: {error.strerror}") from None
    try:
        return parse_plain_pickle(data)
    except MegactxError as error:
        raise MegactxError(f"{path}: {error}") from None


def parse_plain_pickle(data: bytes) -> Any:
    """Like `read_plain_pickle`, from bytes."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name == "STOP":
                (result,) = stack
                return result
            _step(opcode.name, argument, position, stack, memo)
    except MegactxError:
        raise
    except (
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        OverflowError,
        AttributeError,
        MemoryError,
        RecursionError,
    ) as error:
        raise MegactxError(f"damaged pickle ({type(error).__name__})") from None
    raise MegactxError("damaged pickle (no end)")


def _step(name: str, argument: Any, position: int | None, stack: list[Any], memo: dict[int, Any]) -> None:
    if name in _IGNORED:
        return
    if name in _LITERALS:
        stack.append(argument)
    elif name in _EMPTY:
        stack.append(_EMPTY[name]())
    elif name in _FROM_MARK:
        items = _pop_to_mark(stack)
        stack.append(_FROM_MARK[name](items))
    elif name in _TUPLES:
        count = _TUPLES[name]
        if len(stack) < count:
            raise IndexError
        stack[-count:] = [tuple(stack[-count:])]
    elif name in _STORE:
        memo[len(memo) if name == "MEMOIZE" else int(argument)] = stack[-1]
    elif name in _FETCH:
        stack.append(memo[int(argument)])
    elif name in _FILL:
        _fill(name, stack)
    else:
        raise MegactxError(
            f"refused: opcode {name} at byte {position} can run code or load objects; only plain containers, "
            f"strings and numbers are read"
        )


def _fill(name: str, stack: list[Any]) -> None:
    """Add the items on top of the stack to the container below them."""
    if name == "APPEND":
        items = [stack.pop()]
    elif name == "SETITEM":
        items = stack[-2:]
        del stack[-2:]
    else:
        items = _pop_to_mark(stack)
    container = stack[-1]
    if name.startswith("APPEND"):
        list.extend(container, items)
    elif name.startswith("SETITEM"):
        dict.update(container, _pairs(items))
    else:
        set.update(container, items)


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise IndexError
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))
