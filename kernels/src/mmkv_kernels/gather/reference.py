"""Ragged gather in plain torch, without a loop over heads."""

from typing import NamedTuple

import torch
from torch import Tensor


class Gathered(NamedTuple):
    """A ragged cache: keys [T, D] and values [T, Dv]."""

    keys: Tensor
    values: Tensor


def gather_kv_reference(
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    cu_seqlens: Tensor,
    prefix: tuple[Tensor, Tensor, Tensor] | None,
) -> Gathered:
    """See `gather_kv`; arguments are taken as checked, except for the range of `columns`."""
    batch, heads, entries, _ = keys.shape
    segments = torch.arange(batch * heads, device=columns.device)
    owners = segments.repeat_interleave(cu_seqlens.diff(), output_size=columns.shape[0])
    if prefix is None:
        _require_range(columns, torch.tensor(entries, device=columns.device))
        return Gathered(_dense(keys, owners, columns), _dense(values, owners, columns))
    prefix_keys, prefix_values, prefix_cu = prefix
    lengths = prefix_cu.diff()[owners]
    _require_range(columns, lengths + entries)
    places = _Places.of(columns, owners, lengths, prefix_cu)
    return Gathered(places.gather(keys, prefix_keys), places.gather(values, prefix_values))


class _Places(NamedTuple):
    """Where output rows come from: `ragged` ones from prefix entries, `dense` ones from (owner, column) of the tail."""

    ragged: Tensor
    entries: Tensor
    dense: Tensor
    owners: Tensor
    columns: Tensor

    @classmethod
    def of(cls, columns: Tensor, owners: Tensor, lengths: Tensor, prefix_cu: Tensor) -> "_Places":
        old = columns < lengths
        ragged, dense = old.nonzero().squeeze(1), (~old).nonzero().squeeze(1)
        entries = prefix_cu[owners[ragged]] + columns[ragged]
        return cls(ragged, entries, dense, owners[dense], columns[dense] - lengths[dense])

    def gather(self, tail: Tensor, prefix: Tensor) -> Tensor:
        out = tail.new_empty(self.ragged.shape[0] + self.dense.shape[0], tail.shape[-1])
        out.index_copy_(0, self.ragged, prefix.index_select(0, self.entries))
        return out.index_copy_(0, self.dense, _dense(tail, self.owners, self.columns))


def _dense(tensor: Tensor, owners: Tensor, columns: Tensor) -> Tensor:
    """Rows (owner, column) of [B, H, N, D], also of a view such as [B, N, H, D] transposed, without copying it whole.

    Rows are numbered by where they lie in memory: index_select is several times faster than an index per dimension.
    """
    heads, size = tensor.shape[1], tensor.shape[-1]
    if tensor.stride(-1) != 1 or not tensor.numel() or any(stride % size for stride in tensor.stride()[:-1]):
        return tensor[owners // heads, owners % heads, columns]
    row, head, entry = (stride // size for stride in tensor.stride()[:-1])
    segments = torch.arange(tensor.shape[0] * heads, device=columns.device)
    starts = (segments // heads * row + segments % heads * head).index_select(0, owners)
    last = sum((n - 1) * step for n, step in zip(tensor.shape, (row, head, entry), strict=False))
    rows = tensor.as_strided((last + 1, size), (size, 1))
    return rows.index_select(0, starts.add_(columns, alpha=entry))


def _require_range(columns: Tensor, limits: Tensor) -> None:
    """Columns beyond their head would silently be another head's."""
    wrong = (columns < 0) | (columns >= limits)
    if wrong.any():
        at = int(wrong.nonzero()[0])
        limit = int(limits.expand_as(columns)[at])
        raise ValueError(f"columns[{at}] = {int(columns[at])} lies outside the {limit} entries of its head")
