"""PruMerge: the tokens CLS attends to exceptionally, with their like merged in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import _checks
from ._merge import front, joined, single, take, unit
from .encoder import Encoded, Reduced, TowerEvidence


@dataclass(frozen=True, slots=True)
class PruMerge:
    """Keeps outliers of the CLS token's attention, adds to each its nearest tokens, and sums up what is left.

    LLaVA-PruMerge (arXiv 2403.15388) as released (`token_prune_merge_advanced`): outliers are above Q3 + 1.5 IQR; a
    kept token becomes x_i + sum of a_j x_j over the `neighbours` tokens with the most similar keys (kept ones included;
    not normalised); one more token, the sum of a_j x_j over all dropped ones, comes last. CLIP: q and k of the last
    layer, whole width as one head, features of layer -2.

    Deviations: quartiles over the image's own tokens, so that an image gets the same in any batch (release: over the
    batch); kept tokens in their spatial order (release: by score); an image without outliers is its one summed token;
    fewer than `neighbours` others are all taken; an image that drops nothing gets no summed token.

    Attributes:
        neighbours: 32 (the release takes 16 in training).
    """

    neighbours: int = 32

    evidence: ClassVar[TowerEvidence] = TowerEvidence(layer=-1, heads="joined")

    def __post_init__(self) -> None:
        _checks.whole("PruMerge neighbours", self.neighbours, 1)

    def __call__(self, seen: Encoded) -> Reduced:
        """The outliers in order, then the summed token."""
        return merge(seen, outliers(seen.attention, seen.real), self.neighbours)


@dataclass(frozen=True, slots=True)
class PruMergePlus:
    """PruMerge with evenly spaced tokens kept as well, about three for each outlier.

    LLaVA-PruMerge+ (arXiv 2403.15388) as released (`token_prune_merge_advanced_plus`): with r the share of outliers,
    also every `int(int(1 / r) / 3)`-th token of all but the last. Deviations beside `PruMerge`'s: r above 1/3, where
    the release stops with a step of 0, takes every token; r = 0, where it divides by zero, takes the first token, which
    is the limit of small r; batches of any size.

    Attributes:
        neighbours: 32.
    """

    neighbours: int = 32

    evidence: ClassVar[TowerEvidence] = TowerEvidence(layer=-1, heads="joined")

    def __post_init__(self) -> None:
        _checks.whole("PruMergePlus neighbours", self.neighbours, 1)

    def __call__(self, seen: Encoded) -> Reduced:
        """The outliers and the spaced tokens in order, then the summed token."""
        best = outliers(seen.attention, seen.real)
        return merge(seen, best | spaced(best, seen.real), self.neighbours)


def outliers(attention: Tensor, real: Tensor) -> Tensor:
    """[B, V] bool, tokens attended to more than Q3 + 1.5 IQR of their image; quartiles interpolated, in float64."""
    ordered = attention.double().masked_fill(~real, torch.inf).sort(-1).values
    low, high = (_quantile(ordered, real.sum(-1, keepdim=True), share) for share in (0.25, 0.75))
    return real & (attention.double() > high + 1.5 * (high - low))


def _quantile(ordered: Tensor, number: Tensor, share: float) -> Tensor:
    """Quantile [B, 1] of the first `number` [B, 1] of `ordered` [B, V]."""
    if ordered.shape[-1] == 0:
        return ordered.new_zeros(number.shape)
    place = (number - 1).clamp(min=0) * share
    lower, upper = (ordered.gather(-1, at.long()) for at in (place.floor(), place.ceil()))
    return torch.where(number > 0, lower + (upper - lower) * place.frac(), 0.0)


def spaced(best: Tensor, real: Tensor) -> Tensor:
    """[B, V] bool, the evenly spaced tokens PruMerge+ takes beside the `best` [B, V]."""
    number, found = real.sum(-1, keepdim=True), best.sum(-1, keepdim=True)
    step = (number // found.clamp(min=1) // 3).clamp(min=1)
    place = real.cumsum(-1) - 1
    on_step = torch.where(found > 0, place % step == 0, place == 0)
    return real & on_step & (place < number - 1)


@torch.no_grad()
def merge(seen: Encoded, kept: Tensor, neighbours: int) -> Reduced:
    """The `kept` [B, V] with their neighbours added, then the sum of the rest; see `PruMerge`."""
    real = seen.real
    weight = seen.attention.float().masked_fill(~real, 0.0)
    features = seen.features.float().masked_fill(~real.unsqueeze(-1), 0.0)
    index, is_kept = front(kept)
    near = _nearest(seen.keys, index, real, neighbours)
    merged = take(features, index) + (near * weight.unsqueeze(1)) @ features
    dropped = real & ~kept
    rest = ((weight * dropped).unsqueeze(1) @ features).squeeze(1)
    return joined([Reduced(merged, index, is_kept), single(rest, dropped.any(-1))], seen.features.dtype)


def _nearest(keys: Tensor, index: Tensor, real: Tensor, number: int) -> Tensor:
    """[B, K, V] bool, the real tokens whose keys are most similar to those at `index`, itself not counted."""
    keys = unit(keys)
    others = real.unsqueeze(1) & (index.unsqueeze(-1) != torch.arange(real.shape[-1], device=real.device))
    alike = (take(keys, index) @ keys.transpose(-1, -2)).masked_fill(~others, -torch.inf)
    order = alike.sort(dim=-1, descending=True, stable=True).indices[..., :number]
    return torch.zeros_like(others).scatter(-1, order, True) & others
