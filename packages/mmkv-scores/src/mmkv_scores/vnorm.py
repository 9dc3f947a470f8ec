"""VNorm: large values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmkv_kernels.masked import entry_norms
from torch import Tensor

from .trace import Trace
from .types import Observation, Scores


@dataclass(frozen=True, slots=True)
class VNorm:
    """Scores an entry by the L2 norm of its value, the intrinsic importance term of MixKV (arXiv 2510.20707)."""

    window: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, seen: Observation, capacity: Tensor, trace: Trace) -> Scores:
        """Scores of one layer; `capacity` and `trace` are not used."""
        score = entry_norms(seen.values, seen.valid)
        return Scores(rank=score, backbone=score)
