"""What the Triton kernels share; imported only by them.

Tensors come with their strides as one tuple. Indices of entries are int64: a product with a stride may pass 2^31. A
tile is [rows, BLOCK_D], BLOCK_D being the head size padded to a power of two. Nothing that may differ between a row
alone and the row in a batch has a say in how work is cut, so that the results are the same to the bit. Lengths are
not specialised on: one compiled kernel serves all prompts.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements of a tile of rows: 16 registers of each of 128 threads, 4 KB of a 16-bit cache
OPTIONS = {"enable_fp_fusion": True}  # of every launch; Triton's default up to 3.9, and not from 3.10 on


def block_size(size: int) -> int:
    """Columns of a tile for heads of `size`: a power of two, and no less than matrix instructions take."""
    return max(16, 1 << (size - 1).bit_length())


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Kernels start on the current GPU, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def aligned(*caches: Tensor) -> int:
    """What divides the places of all heads' entries in memory: for strides of 72, Triton by itself assumes 1."""
    return math.gcd(16, *(stride for cache in caches for stride in cache.stride()[:-1]))


@triton.jit
def place(parts: tl.tensor, heads: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Number of this program, and the segment, batch row and KV head it works for; a segment has `parts` programs."""
    part = tl.program_id(0)  # divided while it has 32 bits: three times as fast
    segment = part // parts
    b, h = segment // heads, segment % heads
    return part.to(tl.int64), segment.to(tl.int64), b.to(tl.int64), h.to(tl.int64)


@triton.jit
def load_rows(
    cache: tl.tensor,
    head: tl.tensor,
    rows: tl.tensor,
    strides: tl.tuple,
    real: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Tile [rows, BLOCK_D], as stored, of entries `rows` of a head; 0 where not `real`.

    The head begins `head` elements into the cache, and `strides` are the cache's last two.
    """
    dims = tl.arange(0, BLOCK_D)
    starts = tl.multiple_of(head + rows * strides[0], ALIGNED)
    places = starts[:, None] + dims.to(tl.int64)[None, :] * strides[1]
    return tl.load(cache + places, mask=real[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def real_rows(valid: tl.tensor, rows: tl.tensor, stride: tl.tensor, entries: tl.tensor) -> tl.tensor:
    """Bool [rows]: which are entries of a head, and valid ones where there is a `valid` (the head's first flag)."""
    real = rows < entries
    if valid is not None:
        real = real & tl.load(valid + rows * stride, mask=real, other=0).to(tl.int1)
    return real
