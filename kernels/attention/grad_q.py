"""Flash attention, backward, by queries: the gradient of q.

It mirrors the forward, with the weights from the logsumexp.  Taking the weights apart once more costs less than sums
shared between programs would, which need atomic operations, in an order that differs each time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .tiles import (
    LOG2E,
    add_product,
    digits,
    distance,
    exponent,
    finite_part,
    load_positions,
    load_tile,
    product,
    spread_out,
    store_tile,
    tile_offsets,
)


@triton.jit
def add_grad_q(
    grad_q,
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
    """Add what the keys [begin, end) send to a tile of rows.  MASKED and STAGES are those of the forward's `attend`."""
    q, grad, lse2, delta, last_key, positions_q, slope, reference = rows
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
        seen = exists[None, :]
        alive = exists
        if mask_ptr is not None:
            alive = tl.load(mask_ptr + start * stride_mt + columns * stride_mt, mask=exists, other=0) != 0
            seen = alive[None, :]
        if CAUSAL and MASKED:
            seen = seen & (index[None, :] <= last_key[:, None])
        k = load_tile(k_ptr + start * stride_kt, offsets_k, alive, GUARDED, HEAD_DIM, BLOCK_D)
        v = load_tile(v_ptr + start * stride_vt, offsets_v, alive, GUARDED, HEAD_DIM, BLOCK_D)
        logits = product(q, tl.trans(k), UPCAST) * scale2
        if slope is not None:
            positions = load_positions(
                positions_ptr + start * stride_pt, columns * stride_pt, exists, reference, MASKED
            )
            logits -= slope * distance(digits(positions_q, MASKED), digits(positions, MASKED), MASKED)
        if GUARDED:
            logits = tl.where(seen, logits, float("-inf"))
        p = tl.exp2(exponent(logits, lse2[:, None]))
        grad_s = p * (product(grad, tl.trans(v), UPCAST) - delta[:, None])
        if MASKED:
            grad_s = tl.where(seen, grad_s, 0.0)
            k = finite_part(k)
        grad_q = add_product(grad_s, k, grad_q, UPCAST)
    return grad_q


@triton.jit(do_not_specialize=["batch_heads", "queries", "keys", "stride_pqb", "stride_pkb", "stride_mb"])
def grad_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse2_ptr,
    delta_ptr,
    positions_q_ptr,
    positions_k_ptr,
    slopes_ptr,
    mask_ptr,
    grad_q_ptr,
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
    stride_gb,
    stride_gt,
    stride_gh,
    stride_gd,
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
    scale,
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
    """dQ [B, Tq, Hq, D] = scale dS k, with P = exp(s - lse) and dS = P (dO v - delta).

    Grid: one program for every BLOCK_M queries of a head, on one axis, the tiles that see most keys first.
    Work: 6 D operations and one exp2 a pair.  q and dO are read and dQ is written once, k and v once per tile of rows.
    """
    program = tl.program_id(0)
    tile = program // batch_heads
    if CAUSAL:
        tile = tl.cdiv(queries, BLOCK_M) - 1 - tile
    head = (program % batch_heads % heads).to(tl.int64)
    batch, kv_head = (program % batch_heads // heads).to(tl.int64), head // group
    start, index = (tile * BLOCK_M).to(tl.int64), tl.arange(0, BLOCK_M)
    row = tile * BLOCK_M + index
    exists = row < queries
    rows = (batch * heads + head) * queries + row
    lse2 = tl.load(lse2_ptr + rows, mask=exists, other=float("inf"))
    delta = tl.load(delta_ptr + rows, mask=exists, other=0.0)
    live = lse2 != float("inf")  # a row that sees nothing enters as zeros
    q_ptr += batch * stride_qb + head * stride_qh + start * stride_qt
    q = load_tile(q_ptr, tile_offsets(stride_qt, stride_qd, BLOCK_M, BLOCK_D), live, True, HEAD_DIM, BLOCK_D)
    grad_ptr += batch * stride_gb + head * stride_gh + start * stride_gt
    grad = load_tile(grad_ptr, tile_offsets(stride_gt, stride_gd, BLOCK_M, BLOCK_D), live, True, HEAD_DIM, BLOCK_D)

    last_key = row + (keys - queries)
    common, end = keys, keys
    if CAUSAL:
        common = tl.minimum(tile * BLOCK_M + (keys - queries) + 1, keys)
        end = tl.minimum(tile * BLOCK_M + (keys - queries) + BLOCK_M, keys)
    common = common // BLOCK_N * BLOCK_N
    slope, reference, positions_q = None, None, None
    if slopes_ptr is not None:
        slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
        positions_q_ptr += batch * stride_pqb + start * stride_pqt
        positions_k_ptr += batch * stride_pkb
        reference = tl.load(positions_q_ptr).to(tl.int64)
        positions_q = load_positions(positions_q_ptr, index * stride_pqt, exists, reference, True)
        common = tl.where(spread_out(positions_q), 0, common)
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    tiles = (q, grad, lse2, delta, last_key, positions_q, slope, reference)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for masked in tl.static_range(2):
        grad_q = add_grad_q(
            grad_q,
            tiles,
            (k_ptr, v_ptr, positions_k_ptr, mask_ptr),
            (stride_kt, stride_kd, stride_vt, stride_vd, stride_pkt, stride_mt),
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
    stride_ot = heads * HEAD_DIM
    grad_q_ptr += (batch * queries + start) * stride_ot + head * HEAD_DIM
    offsets = tile_offsets(stride_ot, 1, BLOCK_M, BLOCK_D)
    store_tile(grad_q_ptr, offsets, grad_q * scale, exists, HEAD_DIM, BLOCK_D)
