"""The linear loss, chunk by chunk: matrix products by PyTorch, and one pass over the logits of each chunk.

The logits of a chunk of rows are made in a workspace that all chunks share, and are replaced by their gradient where
one is wanted, which goes on into the gradients of hidden, weight and bias.  So the logits never exist at once, and a
training step costs the three products it needs.  `linear_mtp_cross_entropy_gradients` does it for an upstream
gradient of 1, in the same sweep as the loss; the other two make the logits a second time for the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from .._runtime import compute_dtype
from . import config
from .loss import Entries, part
from .reference import Options, Results
from .rows import Columns

Needs = tuple[bool, bool, bool]  # which of hidden, weight and bias want a gradient


def linear_mtp_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *options: object
) -> Results:
    """As `reference.linear_mtp_cross_entropy`."""
    o = Options(*options)  # type: ignore[arg-type]
    entries = Entries.of(targets, o, compute_dtype(hidden.dtype))
    rows = _Rows.of(entries.valid, targets)
    h, t = rows.hidden(hidden), rows.pick(targets)
    head = _Head(h, weight, bias)
    settings = o.vocab_sizes, o.ignore_index, o.softcap
    chunks: list[Columns] = [
        part("mtp_rows")(head.logits(each), _taken(t, each), *settings, o.label_smoothing > 0) for each in head.chunks()
    ]
    columns = rows.columns(chunks, targets, hidden, o)
    return (*entries.reduced(columns), columns[2], columns[0])


def linear_mtp_cross_entropy_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, per_step) and the gradients of that loss by hidden, weight and bias, empty where not needed."""
    *options, need_hidden, need_weight, need_bias = rest
    o = Options(*options)  # type: ignore[arg-type]
    entries = Entries.of(targets, o, compute_dtype(hidden.dtype))
    needs = bool(need_hidden), bool(need_weight), bool(need_bias)
    columns, grads = _sweep(None, hidden, weight, bias, targets, entries, needs)
    return (*entries.reduced(columns), *grads)


def linear_mtp_cross_entropy_backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    log_p: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.linear_mtp_cross_entropy_backward`.

    `lse` and `log_p` are not used: the logits have to be made again anyway, and a pass that finds both on its way can
    put the gradient in their place, where one that is given both has to write it elsewhere.
    """
    *options, need_hidden, need_weight, need_bias = rest
    o = Options(*options)  # type: ignore[arg-type]
    needs = bool(need_hidden), bool(need_weight), bool(need_bias)
    entries = Entries.of(targets, o, compute_dtype(hidden.dtype))
    return _sweep(grad_loss, hidden, weight, bias, targets, entries, needs)[1]


def _sweep(
    grad_loss: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    entries: Entries,
    needs: Needs,
) -> tuple[Columns, tuple[Tensor, Tensor, Tensor]]:
    """What the logits come down to, and the gradients: the logits of each chunk are made, read and written once."""
    o, rows = entries.options, _Rows.of(entries.valid, targets)
    h, t, a = rows.hidden(hidden), rows.pick(targets), rows.pick(entries.weighed(grad_loss))
    head = _Head(h, weight, bias)
    dtypes = hidden.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype
    grads = _Gradients(head, dtypes, needs)
    settings = o.vocab_sizes, o.ignore_index, o.softcap
    chunks: list[Columns] = []
    for each in head.chunks():
        z = head.logits(each)
        chunks.append(part("mtp_rows_")(z, _taken(t, each), _taken(a, each), *settings, o.label_smoothing, o.z_loss))
        grads.add(each, z)
    grad_hidden, grad_weight, grad_bias = grads.done()
    if needs[0]:
        grad_hidden = rows.spread(grad_hidden, hidden.shape[0])
    return rows.columns(chunks, targets, hidden, o), (grad_hidden, grad_weight, grad_bias)


def _taken(x: Tensor, rows: slice) -> Tensor:
    """`x[rows]`, or `x` itself where that is all of it: a view costs as much as a small product."""
    return x if rows.stop - rows.start == x.shape[0] else x[rows]


@dataclass(frozen=True)
class _Rows:
    """The rows that have a target: all of them where `index` is None.

    The others take part in no product.  Finding them needs a number on the host, so on a GPU, which that would stall,
    all take part: the passes over the logits skip those without a target, and their hidden state counts as 0, since a
    NaN in it would reach the sum over the rows even with a gradient of 0.
    """

    index: Tensor | None
    idle: Tensor | None  # [N, 1], on a GPU

    @classmethod
    def of(cls, valid: Tensor | None, targets: Tensor) -> _Rows:
        if valid is None:
            return cls(None, None)
        wanted = valid.flatten(1).any(1)
        if targets.device.type != "cpu":
            return cls(None, ~wanted[:, None])
        return cls(None if bool(wanted.all()) else wanted.nonzero().squeeze(1), None)

    def hidden(self, x: Tensor) -> Tensor:
        return self.pick(x) if self.idle is None else x.masked_fill(self.idle, 0.0)

    def pick(self, x: Tensor) -> Tensor:
        if self.index is None:
            return x
        return x[: self.index.shape[0]] if x.stride(0) == 0 else x.index_select(0, self.index)

    def spread(self, x: Tensor, rows: int) -> Tensor:
        return x if self.index is None else x.new_zeros((rows, *x.shape[1:])).index_copy_(0, self.index, x)

    def columns(self, chunks: list[Columns], targets: Tensor, hidden: Tensor, o: Options) -> Columns:
        """The columns of all rows, which are 0 where there is no target."""
        if not chunks:
            zeros = hidden.new_zeros(targets.shape, dtype=compute_dtype(hidden.dtype))
            return zeros, zeros.sum(-1), zeros.sum(-1)
        one = len(chunks) == 1
        log_p, mean_log_p, lse = chunks[0] if one else (torch.cat(column) for column in zip(*chunks, strict=True))
        count = targets.shape[0]
        if o.label_smoothing:
            mean_log_p = self.spread(mean_log_p, count)
        return self.spread(log_p, count), mean_log_p, self.spread(lse, count)


class _Head:
    """hidden @ weight.T + bias, a chunk of rows at a time, in one workspace.

    The products are taken in the dtype of `hidden`, but for float16 on the CPU, which has none to speak of: those are
    4 to 100 times as slow as float32 there.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        if hidden.device.type == "cpu" and hidden.dtype == torch.float16:
            hidden = hidden.float()
        self.hidden = hidden
        self.weight = weight.to(hidden.dtype)  # the one copy there is, of a weight in another dtype
        self.bias = None if bias is None else bias.to(hidden.dtype)
        rows, (vocab, width) = hidden.shape[0], weight.shape
        self.size = config.chunk_rows(rows, vocab, width, hidden.element_size(), hidden.device.type)
        # Rows of the workspace begin at multiples of 32 bytes, which the kernels on a GPU read 16 bytes at a time.
        stride = vocab if hidden.device.type == "cpu" else -(-vocab // 16) * 16
        self.workspace = hidden.new_empty((min(self.size, rows), stride))[:, :vocab]

    def chunks(self) -> list[slice]:
        rows = self.hidden.shape[0]
        return [slice(start, min(start + self.size, rows)) for start in range(0, rows, self.size)]

    def logits(self, rows: slice) -> Tensor:
        """The logits of some rows.  The next call overwrites them."""
        h = _taken(self.hidden, rows)
        out = _taken(self.workspace, slice(0, rows.stop - rows.start))
        if self.bias is None:
            return torch.mm(h, self.weight.T, out=out)
        return torch.addmm(self.bias, h, self.weight.T, out=out)


class _Gradients:
    """The gradients of hidden, weight and bias, from those of the logits of one chunk after the other.

    Those of weight and bias are sums over the chunks: they are kept in float32 and rounded once.
    """

    def __init__(self, head: _Head, dtypes: tuple[torch.dtype, ...], needs: Needs) -> None:
        need_hidden, need_weight, need_bias = needs
        self.head, self.needs, self.dtypes = head, needs, dtypes
        self.empty = True
        new, dtype = head.hidden.new_empty, compute_dtype(head.hidden.dtype)
        self.hidden = new(head.hidden.shape if need_hidden else 0)
        self.weight = new(head.weight.shape if need_weight else 0, dtype=dtype)
        self.bias = new(head.weight.shape[0] if need_bias else 0, dtype=dtype)
        widened = need_weight and dtype != head.hidden.dtype and head.hidden.device.type != "cuda"
        self.wide = new(head.workspace.shape, dtype=dtype) if widened else None

    def add(self, rows: slice, grad: Tensor) -> None:
        need_hidden, need_weight, need_bias = self.needs
        if need_hidden:
            torch.mm(grad, self.head.weight, out=_taken(self.hidden, rows))
        if need_weight:
            self._add_weight(grad, _taken(self.head.hidden, rows))
        if need_bias:
            if self.empty:
                torch.sum(grad, 0, dtype=self.bias.dtype, out=self.bias)
            else:
                self.bias += grad.sum(0, dtype=self.bias.dtype)
        self.empty = False

    def _add_weight(self, grad: Tensor, hidden: Tensor) -> None:
        """The sum is not read where it is still empty, so it need not be zeroed."""
        total = self.weight
        if self.wide is not None:  # only on CUDA has a product a sum wider than its factors
            grad, hidden = self.wide[: grad.shape[0]].copy_(grad), hidden.to(total.dtype)
        if grad.dtype == total.dtype:
            torch.mm(grad.T, hidden, out=total) if self.empty else total.addmm_(grad.T, hidden)
        elif self.empty:
            torch.mm(grad.T, hidden, out_dtype=total.dtype, out=total)
        elif _adds_wider_sums(total.device):
            torch.addmm(total, grad.T, hidden, out_dtype=total.dtype, out=total)
        else:
            total += torch.mm(grad.T, hidden, out_dtype=total.dtype)

    def done(self) -> tuple[Tensor, Tensor, Tensor]:
        grads = self.hidden, self.weight, self.bias
        if self.empty:  # no row has a target
            for grad in grads:
                grad.zero_()
        hidden, weight, bias = (grad.to(dtype) for grad, dtype in zip(grads, self.dtypes, strict=True))
        return hidden, weight, bias


@cache
def _adds_wider_sums(device: torch.device) -> bool:
    """Whether PyTorch on this GPU adds a product of bfloat16 to a float32 sum.

    The first versions with `out_dtype` do not: they ask for a sum in bfloat16, so a product has to be a tensor of its
    own before it is added.
    """
    try:
        one = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
        total = torch.zeros((16, 16), device=device)
        torch.addmm(total, one, one, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True
