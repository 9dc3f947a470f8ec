"""Top-k of every head in Triton: the score at the cut by radix select, then two passes to ascending columns.

`cut` finds the value and how many of those equal to it are taken; `count` says how many each chunk of entries keeps,
so that `write` knows where it puts them. Bytes: six reads of the scores and candidates, all but the first from the
cache of a GPU, and 8 bytes per kept entry.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._radix import TILE, load_scores, radix_cut
from .._triton import OPTIONS, on_device, place
from .reference import HeadTopK

CHUNK = 1024  # entries of one program of `count` and `write`


@triton.jit(do_not_specialize=["entries", "span"])
def head_topk_cut_kernel(
    scores: tl.tensor,  # [B, H, N]
    candidates: tl.tensor,  # bool [B, H, N] or None
    counts: tl.tensor,  # int64 [B, H] or [B], contiguous
    cuts: tl.tensor,  # out, float32, one of every count
    rooms: tl.tensor,  # out, int64, one of every count
    strides: tl.tuple,
    candidate_strides: tl.tuple,
    heads: tl.tensor,
    span: tl.tensor,
    entries: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Score at the cut of `span` heads of a row, and how many of those equal to it are taken."""
    segment = tl.program_id(0).to(tl.int64)
    b, h = segment * span // heads, segment * span % heads
    count = tl.minimum(tl.maximum(tl.load(counts + segment), 0), span * entries).to(tl.int32)
    cut, room = radix_cut(
        scores, strides, candidates, candidate_strides, b, h, span.to(tl.int64), entries, count, TILE
    )  # fmt: skip
    tl.store(cuts + segment, cut)
    tl.store(rooms + segment, room)


@triton.jit(do_not_specialize=["entries", "chunks", "span"])
def head_topk_count_kernel(
    scores: tl.tensor,
    candidates: tl.tensor,
    always: tl.tensor,  # bool [B, H, N] or None
    cuts: tl.tensor,
    above: tl.tensor,  # out, int64 [B, H, chunks]: above the cut, or kept always
    tied: tl.tensor,  # out, int64 [B, H, chunks]: at the cut
    strides: tl.tuple,
    candidate_strides: tl.tuple,
    always_strides: tl.tuple,
    heads: tl.tensor,
    span: tl.tensor,
    entries: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """How many entries of a chunk lie above and at the cut."""
    part, segment, b, h = place(chunks, heads)
    _, over, equal = _compare(
        scores, strides, candidates, candidate_strides, always, always_strides,
        tl.load(cuts + segment // span), b, h, part % chunks * CHUNK, entries, CHUNK,
    )  # fmt: skip
    tl.store(above + part, tl.sum(over.to(tl.int64), 0))
    tl.store(tied + part, tl.sum(equal.to(tl.int64), 0))


@triton.jit(do_not_specialize=["entries", "chunks", "span"])
def head_topk_write_kernel(
    scores: tl.tensor,
    candidates: tl.tensor,
    always: tl.tensor,
    cuts: tl.tensor,
    taken: tl.tensor,  # int64 [B, H, chunks]: how many at the cut are kept
    starts: tl.tensor,  # int64 [B, H, chunks]: where a chunk's columns begin
    kept: tl.tensor,  # out, int64 [T]
    strides: tl.tuple,
    candidate_strides: tl.tuple,
    always_strides: tl.tuple,
    heads: tl.tensor,
    span: tl.tensor,
    entries: tl.tensor,
    chunks: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """Writes the columns a chunk keeps."""
    part, segment, b, h = place(chunks, heads)
    columns, over, equal = _compare(
        scores, strides, candidates, candidate_strides, always, always_strides,
        tl.load(cuts + segment // span), b, h, part % chunks * CHUNK, entries, CHUNK,
    )  # fmt: skip
    keep = over | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= tl.load(taken + part)))
    places = tl.load(starts + part) + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(kept + places, columns, mask=keep)


@triton.jit
def _compare(
    scores: tl.tensor,
    strides: tl.tuple,
    candidates: tl.tensor,
    candidate_strides: tl.tuple,
    always: tl.tensor,
    always_strides: tl.tuple,
    cut: tl.tensor,
    b: tl.tensor,
    h: tl.tensor,
    start: tl.tensor,
    entries: tl.tensor,
    CHUNK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Columns of a chunk, which are above the cut or kept always, and which candidates are at it."""
    columns = start + tl.arange(0, CHUNK)
    x, real = load_scores(scores, strides, candidates, candidate_strides, b, h, columns, entries)
    over, equal = real & (x > cut), real & (x == cut)
    if always is not None:
        places = b * always_strides[0] + h * always_strides[1] + columns * always_strides[2]
        over |= tl.load(always + places, mask=columns < entries, other=0).to(tl.int1)
    return columns, over, equal


def head_topk_triton(scores: Tensor, counts: Tensor, candidates: Tensor | None, always: Tensor | None) -> HeadTopK:
    """See `head_topk`; arguments are taken as checked."""
    batch, heads, entries = scores.shape
    if not scores.numel():
        return HeadTopK(counts.new_empty(0), counts.new_zeros(batch * heads + 1))
    if always is not None:
        candidates = ~always if candidates is None else candidates & ~always
    chunks, segments = triton.cdiv(entries, CHUNK), counts.numel()
    span = batch * heads // segments
    cuts, rooms = counts.new_empty(segments, dtype=torch.float32), counts.new_empty(segments)
    above, tied = (counts.new_empty(batch, heads, chunks) for _ in range(2))
    flags, kept_flags = (None if mask is None else mask.expand(scores.shape) for mask in (candidates, always))
    strides = (scores.stride(), *((0, 0, 0) if mask is None else mask.stride() for mask in (flags, kept_flags)))
    sizes = heads, span, entries, chunks, CHUNK
    with on_device(scores):
        head_topk_cut_kernel[(segments,)](
            scores, flags, counts.contiguous(), cuts, rooms, *strides[:2], heads, span, entries, TILE,
            num_warps=16, **OPTIONS,
        )  # fmt: skip
        head_topk_count_kernel[(above.numel(),)](
            scores, flags, kept_flags, cuts, above, tied, *strides, *sizes, **OPTIONS
        )
        taken = _taken(tied, rooms)
        ends = (above + taken).flatten().cumsum(0)
        offsets = torch.cat((ends.new_zeros(1), ends))
        columns = counts.new_empty(int(ends[-1]))
        head_topk_write_kernel[(above.numel(),)](
            scores, flags, kept_flags, cuts, taken, offsets, columns, *strides, *sizes, **OPTIONS
        )
    return HeadTopK(columns, offsets[::chunks].contiguous())


def _taken(tied: Tensor, rooms: Tensor) -> Tensor:
    """How many at the cut each chunk keeps: the first `rooms` of a cut's, in the order of heads and columns."""
    by_cut = tied.view(rooms.shape[0], -1)
    before = by_cut.cumsum(1) - by_cut
    return (rooms[:, None] - before).clamp(min=0).minimum(by_cut).view(tied.shape)
