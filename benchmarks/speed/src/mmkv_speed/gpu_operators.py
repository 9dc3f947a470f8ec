"""Operators on a device: bandwidth of every kernel and its reference over a grid of caches."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch

from . import device
from .deadline import Deadline
from .geometry import TINY, WHOLE, Geometry
from .operators import CASES, Case, Shape, triton_runs

SKEW: Final = 16
_LONGEST: Final = 4.0
"""Seconds for all repeats of one call."""
_TARGET: Final = (32768, 8)


@dataclass(frozen=True, slots=True)
class Grid:
    """What is measured.

    Attributes:
        geometries: heads and their size.
        points: (entries, batch), those that targets speak of first.
        copied: bytes of the copy.
        matrix: side of the matrices.
        repeats: of each call.
        slow: largest batch that references are run with.
    """

    geometries: tuple[Geometry, ...] = WHOLE
    points: tuple[tuple[int, int], ...] = (
        _TARGET,
        *((n, b) for b in (1, 8, 32) for n in (4096, 16384, 32768, 65536, 131072) if (n, b) != _TARGET),
    )
    copied: int = 2**30
    matrix: int = 8192
    repeats: int = 10
    slow: int = 8


SMALL: Final = Grid(TINY, ((48, 2), (16, 1)), 2**16, 16, 1, 2)


def machine(where: str, grid: Grid, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per second of a copy, and operations per second of a matrix product."""
    return {
        "bandwidth": statistics.median(device.copy_bandwidth(where, grid.copied, repeats=grid.repeats)),
        "rate": statistics.median(device.matrix_rate(where, dtype, grid.matrix, repeats=grid.repeats)),
    }


def run(where: str, dtype: torch.dtype, grid: Grid, deadline: Deadline) -> list[dict[str, Any]]:
    """Every case, geometry, point and implementation, or why it was left out."""
    return [_cell(*wanted, where, dtype, grid, deadline) for wanted in _wanted(grid)]


def _wanted(grid: Grid) -> Iterator[tuple[Case, Geometry, int, int, int, str]]:
    """Kernels before references at every point, and skewed heads where targets speak of them."""
    for entries, batch in grid.points:
        for impl in ("triton", "reference"):
            for geometry in grid.geometries:
                for case in CASES:
                    if impl == "reference" or case.dispatches:
                        yield case, geometry, entries, batch, 1, impl
                    if case.name == "ragged_attention" and case.dispatches and (entries, batch) == grid.points[0]:
                        yield case, geometry, entries, batch, SKEW, impl


def _cell(
    case: Case, geometry: Geometry, entries: int, batch: int, skew: int, impl: str,
    where: str, dtype: torch.dtype, grid: Grid, deadline: Deadline,
) -> dict[str, Any]:  # fmt: skip
    shape = geometry.shape(batch, entries, dtype, where, skew)
    cell: dict[str, Any] = {
        "operator": case.name, "geometry": geometry.name, "entries": entries, "batch": batch, "skew": skew,
        "impl": impl, "bytes": case.bytes(shape), "flops": case.flops(shape), "seconds": [],
    }  # fmt: skip
    cell["why"] = _obstacle(case, shape, impl, grid, deadline)
    if not cell["why"]:
        try:
            call = partial(case.call, case.make(shape), impl)
            cell["seconds"] = device.seconds(
                call, where, repeats=grid.repeats, warmups=2, at_most=min(_LONGEST, deadline.left / 4)
            )
        except torch.cuda.OutOfMemoryError:
            cell["why"] = "does not fit"
            torch.cuda.empty_cache()
        except Exception as failure:
            cell["why"] = f"fails: {failure}"
    return cell


def _obstacle(case: Case, shape: Shape, impl: str, grid: Grid, deadline: Deadline) -> str:
    """Why this is not measured; empty: it is."""
    if deadline.over:
        return "no time left"
    if impl == "reference" and shape.batch > grid.slow:
        return f"references are run up to batch {grid.slow}"
    if impl == "triton" and not triton_runs(shape.device):
        return "no Triton on this machine"
    if shape.device.startswith("cuda") and 3 * case.bytes(shape) > torch.cuda.mem_get_info()[0]:
        return "does not fit"
    return ""


def bandwidth(cell: dict[str, Any]) -> float:
    """Bytes per second achieved."""
    return float(cell["bytes"] / statistics.median(cell["seconds"]))


def share(cell: dict[str, Any], machine_: dict[str, float], *, roofline: bool = False) -> float:
    """Of the copy's bandwidth, or of whichever limit is nearer."""
    limits = [cell["bytes"] / machine_["bandwidth"]]
    if roofline:
        limits.append(cell["flops"] / machine_["rate"])
    return float(max(limits) / statistics.median(cell["seconds"]))


def pick(cells: Sequence[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """The measured ones with these values."""
    return [c for c in cells if c["seconds"] and all(c[name] == value for name, value in wanted.items())]
