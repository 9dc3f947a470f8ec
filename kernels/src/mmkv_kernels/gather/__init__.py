"""Kept entries of every head, gathered into one ragged cache."""

import torch
from torch import Tensor

from .. import _checks
from .._dispatch import Impl, operator, takes_triton
from .reference import Gathered, gather_kv_reference

__all__ = ["Gathered", "gather_kv"]


@torch.no_grad()
def gather_kv(
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    cu_seqlens: Tensor,
    *,
    prefix: tuple[Tensor, Tensor, Tensor] | None = None,
    impl: Impl = "auto",
) -> Gathered:
    """The entries `columns` names, row-major by (batch row, KV head), in the order given (repeats allowed).

    Args:
        keys: [B, H, N, D] dense; float32, bfloat16, float16 or float64.
        values: [B, H, N, Dv], same dtype.
        columns: int64 [T], for each segment of `cu_seqlens` indices of entries of its head.
        cu_seqlens: int64 [B * H + 1], from 0 to T.
        prefix: ragged keys [P, D], values [P, Dv] and their offsets int64 [B * H + 1]. A head's entries are then its
            part of the prefix followed by its N dense ones.
        impl: "auto", "reference" or "triton", see the package.

    Returns:
        `keys` [T, D] and `values` [T, Dv], contiguous, dtype of the input, in storage of their own.

    Raises:
        TypeError: mixed or unsupported dtypes, indices that are not int64.
        ValueError: shapes or offsets that disagree, a column outside its head's entries.
    """
    dims = _checks.Dims()
    dims.bind("keys", keys, "B H N D")
    dims.bind("values", values, "B H N Dv")
    dims.bind("columns", columns, "T")
    dims.beside("cu_seqlens", cu_seqlens)
    _checks.floats(keys=keys, values=values)
    _checks.integers("columns", columns)
    if prefix is not None:
        dims.bind("prefix keys", prefix[0], "P D")
        dims.bind("prefix values", prefix[1], "P Dv")
        dims.beside("prefix cu_seqlens", prefix[2])
        _checks.floats(keys=keys, prefix_keys=prefix[0], prefix_values=prefix[1])
    prefix_keys, prefix_values, prefix_cu = prefix or (None, None, None)
    return Gathered(*_gather_kv(keys, values, columns, cu_seqlens, prefix_keys, prefix_values, prefix_cu, impl))


def _fake(keys: Tensor, values: Tensor, columns: Tensor, *others: object) -> tuple[Tensor, Tensor]:
    total = columns.shape[0]
    return keys.new_empty(total, keys.shape[3]), values.new_empty(total, values.shape[3])


@operator(_fake)
def _gather_kv(
    keys: Tensor,
    values: Tensor,
    columns: Tensor,
    cu_seqlens: Tensor,
    prefix_keys: Tensor | None,
    prefix_values: Tensor | None,
    prefix_cu: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    segments = keys.shape[0] * keys.shape[1]
    _checks.segment_lengths("cu_seqlens", cu_seqlens, segments, columns.shape[0])
    prefix = None
    if prefix_keys is not None and prefix_values is not None and prefix_cu is not None:
        _checks.segment_lengths("prefix cu_seqlens", prefix_cu, segments, prefix_keys.shape[0])
        prefix = prefix_keys, prefix_values, prefix_cu
    if takes_triton(impl, keys, keys.shape[3], values.shape[3]):
        from .triton import gather_kv_triton

        return gather_kv_triton(keys, values, columns, cu_seqlens, prefix)
    return gather_kv_reference(keys, values, columns, cu_seqlens, prefix)
