"""Flash attention, forward: the softmax of each row built up over tiles of keys, which never exist together."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .tiles import (
    LN2,
    LOG2E,
    LOWEST,
    add_product,
    digits,
    distance,
    finite_part,
    load_positions,
    load_tile,
    product,
    spread_out,
    store_tile,
    tile_offsets,
    trace_of_nan,
)


@triton.jit
def attend(
    state,
    rows,
    pointers,
    strides,
    begin,
    end,
    keys,
    scale2,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Let some rows see the keys [begin, end) of their sample and head, BLOCK_N at a time.

    STAGES is how far its loads run ahead, where not as far as the launch says.

    The state is (total [M, D], weight [M], largest [M]): with m the largest logit so far, the sums of exp2(t - m) v and
    of exp2(t - m).  A tile of logits t [M, N] moves m to m' and scales both sums by exp2(m - m').

    MASKED says that these tiles hold keys that some row must not see: past its last one, or past the end.  There a key
    which is not finite may stand beside rows that do not see it, and 0 * NaN is NaN: the product with v takes its
    finite part, and the rows that do see it become NaN through their logits.  In other tiles every row sees every key
    that is not padding, and what is not finite gets to all of them by itself.  One case is left to IEEE arithmetic: an
    infinite k whose product with q is -inf is a key without weight, where the reference says NaN.
    """
    total, weight, largest = state
    q, last_key, positions_q, slope, reference = rows
    k_ptr, v_ptr, positions_ptr, mask_ptr = pointers
    stride_kt, stride_kd, stride_vt, stride_vd, stride_pt, stride_mt = strides
    GUARDED: tl.constexpr = MASKED or mask_ptr is not None
    columns = tl.arange(0, BLOCK_N)
    offsets_k = tile_offsets(stride_kt, stride_kd, BLOCK_N, BLOCK_D)
    offsets_v = tile_offsets(stride_vt, stride_vd, BLOCK_N, BLOCK_D)
    for first in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        start = tl.cast(first, tl.int64)
        index = first + columns
        exists = index < keys
        alive = exists
        if mask_ptr is not None:
            alive = tl.load(mask_ptr + start * stride_mt + columns * stride_mt, mask=exists, other=0) != 0
        k = load_tile(k_ptr + start * stride_kt, offsets_k, alive, GUARDED, HEAD_DIM, BLOCK_D)
        logits = product(q, tl.trans(k), UPCAST) * scale2
        if slope is not None:
            positions = load_positions(
                positions_ptr + start * stride_pt, columns * stride_pt, exists, reference, MASKED
            )
            logits -= slope * distance(digits(positions_q, MASKED), digits(positions, MASKED), MASKED)
        v = load_tile(v_ptr + start * stride_vt, offsets_v, alive, GUARDED, HEAD_DIM, BLOCK_D)
        if MASKED:
            logits += trace_of_nan(v)[None, :]
            v = finite_part(v)
        if CAUSAL and MASKED:
            logits = tl.where(index[None, :] <= last_key[:, None], logits, float("-inf"))
        if GUARDED:
            logits = tl.where(alive[None, :], logits, float("-inf"))
        before = largest
        largest = tl.maximum(before, tl.max(logits, axis=1))
        p = tl.exp2(logits - largest[:, None])
        decay = tl.exp2(before - largest)
        weight = weight * decay + tl.sum(p, axis=1)
        total = add_product(p, v, total * decay[:, None], UPCAST)
    return total, weight, largest


@triton.jit
def softmax_start(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """The state of rows that have seen nothing."""
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    largest = tl.full([BLOCK_M], LOWEST, tl.float32)
    return total, weight, largest


@triton.jit
def softmax_end(state, sinks_ptr, head):
    """(out [M, D], lse [M]) of a state: NaN where a value was not finite, 0 where there was nothing.

    The sink comes in here, once: where there was nothing out is 0 even if the sink is not finite, and lse the sink, or
    -inf without one.
    """
    total, weight, largest = state
    weight += trace_of_nan(total)
    nothing, share = weight == 0.0, 1.0
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        top = tl.maximum(largest, sink)
        share = tl.exp2(largest - top)
        weight, largest = weight * share + tl.exp2(sink - top), top
    out = total * tl.where(nothing, 0.0, share / weight)[:, None]
    return out, (largest + tl.log2(weight)) * LN2


@triton.jit(do_not_specialize=["batch_heads", "queries", "keys", "stride_pqb", "stride_pkb", "stride_mb"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_q_ptr,
    positions_k_ptr,
    slopes_ptr,
    sinks_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kb,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vb,
    stride_vt,
    stride_vh,
    stride_vd,
    stride_pqb,
    stride_pqt,
    stride_pkb,
    stride_pkt,
    stride_mb,
    stride_mt,
    batch_heads,
    heads,
    group,
    queries,
    keys,
    scale2,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
    EDGE_STAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out [B, Tq, Hq, D] and lse [B, Hq, Tq] of q [B, Tq, Hq, D], k and v [B, Tk, Hk, D].

        s_ij = scale q_i k_j - slope |pos_i - pos_j|,   lse_i = log(sum_j exp(s_ij) + exp(sink))
        out_i = sum_j exp(s_ij - lse_i) v_j

    Grid: one program for every BLOCK_M queries of a head, on one axis, the tiles that see most keys first.
    Work: 4 D operations and one exp2 a pair.  q is read and out written once, k and v once per tile of queries, from
    the L2 cache mostly; the bias costs one position a key and tile.
    """
    program = tl.program_id(0)
    tile = program // batch_heads
    if CAUSAL:
        tile = tl.cdiv(queries, BLOCK_M) - 1 - tile
    head = program % batch_heads % heads
    batch, kv_head = (program % batch_heads // heads).to(tl.int64), (head // group).to(tl.int64)
    start = (tile * BLOCK_M).to(tl.int64)
    index = tl.arange(0, BLOCK_M)
    row = tile * BLOCK_M + index
    exists = row < queries
    q_ptr += batch * stride_qb + head.to(tl.int64) * stride_qh + start * stride_qt
    q = load_tile(q_ptr, tile_offsets(stride_qt, stride_qd, BLOCK_M, BLOCK_D), exists, True, HEAD_DIM, BLOCK_D)

    last_key = row + (keys - queries)  # where causal: the queries are the last of the keys
    common, end = keys, keys
    if CAUSAL:
        common = tl.minimum(tile * BLOCK_M + (keys - queries) + 1, keys)
        end = tl.minimum(tile * BLOCK_M + (keys - queries) + BLOCK_M, keys)
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    strides = (stride_kt, stride_kd, stride_vt, stride_vd, stride_pkt, stride_mt)
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb
    common = common // BLOCK_N * BLOCK_N
    slope, reference, positions_q = None, None, None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
        positions_q_ptr += batch * stride_pqb + start * stride_pqt
        positions_k_ptr += batch * stride_pkb
        reference = tl.load(positions_q_ptr).to(tl.int64)
        positions_q = load_positions(positions_q_ptr, index * stride_pqt, exists, reference, True)
        common = tl.where(spread_out(positions_q), 0, common)
    rows = (q, last_key, positions_q, slope, reference)
    pointers = (k_ptr, v_ptr, positions_k_ptr, mask_ptr)
    state = softmax_start(BLOCK_M, BLOCK_D)
    for masked in tl.static_range(2):
        state = attend(
            state,
            rows,
            pointers,
            strides,
            common if masked else 0,
            end if masked else common,
            keys,
            scale2,
            masked == 1,
            CAUSAL,
            HEAD_DIM,
            BLOCK_EDGE if masked else BLOCK_N,
            EDGE_STAGES if masked else None,
            BLOCK_D,
            UPCAST,
        )
    out, lse = softmax_end(state, sinks_ptr, head)
    stride_ot = heads * HEAD_DIM
    out_ptr += (batch * queries + start) * stride_ot + head * HEAD_DIM
    store_tile(out_ptr, tile_offsets(stride_ot, 1, BLOCK_M, BLOCK_D), out, exists, HEAD_DIM, BLOCK_D)
    tl.store(lse_ptr + (batch * heads + head) * queries + row, lse, mask=exists)
