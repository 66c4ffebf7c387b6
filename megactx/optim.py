"""Optimizers, with their state as named tensors.

AdamW decays matrices and leaves vectors alone, the nanoGPT rule. With `--optimizer muon`, `torch.optim.Muon` takes the
matrices inside the blocks, those of multi-token prediction's own heads too (it orthogonalises updates, which is meant
for hidden layers), and AdamW the embedding, the head and the vectors. Each parameter group remembers its share of the
learning rate in `lr_scale`, so that one schedule drives them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megactx.block import Block
from megactx.errors import MegactxError
from megactx.parallel import placed, whole


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
    inside = {p for module in model.modules() if isinstance(module, Block) for p in module.parameters()}
    hidden: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        elif kind == "muon" and parameter.dim() == 2 and parameter in inside:
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
        sliced = any(hasattr(parameter, "placements") for parameter in hidden)
        found["muon"] = (SlicedMuon if sliced else torch.optim.Muon)(
            [{"params": hidden, "lr_scale": scale}], lr=muon_learning_rate, weight_decay=weight_decay
        )
    return found


class SlicedMuon(torch.optim.Muon):
    """Muon for matrices of which every process holds some rows (FSDP). The update is one of the whole matrix.

    Given such matrices as they are, `torch.optim.Muon` would exchange parts of them in each of the some fifteen
    products of an orthogonalisation, and add partial sums in bfloat16. Here momentum stays in slices, the direction is
    gathered once, and every process orthogonalises it as one process would.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # the trainer has no closures
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, momentum = self.state[parameter], group["momentum"]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
                direction = parameter.grad.lerp(state["momentum_buffer"], momentum)  # Nesterov's, Muon's default
                step = _muon_step(whole(direction), group["lr"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(placed(step, parameter))


def _muon_step(direction: Tensor, learning_rate: float) -> Tensor:
    """What `torch.optim.Muon` adds to a matrix for this direction: it is asked by way of a matrix of zeros, without
    momentum and decay."""
    matrix = nn.Parameter(torch.zeros_like(direction))
    matrix.grad = direction
    torch.optim.Muon([matrix], lr=learning_rate, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    return matrix.detach()


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
    model: nn.Module, optimizers: Mapping[str, torch.optim.Optimizer], packed: Iterable[tuple[str, Tensor]]
) -> None:
    """Puts `pack_state`'s tensors back, each on its parameter's device and in its slices.

    Raises:
        MegactxError: an entry names an optimizer or a parameter that this run does not have, or not together.
    """
    parameters = dict(model.named_parameters())
    owned = {kind: {p for group in o.param_groups for p in group["params"]} for kind, o in optimizers.items()}
    for key, value in packed:
        kind, _, rest = key.partition("/")
        name, _, entry = rest.rpartition("/")
        parameter = parameters.get(name)
        if parameter is None or parameter not in owned.get(kind, ()):
            raise MegactxError(f"optimizer state: {key!r} in the checkpoint has no place in this run")
        optimizers[kind].state[parameter][entry] = placed(value, parameter)
