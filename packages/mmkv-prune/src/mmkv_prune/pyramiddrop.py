"""PyramidDrop: fewer vision tokens from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import _checks
from ._choose import floored, keep_best
from .attention import last_rows
from .prompt import Prompt
from .types import Evidence, Positions, Seen


@dataclass(frozen=True, slots=True)
class PyramidDrop:
    """Drops, at several layers, the vision tokens that the last prompt token would attend to least there.

    PyramidDrop (arXiv 2410.17247): before layer K its input norm and q/k projections are run on the tokens about to
    enter it, softmax in float32 of the last instruction token's row over all of them, mean over heads;
    `int(N * keep)` of the N vision tokens of the prompt stay. Release: layers 8, 16, 24 of 32, shares 1/2, 1/4, 1/8.

    Deviations: the release renumbers position ids after each drop, which puts the keys of different layers into
    different frames; here that is `positions="reindex"`, and "keep" the default. The last *prompt* token asks (the same
    in a prompt that ends with the instruction). All images of a row compete (the release takes one image per sample);
    at least one vision token stays; GQA works.

    Attributes:
        layers: (8, 16, 24).
        keep: share of the prompt's vision tokens that is left by each layer, in (0, 1], not growing.
        positions: "keep", or "reindex" as released.
    """

    layers: tuple[int, ...] = (8, 16, 24)
    keep: tuple[float, ...] = (0.5, 0.25, 0.125)
    positions: Positions = "keep"

    evidence: ClassVar[Evidence] = Evidence("own")

    def __post_init__(self) -> None:
        layers = _checks.layers("PyramidDrop", self.layers)
        keep = _checks.each("PyramidDrop keep", self.keep, _checks.share)
        _checks.falling("PyramidDrop keep", keep, len(layers))
        _checks.one_of("PyramidDrop positions", self.positions, ("keep", "reindex"))
        _checks.store(self, layers=layers, keep=keep)

    def rows(self, prompt: Prompt, embeddings: Tensor | None = None) -> Tensor:
        """The last real column of each row."""
        return last_rows(prompt)

    def counts(self, prompt: Prompt) -> Tensor:
        """Vision tokens left by each layer, [S, B] int64."""
        return torch.stack([floored(prompt.counts, share) for share in self.keep])

    def __call__(self, seen: Seen) -> Tensor:
        """Columns that enter the layer, [B, N] bool."""
        return keep_best(seen, seen.asked.mean(), self.counts(seen.prompt)[self.layers.index(seen.layer)])
