"""Fused operators for small multi-context GPTs: rotary, ALiBi attention, gist attention, sampling, cross-entropy.

Every public function is a thin shell: it checks its arguments and calls one operator of the table in `_library`.
The names below are resolved on first use, so importing this package costs nothing and imports neither torch nor
triton.  The package stands alone: it knows nothing of the model that uses it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._library import backends as backends
    from ._library import use_backend as use_backend
    from .attention.op import alibi_attention as alibi_attention
    from .attention.op import alibi_slopes as alibi_slopes
    from .gist.op import gist_attention as gist_attention
    from .mtp.op import MTPLoss as MTPLoss
    from .mtp.op import linear_mtp_cross_entropy as linear_mtp_cross_entropy
    from .mtp.op import mtp_cross_entropy as mtp_cross_entropy
    from .rotary.op import gaussian_rope as gaussian_rope
    from .rotary.op import gaussian_rope_ as gaussian_rope_
    from .sampling.op import sample_contexts as sample_contexts

__all__ = [
    "MTPLoss",
    "alibi_attention",
    "alibi_slopes",
    "backends",
    "gaussian_rope",
    "gaussian_rope_",
    "gist_attention",
    "linear_mtp_cross_entropy",
    "mtp_cross_entropy",
    "sample_contexts",
    "use_backend",
]

_HOMES = {
    "MTPLoss": ".mtp.op",
    "alibi_attention": ".attention.op",
    "alibi_slopes": ".attention.op",
    "backends": "._library",
    "gaussian_rope": ".rotary.op",
    "gaussian_rope_": ".rotary.op",
    "gist_attention": ".gist.op",
    "linear_mtp_cross_entropy": ".mtp.op",
    "mtp_cross_entropy": ".mtp.op",
    "sample_contexts": ".sampling.op",
    "use_backend": "._library",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home, __name__), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
