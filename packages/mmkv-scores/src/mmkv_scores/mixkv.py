"""MixKV: importance mixed with key diversity, by the redundancy of each head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from mmkv_kernels import key_statistics, mixkv_mix
from torch import Tensor

from .snapkv import SnapKV
from .trace import Trace
from .types import AttentionScorer, Observation, Scores

Table = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class MixKV:
    """Ranks by r * diversity + (1 - r) * (attention + value norm), r being the head's mean pairwise key cosine.

    MixKV (arXiv 2510.20707). Per KV head, over the candidates: the value norms and minus the cosine to the mean key are
    rescaled to [0, 1], then to the mean of the attention score; the mean key and r run over all real entries, the
    window included. r has the closed form (N |mean normalised key|^2 - 1) / (N - 1). Only the order within a head
    changes.

    `MixKV(BACON(...))` is our own composition, no paper has it: BACON's S takes the place of the attention term, and
    the backbone stays the raw window score.

    Deviations: a head whose values all have the same norm gets 0 there, where the release divides 0 by 0; float32
    throughout, where the release computes cosines in the model's dtype.

    Attributes:
        base: the attention score that is mixed (SnapKV by default).
        redundancy: where r comes from. "online": from this prompt's keys (the published method, and the release for GUI
            grounding). A number: the same r for all heads; 0 is the release's "vnorm" variant, 1 its "keydiff", and 0.5
            ranks as its equal-parts "mixkv". A table `[layers][KV heads]`: the release's main configuration reads one
            made for Qwen2-VL-7B; a layer or head outside the table raises (the release takes r = 0 there).
    """

    base: AttentionScorer = field(default_factory=SnapKV)
    redundancy: Literal["online"] | float | Table = "online"

    def __post_init__(self) -> None:
        if not getattr(self.base, "is_attention", False):
            name = type(self.base).__name__
            raise ValueError(f"MixKV mixes attention with diversity; {name} is not an attention score")
        if isinstance(self.redundancy, str) and self.redundancy != "online":
            raise ValueError(f"MixKV: redundancy is 'online', a number in [0, 1] or a table, got {self.redundancy!r}")
        if not isinstance(self.redundancy, str):
            object.__setattr__(self, "redundancy", _frozen(self.redundancy))

    is_attention: ClassVar[bool] = False  # its diversity term is no attention: mixing twice would dilute it

    @property
    def window(self) -> int:
        """Query rows of the base."""
        return self.base.window

    @property
    def needs(self) -> frozenset[str]:
        """What the base needs."""
        return self.base.needs

    def __call__(self, seen: Observation, capacity: Tensor, trace: Trace) -> Scores:
        """Scores of one layer."""
        base = self.base(seen, capacity, trace)
        statistics = key_statistics(seen.keys, seen.values, valid=seen.valid)
        redundancy = self._redundancy(seen, statistics.redundancy)
        norms, cosines, mean_norm = statistics.value_norms, statistics.cosines, statistics.mean_norm
        rank = mixkv_mix(base.rank, norms, cosines, mean_norm, redundancy, seen.candidates)
        return Scores(rank=rank, backbone=base.backbone)

    def _redundancy(self, seen: Observation, online: Tensor) -> Tensor:
        if self.redundancy == "online":
            return online
        if isinstance(self.redundancy, float):
            return torch.full_like(online, self.redundancy)
        assert isinstance(self.redundancy, tuple)
        found = (len(self.redundancy), len(self.redundancy[0]))
        needed = (seen.num_layers, seen.keys.shape[1])
        if found != needed:
            raise ValueError(f"MixKV: the redundancy table has {found} layers x KV heads, this model needs {needed}")
        return online.new_tensor(self.redundancy[seen.layer]).expand_as(online)


def _frozen(redundancy: float | Sequence[Sequence[float]]) -> float | Table:
    try:
        rows = [[redundancy]] if isinstance(redundancy, int | float) else [list(row) for row in redundancy]
    except TypeError:
        raise ValueError(f"MixKV: redundancy is 'online', a number or a table, got {redundancy!r}") from None
    if not rows or not rows[0] or len({len(row) for row in rows}) != 1:
        raise ValueError("MixKV: the redundancy table needs the same number of heads in every layer")
    if not all(_is_cosine(x) for row in rows for x in row):
        raise ValueError(f"MixKV: redundancies are mean cosines, numbers in [-1, 1], got {redundancy!r}")
    return float(rows[0][0]) if isinstance(redundancy, int | float) else tuple(tuple(map(float, row)) for row in rows)


def _is_cosine(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and -1 <= x <= 1
