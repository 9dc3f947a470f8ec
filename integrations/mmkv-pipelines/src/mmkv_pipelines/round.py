"""One compression of one request: capacity, scores, counts, kept entries, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mmkv_budget import TableRule
from mmkv_scores import Observation, Trace
from mmkv_select import Kept, select
from torch import Tensor

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
        trace: scorers' state between layers.
    """

    pipeline: Pipeline
    budget: Tensor
    num_layers: int
    lengths: Tensor
    trace: Trace = field(default_factory=Trace)
    _plan: Tensor | None = None

    def decide(self, seen: Observation, protect: Tensor | None = None) -> Kept | None:
        """The entries of one layer that stay, or None when nothing has to go.

        Args:
            seen: the layer, with `candidates` = `valid`; layers come in order.
            protect: [B, H or 1, N] bool, further entries that must stay.

        Raises:
            ValueError: the budget does not exceed the protected entries, or a score is not finite.
        """
        protected = self.pipeline.select.protected(seen.valid, self.pipeline.window, seen.modality, protect)
        seen = replace(seen, candidates=seen.valid & ~protected)
        existing = seen.candidates.sum(-1).expand(seen.keys.shape[:2])
        fixed = protected.sum(-1).amax(1)
        mean_capacity = self._mean_capacity(fixed, existing)
        capacity = self.pipeline.layers(self.lengths - fixed, mean_capacity, seen.layer, self.num_layers)
        planned = isinstance(self.pipeline.heads, TableRule)
        if not planned and bool((capacity * existing.shape[1] >= existing.sum(1)).all()):
            return None
        scores = self.pipeline.score(seen, capacity, self.trace)
        counts = self._counts(seen, scores.backbone, capacity, mean_capacity, self.lengths - fixed)
        kept = select(scores.rank, counts, seen.candidates, protected, self.pipeline.select.granularity)
        return None if kept.is_everything(seen.valid) else kept

    def _mean_capacity(self, fixed: Tensor, existing: Tensor) -> Tensor:
        capacity = self.budget - fixed
        short = (capacity <= 0) & (existing.amax(1) > capacity.clamp(min=0))
        if bool(short.any()):
            row = int(short.nonzero()[0])
            raise ValueError(
                f"budget {int(self.budget[row])} does not exceed the {int(fixed[row])} protected tokens of row {row}; "
                f"the least that works is {int(fixed[row]) + 1}"
            )
        return capacity.clamp(min=0)

    def _counts(
        self, seen: Observation, backbone: Tensor, capacity: Tensor, mean_capacity: Tensor, candidates: Tensor
    ) -> Tensor:
        rule = self.pipeline.heads
        if not isinstance(rule, TableRule):
            return rule(backbone, seen.candidates, capacity)
        if self._plan is None:
            self._plan = rule.plan(candidates, mean_capacity, self.num_layers, seen.keys.shape[1])
        return self._plan[seen.layer]
