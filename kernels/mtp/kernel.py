"""The Triton kernels of the multi-token loss over rows of logits: in one launch, or split over the vocabulary.

Where rows are many, `rows_kernel` does a row and context in one program: one sweep from memory for the logsumexp, one
from the second-level cache for the gradient.  Where they are too few to fill the GPU and the vocabulary is large,
`parts_kernel` sweeps stretches of a fixed length, `combine_kernel` joins them, `gradient_kernel` has a program for each
stretch.  Both ways do the same sums in the same order, so that a row's results do not depend on its company.

`layout_ptr` int32: where the segments of the C contexts begin [C + 1], the first of the parts of each [C + 1], and the
context of each part.  None with one context, whose segment begins at 0 and has `width` columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .sweep import (
    LOG2E,
    capped,
    joined,
    log_probabilities,
    no_state,
    part_state,
    read_targets,
    target_gradient,
    weights_of,
    write_gradient,
    write_zeros,
)


@triton.jit
def _segment(logits_ptr, layout_ptr, row, context, stride_n, width, ALIGN: tl.constexpr):
    """(pointer to the segment of a row and context, its size); what is a multiple of ALIGN is said to be one."""
    offset, size = row * stride_n, width
    if layout_ptr is not None:
        begin = tl.load(layout_ptr + context)
        size = tl.load(layout_ptr + context + 1) - begin
        offset += begin
    return logits_ptr + tl.multiple_of(offset, ALIGN), size


@triton.jit
def _part(layout_ptr, program, contexts, width, PART: tl.constexpr):
    """(row, context, start) of a program for each row and part: the parts of a row lie side by side."""
    if layout_ptr is None:
        parts = tl.cdiv(width, PART)
        return (program // parts).to(tl.int64), 0, program % parts * PART
    else:
        parts = tl.load(layout_ptr + 2 * contexts + 1)
        part = program % parts
        context = tl.load(layout_ptr + 2 * contexts + 2 + part).to(tl.int64)
        return (program // parts).to(tl.int64), context, (part - tl.load(layout_ptr + contexts + 1 + context)) * PART


@triton.jit
def _store_columns(log_p_ptr, mean_ptr, lse_ptr, slot, log_p, mean, lse, steps, STEPS: tl.constexpr):
    step = tl.arange(0, STEPS)
    tl.store(log_p_ptr + slot * steps + step, log_p, mask=step < steps)
    tl.store(lse_ptr + slot, lse)
    if mean_ptr is not None:
        tl.store(mean_ptr + slot, mean)


# What changes with the batch and the options: no kernel of its own for each value.
_TARGETS = ["stride_tn", "stride_tc", "stride_tk", "ignore_index", "contexts", "steps"]
_OPTIONS = ["stride_wn", "stride_wc", "stride_wk", "softcap", "inverse", "smoothing", "z_loss"]


@triton.jit(do_not_specialize=_TARGETS + _OPTIONS)
def rows_kernel(
    logits_ptr, targets_ptr, weights_ptr, layout_ptr, log_p_ptr, mean_ptr, lse_ptr,
    stride_n, stride_tn, stride_tc, stride_tk, stride_wn, stride_wc, stride_wk,
    contexts, steps, width, ignore_index, softcap, inverse, smoothing, z_loss,
    STEPS: tl.constexpr, PART: tl.constexpr, GROUP: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """log p of K targets, its mean over the vocabulary and lse of a row and context; the gradient over the logits.

    logits [N, sum V], rows `stride_n` apart; targets int64 [N, C, K] and weights float32 [N, C, K] at any strides;
    log_p [N, C, K], mean and lse [N, C], float32.  The gradient, for the weight of each entry in the loss, is written
    over the logits where there are weights.

    Grid: a program for each row and context.  STEPS is K padded to a power of two.  Bytes: each logit once in; with
    the gradient once more, from the cache, and once out.  A row and context without targets is not read.
    """
    slot = tl.program_id(0).to(tl.int64)
    row, context = (tl.program_id(0) // contexts).to(tl.int64), (tl.program_id(0) % contexts).to(tl.int64)
    segment_ptr, size = _segment(logits_ptr, layout_ptr, row, context, stride_n, width, ALIGN)
    targets_ptr += row * stride_tn + context * stride_tc
    y, valid, bad = read_targets(targets_ptr, stride_tk, steps, size, ignore_index, STEPS)
    if tl.max((valid | bad).to(tl.int32)) > 0:
        u_y = tl.load(segment_ptr + y, mask=valid, other=0.0).to(tl.float32)
        z_y = capped(u_y, softcap, inverse)
        state = no_state()
        for start in range(0, size, PART):
            part = part_state(
                segment_ptr, start, size, y, valid, z_y, softcap, inverse,
                mean_ptr is not None, "" if weights_ptr is None else "evict_last", PART, GROUP, THREADS, VEC,
            )  # fmt: skip
            state = joined(state, part)
        log_p, lse = log_probabilities(state, valid, bad, z_y)
        _store_columns(log_p_ptr, mean_ptr, lse_ptr, slot, log_p, state[3] / size - lse, lse, steps, STEPS)
        if weights_ptr is not None:
            weights_ptr += row * stride_wn + context * stride_wc
            total, equal, rest = weights_of(weights_ptr, stride_wk, y, valid, bad, STEPS)
            scale = tl.fma(2 * z_loss * lse, total, total) / state[1]
            at_targets = target_gradient(
                u_y, log_p, lse, total, equal, rest, smoothing, z_loss, size, softcap, inverse
            )  # fmt: skip
            tl.debug_barrier()  # all have read the logits of the targets
            write_gradient(
                segment_ptr, segment_ptr, 0, size, state[0], 0.0, scale, smoothing * total / size, softcap, inverse,
                GROUP, THREADS, VEC,
            )  # fmt: skip
            tl.debug_barrier()  # what the sweep wrote at the targets is overwritten
            tl.store(segment_ptr + y, at_targets.to(logits_ptr.dtype.element_ty), mask=valid)
    else:
        _store_columns(log_p_ptr, mean_ptr, lse_ptr, slot, tl.zeros([STEPS], tl.float32), 0.0, 0.0, steps, STEPS)
        if weights_ptr is not None:
            write_zeros(segment_ptr, 0, size, GROUP, THREADS, VEC)


@triton.jit(do_not_specialize=[*_TARGETS, "softcap", "inverse"])
def parts_kernel(
    logits_ptr, targets_ptr, layout_ptr, states_ptr,
    stride_n, stride_tn, stride_tc, stride_tk, contexts, steps, width, ignore_index, softcap, inverse,
    MEAN: tl.constexpr, STEPS: tl.constexpr, PART: tl.constexpr, GROUP: tl.constexpr, THREADS: tl.constexpr,
    VEC: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """The state of `part_state` of each row and part, float32 [N, parts, 4].

    Grid: a program for each.  Bytes: each logit once in.  A row and context without targets is not read.
    """
    program = tl.program_id(0)
    row, context, start = _part(layout_ptr, program, contexts, width, PART)
    segment_ptr, size = _segment(logits_ptr, layout_ptr, row, context, stride_n, width, ALIGN)
    targets_ptr += row * stride_tn + context * stride_tc
    y, valid, bad = read_targets(targets_ptr, stride_tk, steps, size, ignore_index, STEPS)
    if tl.max((valid | bad).to(tl.int32)) > 0:
        z_y = capped(tl.load(segment_ptr + y, mask=valid, other=0.0).to(tl.float32), softcap, inverse)
        largest, total, others, plain = part_state(
            segment_ptr, start, size, y, valid, z_y, softcap, inverse, MEAN, "", PART, GROUP, THREADS, VEC,
        )  # fmt: skip
        states_ptr += program.to(tl.int64) * 4
        tl.store(states_ptr, largest)
        tl.store(states_ptr + 1, total)
        tl.store(states_ptr + 2, others)
        tl.store(states_ptr + 3, plain)


@triton.jit(do_not_specialize=[*_TARGETS, "softcap", "inverse"])
def combine_kernel(
    logits_ptr, targets_ptr, layout_ptr, states_ptr, log_p_ptr, mean_ptr, lse_ptr, softmax_ptr,
    stride_n, stride_tn, stride_tc, stride_tk, contexts, steps, width, ignore_index, softcap, inverse,
    STEPS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The results of `rows_kernel` from the states of the parts, joined in their order.

    `softmax` float32 [N, C, 2]: the largest logit and the sum, which the gradient over the logits needs.
    Grid: a program for each row and context.
    """
    slot = tl.program_id(0).to(tl.int64)
    row, context = (tl.program_id(0) // contexts).to(tl.int64), (tl.program_id(0) % contexts).to(tl.int64)
    segment_ptr, size = _segment(logits_ptr, layout_ptr, row, context, stride_n, width, 1)
    targets_ptr += row * stride_tn + context * stride_tc
    y, valid, bad = read_targets(targets_ptr, stride_tk, steps, size, ignore_index, STEPS)
    if tl.max((valid | bad).to(tl.int32)) > 0:
        parts, first = tl.cdiv(width, PART), 0
        if layout_ptr is not None:
            parts = tl.load(layout_ptr + 2 * contexts + 1)
            first = tl.load(layout_ptr + contexts + 1 + context)
        states_ptr += (row * parts + first) * 4
        z_y = capped(tl.load(segment_ptr + y, mask=valid, other=0.0).to(tl.float32), softcap, inverse)
        state = no_state()
        for part in range(0, tl.cdiv(size, PART)):
            at = states_ptr + part * 4
            state = joined(state, (tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)))
        log_p, lse = log_probabilities(state, valid, bad, z_y)
        _store_columns(log_p_ptr, mean_ptr, lse_ptr, slot, log_p, state[3] / size - lse, lse, steps, STEPS)
        if softmax_ptr is not None:
            tl.store(softmax_ptr + slot * 2, state[0])
            tl.store(softmax_ptr + slot * 2 + 1, state[1])
    else:
        _store_columns(log_p_ptr, mean_ptr, lse_ptr, slot, tl.zeros([STEPS], tl.float32), 0.0, 0.0, steps, STEPS)


@triton.jit
def _softmax_from(z_y, valid, log_p, lse):
    """(r, s, D) for p_v = 2^fma(z_v - r, log2 e, s) / D, from what a forward pass kept.

    lse alone is known to a rounding of itself, which at large logits is much in p.  A target's logit less its log p
    is lse too, and known to a rounding of the log p.  The best of both: the most likely target, or lse, which is at
    least the largest logit.  So where all targets are unlikely by millions, p is as exact as float32 has lse.
    """
    likely = tl.max(tl.where(valid, log_p, float("-inf")))
    z = tl.max(tl.where(valid, z_y, float("-inf")))
    by_target = tl.abs(likely) < tl.minimum(tl.abs(lse), 1 << 22)  # a rounding of more would be all of p, or more
    less = tl.where(by_target, likely, 0.0)
    shift = less * LOG2E
    return tl.where(by_target, z, lse), shift, tl.exp2(tl.fma(-less, LOG2E, shift))


@triton.jit(do_not_specialize=_TARGETS + _OPTIONS)
def gradient_kernel(
    logits_ptr, grad_ptr, targets_ptr, weights_ptr, layout_ptr, log_p_ptr, lse_ptr, softmax_ptr,
    stride_n, stride_gn, stride_tn, stride_tc, stride_tk, stride_wn, stride_wc, stride_wk,
    contexts, steps, width, ignore_index, softcap, inverse, smoothing, z_loss,
    STEPS: tl.constexpr, PART: tl.constexpr, GROUP: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits, into `grad` or, with the `softmax` of `combine_kernel`, over them.

    Grid: a program for each row and part.  Bytes: each logit once in and once out.  The logits of a row and context
    without targets are not read, and their gradient is 0.
    """
    row, context, start = _part(layout_ptr, tl.program_id(0), contexts, width, PART)
    segment_ptr, size = _segment(logits_ptr, layout_ptr, row, context, stride_n, width, ALIGN)
    grads_ptr, _ = _segment(grad_ptr, layout_ptr, row, context, stride_gn, width, ALIGN)
    end = tl.minimum(start + PART, size)
    targets_ptr += row * stride_tn + context * stride_tc
    y, valid, bad = read_targets(targets_ptr, stride_tk, steps, size, ignore_index, STEPS)
    if tl.max((valid | bad).to(tl.int32)) > 0:
        slot, step = row * contexts + context, tl.arange(0, STEPS)
        log_p = tl.load(log_p_ptr + slot * steps + step, mask=valid, other=0.0)
        lse = tl.load(lse_ptr + slot)
        if softmax_ptr is None:
            u_y = tl.load(segment_ptr + y, mask=valid, other=0.0).to(tl.float32)
            reference, shift, everything = _softmax_from(capped(u_y, softcap, inverse), valid, log_p, lse)
        else:  # the other parts may have been overwritten
            u_y = tl.load(segment_ptr + y, mask=valid & (y >= start) & (y < end), other=0.0).to(tl.float32)
            reference, shift, everything = tl.load(softmax_ptr + slot * 2), 0.0, tl.load(softmax_ptr + slot * 2 + 1)
        weights_ptr += row * stride_wn + context * stride_wc
        total, equal, rest = weights_of(weights_ptr, stride_wk, y, valid, bad, STEPS)
        scale = tl.fma(2 * z_loss * lse, total, total) / everything
        at_targets = target_gradient(u_y, log_p, lse, total, equal, rest, smoothing, z_loss, size, softcap, inverse)
        if softmax_ptr is not None:
            tl.debug_barrier()  # all have read the logits of the targets
        write_gradient(
            segment_ptr, grads_ptr, start, end, reference, shift, scale, smoothing * total / size, softcap, inverse,
            GROUP, THREADS, VEC,
        )  # fmt: skip
        tl.debug_barrier()  # what the sweep wrote at the targets is overwritten
        here = valid & (y >= start) & (y < end)
        tl.store(grads_ptr + y, at_targets.to(grad_ptr.dtype.element_ty), mask=here)
    else:
        write_zeros(grads_ptr, start, end, GROUP, THREADS, VEC)
