"""TOVA: attention of the last query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mmkv_kernels.masked import pool
from torch import Tensor

from ._settings import check_kernel, check_types
from .snapkv import window_evidence
from .trace import Trace
from .types import Evidence, Observation, Scores


@dataclass(frozen=True, slots=True)
class LastQuery:
    """Scores an entry by the attention of the last prompt token.

    TOVA (arXiv 2401.06104) at the end of prefill: the weights are averaged over all heads of the layer, so that every
    head keeps the same entries. Heads that hold different entries (a second turn) are averaged slot by slot.

    Attributes:
        kernel: average-pooling kernel, odd; 1 is no pooling, as published.
        across_heads: True averages over all heads (published); False keeps one score per KV head.
    """

    kernel: int = 1
    across_heads: bool = True

    window: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    is_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(self)
        check_kernel(self.kernel, "LastQuery")

    def evidence(self, seen: Observation) -> Evidence:
        """The last row, twice: a window of one is its own mean."""
        last = window_evidence(seen, 1).last
        if self.across_heads:
            last = _mean_over_heads(last, seen.slots)
        last = pool(last, seen.candidates, self.kernel)
        return Evidence(window=last, last=last)

    def __call__(self, seen: Observation, capacity: Tensor, trace: Trace) -> Scores:
        """Scores of one layer; `capacity` and `trace` are not used."""
        score = self.evidence(seen).last
        return Scores(rank=score, backbone=score)


def _mean_over_heads(score: Tensor, slots: Tensor) -> Tensor:
    """Mean [B, H, N] over the heads that hold each entry's slot; after an eviction heads hold different ones."""
    if slots.shape[1] == 1 or not slots.numel():
        return score.mean(1, keepdim=True).expand_as(score)
    table = score.new_zeros(*score.shape[:2], int(slots.amax()) + 2)
    index = slots + 1  # column 0 takes the entries that are not valid
    held = table.scatter(2, index, 1.0).sum(1, keepdim=True)
    total = table.scatter(2, index, score).sum(1, keepdim=True)
    return (total / held.clamp_(min=1)).expand_as(table).gather(2, index)
