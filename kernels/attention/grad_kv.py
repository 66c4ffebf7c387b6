"""Flash attention, backward, by keys: the gradients of k and v.

The weights are computed again from the logsumexp, here with keys as rows.  A program adds up all that its keys get, so
there are no atomic operations, and the same input gives the same bits.
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
    load_positions,
    load_tile,
    product,
    spread_out,
    store_tile,
    tile_offsets,
)


@triton.jit
def add_grad_kv(
    grads,
    tiles,
    pointers,
    strides,
    begin,
    end,
    queries,
    keys,
    scale2,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Add what the rows [begin, end) of one head send to a tile of keys, with weights and logits transposed, [N, M].

    MASKED says that some of these rows do not see some of these keys (when CAUSAL), or that the keys' positions are
    spread out.  A weight of 0 is not enough there: dO v may be infinite or NaN.
    """
    grad_k, grad_v = grads
    k, v, index, positions_k, slope, reference = tiles
    q_ptr, grad_ptr, lse2_ptr, delta_ptr, positions_ptr = pointers
    stride_qt, stride_qd, stride_gt, stride_gd, stride_pt = strides
    columns = tl.arange(0, BLOCK_M)
    offsets_q = tile_offsets(stride_qt, stride_qd, BLOCK_M, BLOCK_D)
    offsets_g = tile_offsets(stride_gt, stride_gd, BLOCK_M, BLOCK_D)
    for first in tl.range(begin, end, BLOCK_M):
        start = tl.cast(first, tl.int64)
        row = first + columns
        exists = row < queries
        q = load_tile(q_ptr + start * stride_qt, offsets_q, exists, True, HEAD_DIM, BLOCK_D)
        lse2 = tl.load(lse2_ptr + row, mask=exists, other=float("inf"))
        logits = product(k, tl.trans(q), UPCAST) * scale2
        if slope is not None:
            tile_ptr = positions_ptr + start * stride_pt
            positions = load_positions(tile_ptr, columns * stride_pt, exists, reference, True)
            logits -= slope * distance(digits(positions_k, MASKED), digits(positions, MASKED), MASKED)
        p = tl.exp2(exponent(logits, lse2[None, :]))
        if CAUSAL and MASKED:
            seen = index[:, None] <= (row + (keys - queries))[None, :]
            p = tl.where(seen, p, 0.0)  # a weight, since that of a row which is NaN would be NaN
        grad = load_tile(grad_ptr + start * stride_gt, offsets_g, exists, True, HEAD_DIM, BLOCK_D)
        grad_v = add_product(p, grad, grad_v, UPCAST)
        delta = tl.load(delta_ptr + row, mask=exists, other=0.0)
        grad_s = p * (product(v, tl.trans(grad), UPCAST) - delta[None, :])
        if CAUSAL and MASKED:
            grad_s = tl.where(seen, grad_s, 0.0)
        grad_k = add_product(grad_s, q, grad_k, UPCAST)
    return grad_k, grad_v


@triton.jit
def crossing_rows(
    tile, begin, queries, keys, apart, CAUSAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_EDGE: tl.constexpr
):
    """(begin, end) of the rows that a tile of keys takes as MASKED, in steps of BLOCK_EDGE; the rest follow.

    When causal they begin with the first row that sees its first key, and a tile beyond them all see its last one.  All
    rows are taken so where the keys' positions lie apart.
    """
    end = begin
    if CAUSAL:
        begin = tl.maximum(begin, tile * BLOCK_N - (keys - queries))
        last = tl.minimum(tile * BLOCK_N + BLOCK_N, keys) - 1 - (keys - queries)
        end = begin + tl.cdiv(tl.maximum(last - begin, 0), BLOCK_EDGE) * BLOCK_EDGE
    if apart is not None:
        end = tl.where(apart, queries, end)
    return begin, tl.minimum(end, queries)


@triton.jit(do_not_specialize=["batch_heads", "queries", "keys", "stride_pqb", "stride_pkb", "stride_mb"])
def grad_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    lse2_ptr,
    delta_ptr,
    first_row_ptr,
    positions_q_ptr,
    positions_k_ptr,
    slopes_ptr,
    mask_ptr,
    grad_k_ptr,
    grad_v_ptr,
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
    queries,
    keys,
    scale,
    scale2,
    CAUSAL: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_EDGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dK, dV [B, Tk, Hk, D]: with P = exp(s - lse) and dS = P (dO v - delta), dV = P^T dO and dK = scale dS^T q.

    Grid: one program for every BLOCK_N keys of a key head, on one axis; when causal the first keys, which most rows
    see, come first.  It goes through the query heads that share the key head and the rows that see its keys.
    Work: 8 D operations and one exp2 a pair; k, v and their gradients pass once, q and dO once per tile of keys.
    """
    program, kv_heads = tl.program_id(0), heads // GROUP
    tile = program // batch_heads  # here the key heads of the batch
    kv_head, batch = (program % batch_heads % kv_heads).to(tl.int64), (program % batch_heads // kv_heads).to(tl.int64)
    start, columns = (tile * BLOCK_N).to(tl.int64), tl.arange(0, BLOCK_N)
    index = tile * BLOCK_N + columns
    exists, row_begin = index < keys, 0
    alive = exists
    if mask_ptr is not None:
        mask_ptr += batch * stride_mb + start * stride_mt
        alive = tl.load(mask_ptr + columns * stride_mt, mask=exists, other=0) != 0
        row_begin = tl.load(first_row_ptr + batch)
    k_ptr += batch * stride_kb + kv_head * stride_kh + start * stride_kt
    v_ptr += batch * stride_vb + kv_head * stride_vh + start * stride_vt
    k = load_tile(k_ptr, tile_offsets(stride_kt, stride_kd, BLOCK_N, BLOCK_D), alive, True, HEAD_DIM, BLOCK_D)
    v = load_tile(v_ptr, tile_offsets(stride_vt, stride_vd, BLOCK_N, BLOCK_D), alive, True, HEAD_DIM, BLOCK_D)
    apart = None
    if slopes_ptr is not None:
        positions_q_ptr += batch * stride_pqb
        positions_k_ptr += batch * stride_pkb + start * stride_pkt
        reference = tl.load(positions_k_ptr).to(tl.int64)
        positions_k = load_positions(positions_k_ptr, columns * stride_pkt, exists, reference, True)
        apart = spread_out(positions_k)
    row_begin, row_common = crossing_rows(tile, row_begin, queries, keys, apart, CAUSAL, BLOCK_N, BLOCK_EDGE)
    strides = (stride_qt, stride_qd, stride_gt, stride_gd, stride_pqt)
    grads = (tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
    for shared in tl.range(0, GROUP):
        head = kv_head * GROUP + shared
        tiles = (k, v, index, None, None, None)
        if slopes_ptr is not None:
            slope = tl.load(slopes_ptr + head).to(tl.float32) * LOG2E
            tiles = (k, v, index, positions_k, slope, reference)
        rows = (batch * heads + head) * queries
        pointers = (
            q_ptr + batch * stride_qb + head * stride_qh,
            grad_ptr + batch * stride_gb + head * stride_gh,
            lse2_ptr + rows,
            delta_ptr + rows,
            positions_q_ptr,
        )
        for masked in tl.static_range(2):
            grads = add_grad_kv(
                grads,
                tiles,
                pointers,
                strides,
                row_begin if masked else row_common,
                row_common if masked else queries,
                queries,
                keys,
                scale2,
                masked == 1,
                CAUSAL,
                HEAD_DIM,
                BLOCK_EDGE if masked else BLOCK_M,
                BLOCK_D,
                UPCAST,
            )
    first = ((batch * keys + start) * kv_heads + kv_head) * HEAD_DIM
    offsets = tile_offsets(kv_heads * HEAD_DIM, 1, BLOCK_N, BLOCK_D)
    grad_k = tl.where(alive[:, None], grads[0] * scale, 0.0)  # a padded key went in as zeros, and had weights
    grad_v = tl.where(alive[:, None], grads[1], 0.0)
    store_tile(grad_k_ptr + first, offsets, grad_k, exists, HEAD_DIM, BLOCK_D)
    store_tile(grad_v_ptr + first, offsets, grad_v, exists, HEAD_DIM, BLOCK_D)
