"""The mix of importance and diversity in plain torch."""

from torch import Tensor

from ..masked import EPS, masked_mean, masked_min_max


def mixkv_mix_reference(
    attention: Tensor, value_norms: Tensor, cosines: Tensor, mean_norm: Tensor, redundancy: Tensor, candidates: Tensor
) -> Tensor:
    """See `mixkv_mix`; arguments are taken as checked."""
    level = masked_mean(attention, candidates)
    alignment = cosines * mean_norm[..., None]
    value = _levelled(masked_min_max(value_norms, candidates), level, candidates)
    diversity = _levelled(masked_min_max(-alignment, candidates), level, candidates)
    r = redundancy[..., None]
    mixed = r * diversity + (1 - r) * (attention + value)
    return mixed.masked_fill(~candidates, 0.0).contiguous()


def _levelled(x: Tensor, level: Tensor, candidates: Tensor) -> Tensor:
    return x * (level / (masked_mean(x, candidates) + EPS))
