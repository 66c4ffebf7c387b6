"""Optimizers and the learning-rate schedule, with their state as named tensors.

AdamW decays matrices and leaves vectors alone, the nanoGPT rule. With `--optimizer muon`, `torch.optim.Muon` takes the
matrices inside the blocks (it orthogonalises updates, which is meant for hidden layers) and AdamW the embedding, the
head and the vectors. Each parameter group remembers its share of the learning rate in `lr_scale`, so that one schedule
drives them all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megactx.errors import MegactxError


def build_optimizers(
    model: nn.Module,
    *,
    kind: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    muon_learning_rate: float,
) -> dict[str, torch.optim.Optimizer]:
    """Optimizers by name (`adamw`, and `muon` for `kind="muon"`) that together own every trainable parameter once.

    Raises:
        ValueError: `kind` is neither `adamw` nor `muon`.
    """
    if kind not in ("adamw", "muon"):
        raise ValueError(f"optimizer: expected 'adamw' or 'muon', got {kind!r}")
    hidden: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif kind == "muon" and parameter.dim() == 2 and name.startswith("blocks."):
            hidden.append(parameter)
        else:
            matrices.append(parameter)
    groups = [
        {"params": matrices, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    groups = [group for group in groups if group["params"]]
    # `fused`: one pass over each tensor, on CPU as on CUDA.
    found: dict[str, torch.optim.Optimizer] = {
        "adamw": torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    }
    if hidden:
        scale = muon_learning_rate / learning_rate
        found["muon"] = torch.optim.Muon(
            [{"params": hidden, "lr_scale": scale}], lr=muon_learning_rate, weight_decay=weight_decay
        )
    return found


def learning_rate_at(step: int, *, peak: float, floor: float, warmup_steps: int, decay_steps: int) -> float:
    """Linear warm-up to `peak` over `warmup_steps`, then a half cosine down to `floor` at step `decay_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= decay_steps:
        return floor
    progress = (step - warmup_steps) / max(1, decay_steps - warmup_steps)
    return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)


def set_learning_rate(optimizers: Mapping[str, torch.optim.Optimizer], learning_rate: float) -> None:
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]


def pack_state(model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Optimizer state as `{optimizer}/{parameter name}/{entry}` tensors, independent of parameter order."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    packed: dict[str, Tensor] = {}
    for kind, optimizer in optimizers.items():
        for parameter, entries in optimizer.state.items():
            for entry, value in entries.items():
                packed[f"{kind}/{names[parameter]}/{entry}"] = torch.as_tensor(value)
    return packed


def unpack_state(
    model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer], packed: Mapping[str, Tensor]
) -> None:
    """Puts `pack_state`'s tensors back, each on its parameter's device.

    Raises:
        MegactxError: an entry names an optimizer or a parameter that this run does not have, or not together.
    """
    parameters = dict(model.named_parameters())
    owned = {kind: {p for group in o.param_groups for p in group["params"]} for kind, o in optimizers.items()}
    for key, value in packed.items():
        kind, _, rest = key.partition("/")
        name, _, entry = rest.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or parameter not in owned.get(kind, ()):
            raise MegactxError(f"optimizer state: {key!r} in the checkpoint has no place in this run")
        optimizers[kind].state[parameter][entry] = value.to(parameter.device, copy=True)
