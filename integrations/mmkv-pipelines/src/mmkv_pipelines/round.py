"""One compression of one request: capacity, scores, counts, kept entries, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

from mmkv_budget import HeadRule, TableRule
from mmkv_scores import Observation, Trace
from mmkv_select import Kept, select
from torch import Tensor

from ._checks import checked_counts, checked_scores, checked_whole

if TYPE_CHECKING:
    from .pipeline import Pipeline


@dataclass(slots=True)
class Round:
    """What the layers of one request share while its prompt is compressed; thrown away after the last layer.

    Attributes:
        pipeline: the method.
        budget: [B] int64, KV pairs kept per KV head, protected ones included.
        num_layers: how many layers are compressed.
        lengths: [B] int64, real tokens each conversation has seen; layer budgets follow from it, so that they are the
            same in every layer even when a second turn finds different counts in each.
        bytes_per_token: of a budget that was given in bytes, so that a message can answer in bytes.
        trace: scorers' state between layers.
    """

    pipeline: Pipeline
    budget: Tensor
    num_layers: int
    lengths: Tensor
    bytes_per_token: int | None = None
    trace: Trace = field(default_factory=Trace)
    _table: TableRule | None = field(init=False)
    _plan: Tensor | None = None

    def __post_init__(self) -> None:
        heads = self.pipeline.heads
        self._table = heads if isinstance(heads, TableRule) else None  # asked once: protocols answer slowly

    def decide(self, seen: Observation, protect: Tensor | None = None) -> Kept | None:
        """The entries of one layer that stay, or None when nothing has to go.

        Args:
            seen: the layer, with `candidates` = `valid`; layers come in order.
            protect: [B, H or 1, N] bool, further entries that must stay.

        Raises:
            ValueError: the budget does not exceed the protected entries, or a part of the pipeline returned something
                else than it has to: other shapes or dtypes, scores that are not finite, negative or unequal counts.
        """
        protected = self.pipeline.select.protected(seen.valid, self.pipeline.window, seen.modality, protect)
        seen = replace(seen, candidates=seen.valid & ~protected)
        existing = seen.candidates.sum(-1).expand(seen.keys.shape[:2])
        fixed = protected.sum(-1).amax(1)
        mean_capacity = self._mean_capacity(fixed, existing)
        rule = self.pipeline.layers
        capacity = rule(self.lengths - fixed, mean_capacity, seen.layer, self.num_layers)
        checked_whole(rule, "capacity", capacity, self.budget.shape)
        if self._table is None and bool((capacity * existing.shape[1] >= existing.sum(1)).all()):
            return None
        scores = self.pipeline.score(seen, capacity, self.trace)
        checked_scores(self.pipeline.score, scores, seen.candidates, seen.keys.shape[:3])
        counts = self._counts(seen, scores.backbone, capacity, mean_capacity, self.lengths - fixed)
        checked_counts(self.pipeline.heads, counts, existing)
        kept = select(scores.rank, counts, seen.candidates, protected, self.pipeline.select.granularity)
        return None if kept.is_everything(seen.valid) else kept

    def _mean_capacity(self, fixed: Tensor, existing: Tensor) -> Tensor:
        capacity = self.budget - fixed
        short = (capacity <= 0) & (existing.amax(1) > capacity.clamp(min=0))
        if bool(short.any()):
            row = int(short.nonzero()[0])
            least = int(fixed[row]) + 1
            size = "" if self.bytes_per_token is None else f" ({least * self.bytes_per_token:,} bytes)"
            raise ValueError(
                f"budget {int(self.budget[row])} does not exceed the {least - 1} protected tokens of row {row}; "
                f"the least that works is {least}{size}"
            )
        return capacity.clamp(min=0)

    def _counts(
        self, seen: Observation, backbone: Tensor, capacity: Tensor, mean_capacity: Tensor, candidates: Tensor
    ) -> Tensor:
        if self._table is None:
            rule = cast(HeadRule, self.pipeline.heads)
            return rule(backbone, seen.candidates, capacity)
        if self._plan is None:
            batch, heads = seen.keys.shape[:2]
            plan = self._table.plan(candidates, mean_capacity, self.num_layers, heads)
            self._plan = checked_whole(self._table, "plan", plan, (self.num_layers, batch, heads))
        return self._plan[seen.layer]
