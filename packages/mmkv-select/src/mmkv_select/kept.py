"""Which entries stay: ragged index sets per batch row and KV head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """Entries that stay, per (row, head) in row-major order, ascending within each.

    Attributes:
        columns: [T] int64, index of each kept entry along the N entries of its head.
        cu_seqlens: [B * H + 1] int64, exclusive running sum of the lengths.
        lengths: [B, H] int64.
        size: N, how many entries there were.
    """

    columns: Tensor
    cu_seqlens: Tensor
    lengths: Tensor
    size: int

    @classmethod
    def from_mask(cls, mask: Tensor) -> Kept:
        """Kept entries from a mask [B, H, N] bool."""
        lengths = mask.sum(-1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.flatten().cumsum(0)])
        columns = mask.flatten().nonzero().squeeze(1).remainder_(max(1, mask.shape[-1]))  # [:, 2] would keep all three
        return cls(columns, cu_seqlens, lengths, mask.shape[-1])

    def below(self, column: int) -> Kept:
        """The kept entries whose index is below `column`."""
        mask = self.columns < column
        lengths = self.lengths.flatten().scatter_add(0, self.owners(), mask.long() - 1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return Kept(self.columns[mask], cu_seqlens, lengths.view(self.lengths.shape), self.size)

    def mask(self) -> Tensor:
        """The kept entries as [B, H, N] bool."""
        mask = torch.zeros(self.lengths.numel() * self.size, dtype=torch.bool, device=self.columns.device)
        mask[self.owners() * self.size + self.columns] = True
        return mask.view(*self.lengths.shape, self.size)

    def owners(self) -> Tensor:
        """[T] int64, the flat (row, head) index each entry belongs to."""
        flat = self.lengths.flatten()
        segments = torch.arange(flat.numel(), device=flat.device)
        return segments.repeat_interleave(flat, output_size=self.columns.shape[0])

    def is_everything(self, valid: Tensor) -> bool:
        """True when nothing of valid [B, H or 1, N] was dropped."""
        return bool((self.lengths == valid.sum(-1)).all())
