"""Reductions and neighbourhoods over the candidates of each head, in plain torch.

Padding and protected entries never take part. For scores, and the references of `bacon_calibrate` and `mixkv_mix`.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ._checks import wide

EPS = 1e-8


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x [B, H, N] over mask [B, H or 1, N] -> [B, H, 1]; 0 where the mask is empty."""
    return x.masked_fill(~mask, 0.0).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)


def masked_min_max(x: Tensor, mask: Tensor) -> Tensor:
    """Rescales x [B, H, N] to [0, 1] over mask [B, H or 1, N]; 0 elsewhere, and everywhere if all values are equal."""
    if x.shape[-1] == 0:
        return x
    low = x.masked_fill(~mask, torch.inf).amin(-1, keepdim=True)
    high = x.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    scaled = (x - low) / ((high - low) + EPS)
    return torch.where(mask, scaled, 0.0)


def pool(x: Tensor, mask: Tensor, kernel: int, pooling: Literal["avg", "max"] = "avg") -> Tensor:
    """1-D pooling of x [B, H, N] along N over mask [B, H or 1, N]; 0 elsewhere.

    Entries outside the mask count as zeros and the divisor is always `kernel`, as in SnapKV and its descendants
    (`F.avg_pool1d` with zero padding), so the first and last kernel // 2 candidates are scaled down.
    """
    x = x.masked_fill(~mask, 0.0)
    if kernel > 1 and x.numel():
        function = F.avg_pool1d if pooling == "avg" else F.max_pool1d
        x = function(x, kernel, stride=1, padding=kernel // 2) * mask
    return x


def neighbourhood_mean(x: Tensor, mask: Tensor, radius: int) -> Tensor:
    """Mean of x [B, H, N] over the candidates within `radius` entries, the entry itself included; 0 elsewhere."""
    kernel = 2 * radius + 1
    share = pool(mask.expand_as(x).to(x.dtype), mask, kernel)
    return pool(x, mask, kernel) / share.clamp(min=1 / kernel)


def entry_norms(cache: Tensor, valid: Tensor) -> Tensor:
    """L2 norms [B, H, N], float32, of keys or values [B, H, N, D]; 0 where not valid [B, H or 1, N]."""
    norms: Tensor = torch.linalg.vector_norm(cache, dim=-1, dtype=wide(cache.dtype))
    return norms.float().masked_fill_(~valid, 0.0)
