"""The score at the cut of a top-k whose k differs from head to head, shared by the references of `topk` and `bacon`."""

import torch
from torch import Tensor


def kth_largest(scores: Tensor, counts: Tensor) -> Tensor:
    """The `counts`-th largest score of each head.

    Knowing the value at the cut is enough to select a top-k, and finding it is far cheaper than sorting.

    Args:
        scores: [B, H, N] floating, -inf allowed, no NaN; N > 0.
        counts: [B, H] int64, from 1 to N.

    Returns:
        [B, H, 1], dtype of the scores.
    """
    batch, heads, entries = scores.shape
    places = (entries + 1 - counts).flatten().tolist()
    if len(set(places)) == 1:
        return scores.kthvalue(places[0], dim=-1, keepdim=True).values
    rows = zip(scores.flatten(0, 1), places, strict=True)
    return torch.stack([row.kthvalue(place).values for row, place in rows]).view(batch, heads, 1)
