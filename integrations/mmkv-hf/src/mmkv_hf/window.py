"""The last query rows of a prompt, rolled over chunk borders, per batch row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def sees_itself(mask: Tensor, positions: Tensor) -> Tensor:
    """[B, n] bool: which queries at positions [B or 1, n] (-1: none) of mask [B, 1, n, S] are no padding."""
    batch = max(len(mask), len(positions))
    index = positions.clamp(min=0).expand(batch, -1)[..., None]
    return mask[:, 0].expand(batch, -1, -1).gather(2, index)[..., 0] & (positions >= 0)


@dataclass(frozen=True, slots=True)
class WindowRows:
    """The last real queries seen so far.

    Attributes:
        queries: [B, Hq, W, D], right-aligned.
        positions: [B, W] int64, logical positions; -1 for a padding query.
        mask: [B, 1, W, S] bool, what each row saw; None while everything was causal without padding.
    """

    queries: Tensor
    positions: Tensor
    mask: Tensor | None

    @classmethod
    def of(cls, queries: Tensor, positions: Tensor, mask: Tensor | None, size: int) -> WindowRows:
        """The last `size` real rows of queries [B, Hq, n, D] at positions [B or 1, n], with mask [B, 1, n, S] or None.

        Without a mask none of them is padding.
        """
        batch, _, count, _ = queries.shape
        if mask is None and count > size:
            queries, positions = queries[:, :, count - size :], positions[:, count - size :]
        positions = positions.expand(batch, -1)
        if mask is not None:
            positions = positions.masked_fill(~sees_itself(mask, positions), -1)
        return cls(queries, positions, mask).last(size)

    def then(self, new: WindowRows, size: int) -> WindowRows:
        """The last `size` real rows of these and the new ones."""
        queries = torch.cat([self.queries, new.queries], dim=2)
        positions = torch.cat([self.positions, new.positions], dim=1)
        mask = None
        if self.mask is not None or new.mask is not None:
            width = max(int(positions.max()) + 1, *(m.shape[-1] for m in (self.mask, new.mask) if m is not None), 0)
            mask = torch.cat([self._explicit(width), new._explicit(width)], dim=2)
        return WindowRows(queries, positions, mask).last(size)

    def sees(self, slots: Tensor) -> Tensor:
        """[B, H or 1, W, N] bool: what each row saw of the entries at slots [B, H or 1, N]."""
        real = (self.positions >= 0)[:, None, :, None]
        held = (slots >= 0)[:, :, None]
        if self.mask is None:
            return (slots[:, :, None] <= self.positions[:, None, :, None]) & real & held
        shape = (*slots.shape[:2], self.positions.shape[1], slots.shape[2])
        index = slots.clamp(min=0)[:, :, None].expand(shape)
        return self.mask.expand(shape[0], shape[1], -1, -1).gather(3, index) & real & held

    def _explicit(self, width: int) -> Tensor:
        if self.mask is not None:
            return F.pad(self.mask.expand(self.queries.shape[0], -1, -1, -1), (0, width - self.mask.shape[-1]))
        columns = torch.arange(width, device=self.positions.device)
        return (columns <= self.positions[..., None])[:, None]

    def last(self, size: int) -> WindowRows:
        """The last `size` of them that are no padding, per batch row."""
        if self.mask is None or bool((self.positions[:, -size:] >= 0).all()):
            mask = None if self.mask is None else self.mask[:, :, -size:].clone()
            return WindowRows(self.queries[:, :, -size:].clone(), self.positions[:, -size:].clone(), mask)
        order = (self.positions >= 0).to(torch.int8).sort(dim=1, stable=True).indices[:, -size:]
        queries = self.queries.gather(
            2, order[:, None, :, None].expand(-1, self.queries.shape[1], -1, self.queries.shape[3])
        )
        mask = self.mask.expand(order.shape[0], -1, -1, -1)
        mask = mask.gather(2, order[:, None, :, None].expand(-1, 1, -1, mask.shape[3]))
        return WindowRows(queries, self.positions.gather(1, order), mask)
