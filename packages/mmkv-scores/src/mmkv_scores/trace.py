"""State that one request carries from layer to layer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Entry:
    layer: int
    slots: Tensor
    value: Tensor


@dataclass(slots=True)
class Trace:
    """What earlier layers left for later ones; owned by the request's cache and cleared after its last layer.

    Entries are kept per `place` (the scorer that wrote them), so two scorers of one pipeline never read each other's.
    """

    _entries: dict[Hashable, list[_Entry]] = field(default_factory=dict)

    def push(self, place: Hashable, layer: int, slots: Tensor, value: Tensor, depth: int) -> None:
        """Remembers `value` [B, H, N] float32 at `slots` [B, H or 1, N] (-1: nothing there), and the `depth` latest."""
        kept = [entry for entry in self._entries.get(place, []) if entry.layer > layer - depth]
        self._entries[place] = [*kept, _Entry(layer, slots, value)] if depth > 0 else []

    def recall(self, place: Hashable, layer: int, slots: Tensor, depth: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and population standard deviation over the last `depth` layers before `layer`, joined by slot and head.

        A slot counts only the layers that held it; layers whose number of heads differs cannot be joined and are left
        out. Both are [B, H, N] like `like`, zeros where nothing is known.
        """
        found = [e for e in self._entries.get(place, []) if layer - depth <= e.layer < layer]
        joined = [_join(e, slots, like) for e in found if e.value.shape[:2] == like.shape[:2]]
        mean, variance, count = torch.zeros_like(like), torch.zeros_like(like), torch.zeros_like(like)
        for value, present in joined:
            mean += value
            count += present
        mean /= count.clamp_(min=1)
        for value, present in joined:  # a second pass: mean of squares minus square of mean cancels in float32
            variance += ((value - mean) * present).square_()
        return mean, (variance / count).sqrt_()

    def clear(self) -> None:
        """Frees everything."""
        self._entries.clear()

    def tensors(self) -> list[Tensor]:
        """All tensors alive in here, for accounting."""
        return [t for entries in self._entries.values() for e in entries for t in (e.slots, e.value)]


def _join(entry: _Entry, slots: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    if entry.slots.shape == slots.shape and (entry.slots is slots or torch.equal(entry.slots, slots)):
        return entry.value, torch.ones_like(like)
    if not entry.slots.numel() or not slots.numel():
        return torch.zeros_like(like), torch.zeros_like(like)
    width = int(max(entry.slots.amax(), slots.amax())) + 2
    table = like.new_zeros(*like.shape[:2], width)
    held = torch.zeros_like(table)
    index = (entry.slots + 1).expand_as(entry.value)  # column 0 takes the entries that are not valid
    table.scatter_(2, index, entry.value)
    held.scatter_(2, index, 1.0)
    held[:, :, 0] = table[:, :, 0] = 0.0
    here = (slots + 1).expand_as(like)
    return table.gather(2, here), held.gather(2, here)
