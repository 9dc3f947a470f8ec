"""Key statistics in plain torch."""

from typing import NamedTuple

import torch
from torch import Tensor


class KeyStatistics(NamedTuple):
    """Statistics of a layer's cache, all float32."""

    key_norms: Tensor  # [B, H, N]
    value_norms: Tensor  # [B, H, N]
    cosines: Tensor  # [B, H, N], of every key with the mean key
    mean_norm: Tensor  # [B, H], of the mean of the normalised keys
    redundancy: Tensor  # [B, H], mean cosine between two different keys


def key_statistics_reference(keys: Tensor, values: Tensor, valid: Tensor | None) -> KeyStatistics:
    """See `key_statistics`; arguments are taken as checked."""
    batch, heads, entries, _ = keys.shape
    if keys.dtype == torch.float64:  # vector_norm does not narrow
        keys, values = keys.float(), values.float()
    key_norms, value_norms = _norms(keys), _norms(values)
    if valid is not None:
        key_norms.masked_fill_(~valid, 0)
        value_norms.masked_fill_(~valid, 0)
    held = torch.full((batch, 1), entries, device=keys.device) if valid is None else valid.sum(-1)
    counts = held.expand(batch, heads)
    cosines, mean_norm = torch.empty_like(key_norms), key_norms.new_empty(batch, heads)
    space = key_norms.new_empty(entries, keys.shape[-1])  # fresh pages for every head would cost as much as the sums
    for b in range(batch):
        for h in range(heads):  # one head's normalised keys in memory at a time
            cosines[b, h], mean_norm[b, h] = _cosines_to_mean(keys[b, h], key_norms[b, h], counts[b, h], space)
    return KeyStatistics(key_norms, value_norms, cosines, mean_norm, redundancy(mean_norm, counts))


def redundancy(mean_norm: Tensor, counts: Tensor) -> Tensor:
    """Mean cosine between two of `counts` unit vectors whose mean has length `mean_norm`; 0 where there are no two."""
    squared = mean_norm.double().square()  # n ||kbar||^2 - 1 cancels for heads of low redundancy
    return ((counts * squared - 1) / (counts - 1)).masked_fill_(counts <= 1, 0).float()


def _norms(x: Tensor) -> Tensor:
    """L2 norms [B, H, N], float32, of x [B, H, N, D], taken in the order x lies in memory: twice as fast."""
    swapped = x.transpose(1, 2)
    by_entry = swapped.is_contiguous()
    norms: Tensor = torch.linalg.vector_norm(swapped if by_entry else x, dim=-1, dtype=torch.float32)
    return (norms.transpose(1, 2) if by_entry else norms).contiguous()


def _cosines_to_mean(keys: Tensor, norms: Tensor, count: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines [N] of keys [N, D] with their mean direction (0 for norm 0), and the length of the mean normalised key.

    The cosine comes from the distance, 1 - |a - b|^2 / 2: where all keys point one way (redundancy .999) a dot product
    loses just the digits that tell them apart.
    """
    counted = norms > 0
    directions = torch.div(keys, norms[:, None], out=space)
    directions.index_fill_(0, (~counted).nonzero().squeeze(1), 0)  # a broadcast mask takes ten times as long on CPUs
    mean = directions.sum(0) / count.clamp(min=1)
    mean_norm = torch.linalg.vector_norm(mean)
    distances = torch.linalg.vector_norm(directions.sub_(mean / mean_norm), dim=-1)
    cosines = distances.square_().mul_(-0.5).add_(1)
    return cosines.masked_fill_(~(counted & (mean_norm > 0)), 0), mean_norm
