"""Kernels against their references, before anything is timed."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import mmkv_kernels
import torch
from torch import Tensor

from .deadline import Deadline
from .operators import Case, Shape, dispatched, outputs, triton_runs

ENTRIES: Final = (1, 63, 1000)
FEW: Final = (1, 17)
DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
_ROUNDINGS: Final = 4
_LEAST: Final = 2**-20
"""Rounding that sums of float32 are granted."""


@dataclass(frozen=True, slots=True)
class Check:
    """One kernel beside its reference on one shape: the greatest error, in units of what is allowed."""

    operator: str
    what: str
    error: float

    @property
    def passed(self) -> bool:
        """Whether it lies within the tolerance."""
        return self.error <= 1

    def to_json(self) -> dict[str, Any]:
        """Plain types; an error without measure is null."""
        error = self.error if math.isfinite(self.error) else None
        return {"operator": self.operator, "what": self.what, "error": error, "passed": self.passed}


def allowed(expected: Tensor, dtype: torch.dtype) -> Tensor:
    """Tolerance of every number: a few roundings of the cache's dtype, of itself and of the largest."""
    rounding = max(torch.finfo(dtype).eps, _LEAST)
    size = expected.abs().nan_to_num(0.0, 0.0, 0.0)
    return _ROUNDINGS * rounding * (size + size.amax() + torch.finfo(torch.float32).tiny)


def error(actual: Tensor, expected: Tensor, dtype: torch.dtype, *, exact: bool) -> float:
    """Greatest error in units of the tolerance; inf where a number is not one, or where it had to agree to the bit."""
    if not expected.numel():
        return 0.0
    same = actual == expected  # infinities too
    if exact or actual.shape != expected.shape:
        return 0.0 if actual.shape == expected.shape and bool(same.all()) else math.inf
    a, e = actual.double(), expected.double()
    apart = ((a - e).abs() / allowed(e, dtype)).masked_fill(same, 0.0)
    return math.inf if not bool(apart.isfinite().all()) else float(apart.amax())


def against_reference(case: Case, shape: Shape) -> float:
    """Greatest error of the Triton kernel's outputs."""
    inputs = case.make(shape)
    mine, other = (outputs(case.call(inputs, impl)) for impl in ("triton", "reference"))
    return max(error(a, e, shape.dtype, exact=case.exact) for a, e in zip(mine, other, strict=True))


def run(shape: Shape, lengths: Sequence[int], deadline: Deadline) -> dict[str, Any]:
    """Every operator with a kernel, these lengths and all dtypes, as far as time goes."""
    if not triton_runs(shape.device):
        return {"checks": [], "skipped": 0, "why": "Triton does not run on this machine"}
    found: list[dict[str, Any]] = []
    skipped = 0
    for case, one in _wanted(shape, lengths):
        if deadline.over:
            skipped += 1
        else:
            found.append(_checked(case, one).to_json())
    why = "" if found or skipped else "no operator of this version has a kernel besides its reference"
    return {"checks": found, "skipped": skipped, "why": why}


def _checked(case: Case, shape: Shape) -> Check:
    what = f"{str(shape.dtype).removeprefix('torch.')}, {shape.entries} entries, skew {shape.skew}"
    try:
        return Check(case.name, what, against_reference(case, shape))
    except Exception as failure:  # a kernel that does not launch is a finding, not the end of the run
        return Check(case.name, f"{what}: {failure}", math.inf)


def _wanted(shape: Shape, lengths: Sequence[int]) -> Iterator[tuple[Case, Shape]]:
    for case in dispatched():
        for dtype in DTYPES:
            for entries in lengths:
                yield case, replace(shape, dtype=dtype, entries=entries)
        if case.name == "ragged_attention":
            yield case, replace(shape, entries=lengths[-1], skew=16)


def kernel_tests(deadline: Deadline) -> str:
    """What pytest says of the kernels' own tests on this device, or why it was not asked."""
    folder = Path(mmkv_kernels.__file__).parents[2] / "tests"
    if not folder.is_dir():
        return "not run: the sources' tests are not beside the package"
    if deadline.over:
        return "not run: no time left"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(folder)]
    try:
        run_ = subprocess.run(command, capture_output=True, text=True, timeout=deadline.left, check=False)
    except subprocess.TimeoutExpired:
        return f"not finished within {deadline.left:.0f} s"
    said = (run_.stdout.strip() or run_.stderr.strip()).splitlines()
    return said[-1] if said else f"nothing said, code {run_.returncode}"
