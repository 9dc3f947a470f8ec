"""Importance mixed with the diversity of keys, by the redundancy of each head (MixKV, arXiv 2510.20707)."""

import torch
from torch import Tensor

from .. import _checks
from .._dispatch import Impl, operator, takes_triton
from .reference import mixkv_mix_reference

__all__ = ["mixkv_mix"]


@torch.no_grad()
def mixkv_mix(
    attention: Tensor,
    value_norms: Tensor,
    cosines: Tensor,
    mean_norm: Tensor,
    redundancy: Tensor,
    candidates: Tensor,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """r * diversity + (1 - r) * (attention + value norm), over the candidates of each head.

    Diversity is minus the key's product with the mean normalised key, -cosine * mean norm. It and the value norm are
    rescaled to [0, 1], then to the mean of the attention.

    Args:
        attention: float32 [B, H, N], as the next two.
        value_norms: of `key_statistics`.
        cosines: of `key_statistics`.
        mean_norm: float32 [B, H], of `key_statistics`.
        redundancy: r, float32 [B, H].
        candidates: bool [B, 1 or H, N].
        impl: "auto", "reference" or "triton", see the package.

    Returns:
        float32 [B, H, N], 0 outside the candidates.

    Raises:
        TypeError: tensors that are not float32, candidates not bool.
        ValueError: shapes that disagree.
    """
    dims = _checks.Dims()
    dims.bind("attention", attention, "B H N")
    dims.bind("value_norms", value_norms, "B H N")
    dims.bind("cosines", cosines, "B H N")
    dims.bind("mean_norm", mean_norm, "B H")
    dims.bind("redundancy", redundancy, "B H")
    dims.flags("candidates", candidates, "B 1|H N")
    _checks.singles(
        attention=attention, value_norms=value_norms, cosines=cosines, mean_norm=mean_norm, redundancy=redundancy
    )
    return _mixkv_mix(attention, value_norms, cosines, mean_norm, redundancy, candidates, impl)


def _fake(attention: Tensor, *others: object) -> Tensor:
    return torch.empty_like(attention, memory_format=torch.contiguous_format)


@operator(_fake)
def _mixkv_mix(
    attention: Tensor,
    value_norms: Tensor,
    cosines: Tensor,
    mean_norm: Tensor,
    redundancy: Tensor,
    candidates: Tensor,
    impl: str,
) -> Tensor:
    if takes_triton(impl, attention):
        from .triton import mixkv_mix_triton

        return mixkv_mix_triton(attention, value_norms, cosines, mean_norm, redundancy, candidates)
    return mixkv_mix_reference(attention, value_norms, cosines, mean_norm, redundancy, candidates)
