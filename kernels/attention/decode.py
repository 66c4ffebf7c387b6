"""A few queries against a long cache: the keys are split over programs, whose results a second kernel puts together.

The split is into chunks of a fixed length, so that what a row gets does not depend on how many others there are.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .forward import attend, softmax_start
from .tiles import LN2, LOG2E, LOWEST, load_positions, load_tile, spread_out, store_tile


@triton.jit(
    do_not_specialize=["kv_heads_in_batch", "queries", "keys", "splits", "stride_pqb", "stride_pkb", "stride_mb"]
)
def decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    positions_q_ptr,
    positions_k_ptr,
    slopes_ptr,
    mask_ptr,
    totals_ptr,
    weights_ptr,
    largest_ptr,
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
    kv_heads_in_batch,
    kv_heads,
    group,
    queries,
    keys,
    splits,
    scale2,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The state of `attend` after one chunk of keys alone: float32 [B Hk, Tq group, splits, D], the others without D.

    The queries of all the heads that share a key head are the rows of one tile, row r being query r // group.

    Grid: a program for each chunk, BLOCK_M rows and key head, on one axis.  k and v are read once (for each BLOCK_M
    rows), which is nearly all there is to do.
    """
    program = tl.program_id(0)
    sample_head, split = (program % kv_heads_in_batch).to(tl.int64), program // kv_heads_in_batch % splits
    batch, kv_head = sample_head // kv_heads, sample_head % kv_heads
    row = program // kv_heads_in_batch // splits * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    exists = row < queries * group
    query, head = row // group, kv_head * group + row % group
    offsets = (query.to(tl.int64) * stride_qt + head * stride_qh)[:, None] + dims[None, :] * stride_qd
    q = load_tile(q_ptr + batch * stride_qb, offsets, exists, True, HEAD_DIM, BLOCK_D)
    slope, reference, positions_q = None, None, None
    if slopes_ptr is not None:
        slope = (tl.load(slopes_ptr + head, mask=exists, other=0.0).to(tl.float32) * LOG2E)[:, None]
        positions_q_ptr += batch * stride_pqb
        positions_k_ptr += batch * stride_pkb
        reference = tl.load(positions_q_ptr).to(tl.int64)
        positions_q = load_positions(positions_q_ptr, query * stride_pqt, exists, reference, True)
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    begin = split * CHUNK
    end = tl.minimum(begin + CHUNK, keys)
    common = end
    if CAUSAL:
        common = tl.minimum(end, keys - queries + 1)
    common = begin + tl.maximum(common - begin, 0) // BLOCK_N * BLOCK_N
    if slopes_ptr is not None:
        common = tl.where(spread_out(positions_q), begin, common)
    state = softmax_start(BLOCK_M, BLOCK_D)
    for masked in tl.static_range(2):
        state = attend(
            state,
            (q, query + (keys - queries), positions_q, slope, reference),
            (k_ptr, v_ptr, positions_k_ptr, mask_ptr),
            (stride_kt, stride_kd, stride_vt, stride_vd, stride_pkt, stride_mt),
            common if masked else begin,
            end if masked else common,
            keys,
            scale2,
            masked == 1,
            CAUSAL,
            HEAD_DIM,
            BLOCK_N,
            None,
            BLOCK_D,
            UPCAST,
        )
    total, weight, largest = state
    slot = (sample_head * queries * group + row) * splits + split
    store_tile(totals_ptr, slot[:, None] * HEAD_DIM + dims[None, :], total, exists, HEAD_DIM, BLOCK_D)
    tl.store(weights_ptr + slot, weight, mask=exists)
    tl.store(largest_ptr + slot, largest, mask=exists)


@triton.jit(do_not_specialize=["queries", "splits"])
def combine_kernel(
    totals_ptr,
    weights_ptr,
    largest_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    heads,
    group,
    queries,
    splits,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out and lse from the states of all chunks, brought to their common largest logit and added in their order.

    Grid: one program for each row of `decode_kernel`.  It reads splits (D + 2) floats.  Chunks in which a row saw
    nothing add exact zeros, so that keys beyond the last visible one change no bit.
    """
    row = tl.program_id(0).to(tl.int64)  # of [B, Hk, Tq, group]
    query, batch = row // group % queries, row // (heads * queries)
    head = row // (queries * group) % (heads // group) * group + row % group
    chunks, dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    largest = tl.full([BLOCK_S], LOWEST, tl.float32)
    for first in tl.range(0, splits, BLOCK_S):
        index = first + chunks
        largest = tl.maximum(largest, tl.load(largest_ptr + row * splits + index, mask=index < splits, other=LOWEST))
    top, weight = tl.max(largest), 0.0
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(0, splits, BLOCK_S):
        slot, exists = row * splits + first + chunks, first + chunks < splits
        share = tl.exp2(tl.load(largest_ptr + slot, mask=exists, other=float("-inf")) - top)
        weight += tl.sum(share * tl.load(weights_ptr + slot, mask=exists, other=0.0))
        offsets = slot[:, None] * HEAD_DIM + dims[None, :]
        total += tl.sum(share[:, None] * load_tile(totals_ptr, offsets, exists, True, HEAD_DIM, BLOCK_D), axis=0)
    weight += tl.sum(total * 0.0)  # from here on as in `softmax_end`
    nothing, share = weight == 0.0, 1.0
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        largest_chunk, top = top, tl.maximum(top, sink)
        share = tl.exp2(largest_chunk - top)
        weight = weight * share + tl.exp2(sink - top)
    out = total * tl.where(nothing, 0.0, share / weight)
    start = ((batch * queries + query) * heads + head) * HEAD_DIM
    tl.store(out_ptr + start + dims, out.to(out_ptr.dtype.element_ty), mask=dims < HEAD_DIM)
    tl.store(lse_ptr + (batch * heads + head) * queries + query, (top + tl.log2(weight)) * LN2)
