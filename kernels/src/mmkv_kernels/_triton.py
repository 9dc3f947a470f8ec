"""What the Triton kernels share; imported only by them.

Tensors come with their strides as one tuple. Indices of entries are int64: a product with a stride may pass 2^31. A
tile is [rows, BLOCK_D], BLOCK_D being the head size padded to a power of two. Nothing that may differ between a row
alone and the row in a batch has a say in how work is cut, so that the results are the same to the bit. Lengths are
not specialised on. Strides are: a kernel is compiled anew where one becomes 1 or a multiple of 16, or stops being it.
So is the number of heads of all rows where `find_work` searches among them: anew for each doubling.
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


def precision(cache: Tensor) -> str:
    """How `product` multiplies tiles of a cache.

    Products of 16-bit values are exact whatever it says. For float32, three products of a shorter format on NVIDIA's
    matrix units lose some 2 of 24 bits and are many times faster than none on them; AMD's take float32 as it is.
    """
    if triton.knobs.runtime.interpret:
        return "wide"  # the interpreter would multiply the bits of bfloat16
    if cache.dtype != torch.float32 or triton.runtime.driver.active.get_current_target().backend == "hip":
        return "ieee"
    return "tf32x3"


@triton.jit
def product(a: tl.tensor, b: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Matrix product, summed in float32."""
    if PRECISION == "wide":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def place(parts: tl.tensor, heads: tl.tensor) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Number of this program, and the segment, batch row and KV head it works for; a segment has `parts` programs."""
    part = tl.program_id(0)  # divided while it has 32 bits: three times as fast
    segment = part // parts
    b, h = segment // heads, segment % heads
    return part.to(tl.int64), segment.to(tl.int64), b.to(tl.int64), h.to(tl.int64)


@triton.jit
def from_head(tensor: tl.tensor, strides: tl.tuple, b: tl.tensor, h: tl.tensor, ALIGNED: tl.constexpr = 1) -> tl.tensor:
    """Pointer to the first entry of head h of batch row b; added once, it takes no registers in loops."""
    return tensor + tl.multiple_of(b * strides[0] + h * strides[1], ALIGNED)


@triton.jit
def find_work(
    program: tl.tensor,
    cu_seqlens: tl.tensor,
    tail: tl.tensor,
    heads: tl.tensor,
    segments: tl.tensor,
    SPLIT: tl.constexpr,
    STEPS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Segment, batch row and KV head this program works for, and the first of its at most SPLIT entries there.

    Segment s has `cu_seqlens[s + 1] - cu_seqlens[s] + tail` entries, cut at multiples of SPLIT, and its programs begin
    with number `entries before it // SPLIT + s`. So there are always enough, at most one too many for each segment
    (its first entry lies past the end), and nobody needs to know the lengths to launch them. STEPS is the bit length
    of `segments`.
    """
    low, high = program * 0, segments
    for _ in tl.static_range(STEPS):
        middle = (low + high) // 2
        beyond = first_program(cu_seqlens, middle + 1, tail, SPLIT) <= program
        low, high = tl.where(beyond, middle + 1, low), tl.where(beyond, high, middle)
    start = (program - first_program(cu_seqlens, low, tail, SPLIT)) * SPLIT
    return low.to(tl.int64), (low // heads).to(tl.int64), (low % heads).to(tl.int64), start


@triton.jit
def first_program(cu_seqlens: tl.tensor, segment: tl.tensor, tail: tl.tensor, SPLIT: tl.constexpr) -> tl.tensor:
    """Number of the first program that works for a segment, see `find_work`."""
    return (tl.load(cu_seqlens + segment) + segment.to(tl.int64) * tail) // SPLIT + segment


@triton.jit
def load_rows(
    cache: tl.tensor,
    starts: tl.tensor,
    stride: tl.tensor,
    real: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Tile [rows, BLOCK_D], as stored, of the entries that start at places `starts` [rows]; 0 where not `real`."""
    dims = tl.arange(0, BLOCK_D)
    # What is said of an argument is lost when its function is inlined: of this new value it stays.
    places = tl.multiple_of(starts[:, None], (ALIGNED, ALIGNED)) + dims.to(tl.int64)[None, :] * stride
    return tl.load(cache + places, mask=real[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def real_rows(valid: tl.tensor, rows: tl.tensor, stride: tl.tensor, entries: tl.tensor) -> tl.tensor:
    """Bool [rows]: which are entries of a head, and valid ones where there is a `valid` (the head's first flag)."""
    real = rows < entries
    if valid is not None:
        real = real & tl.load(valid + rows * stride, mask=real, other=0).to(tl.int1)
    return real
