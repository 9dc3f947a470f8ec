"""The mix of importance and diversity in Triton: one launch, one program for each head.

Three passes: ranges and the mean of the attention, means of what was rescaled, the mix. Bytes: 13 read and 4 written
per entry, and the reads twice again from the cache of a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import OPTIONS, on_device
from ..masked import EPS

TILE = 2048  # entries of one step of a program


@triton.jit(do_not_specialize=["entries"])
def mixkv_mix_kernel(
    attention: tl.tensor,  # [B, H, N], as the next two contiguous
    value_norms: tl.tensor,  # [B, H, N]
    cosines: tl.tensor,  # [B, H, N]
    mean_norm: tl.tensor,  # [B, H]
    redundancy: tl.tensor,  # [B, H]
    candidates: tl.tensor,  # bool [B, H, N]
    mixed: tl.tensor,  # out, [B, H, N]
    candidate_strides: tl.tuple,
    heads: tl.tensor,
    entries: tl.tensor,
    EPS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Mixes the scores of one head."""
    segment = tl.program_id(0).to(tl.int64)
    candidates += segment // heads * candidate_strides[0] + segment % heads * candidate_strides[1]
    attention += segment * entries
    value_norms += segment * entries
    cosines += segment * entries
    length, r = tl.load(mean_norm + segment), tl.load(redundancy + segment)
    inf = float("inf")
    total, count = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.int32)
    v_low, v_high = tl.full([TILE], inf, tl.float32), tl.full([TILE], -inf, tl.float32)
    d_low, d_high = v_low, v_high
    for start in range(0, entries, TILE):
        a, v, d, real, _ = _load(
            attention, value_norms, cosines, candidates, candidate_strides[2], length, start, entries, TILE
        )  # fmt: skip
        total += a
        count += real.to(tl.int32)
        v_low, v_high = tl.minimum(v_low, tl.where(real, v, inf)), tl.maximum(v_high, tl.where(real, v, -inf))
        d_low, d_high = tl.minimum(d_low, tl.where(real, d, inf)), tl.maximum(d_high, tl.where(real, d, -inf))
    held = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    level = tl.sum(total, 0) / held
    v_first, d_first = tl.min(v_low, 0), tl.min(d_low, 0)
    v_range, d_range = tl.max(v_high, 0) - v_first + EPS, tl.max(d_high, 0) - d_first + EPS
    v_sum, d_sum = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    for start in range(0, entries, TILE):
        _, v, d, real, _ = _load(
            attention, value_norms, cosines, candidates, candidate_strides[2], length, start, entries, TILE
        )  # fmt: skip
        v_sum += tl.where(real, (v - v_first) / v_range, 0.0)
        d_sum += tl.where(real, (d - d_first) / d_range, 0.0)
    v_scale, d_scale = level / (tl.sum(v_sum, 0) / held + EPS), level / (tl.sum(d_sum, 0) / held + EPS)
    for start in range(0, entries, TILE):
        a, v, d, real, columns = _load(
            attention, value_norms, cosines, candidates, candidate_strides[2], length, start, entries, TILE
        )  # fmt: skip
        value, diversity = (v - v_first) / v_range * v_scale, (d - d_first) / d_range * d_scale
        mix = tl.where(real, r * diversity + (1 - r) * (a + value), 0.0)
        tl.store(mixed + segment * entries + columns, mix, mask=columns < entries)


@triton.jit
def _load(
    attention: tl.tensor,
    value_norms: tl.tensor,
    cosines: tl.tensor,
    candidates: tl.tensor,
    stride: tl.tensor,
    length: tl.tensor,
    start: tl.tensor,
    entries: tl.tensor,
    TILE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Attention, value norm and diversity of a tile of a head (0 where no candidate), its candidates and columns."""
    columns = start + tl.arange(0, TILE).to(tl.int64)
    real = columns < entries
    real = real & tl.load(candidates + columns * stride, mask=real, other=0).to(tl.int1)
    a = tl.load(attention + columns, mask=real, other=0.0)
    v = tl.load(value_norms + columns, mask=real, other=0.0)
    return a, v, -tl.load(cosines + columns, mask=real, other=0.0) * length, real, columns


def mixkv_mix_triton(
    attention: Tensor, value_norms: Tensor, cosines: Tensor, mean_norm: Tensor, redundancy: Tensor, candidates: Tensor
) -> Tensor:
    """See `mixkv_mix`; arguments are taken as checked."""
    batch, heads, entries = attention.shape
    mixed = torch.empty_like(attention, memory_format=torch.contiguous_format)
    if not mixed.numel():
        return mixed
    flags = candidates.expand(attention.shape)
    with on_device(attention):
        mixkv_mix_kernel[(batch * heads,)](
            attention.contiguous(), value_norms.contiguous(), cosines.contiguous(),
            mean_norm.contiguous(), redundancy.contiguous(), flags, mixed,
            flags.stride(), heads, entries, EPS, TILE, num_warps=8, **OPTIONS,
        )  # fmt: skip
    return mixed
