"""Cross-entropy against K shifted targets as modules: over logits, and over a linear layer whose logits never exist.

Both take the place of PyTorch's own loss with the same call, and with K = 1 give the same number. More targets cost one
logsumexp all the same; see `megactx.kernels.mtp_cross_entropy` for the formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megactx.kernels import MTPLoss, linear_mtp_cross_entropy, mtp_cross_entropy
from megactx.kernels._runtime import check_bool, check_float, check_sequence, check_tensor
from megactx.kernels.mtp.arguments import checked, checked_sizes
from megactx.nn.rotary import check_count

Weights = Sequence[float] | Tensor


class _MTPLoss(nn.Module):
    """The settings both losses share, and the way from the shapes a caller has to those of the operators."""

    step_weights: tuple[float, ...] | Tensor
    context_weights: tuple[float, ...] | Tensor | None

    def __init__(
        self,
        weight: None = None,
        *,
        vocab_sizes: Sequence[int] | None = None,
        step_weights: Weights = (1.0,),
        context_weights: Weights | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        if weight is not None:  # where PyTorch's losses have weights of classes
            raise TypeError(f"weight must be None: classes have no weights here, got {type(weight).__name__}")
        sizes = None
        if vocab_sizes is not None:
            listed = check_sequence("vocab_sizes", vocab_sizes, "a sequence of integers")
            sizes = tuple(check_count("vocab_sizes", size) for size in listed)
        self.vocab_sizes = sizes
        self.contexts = 1 if sizes is None else len(sizes)
        self.reduction = reduction
        self.settings: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "softcap": softcap,
            "z_loss": z_loss,
        }
        self._left: dict[str, Tensor] = {}  # the weights that a move to the meta device took the numbers of
        self._set_weights("step_weights", step_weights)
        self._set_weights("context_weights", context_weights)
        # What the operator would refuse at the first batch is refused here, with nothing run: the tensors may be of
        # any kind, and have no values yet.
        width = 1 if sizes is None else sum(sizes)
        tensors = [weights for weights in (step_weights, context_weights) if isinstance(weights, Tensor)]
        device = tensors[0].device if tensors else torch.device("cpu")
        shape = (0, self.contexts, len(self.step_weights))
        nothing = torch.empty(0, width, device=device), torch.empty(shape, dtype=torch.int64, device=device)
        options = self._options(None)
        listed = checked_sizes(options.pop("vocab_sizes"), width, "their own sum")
        checked(*nothing, listed, **options, counts=None)

    def _set_weights(self, name: str, value: Weights | None) -> None:
        """Numbers stay numbers; a tensor is a buffer, to be written into where it lies, in no state dict."""
        if isinstance(value, Tensor):
            self.register_buffer(name, check_tensor(name, value, 1), persistent=False)
        else:
            words = "a sequence of numbers or a tensor"
            setattr(self, name, None if value is None else tuple(check_sequence(name, value, words)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Weights keep their type and their numbers: through bfloat16, the meta device and `to_empty`.

        A tensor that does not leave its device stays the tensor it was, for whoever writes into it.
        """
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = self._buffers[name]
            if value is None or after is None or after is value:
                continue
            if not value.is_meta:
                self._buffers[name] = value.to(after.device)
                if after.is_meta:
                    self._left[name] = value
            elif not after.is_meta:
                known = self._left.pop(name, None)
                # Made on the meta device they never had numbers: a loss of NaN says so, what lay in memory would not.
                nothing = torch.full_like(after, math.nan, dtype=value.dtype)
                self._buffers[name] = nothing if known is None else known.to(after.device)
        return self

    def _options(self, step_weights: Weights | None) -> dict[str, Any]:
        return {
            "vocab_sizes": self.vocab_sizes,
            "step_weights": self.step_weights if step_weights is None else step_weights,
            "context_weights": self.context_weights,
            "reduction": self.reduction,
            **self.settings,
        }

    def _rows(self, input: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """`[..., W]` and one of the four shapes of a target as `[N, W]` and `[N, C, K]`, views where they can be."""
        check_float("input", input, tuple(range(1, 65)))
        if not isinstance(target, Tensor):
            raise TypeError(f"target must be a torch.Tensor, got {type(target).__name__}")
        rows, shape = tuple(input.shape[:-1]), tuple(target.shape)
        behind = len(shape) - len(rows)
        if self.contexts > 1:
            wanted = f"{[*rows, self.contexts]} or {[*rows, self.contexts, 'K']}"
            good = behind in (1, 2) and shape[len(rows)] == self.contexts
        else:
            wanted = f"{[*rows]} or {[*rows, 'K']}"
            good = behind in (0, 1) or (behind == 2 and shape[len(rows)] == 1)
        if not good or shape[: len(rows)] != rows:
            raise ValueError(
                f"target must have shape {wanted} for an input of shape {tuple(input.shape)}, whose last dimension are "
                f"the channels or classes, got {shape}".replace("'", "")
            )
        steps = shape[-1] if behind >= min(self.contexts, 2) else 1
        count = math.prod(rows)
        return input.reshape(count, input.shape[-1]), target.reshape(count, self.contexts, steps)

    def _result(self, result: MTPLoss, target: Tensor, return_per_step: bool) -> Tensor | MTPLoss:
        loss = result.loss.reshape(target.shape) if self.reduction == "none" else result.loss
        return MTPLoss(loss, result.per_step) if return_per_step else loss

    def extra_repr(self) -> str:
        options = {name: value for name, value in self._options(None).items() if not isinstance(value, Tensor)}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


class MTPCrossEntropyLoss(_MTPLoss):
    """In place of `torch.nn.CrossEntropyLoss`, for K targets a row and C vocabularies side by side.

    loss = sum_c cw_c sum_k sw_k mean over valid n of CE(n, c, k), with `step_weights` sw `[K]` and `context_weights` cw
    `[C]` (default 1 / C). Seed weights of multi-token prediction are `(1, w / (K - 1), ...)`. Weights are numbers, or
    tensors on the device: those may be changed in place, by a schedule, with no recompilation and no synchronisation.
    A tensor made on the meta device has no numbers to keep: after `to_empty` it is NaN until they are written.

    `vocab_sizes`: the C vocabularies in the last dimension of the input; None is one. `reduction`: "mean", "sum", or
    "none" for the shape of the target, ignored entries 0. `label_smoothing` as PyTorch's; `softcap=c` turns logits a
    into c tanh(a / c); `z_loss` adds z_loss * logsumexp^2 to each entry.

    What PyTorch's loss does otherwise: its classes are dimension 1 of an input of more than two dimensions, here they
    are the last; its mean over no target is NaN, here it is 0; it takes probabilities for targets, and weights of
    classes where `weight` here is None. Shared logits answer all K targets with one distribution: there is none of step
    k alone to draft from.
    """

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        *,
        step_weights: Weights | None = None,
        counts: Tensor | None = None,
        return_per_step: bool = False,
    ) -> Tensor | MTPLoss:
        """`input` float `[..., V]`, V = sum(vocab_sizes); `target` int64 `[...]` (K = 1) or `[..., K]`, for C contexts
        `[..., C]` (K = 1) or `[..., C, K]`; entry k is the target k + 1 steps ahead.

        Returns the loss, float32 (float64 for float64); with `return_per_step` an `MTPLoss`, whose `per_step` `[C, K]`
        are the detached means. `step_weights` takes the place of the module's for this call; `counts` `[C, K]` is what
        each mean divides by, where this call sees a part of a batch only. ValueError or TypeError names the argument;
        a target outside its vocabulary is named on the CPU, and makes the loss NaN on a GPU.
        """
        logits, targets = self._rows(input, target)
        result = mtp_cross_entropy(logits, targets, counts=counts, **self._options(step_weights))
        return self._result(result, target, return_per_step)


class LinearMTPCrossEntropyLoss(_MTPLoss):
    """In place of `nn.Linear` and `nn.CrossEntropyLoss`, or of `torch.nn.LinearCrossEntropyLoss`, without the logits.

    `weight` `[num_classes, in_features]` and `bias` `[num_classes]` bear the names `nn.Linear` gives them and start as
    there, so that either loads the other's state dict. With `tied` the module has no weight and each call is given
    one, such as that of an embedding. The other options are those of `MTPCrossEntropyLoss`.

    Rows go through in chunks and the workspace does not grow with their number. Under autocast the products run in its
    type; the gradient of the weight is summed in float32 whatever the type. The gradients are made with the loss, and
    the backward pass uses them up: it can run once for each call, and a second one (`retain_graph`) is an error. Not
    so with `reduction="none"`, for a float16 input, and in a compiled graph: there they are made in the backward pass,
    or kept.

    What `torch.nn.LinearCrossEntropyLoss` does otherwise: its state dict says `linear.weight` where this says `weight`
    (`ours.load_state_dict(theirs.linear.state_dict())`); its `weight=` are weights of classes, which here is None; it
    takes probabilities for targets; with `out_features` it has logits of their own for each of several outputs, here
    the vocabularies lie side by side (`vocab_sizes`), and K targets share one; and it goes in chunks where `options`
    say so, here that is no option. Its input is `[N, in_features]`, here there may be any number of leading dimensions.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        tied: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.in_features = check_count("in_features", in_features)
        self.num_classes = check_count("num_classes", num_classes)
        if self.vocab_sizes is not None and sum(self.vocab_sizes) != self.num_classes:
            raise ValueError(f"vocab_sizes must add up to num_classes = {num_classes}, got {list(self.vocab_sizes)}")
        self.tied = check_bool("tied", tied)
        shape = (self.num_classes, self.in_features)
        like = {"device": device, "dtype": dtype}
        self.weight = None if self.tied else nn.Parameter(torch.empty(shape, **like))  # type: ignore[arg-type]
        bias_needed = check_bool("bias", bias)
        self.bias = nn.Parameter(torch.empty(shape[:1], **like)) if bias_needed else None  # type: ignore[arg-type]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Linear`: uniform within 1 / sqrt(in_features)."""
        bound = 1 / math.sqrt(self.in_features)
        for parameter in (self.weight, self.bias):
            if parameter is not None:
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        *,
        step_weights: Weights | None = None,
        counts: Tensor | None = None,
        return_per_step: bool = False,
    ) -> Tensor | MTPLoss:
        """`input` float `[..., in_features]`; `weight` `[num_classes, in_features]` where tied, and None where not.
        The rest is as in `MTPCrossEntropyLoss`."""
        hidden, targets = self._rows(input, target)
        options = self._options(step_weights)
        result = linear_mtp_cross_entropy(
            hidden, self._weight(weight), targets, bias=self.bias, counts=counts, **options
        )
        return self._result(result, target, return_per_step)

    def logits(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        """What the loss is of, `[..., num_classes]`, for when it is wanted: soft-capped where `softcap` is set."""
        z = F.linear(input, self._weight(weight), self.bias)
        cap = self.settings["softcap"]
        return z if cap is None else cap * torch.tanh(z / cap)

    def _weight(self, weight: Tensor | None) -> Tensor:
        if self.weight is not None:
            if weight is not None:
                raise ValueError("weight must be None: this loss has its own, and only a tied one is given it")
            return self.weight
        if weight is None:
            raise ValueError("weight must be given to a tied loss, which has none of its own, got None")
        if weight.shape != (self.num_classes, self.in_features):
            wanted = (self.num_classes, self.in_features)
            raise ValueError(f"weight must have shape {wanted}, got {tuple(weight.shape)}")
        return weight

    def extra_repr(self) -> str:
        own = f"{self.in_features}, {self.num_classes}, bias={self.bias is not None}, tied={self.tied}, "
        return own + super().extra_repr()
