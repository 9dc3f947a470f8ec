"""Ragged attention in Triton: flash decoding, cut by entries so that no head, however long, sets the time.

`part` attends to at most SPLIT entries of one head, prefix or tail, with all query rows of its group at once; `merge`
joins a head's parts. Logits are in base 2. Bytes: D + Dv elements of the cache per entry, and per SPLIT entries
8 G t (Dv + 1) bytes of parts written and read.
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
    find_work,
    first_program,
    from_head,
    load_rows,
    on_device,
    precision,
    product,
)
from ..merge.reference import AttentionOutput
from .reference import Tail

SPLIT = 256  # entries of a program: parts of 7 query rows cost 6 % of the traffic, 4096 entries of 8 heads fill a GPU
TILE_BYTES = 16384  # of keys, and of values: two stages of both fit even AMD's 64 KB of shared memory
PARTS = 32  # parts that are joined at a time


@triton.jit(do_not_specialize=["rows", "tail", "segments", "blocks"])
def ragged_attention_part_kernel(
    queries: tl.tensor,  # [B, Hq, t, D]
    prefix_keys: tl.tensor,  # [P, D]
    prefix_values: tl.tensor,  # [P, Dv]
    cu_seqlens: tl.tensor,  # int64 [B * H + 1]
    tail_keys: tl.tensor,  # [B, H, n, D]
    tail_values: tl.tensor,  # [B, H, n, Dv]
    prefix_mask: tl.tensor,  # bool [t, P] or None
    tail_mask: tl.tensor,  # bool [B, H, t, n] or None
    outs: tl.tensor,  # out, float32 [programs, G * t, Dv]
    lses: tl.tensor,  # out, float32 [programs, G * t]
    query_strides: tl.tuple,
    prefix_key_strides: tl.tuple,
    prefix_value_strides: tl.tuple,
    tail_key_strides: tl.tuple,
    tail_value_strides: tl.tuple,
    prefix_mask_strides: tl.tuple,
    tail_mask_strides: tl.tuple,
    factor: tl.tensor,
    cap: tl.tensor,
    heads: tl.tensor,
    rows: tl.tensor,
    tail: tl.tensor,
    segments: tl.tensor,
    blocks: tl.tensor,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    STEPS: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> None:
    """Attention of a block of a group's query rows over at most SPLIT entries of their head."""
    program = tl.program_id(0) // blocks  # blocks of rows follow each other: the cache gives them the same entries
    segment, b, h, start = find_work(program, cu_seqlens, tail, heads, segments, SPLIT, STEPS)
    begin = tl.load(cu_seqlens + segment)
    held = tl.load(cu_seqlens + segment + 1) - begin
    stop = tl.minimum(start + SPLIT, held + tail)
    r = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    real = r < GROUP * rows
    g, i = (r // rows).to(tl.int64), (r % rows).to(tl.int64)
    origins = b * query_strides[0] + (h * GROUP + g) * query_strides[1] + i * query_strides[2]
    block = load_rows(queries, origins, query_strides[3], real, D, BLOCK_D, ALIGNED)
    peak, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    end = tl.minimum(stop, held)
    tail_keys = from_head(tail_keys, tail_key_strides, b, h, ALIGNED)
    tail_values = from_head(tail_values, tail_value_strides, b, h, ALIGNED)
    if tail_mask is not None:
        tail_mask = from_head(tail_mask, tail_mask_strides, b, h)
    for first in range(start, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = n < end
        seen = real[:, None] & inside[None, :]
        if prefix_mask is not None:
            places = i[:, None] * prefix_mask_strides[0] + (begin + n)[None, :] * prefix_mask_strides[1]
            seen &= tl.load(prefix_mask + places, mask=seen, other=0).to(tl.int1)
        starts = (begin + n) * prefix_key_strides[0]
        keys = load_rows(prefix_keys, starts, prefix_key_strides[1], inside, D, BLOCK_D, ALIGNED)
        starts = (begin + n) * prefix_value_strides[0]
        values = load_rows(prefix_values, starts, prefix_value_strides[1], inside, DV, BLOCK_DV, ALIGNED)
        peak, total, out = _attend(block, keys, values, seen, factor, cap, peak, total, out, PRECISION)
    for first in range(tl.maximum(start, held), stop, BLOCK_N):
        n = first - held + tl.arange(0, BLOCK_N).to(tl.int64)
        inside = n < stop - held
        seen = real[:, None] & inside[None, :]
        if tail_mask is not None:
            places = i[:, None] * tail_mask_strides[2] + n[None, :] * tail_mask_strides[3]
            seen &= tl.load(tail_mask + places, mask=seen, other=0).to(tl.int1)
        elif CAUSAL:
            seen &= n[None, :] <= (tail - rows + i)[:, None]
        keys = load_rows(tail_keys, n * tail_key_strides[2], tail_key_strides[3], inside, D, BLOCK_D, ALIGNED)
        values = load_rows(tail_values, n * tail_value_strides[2], tail_value_strides[3], inside, DV, BLOCK_DV, ALIGNED)
        peak, total, out = _attend(block, keys, values, seen, factor, cap, peak, total, out, PRECISION)
    some = tl.where(total == 0, 1.0, total)
    row = program.to(tl.int64) * GROUP * rows + r
    dims = tl.arange(0, BLOCK_DV)
    tl.store(lses + row, tl.where(total == 0, float("-inf"), peak + tl.log2(some)), mask=real)
    tl.store(outs + row[:, None] * DV + dims[None, :], out / some[:, None], mask=real[:, None] & (dims < DV)[None, :])


@triton.jit
def _attend(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    seen: tl.tensor,
    factor: tl.tensor,
    cap: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,
    PRECISION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Greatest logit, sum of weights and weighted sum of values [BLOCK_M, ...] once these entries are among them."""
    logits = product(queries, tl.trans(keys), PRECISION) * factor
    if cap is not None:  # cap * tanh
        logits = cap - 2 * cap / (1 + tl.exp2(logits))
    logits = tl.where(seen, logits, float("-inf"))
    higher = tl.maximum(peak, tl.max(logits, 1))
    level = tl.where(higher == float("-inf"), 0.0, higher)
    weights, faded = tl.exp2(logits - level[:, None]), tl.exp2(peak - level)
    out = out * faded[:, None] + product(weights.to(values.dtype), values, PRECISION)
    return higher, total * faded + tl.sum(weights, 1), out


@triton.jit(do_not_specialize=["rows", "tail"])
def ragged_attention_merge_kernel(
    outs: tl.tensor,  # float32 [programs, G * t, Dv]
    lses: tl.tensor,  # float32 [programs, G * t]
    cu_seqlens: tl.tensor,  # int64 [B * H + 1]
    out: tl.tensor,  # out, [B, Hq, t, Dv]
    lse: tl.tensor,  # out, float32 [B, Hq, t]
    rows: tl.tensor,
    tail: tl.tensor,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Joins the parts of one query row; `rows` are those of a group, G * t."""
    row = tl.program_id(0)
    segment, r = (row // rows).to(tl.int64), row % rows
    first = first_program(cu_seqlens, segment, tail, SPLIT)
    entries = tl.load(cu_seqlens + segment + 1) - tl.load(cu_seqlens + segment) + tail
    parts = (entries + SPLIT - 1) // SPLIT
    dims = tl.arange(0, BLOCK_DV)
    peak, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    joined = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS).to(tl.int64)
        places = (first + part) * rows + r
        real = part < parts
        sums = tl.load(lses + places, mask=real, other=float("-inf"))
        tile = tl.load(
            outs + places[:, None] * DV + dims[None, :], mask=real[:, None] & (dims < DV)[None, :], other=0.0
        )
        higher = tl.maximum(peak, tl.max(sums, 0))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights, faded = tl.exp2(sums - level), tl.exp2(peak - level)
        joined = joined * faded + tl.sum(weights[:, None] * tile, 0)
        total = total * faded + tl.sum(weights, 0)
        peak = higher
    some = tl.where(total == 0, 1.0, total)
    tl.store(out + row.to(tl.int64) * DV + dims, (joined / some).to(out.dtype.element_ty), mask=dims < DV)
    ln2: tl.constexpr = 0.6931471805599453
    tl.store(lse + row + tl.arange(0, 1), tl.where(total == 0, float("-inf"), (peak + tl.log2(some)) * ln2))


def ragged_attention_triton(
    queries: Tensor,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    cu_seqlens: Tensor,
    prefix_mask: Tensor | None,
    tail: Tail,
    scaling: float,
    softcap: float | None,
    causal: bool,
) -> AttentionOutput:
    """See `ragged_attention`; arguments are taken as checked."""
    (batch, query_heads, rows, size), (heads, entries) = queries.shape, tail.keys.shape[1:3]
    value_size, segments = tail.values.shape[3], batch * heads
    out = queries.new_empty(batch, query_heads, rows, value_size)
    result = AttentionOutput(out, out.new_empty(out.shape[:3], dtype=torch.float32))
    if not out.numel():
        return result
    group, block, value_block = query_heads // heads, block_size(size), block_size(value_size)
    block_n = min(128 // queries.element_size(), TILE_BYTES // (max(block, value_block) * queries.element_size()))
    block_m = min(64 // queries.element_size(), block_size(group * rows))  # more would spill
    blocks = triton.cdiv(group * rows, block_m)
    programs = (prefix_keys.shape[0] + segments * entries) // SPLIT + segments
    outs = out.new_empty(programs, group * rows, value_size, dtype=torch.float32)
    lses = outs.new_empty(programs, group * rows)
    caches = prefix_keys, prefix_values, tail.keys, tail.values
    tail_mask = None if tail.mask is None else tail.mask.expand(batch, heads, rows, entries)
    log2e = math.log2(math.e)
    with on_device(queries):
        offsets = cu_seqlens.contiguous()
        ragged_attention_part_kernel[(programs * blocks,)](
            queries, prefix_keys, prefix_values, offsets, tail.keys, tail.values, prefix_mask, tail_mask, outs, lses,
            queries.stride(), *(cache.stride() for cache in caches),
            (0, 0) if prefix_mask is None else prefix_mask.stride(),
            (0, 0, 0, 0) if tail_mask is None else tail_mask.stride(),
            scaling * log2e if softcap is None else 2 * scaling * log2e / softcap,
            None if softcap is None else softcap * log2e,
            heads, rows, entries, segments, blocks,
            group, size, value_size, block, value_block, aligned(queries, *caches), block_m, block_n,
            SPLIT, segments.bit_length(), precision(queries), causal, num_stages=2, **OPTIONS,
        )  # fmt: skip
        ragged_attention_merge_kernel[(segments * group * rows,)](
            outs, lses, offsets, *result, group * rows, entries, value_size, value_block, SPLIT, PARTS, **OPTIONS
        )
    return result
