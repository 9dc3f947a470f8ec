"""KeyDiff: keys that differ from the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmkv_kernels import key_statistics
from torch import Tensor

from .trace import Trace
from .types import Observation, Scores


@dataclass(frozen=True, slots=True)
class KeyDiff:
    """Scores an entry by minus the cosine of its key to the mean normalised key of its head.

    KeyDiff (arXiv 2504.15364), one shot over the whole prompt, where the paper works block by block. Query-agnostic.
    Always float32: in bfloat16 the cosines of a head with near-parallel keys collapse to a handful of values.
    """

    window: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, seen: Observation, capacity: Tensor, trace: Trace) -> Scores:
        """Scores of one layer, in [-1, 1]; `capacity` and `trace` are not used."""
        score = -key_statistics(seen.keys, seen.values, valid=seen.valid).cosines
        return Scores(rank=score, backbone=score)
