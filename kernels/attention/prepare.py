"""What both gradients of flash attention need to know about each row, and the gradient of the sinks."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl

from .tiles import LOG2E, load_tile, tile_offsets


@triton.jit(do_not_specialize=["batch_heads", "queries", "keys", "stride_mb"])
def prepare_kernel(
    grad_ptr,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    mask_ptr,
    lse2_ptr,
    delta_ptr,
    first_row_ptr,
    sink_sums_ptr,
    stride_gb,
    stride_gt,
    stride_gh,
    stride_gd,
    stride_mb,
    stride_mt,
    batch_heads,
    heads,
    queries,
    keys,
    CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
):
    """What the rows bring into both gradients: delta_i = dO_i out_i, and lse_i log2(e), float32 [B, Hq, Tq].

    A row with nothing to see gets delta 0 and an lse of +inf, which makes all its weights 0, whatever stands in it.
    When causal these are the rows before some first one, int32 [B]; else all or none.  Of the sinks' gradient,
    -sum_i exp(sink - lse_i) delta_i, each program leaves its part, float32 [Hq, B, tiles].

    Grid: one program for every BLOCK_M queries of a head.  out and dO are read once, and with padding the mask of the
    sample, one byte a key.
    """
    program = tl.program_id(0)
    tile, batch_head = program // batch_heads, program % batch_heads
    head, batch = batch_head % heads, batch_head // heads
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < queries
    live = exists
    if mask_ptr is not None:
        mask_ptr += batch.to(tl.int64) * stride_mb
        first_key = tl.zeros([BLOCK_SCAN], tl.int32) + keys
        for start in tl.range(0, keys, BLOCK_SCAN):
            index = start + tl.arange(0, BLOCK_SCAN)
            alive = tl.load(mask_ptr + index.to(tl.int64) * stride_mt, mask=index < keys, other=0) != 0
            first_key = tl.minimum(first_key, tl.where(alive, index, keys))
        seen = tl.min(first_key)
        first_row = tl.maximum(seen - (keys - queries), 0) if CAUSAL else tl.where(seen < keys, 0, queries)
        live = exists & (row >= first_row)
        if (tile == 0) & (head == 0):
            tl.store(first_row_ptr + batch, first_row)
    start, stride_ot = (tile * BLOCK_M).to(tl.int64), heads * HEAD_DIM
    grad_ptr += batch.to(tl.int64) * stride_gb + head.to(tl.int64) * stride_gh + start * stride_gt
    out_ptr += (batch.to(tl.int64) * queries + start) * stride_ot + head * HEAD_DIM
    grad = load_tile(grad_ptr, tile_offsets(stride_gt, stride_gd, BLOCK_M, BLOCK_D), live, True, HEAD_DIM, BLOCK_D)
    out = load_tile(out_ptr, tile_offsets(stride_ot, 1, BLOCK_M, BLOCK_D), live, True, HEAD_DIM, BLOCK_D)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    rows = batch_head.to(tl.int64) * queries + row
    lse = tl.load(lse_ptr + rows, mask=live, other=float("-inf"))
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    tl.store(delta_ptr + rows, delta, mask=exists)
    tl.store(lse2_ptr + rows, lse2, mask=exists)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * LOG2E
        tiles = tl.cdiv(queries, BLOCK_M)
        slot = (head.to(tl.int64) * (batch_heads // heads) + batch) * tiles + tile
        tl.store(sink_sums_ptr + slot, -tl.sum(tl.exp2(sink - lse2) * delta))
