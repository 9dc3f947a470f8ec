"""Window attention in Triton: two passes over keys, nothing of size W x N.

`partial` finds, for every tile of keys, each query row's log-sum-exp over it; `rows` joins the tiles; `sum` computes
the logits again and adds the probabilities up. Keys stay with a program while all query rows of their group pass by,
both times in the same matrix product, so that what is exponentiated is what was normalised. Logits are in base 2.
Bytes, per batch row and KV head: 2 N D elements of keys read, 8 N bytes written, 8 G W bytes for every tile of keys,
and the masks twice.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import (
    OPTIONS,
    aligned,
    block_size,
    from_head,
    load_rows,
    on_device,
    place,
    precision,
    product,
    real_rows,
)
from .reference import WindowAttention

TILE_BYTES = 32768  # of keys: with the queries that pass by, three programs fit the shared memory of a processor
LAUNCH = {"num_warps": 8, **OPTIONS}  # what of the logits a thread holds leaves room for the rest
ROWS, TILES = 16, 64  # query rows and tiles of keys that are joined at a time


@triton.jit(do_not_specialize=["rows", "entries", "tiles", "per_head"])
def window_attention_partial_kernel(
    queries: tl.tensor,  # [B, Hq, W, D]
    keys: tl.tensor,  # [B, H, N, D]
    valid: tl.tensor,  # bool [B, H, N] or None
    mask: tl.tensor,  # bool [B, H, W, N] or None
    partial: tl.tensor,  # out, float32 [B, Hq, W, tiles]
    query_strides: tl.tuple,
    key_strides: tl.tuple,
    valid_strides: tl.tuple,
    mask_strides: tl.tuple,
    factor: tl.tensor,
    cap: tl.tensor,
    heads: tl.tensor,
    rows: tl.tensor,
    entries: tl.tensor,
    tiles: tl.tensor,
    per_head: tl.tensor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """Log-sum-exp of every query row of a KV head over one tile of its keys."""
    part, segment, b, h = place(tiles, heads)
    column = part % tiles
    columns = column * BLOCK_N + tl.arange(0, BLOCK_N)
    if valid is not None:
        valid = from_head(valid, valid_strides, b, h)
    if mask is not None:
        mask = from_head(mask, mask_strides, b, h)
    real = real_rows(valid, columns, valid_strides[2], entries)
    keys = from_head(keys, key_strides, b, h, ALIGNED)
    tile = load_rows(keys, columns * key_strides[2], key_strides[3], real, D, BLOCK_D, ALIGNED)
    queries = from_head(queries, query_strides, b, h * GROUP, ALIGNED)
    partial += segment * GROUP * rows * tiles + column
    for first in range(0, GROUP * per_head, BLOCK_M):
        logits, g, w = _logits(
            queries, query_strides, tile, columns, real,
            valid, valid_strides[2], mask, mask_strides, factor, cap, first, rows, entries, per_head,
            GROUP, D, BLOCK_D, ALIGNED, BLOCK_M, PRECISION,
        )  # fmt: skip
        peak = tl.max(logits, 0)
        peak = tl.where(peak == float("-inf"), 0.0, peak)
        total = tl.sum(tl.exp2(logits - peak[None, :]), 0)
        lse = tl.where(total == 0, float("-inf"), peak + tl.log2(tl.where(total == 0, 1.0, total)))
        places = (g * rows + w).to(tl.int64) * tiles
        tl.store(partial + places, lse, mask=(w < rows) & (g < GROUP))


@triton.jit(do_not_specialize=["rows", "tiles"])
def window_attention_rows_kernel(
    partial: tl.tensor,  # float32 [B, Hq, W, tiles]
    lse: tl.tensor,  # out, float32 [B, Hq, W]: inf where a row sees nothing, so that its probabilities are 0
    share: tl.tensor,  # out, float32 [B, Hq]: 1 / rows that see something, 0 where none does
    last: tl.tensor,  # out, int32 [B, Hq]: the last of those rows, -1 where there is none
    rows: tl.tensor,
    tiles: tl.tensor,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
) -> None:
    """Log-sum-exp of the rows of one query head, and which of them see something."""
    head = tl.program_id(0).to(tl.int64)
    count, final = tl.zeros([ROWS], tl.int32), tl.full([ROWS], -1, tl.int32)
    for first in range(0, rows, ROWS):
        w = first + tl.arange(0, ROWS)
        peak, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        for start in range(0, tiles, TILES):
            column = start + tl.arange(0, TILES)
            places = (head * rows + w)[:, None] * tiles + column[None, :]
            real = (w < rows)[:, None] & (column < tiles)[None, :]
            tile = tl.load(partial + places, mask=real, other=float("-inf"))
            higher = tl.maximum(peak, tl.max(tile, 1))
            level = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp2(peak - level) + tl.sum(tl.exp2(tile - level[:, None]), 1)
            peak = higher
        seen = total != 0  # NaN of an entry that is valid is handed on
        sums = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("inf"))
        tl.store(lse + head * rows + w, sums, mask=w < rows)
        count += seen.to(tl.int32)
        final = tl.where(seen, w, final)
    seeing = tl.sum(count, 0)
    tl.store(share + head, tl.where(seeing > 0, 1.0 / tl.maximum(seeing, 1), 0.0))
    tl.store(last + head, tl.max(final, 0))


@triton.jit(do_not_specialize=["rows", "entries", "tiles", "per_head"])
def window_attention_sum_kernel(
    queries: tl.tensor,  # [B, Hq, W, D]
    keys: tl.tensor,  # [B, H, N, D]
    valid: tl.tensor,  # bool [B, H, N] or None
    mask: tl.tensor,  # bool [B, H, W, N] or None
    lse: tl.tensor,  # float32 [B, Hq, W]
    share: tl.tensor,  # float32 [B, Hq]
    last: tl.tensor,  # int32 [B, Hq]
    mean_out: tl.tensor,  # out, float32 [B, H, N]
    last_out: tl.tensor,  # out, float32 [B, H, N]
    query_strides: tl.tuple,
    key_strides: tl.tuple,
    valid_strides: tl.tuple,
    mask_strides: tl.tuple,
    factor: tl.tensor,
    cap: tl.tensor,
    heads: tl.tensor,
    rows: tl.tensor,
    entries: tl.tensor,
    tiles: tl.tensor,
    per_head: tl.tensor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    MAX: tl.constexpr,
) -> None:
    """Mean probability over rows, and the last row's, of one tile of keys, joined over the group's query heads."""
    part, segment, b, h = place(tiles, heads)
    columns = part % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    if valid is not None:
        valid = from_head(valid, valid_strides, b, h)
    if mask is not None:
        mask = from_head(mask, mask_strides, b, h)
    real = real_rows(valid, columns, valid_strides[2], entries)
    keys = from_head(keys, key_strides, b, h, ALIGNED)
    tile = load_rows(keys, columns * key_strides[2], key_strides[3], real, D, BLOCK_D, ALIGNED)
    queries = from_head(queries, query_strides, b, h * GROUP, ALIGNED)
    mean, final = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    most, most_final = mean, final
    lse += segment * GROUP * rows
    last_row = tl.load(last + segment * GROUP)  # query heads of a group see the same
    for first in range(0, GROUP * per_head, BLOCK_M):
        logits, g, w = _logits(
            queries, query_strides, tile, columns, real,
            valid, valid_strides[2], mask, mask_strides, factor, cap, first, rows, entries, per_head,
            GROUP, D, BLOCK_D, ALIGNED, BLOCK_M, PRECISION,
        )  # fmt: skip
        inside = (w < rows) & (g < GROUP)
        sums = tl.load(lse + g * rows + w, mask=inside, other=float("inf"))
        weights = tl.exp2(logits - sums[None, :])
        mean += tl.sum(weights, 1)
        final += tl.sum(tl.where((w == last_row)[None, :], weights, 0.0), 1)
        if MAX:  # blocks do not mix query heads
            done = (first + BLOCK_M) % per_head == 0
            most, most_final = tl.maximum(most, mean), tl.maximum(most_final, final)  # sums of one head only grow
            mean, final = tl.where(done, 0.0, mean), tl.where(done, 0.0, final)
    mean, final = (most, most_final) if MAX else (mean / GROUP, final / GROUP)
    mean *= tl.load(share + segment * GROUP)
    tl.store(mean_out + segment * entries + columns, mean, mask=columns < entries)
    tl.store(last_out + segment * entries + columns, final, mask=columns < entries)


@triton.jit
def _logits(
    queries: tl.tensor,
    query_strides: tl.tuple,
    tile: tl.tensor,
    columns: tl.tensor,
    real: tl.tensor,
    valid: tl.tensor,
    valid_stride: tl.tensor,
    mask: tl.tensor,
    mask_strides: tl.tuple,
    factor: tl.tensor,
    cap: tl.tensor,
    first: tl.tensor,
    rows: tl.tensor,
    entries: tl.tensor,
    per_head: tl.tensor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Logits [BLOCK_N, BLOCK_M] of a tile of keys, -inf where a row must not see; heads and rows of their queries."""
    r = first + tl.arange(0, BLOCK_M)
    g, w = r // per_head, r % per_head  # 32 bits: a thread holds them for every fourth row
    own = entries - rows + w
    looks = (w < rows) & (g < GROUP)
    if mask is None:  # a row that is itself no entry is padding
        looks &= own >= 0
        if valid is not None:
            looks &= tl.load(valid + own.to(tl.int64) * valid_stride, mask=looks, other=0).to(tl.int1)
    starts = g.to(tl.int64) * query_strides[1] + w.to(tl.int64) * query_strides[2]
    block = load_rows(queries, starts, query_strides[3], looks, D, BLOCK_D, ALIGNED)
    logits = product(tile, tl.trans(block), PRECISION) * factor
    if cap is not None:  # cap * tanh
        logits = cap - 2 * cap / (1 + tl.exp2(logits))
    seen = real[:, None] & looks[None, :]
    if mask is None:
        seen &= columns.to(tl.int32)[:, None] <= own[None, :]
    else:
        places = w.to(tl.int64)[None, :] * mask_strides[2] + columns[:, None] * mask_strides[3]
        seen &= tl.load(mask + places, mask=seen, other=0).to(tl.int1)
    return tl.where(seen, logits, float("-inf")), g, w


def window_attention_triton(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    valid: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    group: str,
) -> WindowAttention:
    """See `window_attention`; arguments are taken as checked."""
    (batch, query_heads, rows, size), (heads, entries) = queries.shape, keys.shape[1:3]
    if 0 in (batch, query_heads, rows, entries):
        return WindowAttention(*(keys.new_zeros(batch, heads, entries, dtype=torch.float32) for _ in range(2)))
    groups, block = query_heads // heads, block_size(size)
    block_n = min(128, TILE_BYTES // (block * keys.element_size()))
    tiles = triton.cdiv(entries, block_n)
    block_m = 16 if group == "max" else min(64 // keys.element_size(), block_size(rows * groups))
    stages = 3 if block_m == 16 and block > 64 else 2  # elsewhere the compilers spill a register for the third
    per_head = triton.cdiv(rows, block_m) * block_m if group == "max" else rows
    result = WindowAttention(*(keys.new_empty(batch, heads, entries, dtype=torch.float32) for _ in range(2)))
    partial = keys.new_empty(batch, query_heads, rows, tiles, dtype=torch.float32)
    lse = keys.new_empty(batch, query_heads, rows, dtype=torch.float32)
    share, last = lse.new_empty(batch, query_heads), lse.new_empty(batch, query_heads, dtype=torch.int32)
    flags = None if valid is None else valid.expand(batch, heads, entries)
    seen = None if mask is None else mask.expand(batch, heads, rows, entries)
    log2e = math.log2(math.e)
    tensors = (
        queries.stride(), keys.stride(), (0, 0, 0) if flags is None else flags.stride(),
        (0, 0, 0, 0) if seen is None else seen.stride(),
        scaling * log2e if softcap is None else 2 * scaling * log2e / softcap,
        None if softcap is None else softcap * log2e,
        heads, rows, entries, tiles, per_head,
        groups, size, block, aligned(queries, keys), block_m, block_n, precision(keys),
    )  # fmt: skip
    with on_device(keys):
        grid = (batch * heads * tiles,)
        window_attention_partial_kernel[grid](queries, keys, flags, seen, partial, *tensors, num_stages=2, **LAUNCH)
        window_attention_rows_kernel[(batch * query_heads,)](
            partial, lse, share, last, rows, tiles, ROWS, TILES, **OPTIONS
        )
        window_attention_sum_kernel[grid](
            queries, keys, flags, seen, lse, share, last, *result, *tensors, group == "max", num_stages=stages, **LAUNCH
        )  # fmt: skip
    return result
