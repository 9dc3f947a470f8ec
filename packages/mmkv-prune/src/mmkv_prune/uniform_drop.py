"""UniformDrop: evenly spaced vision tokens, any share of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from . import _checks
from ._choose import rounded
from .prompt import Prompt
from .types import Seen


@dataclass(frozen=True, slots=True)
class UniformDrop:
    """Keeps evenly spaced vision tokens of each image: the control without content, and ADSC for any share.

    Of an image's n survivors those at `floor((k + 1/2) n / m)` stay, k = 0 ... m - 1, with m = `round(N * keep)` of the
    N tokens the image had, at least one. Defaults as FastV's.

    Attributes:
        layers: (2,).
        keep: share of each image's tokens left by each layer, in (0, 1], not growing.
    """

    layers: tuple[int, ...] = (2,)
    keep: tuple[float, ...] = (0.5,)

    evidence: ClassVar[None] = None
    positions: ClassVar[Literal["keep"]] = "keep"

    def __post_init__(self) -> None:
        layers = _checks.layers("UniformDrop", self.layers)
        keep = _checks.each("UniformDrop keep", self.keep, _checks.share)
        _checks.falling("UniformDrop keep", keep, len(layers))
        _checks.store(self, layers=layers, keep=keep)

    def __call__(self, seen: Seen) -> Tensor:
        """Columns that enter the layer, [B, N] bool."""
        share = self.keep[self.layers.index(seen.layer)]
        return (seen.alive & ~seen.survivors) | evenly_spaced(seen.prompt, seen.survivors, share)


def evenly_spaced(prompt: Prompt, survivors: Tensor, share: float) -> Tensor:
    """Evenly spaced ones of the `survivors`, [B, N] bool; see `UniformDrop`."""
    number = prompt.image_sums(survivors)
    wanted = torch.minimum(rounded(prompt.image_sums(prompt.vision), share), number)
    place = prompt.image_ranks(survivors)
    return survivors & (_before(place + 1, number, wanted) > _before(place, number, wanted))


def _before(place: Tensor, number: Tensor, wanted: Tensor) -> Tensor:
    """How many k have `floor((k + 1/2) number / wanted) < place`, in whole numbers."""
    return (2 * wanted * place + number - 1).div(2 * number.clamp(min=1), rounding_mode="floor")
