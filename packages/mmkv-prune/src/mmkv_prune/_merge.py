"""Bringing chosen tokens to the front, padded, and comparing keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .encoder import Reduced


def front(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of `mask` [B, V] in ascending order and which of them are real, [B, K] each; fillers stand at the end."""
    most = int(mask.sum(-1).max()) if mask.numel() else 0
    index = (~mask).byte().sort(dim=-1, stable=True).indices[:, :most]
    return index, mask.gather(-1, index)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, V, C] at index [B, K], [B, K, C]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def unit(keys: Tensor) -> Tensor:
    """Keys of length one, float32; padding (which may hold anything) is the caller's to ignore."""
    return F.normalize(keys.float(), dim=-1)


def joined(parts: list[Reduced], dtype: torch.dtype) -> Reduced:
    """Parts one after another, with each row's padding moved to the end."""
    features, source, valid = (torch.cat(column, 1) for column in zip(*parts, strict=True))
    index, real = front(valid)
    return Reduced(
        take(features, index).masked_fill(~real.unsqueeze(-1), 0.0).to(dtype),
        source.gather(-1, index).masked_fill(~real, -1),
        real,
    )


def single(feature: Tensor, there: Tensor) -> Reduced:
    """One token without a place for each row: feature [B, C], there [B] bool."""
    return Reduced(
        feature.float().unsqueeze(1), torch.full_like(there, -1, dtype=torch.int64).unsqueeze(1), there[:, None]
    )


def as_they_are(features: Tensor, chosen: Tensor) -> Reduced:
    """The `chosen` [B, V] of features [B, V, C], in order."""
    index, real = front(chosen)
    return Reduced(take(features, index).float(), index, real)
