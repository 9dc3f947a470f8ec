"""KNorm: small keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmkv_kernels.masked import entry_norms
from torch import Tensor

from .trace import Trace
from .types import Observation, Scores


@dataclass(frozen=True, slots=True)
class KNorm:
    """Scores an entry by minus the L2 norm of its key: small keys attract attention (arXiv 2406.11430)."""

    window: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, seen: Observation, capacity: Tensor, trace: Trace) -> Scores:
        """Scores of one layer; `capacity` and `trace` are not used."""
        score = -entry_norms(seen.keys, seen.valid)
        return Scores(rank=score, backbone=score)
