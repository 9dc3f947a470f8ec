"""Kept entries of every head moved together within the pages of an engine's cache."""

from typing import Literal

import torch
from torch import Tensor

from .. import _checks
from .._dispatch import Impl, operator, takes_triton
from .reference import compact_paged_reference, require_movable

__all__ = ["Align", "compact_paged"]

Align = Literal["left", "right"]


@torch.no_grad()
def compact_paged(
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    columns: Tensor,
    cu_seqlens: Tensor,
    *,
    align: Align = "left",
    impl: Impl = "auto",
) -> None:
    """Moves the entries `columns` names together, in place: to the first, or the last, of their row's entries.

    Entry j of row b is place j % S of page table[b, j // S]. Every head moves its own; what is left behind keeps what
    it held. Rows may share pages as long as no kept entry's new place is in them, even where that is its old one.

    Args:
        keys: [P, S, H, D], P pages of S places, any strides; float32, bfloat16, float16 or float64.
        values: [P, S, H, Dv], same dtype; both may lie in one memory, but must not overlap.
        table: int32 or int64 [B, K], pages of every row; what is beyond its length may hold anything.
        lengths: int64 [B], entries of every row.
        columns: int64 [T], for each segment of `cu_seqlens` (row-major by (row, head)) its kept entries, ascending.
        cu_seqlens: int64 [B * H + 1], from 0 to T.
        align: "left": head h's n entries become 0 .. n - 1 of its row; "right": the last n.
        impl: "auto", "reference" or "triton", see the package.

    Raises:
        TypeError: mixed or unsupported dtypes.
        ValueError: shapes or offsets that disagree, columns outside their row or not ascending, pages that are none, a
            page that something is moved to and that is used twice, or entries that share memory. Nothing has been moved
            then.
    """
    dims = _checks.Dims()
    dims.bind("keys", keys, "P S H D")
    dims.bind("values", values, "P S H Dv")
    dims.bind("table", table, "B K")
    dims.bind("lengths", lengths, "B")
    dims.bind("columns", columns, "T")
    dims.beside("cu_seqlens", cu_seqlens)
    _checks.floats(keys=keys, values=values)
    _checks.integers("lengths", lengths)
    _checks.integers("columns", columns)
    if table.dtype != torch.int32:
        _checks.integers("table (if not int32)", table)
    _checks.one_of("align", align, Align)
    _compact_paged(keys, values, table, lengths, columns, cu_seqlens, align, impl)


def _fake(*inputs: object) -> None:
    return None


@operator(_fake, mutates=("keys", "values"))
def _compact_paged(
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    columns: Tensor,
    cu_seqlens: Tensor,
    align: str,
    impl: str,
) -> None:
    _require_own_memory(keys, values)
    triton = takes_triton(impl, keys, keys.shape[3], values.shape[3])
    _checks.segment_lengths("cu_seqlens", cu_seqlens, table.shape[0] * keys.shape[2], columns.shape[0])
    if not columns.shape[0]:
        return
    require_movable(keys.shape, table, lengths, columns, cu_seqlens, align)
    if triton:
        from .triton import compact_paged_triton

        return compact_paged_triton(keys, values, table, lengths, columns, cu_seqlens, align)
    return compact_paged_reference(keys, values, table, lengths, columns, cu_seqlens, align)


def _require_own_memory(keys: Tensor, values: Tensor) -> None:
    """Raises ValueError where an entry would be moved twice, or there is none."""
    if not keys.shape[1]:
        raise ValueError("pages must have places, got S=0")
    if keys.data_ptr() == values.data_ptr() and keys.numel():
        raise ValueError("keys and values are the same memory, whose entries would move twice")
    for name, cache in (("keys", keys), ("values", values)):
        if any(size > 1 and not stride for size, stride in zip(cache.shape, cache.stride(), strict=True)):
            raise ValueError(f"{name} must have memory of its own for every entry, got strides {cache.stride()}")
