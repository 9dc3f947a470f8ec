"""Key statistics in Triton: two passes over keys, one over values.

`sum` writes the norms, and for every chunk of entries the sum of its normalised keys; `mean` joins a head's chunks;
`cosine` compares every key with the mean. Bytes: 2 N D + N Dv elements of the cache read, 12 N bytes written, and
N / CHUNK x 4 D bytes of sums written and read, per batch row and KV head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import OPTIONS, TILE, aligned, block_size, from_head, load_rows, on_device, place, real_rows
from .reference import KeyStatistics

CHUNK = 256  # entries of one program: sums of chunks cost 1 % of the traffic, and 4096 entries of 8 heads fill a GPU
SUMS = 32  # sums of chunks in a tile


@triton.jit(do_not_specialize=["entries", "chunks"])
def key_statistics_sum_kernel(
    keys: tl.tensor,  # [B, H, N, D]
    values: tl.tensor,  # [B, H, N, Dv]
    valid: tl.tensor,  # bool [B, H, N] or None
    key_norms: tl.tensor,  # out, [B, H, N], as all others contiguous
    value_norms: tl.tensor,  # out, [B, H, N]
    sums: tl.tensor,  # out, float32 [B * H, chunks, D]
    counts: tl.tensor,  # out, int32 [B * H, chunks]: valid entries
    key_strides: tl.tuple,
    value_strides: tl.tuple,
    valid_strides: tl.tuple,
    heads: tl.tensor,
    entries: tl.tensor,
    chunks: tl.tensor,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Norms of one chunk of a head's entries, and the sum of its normalised keys."""
    part, segment, b, h = place(chunks, heads)
    if valid is not None:
        valid = from_head(valid, valid_strides, b, h)
    keys, values = from_head(keys, key_strides, b, h, ALIGNED), from_head(values, value_strides, b, h, ALIGNED)
    first = part % chunks * CHUNK
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    counted = tl.zeros([ROWS], tl.int32)
    for start in range(first, tl.minimum(first + CHUNK, entries), ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        real = real_rows(valid, rows, valid_strides[2], entries)
        places = segment * entries + rows
        tile, norms = _normalised(keys, rows * key_strides[2], key_strides[3], real, D, BLOCK_D, ALIGNED)
        tl.store(key_norms + places, norms, mask=rows < entries)
        total += tile
        counted += real.to(tl.int32)
        norms = _normalised(values, rows * value_strides[2], value_strides[3], real, DV, BLOCK_DV, ALIGNED)[1]
        tl.store(value_norms + places, norms, mask=rows < entries)
    dims = tl.arange(0, BLOCK_D)
    tl.store(sums + part * D + dims, tl.sum(total, 0), mask=dims < D)
    tl.store(counts + part, tl.sum(counted, 0))


@triton.jit(do_not_specialize=["chunks"])
def key_statistics_mean_kernel(
    sums: tl.tensor,  # float32 [B * H, chunks, D]
    counts: tl.tensor,  # int32 [B * H, chunks]
    directions: tl.tensor,  # out, float32 [B * H, D]: of the mean, 0 where it is 0
    mean_norm: tl.tensor,  # out, [B * H]
    redundancy: tl.tensor,  # out, [B * H]
    chunks: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    SUMS: tl.constexpr,
) -> None:
    """Length and direction of a head's mean normalised key, and its redundancy."""
    segment = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    total = tl.zeros([SUMS, BLOCK_D], tl.float32)
    counted = tl.zeros([SUMS], tl.int32)
    for start in range(0, chunks, SUMS):
        rows = start + tl.arange(0, SUMS).to(tl.int64)
        total += load_rows(sums, (segment * chunks + rows) * D, 1, rows < chunks, D, BLOCK_D, ALIGNED)
        counted += tl.load(counts + segment * chunks + rows, mask=rows < chunks, other=0)
    count = tl.sum(counted, 0)
    mean = tl.sum(total, 0) / tl.maximum(count, 1)
    norm = tl.sqrt(tl.sum(mean * mean, 0))
    tl.store(directions + segment * D + dims, mean / tl.where(norm > 0, norm, 1.0), mask=dims < D)
    tl.store(mean_norm + segment, norm)
    n, wide = count.to(tl.float64), norm.to(tl.float64)  # n ||kbar||^2 - 1 cancels for heads of low redundancy
    pairs = (n * wide * wide - 1) / tl.maximum(n - 1, 1)
    tl.store(redundancy + segment, tl.where(count > 1, pairs, 0).to(tl.float32))


@triton.jit(do_not_specialize=["entries", "chunks"])
def key_statistics_cosine_kernel(
    keys: tl.tensor,  # [B, H, N, D]
    valid: tl.tensor,  # bool [B, H, N] or None
    directions: tl.tensor,  # float32 [B * H, D]
    mean_norm: tl.tensor,  # [B * H]
    cosines: tl.tensor,  # out, [B, H, N]
    key_strides: tl.tuple,
    valid_strides: tl.tuple,
    heads: tl.tensor,
    entries: tl.tensor,
    chunks: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """Cosine of one chunk of a head's keys with their mean, from the distance as in the reference."""
    part, segment, b, h = place(chunks, heads)
    if valid is not None:
        valid = from_head(valid, valid_strides, b, h)
    keys = from_head(keys, key_strides, b, h, ALIGNED)
    dims = tl.arange(0, BLOCK_D)
    direction = tl.load(directions + segment * D + dims, mask=dims < D, other=0.0)
    length = tl.load(mean_norm + segment)
    first = part % chunks * CHUNK
    for start in range(first, tl.minimum(first + CHUNK, entries), ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)
        real = real_rows(valid, rows, valid_strides[2], entries)
        tile, norms = _normalised(keys, rows * key_strides[2], key_strides[3], real, D, BLOCK_D, ALIGNED)
        apart = tile - direction[None, :]
        cosine = tl.where(norms > 0, 1 - 0.5 * tl.sum(apart * apart, 1), 0.0)
        cosine = tl.where(length > 0, cosine, 0.0)  # apart: the interpreter spoils a scalar condition within `&`
        tl.store(cosines + segment * entries + rows, cosine, mask=rows < entries)


@triton.jit
def _normalised(
    cache: tl.tensor,
    starts: tl.tensor,
    stride: tl.tensor,
    real: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Rows as `load_rows` gives them, but of length 1 (zero rows stay zero), and their norms."""
    tile = load_rows(cache, starts, stride, real, D, BLOCK_D, ALIGNED).to(tl.float32)
    norms = tl.sqrt(tl.sum(tile * tile, 1))
    return tile * (1 / tl.where(norms > 0, norms, 1.0))[:, None], norms


def key_statistics_triton(keys: Tensor, values: Tensor, valid: Tensor | None) -> KeyStatistics:
    """See `key_statistics`; arguments are taken as checked."""
    batch, heads, entries, size = keys.shape
    value_size, segments, chunks = values.shape[3], batch * heads, triton.cdiv(entries, CHUNK)
    key_norms, value_norms, cosines = (keys.new_empty(batch, heads, entries, dtype=torch.float32) for _ in range(3))
    mean_norm, redundancy = (keys.new_empty(batch, heads, dtype=torch.float32) for _ in range(2))
    result = KeyStatistics(key_norms, value_norms, cosines, mean_norm, redundancy)
    if not segments:
        return result
    sums = keys.new_empty(segments, chunks, size, dtype=torch.float32)
    counts = keys.new_empty(segments, chunks, dtype=torch.int32)
    directions = keys.new_empty(segments, size, dtype=torch.float32)
    flags = None if valid is None else valid.expand(batch, heads, entries)
    flag_strides = (0, 0, 0) if flags is None else flags.stride()
    block, value_block = block_size(size), block_size(value_size)
    cut = {"ALIGNED": aligned(keys, values), "ROWS": TILE // max(block, value_block), "CHUNK": CHUNK, **OPTIONS}
    with on_device(keys):
        if entries:
            key_statistics_sum_kernel[(segments * chunks,)](
                keys, values, flags, key_norms, value_norms, sums, counts,
                keys.stride(), values.stride(), flag_strides, heads, entries, chunks,
                size, value_size, block, value_block, **cut,
            )  # fmt: skip
        key_statistics_mean_kernel[(segments,)](
            sums, counts, directions, mean_norm, redundancy, chunks, size, block, aligned(sums), SUMS, **OPTIONS
        )
        if entries:
            key_statistics_cosine_kernel[(segments * chunks,)](
                keys, flags, directions, mean_norm, cosines,
                keys.stride(), flag_strides, heads, entries, chunks, size, block, **cut,
            )  # fmt: skip
    return result
