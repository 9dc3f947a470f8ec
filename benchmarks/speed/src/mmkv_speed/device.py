"""Clocks of devices, and the two limits that operators meet on them: copying memory and multiplying matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Final

import torch
from torch import Tensor

from .machine import processor
from .meter import clock

FLUSH: Final = 256 * 2**20
"""Bytes written before each timed call on a GPU, so that nothing is left of the operands in its caches."""


def seconds(
    call: Callable[[], Any], device: str, *, repeats: int = 5, warmups: int = 1, at_most: float = 10.0
) -> list[float]:
    """Of each repeat: of one thread on CPUs, between events on GPUs; begins none that would end after `at_most`."""
    once = _on_gpu if device.startswith("cuda") else _on_cpu
    begin = time.monotonic()
    for _ in range(warmups):
        call()
    synchronize(device)
    found: list[float] = []
    while len(found) < repeats:
        found.append(once(call))
        if (time.monotonic() - begin) * (1 + 1 / (len(found) + warmups)) > at_most:
            break
    return found


def _on_cpu(call: Callable[[], Any]) -> float:
    start = clock()
    call()
    return clock() - start


def _on_gpu(call: Callable[[], Any]) -> float:
    _flushed().zero_()
    start = mark("cuda")
    call()
    stop = mark("cuda")
    return between([(start, stop)], "cuda")


def mark(device: str) -> Any:
    """A point in time: of the device's stream, or of this process."""
    if not device.startswith("cuda"):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def between(spans: Sequence[tuple[Any, Any]], device: str) -> float:
    """Seconds between marks, summed."""
    synchronize(device)
    if device.startswith("cuda"):
        return float(sum(start.elapsed_time(stop) for start, stop in spans)) / 1000
    return float(sum(stop - start for start, stop in spans))


@lru_cache(maxsize=1)
def _flushed() -> Tensor:
    return torch.empty(FLUSH, dtype=torch.int8, device="cuda")


def synchronize(device: str) -> None:
    """Waits for everything under way."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def copy_bandwidth(device: str, size: int, *, repeats: int = 7) -> list[float]:
    """Bytes per second, read and written, of copying `size` bytes."""
    source, goal = torch.ones(size // 4, device=device), torch.empty(size // 4, device=device)
    return [2 * 4 * source.numel() / x for x in seconds(lambda: goal.copy_(source), device, repeats=repeats)]


def matrix_rate(device: str, dtype: torch.dtype, size: int, *, repeats: int = 7) -> list[float]:
    """Floating point operations per second of a product of two square matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return [2 * size**3 / x for x in seconds(lambda: a @ b, device, repeats=repeats)]


def name(device: str) -> str:
    """For the page."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else processor()
