"""From what a caller has, tokens and targets by name or packed, to the tensors of the model, checked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from megactx.config import GPTConfig, check_names
from megactx.kernels._runtime import check_constant, check_like, check_shape, check_tensor

Tokens = Mapping[str, Tensor] | Sequence[Tensor] | Tensor
IGNORE_INDEX = -1
_STEP_NAME = re.compile(r"target_([1-9]\d*)")


def pack_tokens(
    tokens: Tokens, names: Sequence[str], token_order: Sequence[str] | None = None, argument: str = "tokens"
) -> Tensor:
    """Any of the three forms to one int64 `[B, T, C]` in the order of `names`; names decide, never positions. Of one
    context `[B, T]` will do."""
    if isinstance(tokens, Tensor):
        if tokens.dim() == 2 and len(names) == 1:
            tokens = tokens.unsqueeze(-1)
        if tokens.dim() != 3 or tokens.shape[-1] != len(names):
            also = " or [B, T]" if len(names) == 1 else ""
            raise ValueError(f"{argument} must be [B, T, {len(names)}]{also}, got {list(tokens.shape)}")
        return _ordered(tokens, names, token_order, argument)
    by_name = _by_name(tokens, names, token_order, argument)
    first = by_name[names[0]]
    for name in names:
        stream = by_name[name]
        if stream.dim() != 2 or stream.shape != first.shape:
            raise ValueError(
                f"{argument} of all contexts must be [B, T] alike: "
                f"{names[0]!r} is {list(first.shape)}, {name!r} is {list(stream.shape)}"
            )
    return torch.stack([by_name[name] for name in names], dim=-1).long()


def pack_targets(targets: Tokens, config: GPTConfig, token_order: Sequence[str] | None = None) -> Tensor:
    """Targets in any form to one int64 `[B, T, C, K]`: packed ones have no K where it is 1 and no C where there is one
    context, and named ones are `[B, T]` or `[B, T, K]` each. A numeric context, of which nothing but step 1 is read,
    may have that alone."""
    names = config.names
    if isinstance(targets, Tensor):
        single, shape = len(names) == 1, list(targets.shape)
        if single and targets.dim() in (2, 3):  # [B, T, 1] is one context's one step, whichever of them it names
            targets = targets.reshape(*shape[:2], 1, *(shape[2:] or (1,)))
        elif targets.dim() == 3:
            targets = targets.unsqueeze(-1)
        if targets.dim() != 4 or targets.shape[2] != len(names):
            others = "[B, T], [B, T, K]" if single else f"[B, T, {len(names)}]"
            raise ValueError(f"targets must be {others} or [B, T, {len(names)}, K], got {shape}")
        return _ordered(targets, names, token_order, "targets")
    by_name = _by_name(targets, names, token_order, "targets")
    for name, stream in by_name.items():
        if stream.dim() not in (2, 3):
            raise ValueError(f"targets of context {name!r} must be [B, T] or [B, T, K], got {list(stream.shape)}")
    streams = {name: t.unsqueeze(-1) if t.dim() == 2 else t for name, t in by_name.items()}
    first = streams[names[0]]
    steps = max(t.shape[-1] for t in streams.values())
    for context in config.contexts:
        stream = streams[context.name]
        good = stream.shape[:2] == first.shape[:2]
        if not good or stream.shape[-1] not in ((steps,) if context.kind == "categorical" else (1, steps)):
            raise ValueError(
                f"targets of all contexts must be [B, T] or [B, T, {steps}] alike: {names[0]!r} is "
                f"{list(by_name[names[0]].shape)}, {context.name!r} is {list(by_name[context.name].shape)}"
            )
        streams[context.name] = F.pad(stream.long(), (0, steps - stream.shape[-1]), value=IGNORE_INDEX)
    return torch.stack([streams[name] for name in names], dim=2)


def is_targets_dict(targets: object, names: Sequence[str]) -> bool:
    """Whether these are targets by step, `{"target_1": ..., "target_2": ...}`, and not by context, of which there are
    `names`."""
    if not isinstance(targets, Mapping) or not targets or set(targets) <= set(names):
        return False
    return all(isinstance(key, str) and _STEP_NAME.fullmatch(key) for key in targets)


def pack_targets_dict(
    targets_dict: Mapping[str, Tokens], names: Sequence[str], token_order: Sequence[str] | None = None
) -> Tensor:
    """`{"target_k": [B, T]}`, k = 1 .. K without a gap, to int64 `[B, T, C, K]`; for several contexts each value has
    one of the three forms of tokens."""
    if not isinstance(targets_dict, Mapping):
        raise TypeError(f"targets_dict must map 'target_1' and so on to tensors, got {type(targets_dict).__name__}")
    wanted = [f"target_{k}" for k in range(1, max(len(targets_dict), 1) + 1)]
    if set(targets_dict) != set(wanted):
        given = ", ".join(map(str, targets_dict)) or "none"
        raise ValueError(f"targets_dict must hold {', '.join(wanted)}, got {given}")
    steps = [pack_tokens(targets_dict[key], names, token_order, key) for key in wanted]
    for key, step in zip(wanted, steps, strict=True):
        if step.shape != steps[0].shape:
            raise ValueError(f"targets_dict: {key} is {list(step.shape)}, target_1 is {list(steps[0].shape)}")
    return torch.stack(steps, dim=-1)


def check_targets(targets: Tensor, packed: Tensor, mtp_steps: int) -> None:
    """Refuse targets `[B, T, C, K]` that do not belong to the tokens `[B, T, C]`, or look further than the model."""
    if targets.shape[:3] != packed.shape:
        shape = list(targets.shape if targets.shape[-1] != 1 else targets.shape[:3])
        raise ValueError(f"targets must have the shape of tokens {list(packed.shape)}, steps behind it, got {shape}")
    steps = targets.shape[-1]
    if not 1 <= steps <= mtp_steps:
        raise ValueError(f"targets must hold 1 to mtp_steps = {mtp_steps} steps, got {steps}")


def check_counts(counts: Tensor, targets: Tensor, packed: Tensor) -> None:
    """Refuse what could not divide the means of targets `[B, T, C, K]`, which numeric contexts would take."""
    check_shape("counts", check_tensor("counts", counts, 2), targets.shape[2:])
    if counts.dtype not in (torch.int32, torch.int64, torch.float32, torch.float64):
        raise TypeError(f"counts must be int32, int64, float32 or float64, got {counts.dtype}")
    check_constant("counts", check_like("counts", counts, "tokens", packed, dtype=False))


def check_ids(packed: Tensor, limits: Tensor, config: GPTConfig, argument: str) -> None:
    """Refuse an id `[B, T, C]`, or a target `[B, T, C, K]`, outside its own vocabulary.

    On the CPU the answer is there at once and the error says where. On a GPU asking would stall the queue, and
    inside a compiled graph it would break it: there a device-side assertion is queued instead.
    """
    lowest = IGNORE_INDEX if argument == "targets" else 0
    bad = (packed < lowest) | (packed >= (limits if packed.dim() == 3 else limits[:, None]))
    if _asynchronous(packed):
        sizes = ", ".join(f"{c.name!r}: {c.vocab_size}" for c in config.contexts)
        torch._assert_async(~bad.any(), f"{argument} hold an id outside its context's vocabulary ({sizes})")
    elif bad.any():
        row, position, index, *step = bad.nonzero()[0].tolist()
        context = config.contexts[index]
        where = f"row {row}, position {position}" + "".join(f", step {s + 1}" for s in step if packed.shape[-1] > 1)
        raise ValueError(
            f"{argument} of context {context.name!r}: id {int(packed[(row, position, index, *step)])} at {where} "
            f"is outside its vocabulary of {context.vocab_size}"
        )


def check_places(
    packed: Tensor,
    config: GPTConfig,
    positions: Tensor | None,
    lods: Tensor | None,
    key_padding_mask: Tensor | None,
) -> None:
    """Refuse positions, levels of detail and masks that do not fit the tokens, or that nothing would read."""
    batch, length, _ = packed.shape
    for argument, value in (("positions", positions), ("lods", lods), ("key_padding_mask", key_padding_mask)):
        if value is None:
            continue
        wanted = (torch.bool,) if argument == "key_padding_mask" else (torch.int32, torch.int64)
        if not isinstance(value, Tensor) or value.dtype not in wanted:
            kind = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
            raise TypeError(f"{argument} must be a tensor of {kind}, got {getattr(value, 'dtype', value)!r}")
        shapes = [(batch, length)] if argument == "key_padding_mask" else [(length,), (batch, length)]
        if tuple(value.shape) not in shapes:
            shape = " or ".join(str(list(s)) for s in shapes)
            raise ValueError(f"{argument} must be {shape} as the tokens are, got {list(value.shape)}")
    if positions is not None and config.position == "none":
        raise ValueError('positions must be None where position = "none": nothing would read them')
    if positions is not None and config.position == "learned":
        inside = (positions >= 0) & (positions < config.block_size)
        _require(inside, f"positions must be in the learned table, 0 to {config.block_size - 1}")
    if lods is not None and not config.rotary:
        raise ValueError(f"lods must be None where position = {config.position!r}: nothing would read them")
    if lods is not None:
        _require(lods >= 0, "lods must be at least 0")


def _ordered(tokens: Tensor, names: Sequence[str], token_order: Sequence[str] | None, argument: str) -> Tensor:
    """A packed tensor with its contexts, dimension 2, put from `token_order` into the order of `names`."""
    _check_integer(argument, tokens)
    if token_order is None or tuple(token_order) == tuple(names):
        return tokens.long()
    check_names(argument, names, token_order)
    by_name = dict(zip(token_order, tokens.unbind(2), strict=True))
    return torch.stack([by_name[name] for name in names], dim=2).long()


def _by_name(
    tokens: Mapping[str, Tensor] | Sequence[Tensor],
    names: Sequence[str],
    token_order: Sequence[str] | None,
    argument: str,
) -> dict[str, Tensor]:
    """A mapping, or a list with its names in `token_order`, as a mapping with each of `names` once."""
    if isinstance(tokens, Mapping):
        by_name = dict(tokens)
        check_names(argument, names, list(by_name))
    elif not isinstance(tokens, Sequence):
        raise TypeError(f"{argument} must be a tensor, or a mapping or list of tensors, got {type(tokens).__name__}")
    else:
        if token_order is None:
            raise ValueError(f"{argument} given as a list need token_order, the names of its contexts")
        if len(tokens) != len(token_order):
            raise ValueError(f"{argument} hold {len(tokens)} tensors, but token_order {len(token_order)} names")
        check_names(argument, names, token_order)
        by_name = dict(zip(token_order, tokens, strict=True))
    for name in names:
        _check_integer(f"{argument} of context {name!r}", by_name[name])
    return by_name


def _asynchronous(tensor: Tensor) -> bool:
    """Whether reading a value would stall a GPU, or break a graph being traced."""
    return torch.compiler.is_compiling() or tensor.device.type != "cpu"


def _require(good: Tensor, message: str) -> None:
    if _asynchronous(good):
        torch._assert_async(good.all(), message)
    elif not good.all():
        raise ValueError(message)


def _check_integer(argument: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{argument} must be a tensor of integers, got {type(tensor).__name__}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{argument} must be integers, got {tensor.dtype}")
