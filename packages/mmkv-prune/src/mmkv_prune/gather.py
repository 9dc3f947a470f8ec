"""From a mask over the prompt to what an adapter gathers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class KeptColumns(NamedTuple):
    """Kept columns as indices; rows that keep fewer are filled up on the left.

    Attributes:
        columns: [B, K] int64, ascending where real. Fillers are other columns of the row, each at most once.
        real: [B, K] bool; a filler must be masked out as a key and its output ignored.
    """

    columns: Tensor
    real: Tensor


def kept_columns(kept: Tensor) -> KeptColumns:
    """The columns of `kept` [B, N] bool, K being the most that a row keeps.

    To gather from a sequence that holds only `earlier` columns, hand in
    `kept.gather(1, earlier.columns) & earlier.real`.
    """
    most = int(kept.sum(-1).max()) if kept.numel() else 0
    order = kept.byte().sort(dim=-1, stable=True).indices
    index = order[:, kept.shape[-1] - most :]
    return KeptColumns(index, kept.gather(-1, index))


def reindexed(kept: Tensor) -> Tensor:
    """Position ids [B, N] int64 that number the columns of `kept` [B, N] bool 0, 1, 2, ...; meaningful where True.

    For `positions="reindex"`: the first generated token of row b is then at position `kept[b].sum()` in these layers.
    """
    return (torch.cumsum(kept, -1) - 1).clamp(min=0)
