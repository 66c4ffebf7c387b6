"""What the attention kernels share on the device: loads, products, distances, and what is not finite.

Logits are kept in units of log2(e), so that one `exp2` makes a weight of them: t = (scale q k - slope |a - b|) log2(e).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a running maximum starts.  It is finite, so that exp2(t - maximum) is 0 for a t of -inf, and never NaN: a row
# that sees nothing needs no branch, all its weights are 0.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def tile_offsets(stride_t, stride_d, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """[ROWS, BLOCK_D] from the first row of a tile, int32: the launcher sees to it that strides are small enough."""
    return tl.arange(0, ROWS)[:, None] * stride_t + tl.arange(0, BLOCK_D)[None, :] * stride_d


@triton.jit
def load_tile(ptr, offsets, alive, GUARDED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile [R, BLOCK_D]: zeros where `alive` [R] is false, and past the head dimension.

    GUARDED false says that all rows are alive.  What is not loaded cannot be NaN: so are padded keys and rows past the
    end kept out.
    """
    if GUARDED:
        live = alive[:, None]
        if HEAD_DIM != BLOCK_D:
            live = live & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
        tile = tl.load(ptr + offsets, mask=live, other=0.0)
    elif HEAD_DIM == BLOCK_D:
        tile = tl.load(ptr + offsets)
    else:
        tile = tl.load(ptr + offsets, mask=(tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(ptr, offsets, tile, exists, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows of a tile [R, BLOCK_D] that exist, in the dtype of the memory."""
    live = exists[:, None]
    if HEAD_DIM != BLOCK_D:
        live = live & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    tl.store(ptr + offsets, tile.to(ptr.dtype.element_ty), mask=live)


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """a b, accumulated in float32.  UPCAST is for the interpreter, which multiplies bfloat16 wrongly."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def add_product(a, b, total, UPCAST: tl.constexpr):
    """total + a b, where `a` holds weights in float32: the matrix units take them in the dtype of b."""
    if UPCAST:
        b = b.to(tl.float32)
    else:
        a = a.to(b.dtype)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_positions(ptr, offsets, exists, reference, GUARDED: tl.constexpr):
    """Positions relative to `reference`, int64 from whatever integers they are stored as; 0 where there is none."""
    if GUARDED:
        positions = tl.where(exists, tl.load(ptr + offsets, mask=exists, other=0).to(tl.int64) - reference, 0)
    else:
        positions = tl.load(ptr + offsets).to(tl.int64) - reference
    return positions


@triton.jit
def spread_out(positions):
    """Whether those of a tile lie so far from their reference that one float32 is too little for them."""
    return tl.max(tl.abs(positions)) >= 8388608  # 2^23


@triton.jit
def digits(positions, WIDE: tl.constexpr):
    """int64 positions in float32, for `distance`: in base 2^24 where WIDE, from high to low; else rounded, thrice.

    Rounding will do where those of the other side are not spread out: below 2^24 it changes nothing, and beyond 2^24 a
    position is at most twice as large as the distance.  It goes by halves of 32 bits, since GPUs convert 64 bits at
    once at an eighth of the rate.  That rounds twice at most: the upper half beyond 2^56 only, where what the lower one
    loses is nothing, and the lower one, which is then all there is, beyond 2^24.
    """
    small = positions.to(tl.int32)
    upper = ((positions - small.to(tl.int64)) >> 32).to(tl.int32)
    low = upper.to(tl.float32) * 4294967296.0 + small.to(tl.float32)
    high, middle = low, low
    if WIDE:
        low = (positions.to(tl.int32) & 0xFFFFFF).to(tl.float32)
        middle = ((positions >> 24).to(tl.int32) & 0xFFFFFF).to(tl.float32)
        high = ((positions >> 32).to(tl.int32) >> 16).to(tl.float32)
    return high, middle, low


@triton.jit
def distance(a, b, WIDE: tl.constexpr):
    """|a - b| [A, B] of integers given as `digits`, to two roundings, with no 64-bit arithmetic for each pair.

    The digits' differences are exact, and by Horner's rule from the top a rounding comes only where what is left below
    is smaller than it.
    """
    a_high, a_middle, a_low = a
    b_high, b_middle, b_low = b
    apart = a_low[:, None] - b_low[None, :]
    if WIDE:
        above = (a_high[:, None] - b_high[None, :]) * 16777216.0 + (a_middle[:, None] - b_middle[None, :])
        apart = above * 16777216.0 + apart
    return tl.abs(apart)


@triton.jit
def exponent(logits, lse2):
    """logits - lse2, at most 0, and NaN where one is: a weight is at most 1.

    Where all keys are so far away that the logits are huge, a float32 logsumexp has no room for what it is above them.
    """
    return tl.minimum(logits - lse2, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def finite_part(x):
    """x with zeros for what is not finite, since 0 * NaN is NaN."""
    return tl.where(x.to(tl.float32) * 0.0 == 0.0, x, 0.0).to(x.dtype)


@triton.jit
def trace_of_nan(x):
    """[R] of x [R, D]: NaN for each row that holds something not finite, else 0."""
    return tl.sum(x.to(tl.float32) * 0.0, axis=1)
