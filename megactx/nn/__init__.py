"""Drop-in modules: each file holds one family and can be used without the rest of the package's model.

The names load on first use, so that importing one family costs one family.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "CausalSelfAttention": "attention",
    "GaussianRoPE": "rotary",
    "LinearMTPCrossEntropyLoss": "mtp",
    "MLP": "mlp",
    "MTPCrossEntropyLoss": "mtp",
    "NumericEmbedding": "embedding",
    "NumericHead": "embedding",
    "PackedEmbedding": "embedding",
    "PackedHead": "embedding",
    "RMSNorm": "norm",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
