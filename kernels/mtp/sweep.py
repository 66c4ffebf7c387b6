"""What the row kernels are made of: the logsumexp of a stretch of logits, the gradient, at the targets and elsewhere.

Exponentials are powers of 2, which is what the hardware has.  The largest logit m is taken off first: z - m has no
rounding where z is close to m, and is never above 0, however large the logits or the fills that mask them.  In one
fma(z, log2 e, -round(m log2 e)) the rounding of m log2 e would be left, which overflows 2^x from |m| = 1.5e9 on.  Every
sum of products is an explicit `fma`, so that the compiler has nothing left to contract in its own way in one kernel and
not in another: a row keeps its bits, split or not.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the largest of no logits: finite, since -inf - -inf is NaN


@triton.jit
def exponential(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh_of(u, inverse):
    """tanh(u inverse), and 1 - tanh^2, each to a few roundings of itself: neither cancels, neither overflows.

    Not libdevice's, which branches; not the hardware's, which is good to 2^-11.
    """
    x = u * inverse
    size = tl.abs(x)
    e = tl.exp2(size * (-2 * LOG2E))
    r = 1 / (1 + e)
    square = x * x
    series = tl.fma(square, 0.01721995882689953, -0.053034693002700806)
    series = tl.fma(square, series, 0.13325712084770203)
    series = tl.fma(square, series, -0.3333313763141632)
    small = tl.fma(size * square, series, size)  # within 2e-8 for |x| <= 1/2
    t = tl.where(size < 0.5, small, (1 - e) * r)
    return tl.where(x < 0, -t, t), 4 * e * r * r


@triton.jit
def capped(u, softcap, inverse):
    """The logits that count: softcap * tanh(u / softcap), or u itself."""
    if softcap is None:
        return u
    else:
        t, _ = tanh_of(u, inverse)
        return tl.fma(t, softcap, 0.0)  # a product that no later sum can be fused with


@triton.jit
def tile_columns(GROUP: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    """Columns of a tile [GROUP, THREADS, VEC]: VEC neighbours for one 16-byte load, then the next thread's.

    In two terms, the thread's own and what is the same for all: added to a pointer one after the other, the second is
    part of the instruction, and no register holds it.
    """
    group = tl.arange(0, GROUP)[:, None, None] * (THREADS * VEC)
    return tl.arange(0, THREADS)[None, :, None] * VEC, group + tl.arange(0, VEC)[None, None, :]


@triton.jit
def read_targets(targets_ptr, stride_k, steps, size, ignore_index, STEPS: tl.constexpr):
    """Targets [STEPS] of one row and context, in int32 and 0 where they are none; which are valid, which are bad."""
    step = tl.arange(0, STEPS)
    y = tl.load(targets_ptr + step.to(tl.int64) * stride_k, mask=step < steps, other=ignore_index)
    valid = (y != ignore_index) & (y >= 0) & (y < size)
    return tl.where(valid, y, 0).to(tl.int32), valid, (y != ignore_index) & ((y < 0) | (y >= size))


@triton.jit
def _load(ptr, first, end, columns, POLICY: tl.constexpr):
    """A tile of raw logits as they lie in memory, -inf behind the end."""
    own, common = columns
    live = own + common < end - first
    return tl.load(ptr + first + own + common, mask=live, other=float("-inf"), eviction_policy=POLICY)


@triton.jit
def _gathered(state, u, live, softcap, inverse, MEAN: tl.constexpr):
    """`state`, each thread's own (largest logit, sum of exp(z - largest), sum of z), with one tile more."""
    largest, total, plain = state
    z = capped(u.to(tl.float32), softcap, inverse)
    if softcap is not None:
        z = tl.where(live, z, float("-inf"))
    top = tl.maximum(largest, tl.max(tl.max(z, 2), 0))
    powers = exponential(z - top[None, :, None])
    total = tl.fma(total, exponential(largest - top), tl.sum(tl.sum(powers, 2), 0))
    if MEAN:
        plain += tl.sum(tl.sum(tl.where(live, z, 0.0), 2), 0)
    return top, total, plain


@triton.jit
def _without(
    segment_ptr, start, end, target, total, top, softcap, inverse,
    PART: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """The sum of the exponentials without the column `target`, from `total`, the sums of the threads.

    The term is in the sum of one thread, whose PART / THREADS columns are added up again.
    """
    thread = (target - start) // VEC % THREADS
    index = tl.arange(0, PART // THREADS)
    column = start + (index // VEC * THREADS + thread) * VEC + index % VEC
    other = (column < end) & (column != target)
    z = capped(tl.load(segment_ptr + column, mask=other, other=0.0).to(tl.float32), softcap, inverse)
    again = tl.sum(tl.where(other, exponential(z - top), 0.0))
    return tl.sum(tl.where(tl.arange(0, THREADS) == thread, 0.0, total)) + again


@triton.jit
def part_state(
    segment_ptr, start, size, y, valid, z_y, softcap, inverse,
    MEAN: tl.constexpr, POLICY: tl.constexpr,
    PART: tl.constexpr, GROUP: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """(largest, total, others, plain) of the logits [start, start + PART) of one segment.

    The largest logit; the sum of the exp(z - largest); that sum without the target that is the largest logit, if one
    is; the sum of the logits.  `others` is summed without that term, not by taking 1 away from total:
    where p -> 1 it is all that is left.
    """
    TILE: tl.constexpr = GROUP * THREADS * VEC
    columns = tile_columns(GROUP, THREADS, VEC)
    own, common = columns
    end = tl.minimum(start + PART, size)
    nothing = tl.zeros([THREADS], tl.float32)
    state = (nothing + LOWEST, nothing, nothing)
    raw = _load(segment_ptr, start, end, columns, POLICY)
    for first in range(start, end, TILE):
        following = _load(segment_ptr, first + TILE, end, columns, POLICY)  # under way meanwhile
        state = _gathered(state, raw, own + common < end - first, softcap, inverse, MEAN)
        raw = following
    largest, total, plain = state
    top = tl.max(largest)
    total *= exponential(largest - top)
    everything = tl.sum(total)
    others = everything
    target = tl.max(tl.where(valid & (y >= start) & (y < end) & (z_y == top), y, -1))
    if target >= 0:
        others = _without(segment_ptr, start, end, target, total, top, softcap, inverse, PART, THREADS, VEC)
    return top, everything, others, tl.sum(plain)


@triton.jit
def joined(state, part):
    """The state of two stretches of a segment.  Parts are always joined one by one, in their order."""
    largest, total, others, plain = state
    part_largest, part_total, part_others, part_plain = part
    top = tl.maximum(largest, part_largest)
    here, there = exponential(largest - top), exponential(part_largest - top)
    later = part_largest > largest  # then the largest logit, and a target that is it, are in the part
    others = tl.fma(tl.where(later, total, others), here, tl.where(later, part_others, part_total) * there)
    return top, tl.fma(total, here, part_total * there), others, plain + part_plain


@triton.jit
def no_state():
    return tl.full([], LOWEST, tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32), tl.zeros([], tl.float32)


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], to a few roundings of itself: 2 artanh(x / (2 + x))."""
    s = x / (2 + x)
    square = s * s
    series = tl.fma(square, 1 / 15, 1 / 13)
    series = tl.fma(square, series, 1 / 11)
    series = tl.fma(square, series, 1 / 9)
    series = tl.fma(square, series, 1 / 7)
    series = tl.fma(square, series, 1 / 5)
    series = tl.fma(square, series, 1 / 3)
    return 2 * tl.fma(s * square, series, s)


@triton.jit
def _minus_expm1(x):
    """1 - exp(x) for x <= 0, to a few roundings of itself."""
    near = tl.maximum(x, -0.5)
    series = tl.fma(near, 1 / 40320, 1 / 5040)
    series = tl.fma(near, series, 1 / 720)
    series = tl.fma(near, series, 1 / 120)
    series = tl.fma(near, series, 1 / 24)
    series = tl.fma(near, series, 1 / 6)
    series = tl.fma(near, series, 1 / 2)
    return tl.where(x > -0.5, -tl.fma(near * near, series, near), 1 - tl.exp2(x * LOG2E))


@triton.jit
def log_probabilities(state, valid, bad, z_y):
    """log p of the targets [STEPS]: 0 where ignored, NaN where bad; and the logsumexp.

    A NaN, a logit of +inf, or none above -inf makes them NaN: the total is NaN, or 0 where it would be 1 and more.
    """
    largest, total, others, _ = state
    log_total = tl.log2(tl.where(total > 0, total, float("nan")))
    log_p = tl.fma(log_total, -LN2, z_y - largest)
    # The largest logit: everything but itself is `others`.  Two that share the first place leave 1 and more.
    first = tl.where(z_y == largest, others, 1.0) < 0.9
    log_p = tl.where(first, -_log1p(tl.minimum(others, 1.0)), log_p)
    log_p = tl.where(valid, log_p, tl.where(bad, float("nan"), 0.0))
    return log_p, tl.fma(log_total, LN2, largest)


@triton.jit
def weights_of(weights_ptr, stride_k, y, valid, bad, STEPS: tl.constexpr):
    """sum_k a_k over the valid targets, NaN with a bad one; for each target the sum of its equals, and of the rest."""
    step = tl.arange(0, STEPS)
    a = tl.load(weights_ptr + step.to(tl.int64) * stride_k, mask=valid, other=0.0).to(tl.float32)
    a = tl.where(bad, float("nan"), a)
    equal = y[:, None] == y[None, :]  # one that is not valid has no weight, whatever it equals
    return tl.sum(a), tl.sum(tl.where(equal, a[None, :], 0.0), 1), tl.sum(tl.where(equal, 0.0, a[None, :]), 1)


@triton.jit
def write_gradient(
    segment_ptr, grad_ptr, start, end, reference, shift, scale, smooth, softcap, inverse,
    GROUP: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """scale 2^fma(z - reference, log2 e, shift) - smooth, for the raw logits, at columns [start, end) of a segment."""
    TILE: tl.constexpr = GROUP * THREADS * VEC
    columns = tile_columns(GROUP, THREADS, VEC)
    own, common = columns
    raw = _load(segment_ptr, start, end, columns, "evict_first")
    for first in range(start, end, TILE):
        following = _load(segment_ptr, first + TILE, end, columns, "evict_first")  # under way meanwhile
        grad = _gradient(raw.to(tl.float32), reference, shift, scale, smooth, softcap, inverse)
        live = own + common < end - first
        grad = grad.to(grad_ptr.dtype.element_ty)
        tl.store(grad_ptr + first + own + common, grad, mask=live, eviction_policy="evict_first")
        raw = following


@triton.jit
def _gradient(u, reference, shift, scale, smooth, softcap, inverse):
    if softcap is None:
        return tl.fma(tl.exp2(tl.fma(u - reference, LOG2E, shift)), scale, -smooth)
    else:
        t, slope = tanh_of(u, inverse)
        z = tl.fma(t, softcap, 0.0)
        return tl.fma(tl.exp2(tl.fma(z - reference, LOG2E, shift)), scale, -smooth) * slope


@triton.jit
def target_gradient(u_y, log_p, lse, total, equal, rest, smoothing, z_loss, size, softcap, inverse):
    """The gradient at the targets, where p and the weights nearly cancel: by 1 - p, in float32."""
    pull = 2 * z_loss * lse * total
    grad = tl.fma(pull + rest, tl.exp2(log_p * LOG2E), -equal * _minus_expm1(log_p))
    grad = tl.fma(smoothing, equal - total / size, grad)
    if softcap is not None:
        _, slope = tanh_of(u_y, inverse)
        grad *= slope
    return grad


@triton.jit
def write_zeros(grad_ptr, start, end, GROUP: tl.constexpr, THREADS: tl.constexpr, VEC: tl.constexpr):
    TILE: tl.constexpr = GROUP * THREADS * VEC
    own, common = tile_columns(GROUP, THREADS, VEC)
    zeros = tl.zeros([GROUP, THREADS, VEC], grad_ptr.dtype.element_ty)
    for first in range(start, end, TILE):
        tl.store(grad_ptr + first + own + common, zeros, mask=own + common < end - first)
