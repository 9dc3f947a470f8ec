"""HeadKV: budgets by offline scores of retrieval heads."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ._apportion import floor_divide
from ._checks import check_types, number
from ._tables import pooled_counts
from .head_scores import HeadScores, Table
from .protocols import Counts


@dataclass(frozen=True, slots=True)
class HeadKV:
    """Counts by how much each head retrieves or reasons (HeadKV, https://arxiv.org/abs/2410.19258).

    The arithmetic is that of the HeadKV repository, also in KVCache-Factory. Protected tokens are not counted here.

    Attributes:
        table: Retrieval-head scores of this model: a `HeadScores`, nested numbers, or the path of a table, read once,
            here; kept as a `HeadScores` with the path as its `source`.
        beta: The pool takes `C // beta` of every head's capacity C: 1.01, the released default, leaves about 1 % to
            everyone. At least 1.
        exact: True: totals over layers and heads are exact, and what a head cannot hold goes to the others by score.
            False: as released.
    """

    table: Table
    beta: float = 1.01
    exact: bool = True
    counts: ClassVar[Counts] = "static"

    def __post_init__(self) -> None:
        """Loads the table."""
        check_types(self)
        object.__setattr__(self, "table", HeadScores.of(self.table))
        number(self.beta, "HeadKV beta", 1)

    def plan(self, candidates: Tensor, mean_capacity: Tensor, num_layers: int, num_heads: int) -> Tensor:
        """Counts `[L, B, H]` int64; see `headkv_counts`."""
        scores = HeadScores.of(self.table).per_kv_head(num_layers, num_heads)
        return headkv_counts(scores, candidates, mean_capacity, beta=self.beta, exact=self.exact)


def headkv_counts(
    scores: Tensor, candidates: Tensor, mean_capacity: Tensor, *, beta: float = 1.01, exact: bool = True
) -> Tensor:
    """Counts `[L, B, H]` int64.

    With C the mean capacity, b = C // beta, floor m = C - b, pool b L H and p the head's share of all scores: head (l,
    h) is due `p b L H + m`. Exact (a deviation): as `sparsemm_counts`. Released: `round`, cut to the candidates.

    Deviations from the release in both: per KV head, scores summed over the group (the release stores a cache per query
    head; its KV-head mode takes the mean of the rounded capacities of the group, the same before rounding); C is
    without the protected tokens, as in the HeadKV repository (KVCache-Factory's runner forgets to take the window off).

    Args:
        scores: `[L, H]` float64 on the CPU, per KV head, any positive scale.
        candidates: `[B]` integer.
        mean_capacity: `[B]` integer.
        beta: See `HeadKV`.
        exact: See `HeadKV`.
    """
    return pooled_counts(
        scores, candidates, mean_capacity, lambda capacity: capacity - floor_divide(capacity, beta), exact
    )
