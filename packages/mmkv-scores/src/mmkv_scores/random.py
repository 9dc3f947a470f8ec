"""Random: the control every method has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .trace import Trace
from .types import Observation, Scores

_STEPS = (0x2545F491, 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)


@dataclass(frozen=True, slots=True)
class Random:
    """Scores an entry by a hash of (seed, layer, head, slot): the same on every device, batch size and run.

    Attributes:
        seed: 0 by default.
    """

    seed: int = 0

    window: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, seen: Observation, capacity: Tensor, trace: Trace) -> Scores:
        """Scores of one layer, uniform in [0, 1); `capacity` and `trace` are not used."""
        batch, heads, length = seen.keys.shape[:3]
        head = torch.arange(heads, device=seen.keys.device)[None, :, None]
        score = hashed_uniform(self.seed, seen.layer, head, seen.slots).expand(batch, heads, length)
        return Scores(rank=score, backbone=score)


def hashed_uniform(seed: int, layer: int, head: Tensor, slot: Tensor) -> Tensor:
    """float32 in [0, 1) from integers, by multiply-xorshift rounds on 31 bits (no device has an opinion on those)."""
    state = torch.zeros_like(slot)
    parts: tuple[int | Tensor, ...] = (seed, layer, head, slot)
    for part, step in zip(parts, _STEPS, strict=True):
        state = ((state ^ (part + 1)) * step) & 0x7FFFFFFF
        state = ((state ^ (state >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF
        state = ((state ^ (state >> 12)) * 0x297A2D39) & 0x7FFFFFFF
        state = state ^ (state >> 15)
    return (state >> 7).float() / 2**24
