"""Ragged gather in Triton: one launch, every kept entry read once and written once.

A program copies up to ROWS entries of one head. Bytes: 2 (D + Dv) elements of the cache and 8 of its column per entry.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import OPTIONS, aligned, block_size, find_work, from_head, load_rows, on_device
from .reference import Gathered, gather_kv_reference

TILE_BYTES = 8192  # of keys, and of values: four loads of each by every thread, all in flight at once


@triton.jit(do_not_specialize=["entries", "segments"])
def gather_kv_kernel(
    keys: tl.tensor,  # [B, H, N, D]
    values: tl.tensor,  # [B, H, N, Dv]
    columns: tl.tensor,  # int64 [T]
    cu_seqlens: tl.tensor,  # int64 [B * H + 1]
    prefix_keys: tl.tensor,  # [P, D] or None, as the next two
    prefix_values: tl.tensor,  # [P, Dv]
    prefix_cu: tl.tensor,  # int64 [B * H + 1]
    out_keys: tl.tensor,  # out, [T, D], contiguous
    out_values: tl.tensor,  # out, [T, Dv], contiguous
    wrong: tl.tensor,  # out, int32 [1]: 1 where a column lies outside its head's entries, else as it was
    key_strides: tl.tuple,
    value_strides: tl.tuple,
    prefix_key_strides: tl.tuple,
    prefix_value_strides: tl.tuple,
    heads: tl.tensor,
    entries: tl.tensor,
    segments: tl.tensor,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
) -> None:
    """Copies the entries that ROWS columns of one head name."""
    segment, b, h, start = find_work(tl.program_id(0), cu_seqlens, 0, heads, segments, ROWS, STEPS)
    places = tl.load(cu_seqlens + segment) + start + tl.arange(0, ROWS)
    real = places < tl.load(cu_seqlens + segment + 1)
    rows = tl.load(columns + places, mask=real, other=0)
    begin, held = 0, 0
    if prefix_keys is not None:
        begin = tl.load(prefix_cu + segment)
        held = tl.load(prefix_cu + segment + 1) - begin
    inside = (rows >= 0) & (rows < held + entries)
    tl.store(wrong + tl.zeros([ROWS], tl.int32), 1, mask=real & ~inside)
    real &= inside
    _copy(
        from_head(keys, key_strides, b, h, ALIGNED), key_strides,
        prefix_keys, begin, prefix_key_strides, out_keys, places, rows, held, real, D, BLOCK_D, ALIGNED,
    )  # fmt: skip
    _copy(
        from_head(values, value_strides, b, h, ALIGNED), value_strides,
        prefix_values, begin, prefix_value_strides, out_values, places, rows, held, real, DV, BLOCK_DV, ALIGNED,
    )  # fmt: skip


@triton.jit
def _copy(
    tail: tl.tensor,
    strides: tl.tuple,
    prefix: tl.tensor,
    begin: tl.tensor,
    prefix_strides: tl.tuple,
    out: tl.tensor,
    places: tl.tensor,
    rows: tl.tensor,
    held: tl.tensor,
    real: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Copies entries `rows` of a head, `held` of them in the prefix from `begin` on, to `places` of `out`."""
    tile = load_rows(tail, (rows - held) * strides[2], strides[3], real & (rows >= held), D, BLOCK_D, ALIGNED)
    if prefix is not None:
        old = rows < held
        starts = (begin + rows) * prefix_strides[0]
        kept = load_rows(prefix, starts, prefix_strides[1], real & old, D, BLOCK_D, ALIGNED)
        tile = tl.where(old[:, None], kept, tile)
    dims = tl.arange(0, BLOCK_D)
    tl.store(out + places[:, None] * D + dims[None, :], tile, mask=real[:, None] & (dims < D)[None, :])


def gather_kv_triton(
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    cu_seqlens: Tensor,
    prefix: tuple[Tensor, Tensor, Tensor] | None,
) -> Gathered:
    """See `gather_kv`; arguments are taken as checked, except for the range of `columns`."""
    batch, heads, entries, size = keys.shape
    value_size, segments, total = values.shape[3], batch * heads, columns.shape[0]
    result = Gathered(keys.new_empty(total, size), values.new_empty(total, value_size))
    if not total:
        return result
    prefix_keys, prefix_values, prefix_cu = (None, None, None) if prefix is None else prefix
    sources = (keys, values) if prefix is None else (keys, values, prefix[0], prefix[1])
    strides = [source.stride() for source in (*sources, keys, values)][:4]
    block, value_block = block_size(size), block_size(value_size)
    rows = TILE_BYTES // (max(block, value_block) * keys.element_size())
    wrong = columns.new_zeros(1, dtype=torch.int32)
    with on_device(keys):
        gather_kv_kernel[(total // rows + segments,)](
            keys, values, columns.contiguous(), cu_seqlens.contiguous(),
            prefix_keys, prefix_values, None if prefix_cu is None else prefix_cu.contiguous(), *result, wrong,
            *strides, heads, entries, segments,
            size, value_size, block, value_block, aligned(*sources), rows, segments.bit_length(), **OPTIONS,
        )  # fmt: skip
    if wrong.item():
        return gather_kv_reference(keys, values, columns, cu_seqlens, prefix)  # raises, naming the column
    return result
