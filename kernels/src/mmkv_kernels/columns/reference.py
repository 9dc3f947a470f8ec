"""Column sums in plain torch, in blocks of query rows."""

import torch
from torch import Tensor

from .._rows import Visibility, attention_weights, fold_queries, head_range, logit_space


def column_sums_reference(
    queries: Tensor,
    keys: Tensor,
    scaling: float,
    valid: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    block: int,
) -> tuple[Tensor, Tensor]:
    """See `column_sums`; arguments are taken as checked."""
    batch, heads, entries, _ = keys.shape
    if mask is None:
        queries = queries[:, :, max(0, queries.shape[2] - entries) :]  # rows before the first entry see nothing
    visibility = Visibility(valid, mask, queries.shape[2], entries, keys.device)
    sums = keys.new_zeros(batch, heads, entries, dtype=torch.float32)
    counts = keys.new_zeros(batch, visibility.heads, entries, dtype=torch.int64)
    if not entries:
        return sums, counts
    folded = fold_queries(queries, heads, scaling, softcap)
    space = logit_space(folded, entries, block)
    for b, part, rows, view in visibility.views(batch, block):
        counts[b, part, : view.stop] += view.counts()
        shares = (view.seen / folded.shape[2]).repeat(folded.shape[2])
        for h in head_range(part, visibility.heads, heads):
            weights = attention_weights(folded[b, h, :, rows], keys[b, h], view, softcap, space)
            sums[b, h, : view.stop] += shares @ weights.flatten(0, 1)
    return sums, counts
