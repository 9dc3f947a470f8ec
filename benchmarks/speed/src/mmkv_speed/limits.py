"""Operators on a CPU, beside what the same thread copies and multiplies in the same round."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch

from . import device
from .operators import BY_NAME, CASES, Shape, limits
from .summary import Summary

SHAPE: Final = Shape(batch=1, query_heads=8, heads=4, size=64, entries=32768)
QUICK: Final = Shape(batch=1, query_heads=8, heads=4, size=64, entries=2048)
_COPIED: Final = 256 * 2**20
_MATRIX: Final = 1024
_REPEATS: Final = 3


def measure(shape: Shape) -> dict[str, Any]:
    """One round: medians of the bandwidth, the rate, and every operator's seconds."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {
        "bandwidth": statistics.median(device.copy_bandwidth("cpu", _COPIED)),
        "rate": statistics.median(device.matrix_rate("cpu", torch.float32, _MATRIX)),
        "seconds": {},
    }
    for case in CASES:
        each = device.seconds(partial(case.call, case.make(shape)), "cpu", repeats=_REPEATS)
        found["seconds"][case.name] = statistics.median(each)
    return found


def rows(rounds: Sequence[Mapping[str, Any]], shape: Shape) -> Iterator[list[str]]:
    """Operator, MiB, time, share of the copying bandwidth, share of whichever limit is nearer."""
    for name in rounds[0]["seconds"]:
        case = BY_NAME[name]
        copies, nearer, by = [], [], "bytes"
        for round_ in rounds:
            bytes_, products = limits(case, shape, round_["bandwidth"], round_["rate"])
            copies.append(bytes_ / round_["seconds"][name])
            nearer.append(max(bytes_, products) / round_["seconds"][name])
            by = "bytes" if bytes_ >= products else "products"
        milliseconds = Summary.of([round_["seconds"][name] for round_ in rounds]).text(1000, 1)
        size = f"{case.bytes(shape) / 2**20:.1f}"
        yield [name, size, milliseconds, Summary.of(copies).text(100), f"{Summary.of(nearer).text(100)}, {by}"]
