"""Norms of keys and values, cosine of every key with the mean key, redundancy of a head (MixKV, arXiv 2510.20707)."""

import torch
from torch import Tensor

from .. import _checks
from .._dispatch import Impl, operator, takes_triton
from .reference import KeyStatistics, key_statistics_reference

__all__ = ["KeyStatistics", "key_statistics"]


@torch.no_grad()
def key_statistics(keys: Tensor, values: Tensor, *, valid: Tensor | None = None, impl: Impl = "auto") -> KeyStatistics:
    """Statistics over the valid entries of every batch row and KV head, in float32 whatever the dtype of the cache.

    With k^ = K / ||K|| (zero keys stay zero), their mean kbar over the n valid entries: `mean_norm` is ||kbar||,
    `cosines` is k^ . kbar / ||kbar||, and `redundancy` is (n ||kbar||^2 - 1) / (n - 1), the mean cosine between two
    different entries' keys (where none is zero), 0 for n <= 1. Entries that are not valid may hold anything, NaN
    included, and get 0.

    Args:
        keys: [B, H, N, D]; float32, bfloat16, float16 or float64.
        values: [B, H, N, Dv], same dtype.
        valid: bool [B, 1 or H, N], the real entries; None: all.
        impl: "auto", "reference" or "triton", see the package.

    Returns:
        `key_norms`, `value_norms` and `cosines`, float32 [B, H, N]; `mean_norm` and `redundancy`, float32 [B, H].

    Raises:
        TypeError: mixed or unsupported dtypes, `valid` not bool.
        ValueError: shapes that disagree.
    """
    dims = _checks.Dims()
    dims.bind("keys", keys, "B H N D")
    dims.bind("values", values, "B H N Dv")
    dims.flags("valid", valid, "B 1|H N")
    _checks.floats(keys=keys, values=values)
    return KeyStatistics(*_key_statistics(keys, values, valid, impl))


Fields = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _fake(keys: Tensor, *others: object) -> Fields:
    key_norms, value_norms, cosines = (keys.new_empty(keys.shape[:3], dtype=torch.float32) for _ in range(3))
    mean_norm, redundancy = (keys.new_empty(keys.shape[:2], dtype=torch.float32) for _ in range(2))
    return key_norms, value_norms, cosines, mean_norm, redundancy


@operator(_fake)
def _key_statistics(keys: Tensor, values: Tensor, valid: Tensor | None, impl: str) -> Fields:
    if takes_triton(impl, keys, keys.shape[3], values.shape[3]):
        from .triton import key_statistics_triton

        return key_statistics_triton(keys, values, valid)
    return key_statistics_reference(keys, values, valid)
