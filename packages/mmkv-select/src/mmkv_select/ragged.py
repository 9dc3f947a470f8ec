"""The compacted cache: per-head segments without padding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from mmkv_kernels import gather_kv
from torch import Tensor

from .kept import Kept


@dataclass(frozen=True, slots=True)
class RaggedKV:
    """Kept keys and values, concatenated over (row, head) in row-major order; immutable.

    Attributes:
        keys: [T, D].
        values: [T, Dv].
        slots: [T] int32, the logical column of each entry, ascending within a head.
        cu_seqlens: [B * H + 1] int64.
        shape: (B, H).
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    cu_seqlens: Tensor
    shape: tuple[int, int]

    @property
    def lengths(self) -> Tensor:
        """[B, H] int64, entries per head."""
        return self.cu_seqlens.diff().view(self.shape)

    def rows(self, index: Tensor) -> RaggedKV:
        """The cache of the given batch rows [R] int64, which may repeat (beam search)."""
        lengths = self.lengths[index]
        starts = self.cu_seqlens[:-1].view(self.shape)[index].flatten()
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.flatten().cumsum(0)])
        owners = torch.repeat_interleave(torch.arange(starts.numel(), device=starts.device), lengths.flatten())
        take = torch.arange(owners.numel(), device=owners.device) - cu_seqlens[owners] + starts[owners]
        shape = (int(index.numel()), self.shape[1])
        return RaggedKV(self.keys[take], self.values[take], self.slots[take], cu_seqlens, shape)

    def gather_mask(self, mask: Tensor) -> Tensor:
        """[t, T] bool, what each query sees of each entry, from a mask [B or 1, 1, t, S] over logical columns."""
        owners = torch.repeat_interleave(torch.arange(self.shape[0], device=mask.device), self.lengths.sum(-1))
        return mask.expand(self.shape[0], -1, -1, -1)[owners, 0, :, self.slots.long()].T

    def to(self, device: torch.device | str, non_blocking: bool = False) -> RaggedKV:
        """The same cache on another device."""
        keys, values, slots, cu_seqlens = (t.to(device, non_blocking=non_blocking) for t in self.tensors())
        return RaggedKV(keys, values, slots, cu_seqlens, self.shape)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Everything this cache holds."""
        return self.keys, self.values, self.slots, self.cu_seqlens

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Dense keys [B, H, M, D], values [B, H, M, Dv], slots [B, H, M] int64; 0 and slot -1 pad on the left."""
        batch, heads = self.shape
        width = int(self.lengths.max()) if self.lengths.numel() else 0
        valid = torch.arange(width, device=self.keys.device) >= width - self.lengths[..., None]
        keys = self.keys.new_zeros(batch, heads, width, self.keys.shape[-1])
        values = self.values.new_zeros(batch, heads, width, self.values.shape[-1])
        slots = torch.full((batch, heads, width), -1, dtype=torch.int64, device=self.keys.device)
        keys[valid], values[valid], slots[valid] = self.keys, self.values, self.slots.long()
        return keys, values, slots


def compact(keys: Tensor, values: Tensor, slots: Tensor, kept: Kept) -> RaggedKV:
    """Copies the kept entries out of a dense cache; nothing of the result shares memory with it.

    Args:
        keys: [B, H, N, D].
        values: [B, H, N, Dv].
        slots: [B, H or 1, N] int64, logical columns.
        kept: which entries, of the same B, H, N.

    Raises:
        ValueError: `kept` was made for another shape.
    """
    batch, heads, length = keys.shape[:3]
    if tuple(kept.lengths.shape) != (batch, heads) or kept.size != length:
        raise ValueError(f"kept is for {(*kept.lengths.shape, kept.size)}, the cache is {(batch, heads, length)}")
    gathered = gather_kv(keys, values, kept.columns, kept.cu_seqlens)
    starts = torch.arange(batch * slots.shape[1], device=keys.device).view(batch, -1).expand(-1, heads) * length
    places = starts.flatten().index_select(0, kept.owners()).add_(kept.columns)
    chosen = slots.reshape(-1).index_select(0, places).to(torch.int32)
    return RaggedKV(gathered.keys, gathered.values, chosen, kept.cu_seqlens, (batch, heads))
