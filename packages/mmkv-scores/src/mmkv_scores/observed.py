"""H2O at prefill: attention received from all queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ._settings import check_types
from .trace import Trace
from .types import Observation, Scores


@dataclass(frozen=True, slots=True)
class ObservedAttention:
    """Scores an entry by the attention it received from every query so far, as H2O (arXiv 2306.14048) does at prefill.

    Costs a second pass over all query-key pairs (in blocks), because fused attention does not give its weights away.

    Attributes:
        corrected: True divides by the number of queries that could see the entry, so that early entries are not
            favoured (kvpress's ObservedAttention); False is H2O's raw sum.
    """

    corrected: bool = True

    window: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset({"column_sums"})
    is_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(self)

    def __call__(self, seen: Observation, capacity: Tensor, trace: Trace) -> Scores:
        """Scores of one layer; `capacity` and `trace` are not used.

        Raises:
            ValueError: `seen` comes without column sums.
        """
        if seen.column_sums is None or seen.column_counts is None:
            raise ValueError("ObservedAttention needs Observation.column_sums and column_counts")
        score = seen.column_sums
        if self.corrected:
            score = score / seen.column_counts.clamp(min=1)
        score = score * seen.candidates
        return Scores(rank=score, backbone=score)
