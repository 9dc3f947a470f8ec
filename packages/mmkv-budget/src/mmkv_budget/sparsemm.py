"""SparseMM: budgets by offline scores of visual heads."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ._apportion import floor_times
from ._checks import check_types, number
from ._tables import pooled_counts
from .head_scores import HeadScores, Table
from .protocols import Counts


@dataclass(frozen=True, slots=True)
class SparseMM:
    """Counts by how much each head looks at what an image shows (SparseMM, https://arxiv.org/abs/2506.05344).

    Of its three parts (local window, uniform, by score) the window is the protected tokens, not counted here.

    Attributes:
        table: Visual-head scores of this model: a `HeadScores`, nested numbers, or the path of a table, read once,
            here; kept as a `HeadScores` with the path as its `source`.
        ratio: rho: share of the capacity that every head gets regardless of its score, in [0, 1]. 0.1 as released.
        exact: True: totals over layers and heads are exact, and what a head cannot hold goes to the others by score.
            False: as released.
    """

    table: Table
    ratio: float = 0.1
    exact: bool = True
    counts: ClassVar[Counts] = "static"

    def __post_init__(self) -> None:
        """Loads the table."""
        check_types(self)
        object.__setattr__(self, "table", HeadScores.of(self.table))
        number(self.ratio, "SparseMM ratio", 0, 1)

    def plan(self, candidates: Tensor, mean_capacity: Tensor, num_layers: int, num_heads: int) -> Tensor:
        """Counts `[L, B, H]` int64; see `sparsemm_counts`."""
        scores = HeadScores.of(self.table).per_kv_head(num_layers, num_heads)
        return sparsemm_counts(scores, candidates, mean_capacity, ratio=self.ratio, exact=self.exact)


def sparsemm_counts(
    scores: Tensor, candidates: Tensor, mean_capacity: Tensor, *, ratio: float = 0.1, exact: bool = True
) -> Tensor:
    """Counts `[L, B, H]` int64.

    With C the mean capacity, u = int(C * ratio) for every head, pool P = (C - u) L H and w the head's share of all
    scores: head (l, h) is due `u + w P`. Exact (a deviation): due amounts above the candidates are redistributed by
    score (evenly over heads of score 0 once all others are full), whole tokens by largest remainder, ties by layer,
    then head; the total is `min(C, candidates) L H`. Released: `round`, cut to the candidates. GQA as released: scores
    are summed over the group.

    Args:
        scores: `[L, H]` float64 on the CPU, per KV head, any positive scale.
        candidates: `[B]` integer.
        mean_capacity: `[B]` integer.
        ratio: See `SparseMM`.
        exact: See `SparseMM`.
    """
    return pooled_counts(scores, candidates, mean_capacity, lambda capacity: floor_times(capacity, ratio), exact)
