"""Kept entries of every head, gathered into one ragged cache."""

import torch
from torch import Tensor

from .. import _checks
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
) -> Gathered:
    """The entries `columns` names, row-major by (batch row, KV head), in the order given (repeats allowed).

    Args:
        keys: [B, H, N, D] dense; float32, bfloat16, float16 or float64.
        values: [B, H, N, Dv], same dtype.
        columns: int64 [T], for each segment of `cu_seqlens` indices of entries of its head.
        cu_seqlens: int64 [B * H + 1], from 0 to T.
        prefix: ragged keys [P, D], values [P, Dv] and their offsets int64 [B * H + 1]. A head's entries are then its
            part of the prefix followed by its N dense ones.

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
    _checks.floats(keys=keys, values=values)
    if columns.dtype != torch.int64:
        raise TypeError(f"columns must be int64, got {columns.dtype}")
    segments = dims["B"] * dims["H"]
    _checks.segment_lengths("cu_seqlens", cu_seqlens, segments, dims["T"])
    if prefix is not None:
        dims.bind("prefix keys", prefix[0], "P D")
        dims.bind("prefix values", prefix[1], "P Dv")
        _checks.floats(keys=keys, prefix_keys=prefix[0], prefix_values=prefix[1])
        _checks.segment_lengths("prefix cu_seqlens", prefix[2], segments, dims["P"])
    return gather_kv_reference(keys, values, columns, cu_seqlens, prefix)
