"""Radix select, shared by the Triton kernels of `topk` and `bacon`; imported only by them.

The k-th largest score by its bits, 8 at a time from the top: four reads of the scores, no sort, no memory.
"""

import triton
import triton.language as tl

TILE = 4096  # scores looked at in one step of a program


@triton.jit
def load_scores(
    scores: tl.tensor,
    strides: tl.tuple,
    candidates: tl.tensor,
    candidate_strides: tl.tuple,
    b: tl.tensor,
    h: tl.tensor,
    columns: tl.tensor,
    entries: tl.tensor,
) -> tuple[tl.tensor, tl.tensor]:
    """Float32 scores of a head's `columns`, and which of them are candidates (others: 0)."""
    real = columns < entries
    if candidates is not None:
        places = b * candidate_strides[0] + h * candidate_strides[1] + columns * candidate_strides[2]
        real = real & tl.load(candidates + places, mask=real, other=0).to(tl.int1)
    places = b * strides[0] + h * strides[1] + columns * strides[2]
    return tl.load(scores + places, mask=real, other=0.0).to(tl.float32), real


@triton.jit
def radix_cut(
    scores: tl.tensor,
    strides: tl.tuple,
    candidates: tl.tensor,
    candidate_strides: tl.tuple,
    b: tl.tensor,
    first_head: tl.tensor,
    heads: tl.tensor,
    entries: tl.tensor,
    count: tl.tensor,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The `count`-th largest candidate of `heads` heads of a batch row, and how many of those equal to it are taken.

    A count beyond the candidates takes all; for 0 the cut is NaN, which nothing reaches.
    """
    bins = tl.arange(0, 256)
    prefix, left = (count * 0).to(tl.uint32), count
    for digit in tl.static_range(4):
        shift = 24 - 8 * digit
        histogram = tl.zeros([256], tl.int32)
        for h in range(first_head, first_head + heads):
            for start in range(0, entries, TILE):
                columns = start + tl.arange(0, TILE).to(tl.int64)
                x, real = load_scores(scores, strides, candidates, candidate_strides, b, h, columns, entries)
                key = _key(x)
                if digit > 0:
                    real &= key >> (shift + 8) == prefix
                histogram += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=real)
        total = tl.sum(histogram, 0)
        if digit == 0:
            left = tl.minimum(left, total)
        from_top = total - tl.cumsum(histogram, 0) + histogram  # entries of this bin and those above it
        chosen = tl.sum((from_top >= left).to(tl.int32), 0) - 1
        left -= tl.sum(tl.where(bins > chosen, histogram, 0), 0)
        prefix = (prefix << 8) | chosen.to(tl.uint32)
    return _score(prefix), left


@triton.jit
def _key(x: tl.tensor) -> tl.tensor:
    """Unsigned integers in the order of scores."""
    bits = tl.where(x == 0, 0.0, x).to(tl.uint32, bitcast=True)  # -0 is 0
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def _score(key: tl.tensor) -> tl.tensor:
    """The score a key belongs to."""
    return tl.where(key >> 31 == 1, key ^ 0x80000000, ~key).to(tl.float32, bitcast=True)
