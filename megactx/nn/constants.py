"""Constants of a module: tensors that follow from its settings, so that they are neither trained nor saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class WithConstants(nn.Module):
    """A module whose `constants` are buffers: on its device, so that no call has to copy or to wait for them.

    They are in no state dict, and are made anew after every move or change of type: a module of bfloat16 keeps its
    float32 constants to the last bit, and one made on the meta device has them right after `to_empty`.
    """

    def constants(self, device: torch.device | None) -> Mapping[str, Tensor | None]:
        """The constants by name, each of the type it is to keep."""
        raise NotImplementedError

    def set_constants(self, device: torch.device | None = None) -> None:
        for name, value in self.constants(device).items():
            self.register_buffer(name, value, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        constants = [buffer for buffer in self._buffers.values() if buffer is not None]
        if constants:
            self.set_constants(constants[0].device)
        return self
