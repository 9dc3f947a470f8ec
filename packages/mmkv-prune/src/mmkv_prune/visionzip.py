"""VisionZip: the tokens the encoder attends to most, and a few averages of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks
from ._choose import best
from ._merge import as_they_are, front, joined, single, take, unit
from .encoder import Encoded, Reduced, TowerEvidence


@dataclass(frozen=True, slots=True)
class VisionZip:
    """Keeps the dominant tokens as they are and sums the others up in `contextual` ones.

    VisionZip (arXiv 2412.04467) as released for CLIP: dominant are CLS and the `dominant - 1` tokens its attention,
    summed over the heads of layer -2, is highest for, in their spatial order. Of the others every n // contextual-th is
    a target; the rest goes to the target with the most similar key (keys averaged over heads); a contextual token is
    target + mean of what went to it: a sum of two, not an average. An encoder without CLS (`Encoded.cls` None,
    attention received from all tokens): `dominant` tokens.

    Deviations: images of different sizes in a batch; an image with too few tokens for all targets keeps what it has; a
    target nothing went to stays as it is.

    Attributes:
        dominant: 54, CLS included (the paper's setting for 64 in all; the release's function has 191).
        contextual: 10 (30).
    """

    dominant: int = 54
    contextual: int = 10

    evidence: ClassVar[TowerEvidence] = TowerEvidence(layer=-2, heads="apart")

    def __post_init__(self) -> None:
        _checks.whole("VisionZip dominant", self.dominant, 1)
        _checks.whole("VisionZip contextual", self.contextual, 0)

    def __call__(self, seen: Encoded) -> Reduced:
        """CLS, the dominant tokens in order, the contextual ones in the order of their targets."""
        number = self.dominant - (seen.cls is not None)
        chosen = best(seen.attention, seen.real, torch.full_like(seen.real[:, 0], number, dtype=torch.int64))
        parts = [as_they_are(seen.features, chosen), contextual(seen, seen.real & ~chosen, self.contextual)]
        if seen.cls is not None:
            parts.insert(0, single(seen.cls, torch.ones_like(seen.real[:, 0])))
        return joined(parts, seen.features.dtype)


@torch.no_grad()
def contextual(seen: Encoded, others: Tensor, number: int) -> Reduced:
    """`number` tokens that stand for `others` [B, V] bool; `source` is the target's place."""
    targets = _targets(others, number)
    index, real = front(targets)
    keys = unit(seen.keys)
    # Only an image whose others are all targets has fillers among its targets, and nothing then goes to them.
    alike = keys @ take(keys, index).transpose(-1, -2)
    features = seen.features.float().masked_fill(~seen.real.unsqueeze(-1), 0.0)
    mean = _means(features, alike, others & ~targets) if index.shape[-1] else take(features, index)
    return Reduced(take(features, index) + mean, index, real)


def _means(features: Tensor, alike: Tensor, going: Tensor) -> Tensor:
    """Mean [B, K, C] of the `going` [B, V] that are most `alike` [B, V, K] to each target; ties to the first."""
    to = alike.sort(dim=-1, descending=True, stable=True).indices[..., 0]
    member = (F.one_hot(to, alike.shape[-1]) * going.unsqueeze(-1)).float()
    return (member.transpose(-1, -2) @ features) / member.sum(1).unsqueeze(-1).clamp(min=1)


def _targets(others: Tensor, number: int) -> Tensor:
    """[B, V] bool, every n // number-th of the n `others`, at most `number`."""
    if number == 0:
        return torch.zeros_like(others)
    place = others.cumsum(-1) - 1
    step = (others.sum(-1, keepdim=True) // number).clamp(min=1)
    return others & (place % step == 0) & (place // step < number)
