"""StreamingLLM: the first and the latest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._settings import check_types
from .trace import Trace
from .types import Observation, Scores


@dataclass(frozen=True, slots=True)
class StreamingLLM:
    """Scores the first `sinks` entries highest, then by recency.

    StreamingLLM (arXiv 2309.17453). Deviation: kept entries keep their rotations and logical positions, where the paper
    re-indexes positions inside the cache.

    Attributes:
        sinks: first real entries of a row that always come first (4).
    """

    sinks: int = 4

    window: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_types(self)
        if self.sinks < 0:
            raise ValueError(f"StreamingLLM: sinks cannot be negative, got {self.sinks}")

    def __call__(self, seen: Observation, capacity: Tensor, trace: Trace) -> Scores:
        """Scores of one layer, in [0, 2]; `capacity` and `trace` are not used."""
        order = seen.valid.cumsum(-1)
        recency = order / (order[..., -1:] + 1.0)
        score = torch.where(order <= self.sinks, 2.0, recency)
        score = (score * seen.valid).expand(*seen.keys.shape[:3]).float()
        return Scores(rank=score, backbone=score)
