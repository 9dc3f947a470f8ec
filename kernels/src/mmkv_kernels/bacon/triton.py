"""Calibration of a window score in Triton, in two launches.

`terms` writes E, L and V, chunk by chunk; `score` finds, one program for each head, lambda by two radix selects, and
writes S. Bytes: B, Q, T and the candidates read, E, L, V and S written, and B and V some six times read again, from the
cache of a GPU.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._radix import TILE, load_scores, radix_cut
from .._triton import OPTIONS, on_device, place
from ..masked import EPS
from .reference import Calibration

CHUNK = 1024  # entries of one program of `terms`


@triton.jit(do_not_specialize=["entries", "chunks", "radius"])
def bacon_terms_kernel(
    window: tl.tensor,  # [B, H, N], as all others but candidates contiguous
    last: tl.tensor,  # [B, H, N]
    past: tl.tensor,  # [B, H, N]
    candidates: tl.tensor,  # bool [B, H, N]
    residual: tl.tensor,  # out, [B, H, N]
    local: tl.tensor,  # out, [B, H, N]
    support: tl.tensor,  # out, [B, H, N]
    candidate_strides: tl.tuple,
    heads: tl.tensor,
    entries: tl.tensor,
    chunks: tl.tensor,
    radius: tl.tensor,
    WITH_E: tl.constexpr,
    WITH_L: tl.constexpr,
    WITH_T: tl.constexpr,
    NEIGHBOURHOOD: tl.constexpr,
    EPS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """E, L and V of one chunk of a head's entries."""
    part, segment, b, h = place(chunks, heads)
    columns = part % chunks * CHUNK + tl.arange(0, CHUNK)
    real, places = columns < entries, segment * entries + columns
    candidates += b * candidate_strides[0] + h * candidate_strides[1]
    b_here = tl.load(window + places, mask=real, other=0.0)
    e_here = tl.maximum(tl.load(last + places, mask=real, other=0.0) - b_here, 0.0)
    e_sum, b_sum = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    near = tl.zeros([CHUNK], tl.int32)
    for offset in range(-radius, radius + 1):
        u = columns + offset
        counts = _flags(candidates, candidate_strides[2], u, entries)
        b_there = tl.load(window + segment * entries + u, mask=counts, other=0.0)
        e_sum += tl.maximum(tl.load(last + segment * entries + u, mask=counts, other=0.0) - b_there, 0.0)
        b_sum += b_there
        near += counts.to(tl.int32)
    width = (2 * radius + 1).to(tl.float32)
    mean = e_sum / (tl.maximum(near, 1).to(tl.float32) if NEIGHBOURHOOD == "truncated" else width)
    if NEIGHBOURHOOD == "supported":
        around = b_sum / width
        mean = mean * around / (around + b_here + EPS)
    chosen = _flags(candidates, candidate_strides[2], columns, entries)
    mean = tl.where(chosen, mean, 0.0)
    total = tl.zeros([CHUNK], tl.float32)
    if WITH_E:
        total += e_here
    if WITH_L:
        total += mean
    if WITH_T:
        total += tl.load(past + places, mask=chosen, other=0.0)
    tl.store(residual + places, e_here, mask=real)
    tl.store(local + places, mean, mask=real)
    tl.store(support + places, total, mask=real)


@triton.jit
def _flags(candidates: tl.tensor, stride: tl.tensor, columns: tl.tensor, entries: tl.tensor) -> tl.tensor:
    inside = (columns >= 0) & (columns < entries)
    return inside & tl.load(candidates + columns * stride, mask=inside, other=0).to(tl.int1)


@triton.jit(do_not_specialize=["entries"])
def bacon_score_kernel(
    window: tl.tensor,  # [B, H, N], as all others but candidates contiguous
    support: tl.tensor,  # [B, H, N]
    candidates: tl.tensor,  # bool [B, H, N]
    sizes: tl.tensor,  # int64 [B]
    score: tl.tensor,  # out, [B, H, N]
    factor: tl.tensor,  # out, [B * H]
    strides: tl.tuple,
    candidate_strides: tl.tuple,
    heads: tl.tensor,
    entries: tl.tensor,
    gamma: tl.tensor,
    GATED: tl.constexpr,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Lambda of one head, and its scores."""
    segment = tl.program_id(0).to(tl.int64)
    b, h = segment // heads, segment % heads
    size = tl.minimum(tl.maximum(tl.load(sizes + b), 1), entries).to(tl.int32)
    window_mean, window_std = _top_moments(
        window, strides, candidates, candidate_strides, b, h, entries, size, TILE
    )  # fmt: skip
    own_mean, spread = _top_moments(
        support, strides, candidates, candidate_strides, b, h, entries, size, TILE
    )  # fmt: skip
    scale = gamma * window_std / (spread + EPS)
    if GATED:
        scale *= tl.minimum(tl.maximum(own_mean / (window_mean + EPS), 0.0), 1.0)
    tl.store(factor + segment, scale)
    for start in range(0, entries, TILE):
        columns = start + tl.arange(0, TILE)
        real, places = columns < entries, segment * entries + columns
        x = tl.load(window + places, mask=real, other=0.0)
        tl.store(score + places, x + scale * tl.load(support + places, mask=real, other=0.0), mask=real)


@triton.jit
def _top_moments(
    scores: tl.tensor,
    strides: tl.tuple,
    candidates: tl.tensor,
    candidate_strides: tl.tuple,
    b: tl.tensor,
    h: tl.tensor,
    entries: tl.tensor,
    size: tl.tensor,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Mean and population standard deviation of the `size` largest candidates of a head; zeros where there is none."""
    cut, tied = radix_cut(scores, strides, candidates, candidate_strides, b, h, 1, entries, size, TILE)
    cut = tl.where(tied > 0, cut, 0.0)
    total, count = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.int32)
    for start in range(0, entries, TILE):
        columns = start + tl.arange(0, TILE).to(tl.int64)
        x, real = load_scores(scores, strides, candidates, candidate_strides, b, h, columns, entries)
        above = real & (x > cut)
        total += tl.where(above, x, 0.0)
        count += above.to(tl.int32)
    taken = tl.maximum(tl.sum(count, 0) + tied, 1).to(tl.float32)
    mean = (tl.sum(total, 0) + tied * cut) / taken
    squares = tl.zeros([TILE], tl.float32)
    for start in range(0, entries, TILE):
        columns = start + tl.arange(0, TILE).to(tl.int64)
        x, real = load_scores(scores, strides, candidates, candidate_strides, b, h, columns, entries)
        squares += tl.where(real & (x > cut), (x - mean) * (x - mean), 0.0)
    return mean, tl.sqrt((tl.sum(squares, 0) + tied * (cut - mean) * (cut - mean)) / taken)


def bacon_calibrate_triton(
    window: Tensor,
    last: Tensor,
    past: Tensor,
    candidates: Tensor,
    sizes: Tensor,
    terms: str,
    radius: int,
    neighbourhood: str,
    gamma: float,
    gated: bool,
) -> Calibration:
    """See `bacon_calibrate`; arguments are taken as checked."""
    batch, heads, entries = window.shape
    score, residual, local, support = (window.new_empty(window.shape) for _ in range(4))
    result = Calibration(score, residual, local, window.new_zeros(batch, heads, 1))
    if not window.numel():
        return result
    window, flags, chunks = window.contiguous(), candidates.expand(window.shape), triton.cdiv(entries, CHUNK)
    with on_device(window):
        bacon_terms_kernel[(batch * heads * chunks,)](
            window, last.contiguous(), past.contiguous(), flags, residual, local, support,
            flags.stride(), heads, entries, chunks, radius,
            *(name in terms for name in "elt"), neighbourhood, EPS, CHUNK, **OPTIONS,
        )  # fmt: skip
        bacon_score_kernel[(batch * heads,)](
            window, support, flags, sizes.contiguous(), score, result.factor, window.stride(), flags.stride(),
            heads, entries, gamma, gated, EPS, TILE, num_warps=8, **OPTIONS,
        )  # fmt: skip
    return result
