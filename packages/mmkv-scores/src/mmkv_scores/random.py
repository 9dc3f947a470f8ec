"""Random: the control every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ._settings import check_types
from .trace import Trace
from .types import Observation, Scores

_STEPS = (0x2545F491, 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


@dataclass(frozen=True, slots=True)
class Random:
    """Scores an entry by a hash of (seed, layer, head, distance): the same on every device, batch size and run.

    The distance is counted in slots back from the last real token of the row. Deviation: the design of mmkv says slot
    instead of distance, but a slot is a logical column, which padding on the left shifts: a padded row would keep other
    entries than the row alone. A later turn has another last token, and draws anew.

    Attributes:
        seed: 0 by default.
    """

    seed: int = 0

    window: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        check_types(self)

    def __call__(self, seen: Observation, capacity: Tensor, trace: Trace) -> Scores:
        """Scores of one layer, uniform in [0, 1); `capacity` and `trace` are not used."""
        batch, heads, length = seen.keys.shape[:3]
        head = torch.arange(heads, device=seen.keys.device)[None, :, None]
        last = seen.slots.amax((1, 2), keepdim=True) if length else 0  # -1 where not valid
        score = hashed_uniform(self.seed, seen.layer, head, last - seen.slots).expand(batch, heads, length)
        return Scores(rank=score, backbone=score)


def hashed_uniform(seed: int, layer: int, head: Tensor, distance: Tensor) -> Tensor:
    """float32 in [0, 1) from integers, by multiply-xorshift rounds on 31 bits (no device has an opinion on those)."""
    state = torch.zeros_like(distance)
    parts: tuple[int | Tensor, ...] = (seed, layer, head, distance)
    for part, step in zip(parts, _STEPS, strict=True):
        state = ((state ^ (part + 1)) * step) & 0x7FFFFFFF
        state = ((state ^ (state >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
        state = ((state ^ (state >> 12)) * 0x297A2D39) & 0x7FFFFFFF
        state = state ^ (state >> 15)
    return (state >> 7).float() / 2**24
