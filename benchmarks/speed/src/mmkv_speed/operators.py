"""Every operator of mmkv-kernels as a case: what it is given, and what it has to read, write and multiply.

A new operator is one more entry of the table at the end; the CPU page, the GPU page and its checks take it from there.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import mmkv_kernels
import torch
from torch import Tensor

TAIL: Final = 64
"""Dense entries after a ragged prefix: what was decoded since the prompt."""
SUMMED: Final = 256
"""Query rows whose attention is summed over columns."""
Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of one layer's cache.

    Attributes:
        batch: rows.
        query_heads: Hq.
        heads: KV heads H.
        size: head dimension, of keys and values.
        entries: N, per KV head; of a ragged cache the mean.
        dtype: of the cache.
        device: where.
        window: query rows looked at.
        share: of the entries that stay when some are gathered.
        skew: of a ragged cache, how many times longer every second head is.
    """

    batch: int
    query_heads: int
    heads: int
    size: int
    entries: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    window: int = 32
    share: float = 0.5
    skew: int = 1

    @property
    def itemsize(self) -> int:
        """Bytes of a number in the cache."""
        return self.dtype.itemsize

    @property
    def segments(self) -> int:
        """Heads of all rows."""
        return self.batch * self.heads

    @property
    def kept(self) -> int:
        """Entries gathered per head."""
        return max(1, int(self.entries * self.share))

    def lengths(self) -> list[int]:
        """Entries of every head of a ragged cache: long and short in turn, the mean of each pair is `entries`."""
        long = 2 * self.entries * self.skew // (self.skew + 1)
        pair = (long, 2 * self.entries - long)
        return [pair[i % 2] if self.segments > 1 else self.entries for i in range(self.segments)]

    def randn(self, *sizes: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Standard normal values on the device."""
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(sizes, generator=generator, device=self.device, dtype=dtype or self.dtype)

    def queries(self, rows: int) -> Tensor:
        """[B, Hq, rows, D]."""
        return self.randn(self.batch, self.query_heads, rows, self.size, seed=1)

    def cache(self, entries: int | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, N, D]."""
        sizes = self.batch, self.heads, self.entries if entries is None else entries, self.size
        return self.randn(*sizes, seed=2), self.randn(*sizes, seed=3)


@dataclass(frozen=True, slots=True)
class Case:
    """One operator.

    Attributes:
        name: of the public function.
        make: its arguments.
        bytes: what it reads and writes by its contract: inputs as often as it says, outputs once.
        flops: multiplications and additions of its matrix products, 0 where there are none worth counting.
        exact: whether implementations must agree to the bit.
        passes: how often it reads which argument, where that is not once.
    """

    name: str
    make: Callable[[Shape], Inputs]
    bytes: Callable[[Shape], int]
    flops: Callable[[Shape], int] = lambda shape: 0
    exact: bool = False
    passes: Mapping[str, int] = field(default_factory=dict)

    @property
    def function(self) -> Callable[..., Any]:
        """The public function."""
        found: Callable[..., Any] = getattr(mmkv_kernels, self.name)
        return found

    @property
    def dispatches(self) -> bool:
        """Whether it takes `impl`, and has more than its reference."""
        return "impl" in inspect.signature(self.function).parameters

    def call(self, inputs: Inputs, impl: str = "reference") -> Any:
        """Runs it."""
        return self.function(**inputs, **({"impl": impl} if self.dispatches else {}))


def outputs(result: Any) -> list[Tensor]:
    """The tensors of what an operator gives."""
    return [result] if isinstance(result, Tensor) else list(result)


def triton_runs(device: str) -> bool:
    """Whether kernels can run there: on a GPU, or in Triton's interpreter."""
    there = importlib.util.find_spec("triton") is not None
    return there and (device.startswith("cuda") or os.environ.get("TRITON_INTERPRET") == "1")


def without_case() -> list[str]:
    """Public operators that have none yet."""
    public = (name for name in mmkv_kernels.__all__ if inspect.isroutine(getattr(mmkv_kernels, name)))
    return sorted(set(public) - {case.name for case in CASES})


def limits(case: Case, shape: Shape, bandwidth: float, rate: float) -> tuple[float, float]:
    """Seconds that bytes and products take at the device's measured best: the operator can beat neither."""
    return case.bytes(shape) / bandwidth, case.flops(shape) / rate


# -- arguments


def _statistics(shape: Shape) -> Inputs:
    keys, values = shape.cache()
    return {"keys": keys, "values": values}


def _window(shape: Shape) -> Inputs:
    return {"queries": shape.queries(shape.window), "keys": shape.cache()[0], "scaling": shape.size**-0.5}


def _gather(shape: Shape) -> Inputs:
    keys, values = shape.cache()
    ranks = shape.randn(shape.segments, shape.entries, seed=4, dtype=torch.float32)
    columns = ranks.topk(shape.kept).indices.sort().values.flatten()
    return {"keys": keys, "values": values, "columns": columns, "cu_seqlens": _offsets(shape, [shape.kept])}


def _ragged(shape: Shape) -> Inputs:
    lengths = shape.lengths()
    keys, values = (shape.randn(sum(lengths), shape.size, seed=seed) for seed in (5, 6))
    tail = shape.cache(TAIL)
    inputs = {"queries": shape.queries(1), "prefix_keys": keys, "prefix_values": values}
    inputs |= {"cu_seqlens": _offsets(shape, lengths), "tail_keys": tail[0], "tail_values": tail[1]}
    return inputs | {"scaling": shape.size**-0.5}


def _dense(shape: Shape) -> Inputs:
    keys, values = shape.cache()
    return {"queries": shape.queries(1), "keys": keys, "values": values, "scaling": shape.size**-0.5}


def _merge(shape: Shape) -> Inputs:
    sizes = shape.batch, shape.query_heads, shape.entries
    part = mmkv_kernels.AttentionOutput
    halves = (shape.randn(*sizes, shape.size, seed=seed) for seed in (7, 8))
    lses = (shape.randn(*sizes, seed=seed, dtype=torch.float32) for seed in (9, 10))
    a, b = (part(out, lse) for out, lse in zip(halves, lses, strict=True))
    return {"a": a, "b": b}


def _topk(shape: Shape) -> Inputs:
    sizes = shape.batch, shape.heads
    counts = torch.full(sizes, shape.kept, dtype=torch.int64, device=shape.device)
    return {"scores": shape.randn(*sizes, shape.entries, seed=11, dtype=torch.float32), "counts": counts}


def _bacon(shape: Shape) -> Inputs:
    window, last, past = _scores(shape, 3)
    sizes = torch.full((shape.batch,), 2 * shape.kept, device=shape.device)
    return {"window": window, "last": last, "past": past, "candidates": _candidates(shape), "sizes": sizes}


def _mixkv(shape: Shape) -> Inputs:
    attention, norms, cosines = _scores(shape, 3)
    heads = (shape.randn(shape.batch, shape.heads, seed=seed, dtype=torch.float32).sigmoid() for seed in (15, 16))
    inputs = {"attention": attention, "value_norms": norms, "cosines": cosines}
    return {**inputs, **dict(zip(("mean_norm", "redundancy"), heads, strict=True)), "candidates": _candidates(shape)}


def _scores(shape: Shape, count: int) -> list[Tensor]:
    """Positive [B, H, N] float32."""
    sizes = shape.batch, shape.heads, shape.entries
    return [shape.randn(*sizes, seed=12 + i, dtype=torch.float32).abs() for i in range(count)]


def _candidates(shape: Shape) -> Tensor:
    """All but the last window."""
    places = torch.arange(shape.entries, device=shape.device)
    return (places < shape.entries - min(shape.window, shape.entries // 2)).expand(shape.batch, 1, -1).contiguous()


def _columns(shape: Shape) -> Inputs:
    rows = min(SUMMED, shape.entries)
    return {"queries": shape.queries(rows), "keys": shape.cache()[0], "scaling": shape.size**-0.5}


def _offsets(shape: Shape, lengths: Iterable[int]) -> Tensor:
    """Running sum of the lengths, or of one length for all."""
    given = list(lengths)
    given = given * shape.segments if len(given) == 1 else given
    return torch.tensor([0, *given], device=shape.device).cumsum(0)


# -- bytes and products


def _pairs(shape: Shape, entries: int | None = None) -> int:
    """Numbers in the keys (or values) of a dense cache."""
    return shape.segments * (shape.entries if entries is None else entries) * shape.size


def _row_bytes(shape: Shape, rows: int) -> int:
    """Of [B, Hq, rows, D]."""
    return shape.batch * shape.query_heads * rows * shape.size * shape.itemsize


def _answer_bytes(shape: Shape, rows: int) -> int:
    """Of attention's output and log-sum-exp."""
    return _row_bytes(shape, rows) + 4 * shape.batch * shape.query_heads * rows


def _score_bytes(shape: Shape) -> int:
    """Of [B, H, N] float32."""
    return 4 * shape.segments * shape.entries


def _statistics_bytes(shape: Shape) -> int:
    return 3 * _pairs(shape) * shape.itemsize + 3 * _score_bytes(shape) + 2 * 4 * shape.segments


def _window_bytes(shape: Shape) -> int:
    return 2 * _pairs(shape) * shape.itemsize + _row_bytes(shape, shape.window) + 2 * _score_bytes(shape)


def _window_flops(shape: Shape) -> int:
    return 2 * 2 * shape.query_heads * shape.batch * shape.window * shape.entries * shape.size


def _gather_bytes(shape: Shape) -> int:
    moved = 2 * 2 * _pairs(shape, shape.kept) * shape.itemsize
    return moved + 8 * shape.segments * shape.kept + 8 * (shape.segments + 1)


def _ragged_bytes(shape: Shape) -> int:
    held = 2 * (sum(shape.lengths()) * shape.size + _pairs(shape, TAIL)) * shape.itemsize
    return held + _row_bytes(shape, 1) + _answer_bytes(shape, 1) + 8 * (shape.segments + 1)


def _ragged_flops(shape: Shape) -> int:
    group = shape.query_heads // shape.heads
    return 4 * group * (sum(shape.lengths()) + shape.segments * TAIL) * shape.size


def _dense_bytes(shape: Shape) -> int:
    return 2 * _pairs(shape) * shape.itemsize + _row_bytes(shape, 1) + _answer_bytes(shape, 1)


def _dense_flops(shape: Shape) -> int:
    return 4 * shape.query_heads * shape.batch * shape.entries * shape.size


def _merge_bytes(shape: Shape) -> int:
    return 3 * _answer_bytes(shape, shape.entries)


def _topk_bytes(shape: Shape) -> int:
    return _score_bytes(shape) + 8 * shape.segments * (1 + shape.kept) + 8 * (shape.segments + 1)


def _bacon_bytes(shape: Shape) -> int:
    return 6 * _score_bytes(shape) + shape.batch * (shape.entries + 8) + 4 * shape.segments


def _mixkv_bytes(shape: Shape) -> int:
    return 4 * _score_bytes(shape) + shape.batch * shape.entries + 2 * 4 * shape.segments


def _columns_bytes(shape: Shape) -> int:
    read = _pairs(shape) * shape.itemsize + _row_bytes(shape, min(SUMMED, shape.entries))
    return read + _score_bytes(shape) + 8 * shape.batch * shape.entries


def _columns_flops(shape: Shape) -> int:
    return 2 * shape.query_heads * shape.batch * min(SUMMED, shape.entries) * shape.entries * shape.size


CASES: Final = (
    Case("key_statistics", _statistics, _statistics_bytes, passes={"keys": 2}),
    Case("window_attention", _window, _window_bytes, _window_flops, passes={"keys": 2}),
    Case("gather_kv", _gather, _gather_bytes, exact=True),
    Case("ragged_attention", _ragged, _ragged_bytes, _ragged_flops),
    Case("dense_attention", _dense, _dense_bytes, _dense_flops),
    Case("merge_attention", _merge, _merge_bytes),
    Case("head_topk", _topk, _topk_bytes, exact=True),
    Case("bacon_calibrate", _bacon, _bacon_bytes),
    Case("mixkv_mix", _mixkv, _mixkv_bytes),
    Case("column_sums", _columns, _columns_bytes, _columns_flops),
)
BY_NAME: Final = {case.name: case for case in CASES}


def dispatched() -> Iterator[Case]:
    """Those with more than a reference in this version."""
    return (case for case in CASES if case.dispatches)
