"""Compaction within pages in plain torch: all that moves is read before anything is written."""

import torch
from torch import Tensor


def compact_paged_reference(
    keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor, columns: Tensor, cu_seqlens: Tensor, align: str
) -> None:
    """See `compact_paged`; arguments are taken as checked."""
    size, heads = keys.shape[1:3]
    owners = _owners(cu_seqlens, columns)
    row, head = owners // heads, owners % heads
    target = torch.arange(columns.shape[0], device=columns.device) - cu_seqlens[owners]
    if align == "right":
        target += lengths[row] - cu_seqlens.diff()[owners]
    source_page, target_page = (table[row, entries // size].long() for entries in (columns, target))
    for cache in (keys, values):
        cache[target_page, target % size, head] = cache[source_page, columns % size, head]


def require_movable(
    shape: tuple[int, ...], table: Tensor, lengths: Tensor, columns: Tensor, cu_seqlens: Tensor, align: str
) -> None:
    """Raises ValueError where moving entries would read or write what is not their own; waits for the GPU once."""
    pages, size, heads, _ = shape
    owners = _owners(cu_seqlens, columns)
    outside = (columns < 0) | (columns >= lengths[owners // heads])
    falls = (columns.diff() <= 0) & (owners.diff() == 0)
    block = torch.arange(table.shape[1], device=table.device)
    used = block < ((lengths + size - 1) // size)[:, None]
    wrong = used & ((table < 0) | (table >= pages))
    known = table.long().clamp(0, max(0, pages - 1)).masked_fill(~used, pages)  # one more page, for what is not used
    users = torch.zeros(pages + 1, dtype=torch.int64, device=table.device)
    users.scatter_add_(0, known.flatten(), torch.ones_like(known).flatten())
    most = cu_seqlens.diff().view(-1, heads).amax(1)
    first = lengths - most if align == "right" else torch.zeros_like(most)
    written = used & ((block + 1) * size > first[:, None]) & (block * size < (first + most)[:, None])
    found = {
        "lengths lie outside the pages of their row": ((lengths < 0) | (lengths > table.shape[1] * size)).any(),
        "columns lie outside the entries of their row": outside.any(),
        "columns of a head must ascend": falls.any(),
        f"table names pages that are none of the {pages}": wrong.any(),
        "a page that entries are moved to is used twice": (written & (users[known] > 1)).any(),
    }
    for message, there in zip(found, torch.stack(list(found.values())).tolist(), strict=True):
        if there:
            raise ValueError(message)


def _owners(cu_seqlens: Tensor, columns: Tensor) -> Tensor:
    """Int64 [T]: the (row, head) of every column."""
    segments = torch.arange(cu_seqlens.shape[0] - 1, device=columns.device)
    return segments.repeat_interleave(cu_seqlens.diff(), output_size=columns.shape[0])
