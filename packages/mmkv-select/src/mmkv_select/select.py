"""Top-k per head with protected entries and exact counts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, Literal

import torch
from mmkv_kernels import head_topk
from torch import Tensor

from .kept import Kept

Modality = Literal["text", "image", "video"]
MODALITIES: tuple[Modality, ...] = ("text", "image", "video")


@dataclass(frozen=True, slots=True)
class Select:
    """What is always kept, and in which steps.

    Attributes:
        recent: last real tokens that are protected. None: the scorer's window.
        sinks: first real tokens that are protected.
        protect: a modality that is protected as a whole, e.g. "text".
        granularity: kept totals of heads that lose something are multiples of this (rounded down, never below the
            protected entries), for engines that free memory in blocks.
    """

    recent: int | None = None
    sinks: int = 0
    protect: Modality | None = None
    granularity: int = 1

    def __post_init__(self) -> None:
        _check_types(self)
        if min(self.recent or 0, self.sinks) < 0 or self.granularity < 1:
            raise ValueError(f"Select: recent and sinks cannot be negative and granularity starts at 1, got {self}")
        if self.protect is not None and self.protect not in MODALITIES:
            raise ValueError(f"Select: protect is one of {', '.join(MODALITIES)}, got {self.protect!r}")

    def protected(
        self, valid: Tensor, window: int, modality: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Entries that are kept whatever their score, [B, H or 1, N] bool, a part of `valid`.

        Args:
            valid: [B, H or 1, N] bool, entries ordered by slot.
            window: the scorer's window, the default of `recent`.
            modality: [B, H or 1, N] int8; needed when `protect` is set.
            mask: [B, H or 1, N] bool, further entries to protect.

        Raises:
            ValueError: `protect` is set and `modality` is not given.
        """
        recent = window if self.recent is None else self.recent
        order = valid.cumsum(-1)
        chosen = (order <= self.sinks) | (order > order[..., -1:] - recent)
        if self.protect is not None:
            if modality is None:
                raise ValueError(f"Select(protect={self.protect!r}) needs to know the modality of each token")
            chosen = chosen | (modality == MODALITIES.index(self.protect))
        if mask is not None:
            chosen = chosen | mask
        return chosen & valid


def select(rank: Tensor, counts: Tensor, is_candidate: Tensor, protected: Tensor, granularity: int = 1) -> Kept:
    """Keeps the protected entries and, per head, the `counts` candidates that rank highest; ties go to the lower slot.

    Args:
        rank: [B, H, N] float32.
        counts: [B, H] int64, clamped to the candidates there are.
        is_candidate: [B, H or 1, N] bool.
        protected: [B, H or 1, N] bool, disjoint from the candidates.
        granularity: kept totals are rounded down to a multiple of it; a head that keeps all it has is left alone.

    Raises:
        ValueError: shapes that do not fit, negative counts, or a candidate whose rank is not finite.
    """
    _check(rank, counts, is_candidate, protected)
    is_candidate = is_candidate.expand(rank.shape)
    if granularity > 1:
        spare = (counts + protected.sum(-1)) % granularity
        rounded = (counts - spare).clamp(min=0)
        counts = torch.where(counts < is_candidate.sum(-1), rounded, counts)
    columns, cu_seqlens = head_topk(rank, counts, candidates=is_candidate, always=protected)
    return Kept(columns, cu_seqlens, cu_seqlens.diff().view(counts.shape), rank.shape[-1])


_TYPES: dict[object, tuple[type, ...]] = {"int": (int,), "int | None": (int, NoneType)}


def _check_types(settings: Any) -> None:
    """Raises TypeError unless the fields annotated as int hold one; a bool is none."""
    for field in fields(settings):
        value, types = getattr(settings, field.name), _TYPES.get(field.type)
        if types and (isinstance(value, bool) or not isinstance(value, types)):
            raise TypeError(f"{type(settings).__name__}: {field.name} must be {field.type}, got {value!r}")


def _check(rank: Tensor, counts: Tensor, is_candidate: Tensor, protected: Tensor) -> None:
    if rank.ndim != 3 or counts.shape != rank.shape[:2]:
        raise ValueError(f"rank is [B, H, N] and counts [B, H], got {tuple(rank.shape)} and {tuple(counts.shape)}")
    for name, mask in (("is_candidate", is_candidate), ("protected", protected)):
        fits = mask.ndim == 3 and mask.shape[::2] == rank.shape[::2] and mask.shape[1] in (1, rank.shape[1])
        if mask.dtype != torch.bool or not fits:
            raise ValueError(f"{name} is bool [B, H or 1, N], got {mask.dtype} {tuple(mask.shape)}")
    if bool((counts < 0).any()):
        raise ValueError("counts cannot be negative")
    # The sum is asked first, as it is far cheaper; it may also be infinite because of what no candidate holds.
    if not bool(rank.sum().isfinite()) and bool((~rank.isfinite() & is_candidate).any()):
        raise ValueError("a candidate's rank is NaN or infinite; the model's keys or queries probably are too")
