"""FastV: the vision tokens the last query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from . import _checks
from ._choose import keep_best, rounded
from .attention import last_rows
from .prompt import Prompt
from .types import Evidence, Seen


@dataclass(frozen=True, slots=True)
class FastV:
    """Drops the vision tokens that the last prompt token attends to least in the layer before.

    FastV (arXiv 2403.06764): at the input of layer K, by the attention of layer K - 1, last row, mean over heads;
    `round(N (1 - R))` of N vision tokens stay, with their position ids. Paper: K = 2, R = 50 % (`keep` is 1 - R).

    Deviations: each row of a batch chooses for itself, and all images of a row compete (the release knows one image at
    a fixed place, and one choice per batch); at least one vision token stays. K = 0, the release's random choice, is
    `RandomDrop`.

    Attributes:
        layer: K, from 1.
        keep: share of vision tokens that stays, in (0, 1].
    """

    layer: int = 2
    keep: float = 0.5

    evidence: ClassVar[Evidence] = Evidence("previous")
    positions: ClassVar[Literal["keep"]] = "keep"

    def __post_init__(self) -> None:
        _checks.whole("FastV layer", self.layer, 1)
        _checks.store(self, keep=_checks.share("FastV keep", self.keep))

    @property
    def layers(self) -> tuple[int, ...]:
        """The one layer."""
        return (self.layer,)

    def rows(self, prompt: Prompt, embeddings: Tensor | None = None) -> Tensor:
        """The last real column of each row."""
        return last_rows(prompt)

    def counts(self, prompt: Prompt) -> Tensor:
        """Vision tokens left, [1, B] int64."""
        return rounded(prompt.counts, self.keep).unsqueeze(0)

    def __call__(self, seen: Seen) -> Tensor:
        """Columns that enter the layer, [B, N] bool."""
        return keep_best(seen, seen.asked.mean(), self.counts(seen.prompt)[0])
