"""The Triton kernel of `gaussian_rope`: one launch turns q and k, forwards or backwards."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def _turned_by(phase):
    """Cosine and sine of int64 phases in units of 2^-64 turns, float32, within 1e-7.

    Not `tl.sin` and `tl.cos`: for an argument of any size they bring Payne and Hanek's reduction and local memory.
    Nor the hardware's sine alone: it is good to 2^-20.5 = 7e-7 in [-pi, pi], and the whole budget is 4e-7.  The phase
    is a fraction of a turn already, so its top bits are the quarter and the rest is exact; in the eighth of a turn on
    either side of a quarter four terms are within 5e-9.  All of it is done once for all the heads of a token.
    """
    turn = (phase >> 32).to(tl.int32)
    quarter = (turn + 0x20000000) >> 30  # the nearest one: -2, -1, 0 or 1
    u = (turn - (quarter << 30)).to(tl.float32) * 2.3283064365386963e-10  # 2^-32: in turns, |u| <= 1/8
    z = u * u
    sine = u * (6.283185005187988 + z * (-41.34150695800781 + z * (81.57170104980469 - z * 74.61544799804688)))
    cosine = z * (-19.739208221435547 + z * (64.93914031982422 + z * (-85.4231185913086 + z * 58.561214447021484))) + 1
    odd = (quarter & 1) != 0
    cos, sin = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where(((quarter + 1) & 2) != 0, -cos, cos), tl.where((quarter & 2) != 0, -sin, sin)


@triton.jit
def _damping(lods, squares, growth, SIGMA: tl.constexpr):
    """exp(-(s f)^2 / 2), float32 [BLOCK_T, PAIRS].

    With w = block_size^lod, (s f)^2 / 2 * log2(e) is 2^(lod * growth + squares), times 1 - w^-2 where the spread is
    that of a uniform span.  The exponent is summed in units of 2^-32, since its parts are large and cancel; w^-2 is at
    most 1/4 at the levels above 0, so there nothing cancels, and it is taken to be 1 at the others, which spread over
    nothing.  The bounds keep every power of two finite, and so 0 times it is 0.
    """
    exponent = tl.minimum(tl.maximum(lods, -1048576), 1048576) * growth  # beyond 2^20 nothing changes any more
    sum24 = tl.minimum(tl.maximum((exponent[:, None] + squares) >> 8, -127 << 24), 127 << 24).to(tl.int32)
    spread = tl.exp2(sum24.to(tl.float32) * 5.960464477539063e-08)  # 2^-24
    if SIGMA == "uniform":
        grown24 = tl.minimum(tl.maximum(exponent >> 8, 0), 127 << 24).to(tl.int32)
        spread *= 1 - tl.exp2(grown24.to(tl.float32) * -5.960464477539063e-08)[:, None]
    return tl.exp2(-spread)


@triton.jit
def _rotation(
    positions_ptr, lods_ptr, table_ptr, sample, step, live, stride_pb, stride_pt, stride_lb, stride_lt,
    HALF: tl.constexpr, PAIRS: tl.constexpr, LOD_PAIRS: tl.constexpr, SIGMA: tl.constexpr,
):  # fmt: skip
    """Damped cosines and sines [BLOCK_T, 1, PAIRS] of the tokens at [sample, step]."""
    pair = tl.arange(0, PAIRS)
    steps = tl.load(table_ptr + pair, mask=pair < HALF, other=0)[None, :]
    turns = tl.load(positions_ptr + sample * stride_pb + step * stride_pt, mask=live, other=0).to(tl.int64)
    if lods_ptr is None:
        lods = tl.zeros_like(turns)
    else:
        lods = tl.load(lods_ptr + sample * stride_lb + step * stride_lt, mask=live, other=0).to(tl.int64)
    if LOD_PAIRS > 0:
        turns = tl.where(pair[None, :] < HALF - LOD_PAIRS, turns[:, None], lods[:, None])
    else:
        turns = turns[:, None]
    cos, sin = _turned_by(turns * steps)  # the product wraps, which drops the whole turns and nothing else
    if SIGMA != "none":
        squares = tl.load(table_ptr + HALF + pair, mask=pair < HALF, other=0)[None, :]
        damping = _damping(lods, squares, tl.load(table_ptr + 2 * HALF), SIGMA)
        cos *= damping
        sin *= damping
    return cos[:, None, :], sin[:, None, :]


@triton.jit
def _load(ptrs, live, stride_d, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The first and the second members of the pairs of the heads at `ptrs` [BLOCK_T, BLOCK_H, 1], in float32."""
    if INTERLEAVED:  # one contiguous load, taken apart in registers
        channel = tl.arange(0, 2 * PAIRS)[None, None, :].to(tl.int64)
        x = tl.load(ptrs + channel * stride_d, mask=live if HALF == PAIRS else live & (channel < 2 * HALF), other=0.0)
        first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], PAIRS, 2)))
    else:
        pair = tl.arange(0, PAIRS)[None, None, :].to(tl.int64)
        inside = live if HALF == PAIRS else live & (pair < HALF)
        first = tl.load(ptrs + pair * stride_d, mask=inside, other=0.0)
        second = tl.load(ptrs + (pair + HALF) * stride_d, mask=inside, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store(ptrs, live, stride_d, first, second, HALF: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The inverse of `_load`, rounded to the dtype of `ptrs`."""
    first = first.to(ptrs.dtype.element_ty)
    second = second.to(ptrs.dtype.element_ty)
    if INTERLEAVED:
        channel = tl.arange(0, 2 * PAIRS)[None, None, :].to(tl.int64)
        y = tl.reshape(tl.join(first, second), (first.shape[0], first.shape[1], 2 * PAIRS))
        tl.store(ptrs + channel * stride_d, y, mask=live if HALF == PAIRS else live & (channel < 2 * HALF))
    else:
        pair = tl.arange(0, PAIRS)[None, None, :].to(tl.int64)
        inside = live if HALF == PAIRS else live & (pair < HALF)
        tl.store(ptrs + pair * stride_d, first, mask=inside)
        tl.store(ptrs + (pair + HALF) * stride_d, second, mask=inside)


@triton.jit
def _inverse_rms(first, second, eps, HALF: tl.constexpr):
    return tl.rsqrt(tl.sum(first * first + second * second, 2, keep_dims=True) / (2 * HALF) + eps)


@triton.jit
def _norm_backward(d_first, d_second, first, second, eps, HALF: tl.constexpr):
    """The gradient of x / sqrt(mean x^2 + eps) at x = (first, second)."""
    scale = _inverse_rms(first, second, eps, HALF)
    first *= scale
    second *= scale
    mean = tl.sum(d_first * first + d_second * second, 2, keep_dims=True) / (2 * HALF)
    return scale * (d_first - first * mean), scale * (d_second - second * mean)


@triton.jit
def _turn(
    x_ptr, y_ptr, at_ptr, stride_xb, stride_xt, stride_xh, stride_xd, stride_ab, stride_at, stride_ah, stride_ad,
    token, sample, step, live, cos, sin, heads, first_chunk, eps,
    HALF: tl.constexpr, PAIRS: tl.constexpr, BLOCK_H: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Turn the heads of one tensor, every num_programs(1)-th chunk of them; see `rotary_kernel`."""
    x_rows = x_ptr + sample * stride_xb + step * stride_xt
    for chunk in range(first_chunk, tl.cdiv(heads, BLOCK_H), tl.num_programs(1)):
        head = (chunk * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None].to(tl.int64)
        inside = live & (head < heads)
        a, b = _load(x_rows + head * stride_xh, inside, stride_xd, HALF, PAIRS, INTERLEAVED)
        if at_ptr is None:
            if NORM == "before":
                scale = _inverse_rms(a, b, eps, HALF)
                a, b = a * scale, b * scale
            a, b = a * cos - b * sin, b * cos + a * sin
            if NORM == "after":
                scale = _inverse_rms(a, b, eps, HALF)
                a, b = a * scale, b * scale
        else:
            at_rows = at_ptr + sample * stride_ab + step * stride_at
            c, d = _load(at_rows + head * stride_ah, inside, stride_ad, HALF, PAIRS, INTERLEAVED)
            if NORM == "after":
                a, b = _norm_backward(a, b, c * cos - d * sin, d * cos + c * sin, eps, HALF)
            a, b = a * cos + b * sin, b * cos - a * sin
            if NORM == "before":
                a, b = _norm_backward(a, b, c, d, eps, HALF)
        if y_ptr is None:
            _store(x_rows + head * stride_xh, inside, stride_xd, a, b, HALF, PAIRS, INTERLEAVED)
        else:
            _store(y_ptr + (token * heads + head) * (2 * HALF), inside, 1, a, b, HALF, PAIRS, INTERLEAVED)


# What changes with the batch: no kernel of its own for each value.
_VARYING = ["stride_pb", "stride_pt", "stride_lb", "stride_lt", "tokens", "length", "heads_q", "heads_k", "eps"]


@triton.jit(do_not_specialize=_VARYING)
def rotary_kernel(
    q_ptr, k_ptr, q_out_ptr, k_out_ptr, q_at_ptr, k_at_ptr, positions_ptr, lods_ptr, table_ptr,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_qab, stride_qat, stride_qah, stride_qad, stride_kab, stride_kat, stride_kah, stride_kad,
    stride_pb, stride_pt, stride_lb, stride_lt, tokens, length, heads_q, heads_k, eps,
    HALF: tl.constexpr, PAIRS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    LOD_PAIRS: tl.constexpr, SIGMA: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Turn pair j of every head of a token: y = g (x1 cos t - x2 sin t, x2 cos t + x1 sin t), t = position * f_j.

    q [B, T, Hq, D] and k [B, T, Hk, D] at any strides, into contiguous outputs of that shape, or over themselves where
    the outputs are None.  PAIRS is HALF = D / 2 padded to a power of two.  `table` int64 [2 HALF + 1]: f_j in units of
    2^-64 turns, negative to turn the other way, which is also the derivative; then what the damping
    g = exp(-(s f_j)^2 / 2) needs (see `_damping`).  The last LOD_PAIRS pairs turn by the level.

    NORM divides a head by its root mean square `before` or `after` the rotation.  With `at` the launch is the
    derivative of that: q and k are gradients, `at` is where it is taken.

    Grid: (ceil(B T / BLOCK_T), G).  A program makes the cosines of BLOCK_T tokens once and goes over their heads,
    BLOCK_H at a time; G programs share the heads of a token where tokens are few.  No number depends on G or on B: a
    head is one row of one tile, whichever program has it.  The sum of a norm does depend on how the compiler spreads
    a tile over threads, which may differ between the variants it compiles: in place or not, aligned or not.
    Bytes: q and k once in and once out (and `at` once in), 4 to 16 a token of positions and levels.
    """
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = token < tokens
    sample = (token // length).to(tl.int64)
    step = (token % length).to(tl.int64)
    cos, sin = _rotation(
        positions_ptr, lods_ptr, table_ptr, sample, step, live, stride_pb, stride_pt, stride_lb, stride_lt,
        HALF, PAIRS, LOD_PAIRS, SIGMA,
    )  # fmt: skip
    token = token.to(tl.int64)[:, None, None]
    sample = sample[:, None, None]
    step = step[:, None, None]
    live = live[:, None, None]
    groups = tl.num_programs(1)
    group = tl.program_id(1)
    _turn(
        q_ptr, q_out_ptr, q_at_ptr, stride_qb, stride_qt, stride_qh, stride_qd, stride_qab, stride_qat, stride_qah,
        stride_qad, token, sample, step, live, cos, sin, heads_q, group, eps,
        HALF, PAIRS, BLOCK_H, INTERLEAVED, NORM,
    )  # fmt: skip
    group = (group + groups - tl.cdiv(heads_q, BLOCK_H) % groups) % groups  # on from where the chunks of q ended
    _turn(
        k_ptr, k_out_ptr, k_at_ptr, stride_kb, stride_kt, stride_kh, stride_kd, stride_kab, stride_kat, stride_kah,
        stride_kad, token, sample, step, live, cos, sin, heads_k, group, eps,
        HALF, PAIRS, BLOCK_H, INTERLEAVED, NORM,
    )  # fmt: skip
