"""Compaction within pages in Triton: every entry that moves is read once and written once, in place.

A program moves some dimensions of one head's entries, so no two ever touch the same element, and walks them in steps,
away from where they gather: an entry's new place is at or before its old one (aligned left; right is the mirror image),
so what a step writes is never what a later one reads. Within a step all threads have read before any writes: whether
they write depends on a sum of all that was read. A barrier would not do, as AMD's leaves loads under way.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._triton import OPTIONS, aligned, block_size, on_device

WIDTH = 64  # dimensions of a program: 128 bytes of a 16-bit cache, and enough programs for a GPU
STEP = 128  # entries moved at a time


@triton.jit(do_not_specialize=["zero"])
def compact_paged_kernel(
    cache: tl.tensor,  # in and out, [P, S, H, D]
    table: tl.tensor,  # int32 or int64 [B, K]
    lengths: tl.tensor,  # int64 [B]
    columns: tl.tensor,  # int64 [T]
    cu_seqlens: tl.tensor,  # int64 [B * H + 1]
    strides: tl.tuple,
    table_strides: tl.tuple,
    heads: tl.tensor,
    parts: tl.tensor,
    zero: tl.tensor,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
    STEP: tl.constexpr,
    RIGHT: tl.constexpr,
) -> None:
    """Moves BLOCK_D dimensions of one head's kept entries; `zero` is 0, which compilers must not know."""
    segment = (tl.program_id(0) // parts).to(tl.int64)
    b, h = segment // heads, segment % heads
    begin = tl.load(cu_seqlens + segment)
    count = tl.load(cu_seqlens + segment + 1) - begin
    first = tl.load(lengths + b) - count if RIGHT else count * 0
    dims = tl.program_id(0) % parts * BLOCK_D + tl.arange(0, BLOCK_D)
    cache += tl.multiple_of(h * strides[2], ALIGNED)
    table += b * table_strides[0]
    for step in range(0, count, STEP):
        rows = step + tl.arange(0, STEP).to(tl.int64)
        if RIGHT:
            rows = count - 1 - rows
        real = (rows >= 0) & (rows < count)
        source = tl.load(columns + begin + rows, mask=real, other=0)
        target = first + rows
        real &= source != target
        mask = real[:, None] & (dims < D)[None, :]
        old = _places(table, table_strides[1], strides, source, real, dims, PAGE, ALIGNED)
        new = _places(table, table_strides[1], strides, target, real, dims, PAGE, ALIGNED)
        tile = tl.load(cache + old, mask=mask, other=0.0)
        bits = tile.to(tl.int16 if tile.dtype.primitive_bitwidth == 16 else tl.int32, bitcast=True)
        total = tl.sum(tl.sum(bits.to(tl.int32), 1), 0)  # known once every thread has what it reads
        ready = rows + total * zero == rows
        tl.store(cache + new, tile, mask=mask & ready[:, None])


@triton.jit
def _places(
    table: tl.tensor,
    stride: tl.tensor,
    strides: tl.tuple,
    entries: tl.tensor,
    real: tl.tensor,
    dims: tl.tensor,
    PAGE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Where the dimensions of a row's entries lie in a head's memory, [entries, dims]."""
    page = tl.load(table + entries // PAGE * stride, mask=real, other=0).to(tl.int64)
    starts = page * strides[0] + entries % PAGE * strides[1]
    return tl.multiple_of(starts[:, None], (ALIGNED, ALIGNED)) + dims.to(tl.int64)[None, :] * strides[3]


def compact_paged_triton(
    keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, columns: Tensor, cu_seqlens: Tensor, align: str
) -> None:
    """See `compact_paged`; arguments are taken as checked."""
    offsets = lengths.contiguous(), columns.contiguous(), cu_seqlens.contiguous()
    segments = cu_seqlens.shape[0] - 1
    with on_device(keys):
        for cache in (keys, values):
            page, heads, size = cache.shape[1:]
            block = min(WIDTH, block_size(size))
            parts = triton.cdiv(size, block)
            compact_paged_kernel[(segments * parts,)](
                cache, table, *offsets, cache.stride(), table.stride(), heads, parts, 0,
                page, size, block, aligned(cache), STEP, align == "right", **OPTIONS,
            )  # fmt: skip
