"""What a model is made of: frozen, validated, and small enough to travel as JSON inside every checkpoint.

Nothing here imports torch, so that a config can be read, checked and printed without loading it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["categorical", "numeric"]
Activation = Literal["gelu", "relu2", "silu", "swiglu"]
Position = Literal["simple", "gaussian", "gaussian_alibi", "gaussian_lod2d", "gaussian_lod2d_alibi", "learned", "none"]
Sigma = Literal["uniform", "power"]
AlibiRule = Literal["press", "geometric"]
MTPHeads = Literal["shared", "parallel", "sequential"]

# What each setting of the rotation is read by: the kinds with this word in them. "rope_base" is free to be set where
# nothing is turned, as it was before the other kinds came: a checkpoint may hold it.
_READ_BY = {"rope_sigma": "gaussian", "lod_block_size": "gaussian", "lod_pairs": "lod2d", "alibi_rule": "alibi"}

# What keeps a standardised value, and its square, finite and its code exact in float32, the model's arithmetic.
_MAX_CODES = 2**24
_STD_RANGE = (1e-6, 1e12)

_MAX_MTP_STEPS = 8


def _check_int(field: str, value: object, minimum: int, maximum: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{field} must be an integer, got {value!r}")
    if value < minimum:
        raise ValueError(f"{field} must be at least {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{field} must be at most {maximum}, got {value}")


def _check_real(field: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{field} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{field} must be finite, got {value}")
    return float(value)


def _check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field} must be one of {', '.join(choices)}, got {value!r}")


def _check_keys(cls: type, data: Mapping[str, Any]) -> None:
    """Refuse a field this version does not know: dropping it silently would build a different model."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{cls.__name__}: unknown field {key!r}{hint}")


@dataclass(frozen=True)
class ContextConfig:
    """One aligned stream of symbols.

    Categorical: ids in [0, vocab_size). Numeric: integer codes in the same range, which the model reads and
    predicts as `(code - mean) / std`; at most 2^24 of them, the integers that float32 keeps apart.
    """

    name: str
    kind: Kind = "categorical"
    vocab_size: int = 256
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"context name must be a non-empty string, got {self.name!r}")
        _check_choice(f"kind of context {self.name!r}", self.kind, get_args(Kind))
        _check_int(f"vocab_size of context {self.name!r}", self.vocab_size, 1)
        if self.kind == "numeric" and self.vocab_size > _MAX_CODES:
            raise ValueError(f"vocab_size of numeric context {self.name!r} must be <= 2^24, got {self.vocab_size}")
        if abs(_check_real(f"mean of context {self.name!r}", self.mean)) > _MAX_CODES:
            raise ValueError(f"mean of context {self.name!r} must be within +-2^24, got {self.mean}")
        low, high = _STD_RANGE
        if not low <= _check_real(f"std of context {self.name!r}", self.std) <= high:
            raise ValueError(f"std of context {self.name!r} must be in [{low:g}, {high:g}], got {self.std}")

    def to_json(self) -> dict[str, Any]:
        """Plain containers and scalars only."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ContextConfig:
        """The inverse of `to_json`; ValueError names an unknown field."""
        _check_keys(cls, data)
        return cls(**data)


@dataclass(frozen=True)
class GPTConfig:
    """A pre-norm decoder over the sum of its contexts' embeddings.

    `position`: a kind of `megactx.nn.GaussianRoPE` ("simple" is plain rotary), "learned" a table of `block_size` rows
    added to the embeddings, "none" leaves order to the causal mask. A token of level of detail l stands for
    `lod_block_size ** l` tokens; `rope_sigma`, `lod_pairs` and `alibi_rule` say what the "gaussian", "..._lod2d" and
    "..._alibi" kinds make of it; where nothing reads one of the four it is refused. `n_kv_head` below `n_head` groups
    queries (GQA).

    `use_flash_lobo` learns a constant C in the denominator of every softmax of attention, one a layer, or one a head
    with `use_flash_lobo_per_head`; log C starts at `flash_lobo_log_const`, and stays there with `flash_lobo_fixed`.

    `context_weights` are the weights of the per-context losses, in the order of `contexts`; they are normalised to sum
    to 1, None weighs all alike.

    `mtp_steps` K, 1 to 8: how many tokens ahead the model is trained to predict (multi-token prediction); 1 is the next
    one alone. `mtp_heads` says what answers from the second step on: "shared" the logits of the next token, so that no
    step has a distribution of its own to draft tokens from; "parallel" a block of its own on top of the last one;
    "sequential" a chain of blocks, each given one more of the true tokens.
    """

    contexts: tuple[ContextConfig, ...]
    block_size: int = 256
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int | None = None
    n_embd: int = 384
    dropout: float = 0.0
    activation: Activation = "gelu"
    position: Position = "simple"
    rope_base: float = 10000.0
    rope_sigma: Sigma = "uniform"
    lod_block_size: int = 32
    lod_pairs: int | None = None
    alibi_rule: AlibiRule = "press"
    qk_norm: bool = True
    tie_weights: bool = True
    norm_eps: float = 1e-6
    numerical_mlp_hidden_dim: int = 64
    numerical_mlp_num_layers: int = 2
    context_weights: tuple[float, ...] | None = None
    use_flash_lobo: bool = False
    use_flash_lobo_per_head: bool = False
    flash_lobo_log_const: float = 0.0
    flash_lobo_fixed: bool = False
    mtp_steps: int = 1
    mtp_heads: MTPHeads = "shared"

    def __post_init__(self) -> None:
        object.__setattr__(self, "contexts", tuple(self.contexts))
        self._check_contexts()
        for field in ("block_size", "n_layer", "n_head", "n_embd", "numerical_mlp_hidden_dim"):
            _check_int(field, getattr(self, field), 1)
        _check_int("numerical_mlp_num_layers", self.numerical_mlp_num_layers, 2)
        if self.n_kv_head is not None:
            _check_int("n_kv_head", self.n_kv_head, 1)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got {self.n_embd} and {self.n_head}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_head must be a multiple of n_kv_head, got {self.n_head} and {self.n_kv_head}")
        _check_choice("activation", self.activation, get_args(Activation))
        if self.head_dim % 2:
            raise ValueError(f"n_embd / n_head must be even, got {self.n_embd} / {self.n_head} = {self.head_dim}")
        if not 0 <= _check_real("dropout", self.dropout) < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for field in ("rope_base", "norm_eps"):
            if not 1e-30 <= _check_real(field, getattr(self, field)) <= 1e30:  # what the operators take
                raise ValueError(f"{field} must be above 0, in [1e-30, 1e30], got {getattr(self, field)}")
        for field in ("qk_norm", "tie_weights", "use_flash_lobo", "use_flash_lobo_per_head", "flash_lobo_fixed"):
            if not isinstance(getattr(self, field), bool):
                raise TypeError(f"{field} must be True or False, got {getattr(self, field)!r}")
        self._check_position()
        self._check_flash_lobo()
        self._check_mtp()

    def _check_position(self) -> None:
        _check_choice("position", self.position, get_args(Position))
        _check_choice("rope_sigma", self.rope_sigma, get_args(Sigma))
        _check_choice("alibi_rule", self.alibi_rule, get_args(AlibiRule))
        _check_int("lod_block_size", self.lod_block_size, 1, 2**31 - 1)
        if self.lod_pairs is not None:
            _check_int("lod_pairs", self.lod_pairs, 1)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if _READ_BY.get(item.name, "") not in self.position and value != item.default:
                expected = f"{item.default!r} where position = {self.position!r}, for which nothing reads it"
                raise ValueError(f"{item.name} must be {expected}, got {value!r}")
        pairs = self.head_dim // 2
        if "lod2d" in self.position and pairs < 2:
            least = f"n_embd / n_head must be at least 4 where position = {self.position!r}"
            raise ValueError(f"{least}, for a pair to turn by the position, got {self.head_dim}")
        if self.lod_pairs is not None and self.lod_pairs >= pairs:
            raise ValueError(
                f"lod_pairs must be at most {pairs - 1}, for one of a head's {pairs} pairs to turn by the position, "
                f"got {self.lod_pairs}"
            )

    def _check_flash_lobo(self) -> None:
        if abs(_check_real("flash_lobo_log_const", self.flash_lobo_log_const)) > 1e4:
            raise ValueError(f"flash_lobo_log_const must be within +-1e4, got {self.flash_lobo_log_const}")
        for field in ("use_flash_lobo_per_head", "flash_lobo_log_const", "flash_lobo_fixed"):
            if getattr(self, field) and not self.use_flash_lobo:
                raise ValueError(f"{field} must not be set without use_flash_lobo, got {getattr(self, field)}")
        if self.flash_lobo_fixed and self.use_flash_lobo_per_head:
            raise ValueError("flash_lobo_fixed must not be set with use_flash_lobo_per_head: one is for all heads")

    def _check_mtp(self) -> None:
        _check_int("mtp_steps", self.mtp_steps, 1, _MAX_MTP_STEPS)
        _check_choice("mtp_heads", self.mtp_heads, get_args(MTPHeads))
        if self.mtp_steps > self.block_size:
            raise ValueError(f"mtp_steps must be at most block_size = {self.block_size}, got {self.mtp_steps}")
        if self.mtp_steps > 1 and not self.vocab_sizes:
            expected = "1 without a categorical context, as a numeric one has one step"
            raise ValueError(f"mtp_steps must be {expected}, got {self.mtp_steps}")
        if self.mtp_heads != "shared" and self.mtp_steps == 1:
            raise ValueError(f"mtp_heads must be 'shared' where mtp_steps = 1, got {self.mtp_heads!r}")

    def _check_contexts(self) -> None:
        if not self.contexts:
            raise ValueError("contexts must name at least one context, got none")
        seen: set[str] = set()
        for context in self.contexts:
            if not isinstance(context, ContextConfig):
                raise TypeError(f"contexts must hold ContextConfig, got {type(context).__name__}")
            if context.name in seen:
                raise ValueError(f"contexts must have different names, got {context.name!r} twice")
            seen.add(context.name)
        if self.context_weights is None:
            return
        weights = tuple(_check_real("context_weights", w) for w in self.context_weights)
        if len(weights) != len(self.contexts):
            raise ValueError(f"context_weights needs {len(self.contexts)} values, one per context, got {len(weights)}")
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"context_weights must be >= 0 and not all 0, got {list(weights)}")
        object.__setattr__(self, "context_weights", weights)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads: `n_kv_head`, or `n_head` where it is None."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self) -> int:
        """Channels per attention head."""
        return self.n_embd // self.n_head

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are turned, so that positions and levels of detail may be anything."""
        return self.position not in ("learned", "none")

    @property
    def names(self) -> tuple[str, ...]:
        """Context names in the model's own order."""
        return tuple(context.name for context in self.contexts)

    @property
    def vocab_sizes(self) -> tuple[int, ...]:
        """Vocabulary sizes of the categorical contexts, in order: the segments of the packed logits."""
        return tuple(c.vocab_size for c in self.contexts if c.kind == "categorical")

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """Weights of the contexts' losses, summing to 1."""
        weights = self.context_weights or (1.0,) * len(self.contexts)
        largest = max(weights)  # the sum of numbers near the end of the range would be infinite
        total = sum(w / largest for w in weights)
        return tuple(w / largest / total for w in weights)

    def to_json(self) -> dict[str, Any]:
        """Plain containers and scalars only, as a checkpoint embeds it."""
        data = dataclasses.asdict(self)
        data["contexts"] = [context.to_json() for context in self.contexts]
        data["context_weights"] = None if self.context_weights is None else list(self.context_weights)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GPTConfig:
        """The inverse of `to_json`; ValueError names an unknown or missing field."""
        _check_keys(cls, data)
        if "contexts" not in data:
            raise ValueError("GPTConfig: field 'contexts' is missing")
        fields = dict(data)
        fields["contexts"] = tuple(ContextConfig.from_json(c) for c in data["contexts"])
        if fields.get("context_weights") is not None:
            fields["context_weights"] = tuple(fields["context_weights"])
        return cls(**fields)


def check_names(argument: str, known: Sequence[str], given: Sequence[str]) -> None:
    """Refuses `given` unless it holds each of the model's contexts `known` once, in whatever order."""
    for name in given:
        if name not in known:
            raise ValueError(f"{argument}: unknown context {name!r}, the model has {', '.join(known)}")
    for name in known:
        if name not in given:
            raise ValueError(f"{argument}: context {name!r} is missing")
    if len(given) != len(known):
        twice = next(name for name in given if list(given).count(name) > 1)
        raise ValueError(f"{argument}: context {twice!r} is given twice")
