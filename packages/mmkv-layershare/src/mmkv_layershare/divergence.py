"""How differently neighbouring layers attend."""

from __future__ import annotations

import torch
from torch import Tensor


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions along the last dimension, in nats, between 0 and ln 2.

    JS(p, q) = KL(p | r) / 2 + KL(q | r) / 2 with r = (p + q) / 2 (arXiv 2602.01901, eq. 3). Weights are normalised
    here, so a part of a distribution (vision tokens only) may be given.

    Args:
        p: [..., N] floating, not negative, some weight in every row.
        q: the same shape.

    Returns:
        [...] float64.

    Raises:
        ValueError: shapes that disagree, or a row that is no distribution.
    """
    if p.shape != q.shape or p.ndim == 0:
        raise ValueError(f"p and q must be [..., N] of the same shape, got {tuple(p.shape)} and {tuple(q.shape)}")
    p, q = _normalised(p), _normalised(q)
    middle = (p + q) / 2
    terms = torch.stack([torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p, q)])
    return terms.mean(0).sum(-1).clamp(min=0)


def adjacent_divergences(rows: Tensor, over: Tensor | None = None) -> Tensor:
    """S(l, l + 1) for every pair of neighbouring layers, mean over the batch (arXiv 2602.01901, eq. 3).

    Args:
        rows: [L, B, N] floating: for every layer the last prompt token's attention to all tokens, averaged over the
            query heads. Padding has weight 0.
        over: [B, N] bool, the tokens that are compared, each layer's weights on them normalised anew; None: all. The
            paper compares all and finds that a few text tokens then hide what happens on the image.

    Returns:
        [L - 1] float64, in nats. For several calibration inputs take the mean of theirs.

    Raises:
        ValueError: shapes that disagree, or a layer without any weight on the tokens compared.
    """
    if rows.ndim != 3 or (over is not None and over.shape != rows.shape[1:]):
        shape = None if over is None else tuple(over.shape)
        raise ValueError(f"rows is [L, B, N] and over [B, N], got {tuple(rows.shape)} and {shape}")
    if over is not None:
        rows = rows.masked_fill(~over, 0)
    return js_divergence(rows[:-1], rows[1:]).mean(-1)


def _normalised(weights: Tensor) -> Tensor:
    weights = weights.double()
    total = weights.sum(-1, keepdim=True)
    if not bool((total > 0).all() & total.isfinite().all() & (weights >= 0).all()):
        raise ValueError("every row must be weights >= 0 with a finite sum above 0 on the tokens that are compared")
    return weights / total
