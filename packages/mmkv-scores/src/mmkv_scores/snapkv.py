"""SnapKV: mean attention of the last queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mmkv_kernels import window_attention
from mmkv_kernels.masked import pool
from torch import Tensor

from ._settings import check_kernel, check_types
from .trace import Trace
from .types import Evidence, Observation, Scores


@dataclass(frozen=True, slots=True)
class SnapKV:
    """Scores an entry by the attention the last `window` queries pay to it, pooled over its neighbours.

    SnapKV (arXiv 2404.14469). Softmax in float32 over everything the window sees, mean over the window rows, reduced
    over the query heads of a KV group *before* pooling (as AdaKV, SparseMM and MixKV; kvpress pools first), then a 1-D
    average pool with zero padding and constant divisor. Deviations: rows are averaged where the release sums them (same
    ranking); one score per stored KV head, where the release scores keys expanded to query heads; pooling runs over the
    candidates only.

    Attributes:
        window: query rows looked at (release: 32).
        kernel: pooling kernel, odd (5).
        pooling: "avg" or "max".
        group: how the query heads of a KV head are reduced, "mean" or "max".
    """

    window: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"
    group: Literal["mean", "max"] = "mean"

    needs: ClassVar[frozenset[str]] = frozenset()
    is_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_types(self)
        if self.window < 1:
            raise ValueError(f"SnapKV: the window must be at least one query, got {self.window}")
        if self.pooling not in ("avg", "max") or self.group not in ("mean", "max"):
            raise ValueError(f"SnapKV: pooling is 'avg' or 'max' and group 'mean' or 'max', got {self}")
        check_kernel(self.kernel, "SnapKV")

    def evidence(self, seen: Observation) -> Evidence:
        """The pooled window mean and the pooled last row."""
        raw = window_evidence(seen, self.window, self.group)
        return Evidence(*(pool(x, seen.candidates, self.kernel, self.pooling) for x in raw))

    def __call__(self, seen: Observation, capacity: Tensor, trace: Trace) -> Scores:
        """Scores of one layer; `capacity` and `trace` are not used."""
        raw = window_evidence(seen, self.window, self.group).window
        score = pool(raw, seen.candidates, self.kernel, self.pooling)
        return Scores(rank=score, backbone=score)


def window_evidence(seen: Observation, window: int, group: Literal["mean", "max"] = "mean") -> Evidence:
    """Mean attention of the last `window` queries and attention of the last one, [B, H, N] each, not pooled."""
    raw = window_attention(
        seen.queries[:, :, -window:],
        seen.keys,
        scaling=seen.scaling,
        valid=seen.valid,
        mask=None if seen.mask is None else seen.mask[:, :, -window:],
        softcap=seen.softcap,
        group=group,
    )
    return Evidence(window=raw.mean, last=raw.last)
