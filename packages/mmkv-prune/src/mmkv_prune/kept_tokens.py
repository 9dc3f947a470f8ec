"""KeepUniform and KeepRandom: the controls before the LLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from . import _checks
from ._choose import best, rounded
from ._merge import as_they_are, joined
from .encoder import Encoded, Reduced
from .prompt import Prompt
from .random_drop import hashed_uniform
from .uniform_drop import evenly_spaced


@dataclass(frozen=True, slots=True)
class KeepUniform:
    """Keeps evenly spaced tokens of each image as they are: of n tokens those at `floor((k + 1/2) n / m)`.

    m = `round(n * keep)`, at least one; see `UniformDrop`.

    Attributes:
        keep: share of the tokens, in (0, 1].
    """

    keep: float = 0.25

    evidence: ClassVar[None] = None

    def __post_init__(self) -> None:
        _checks.store(self, keep=_checks.share("KeepUniform keep", self.keep))

    def __call__(self, seen: Encoded) -> Reduced:
        """The tokens kept, in order."""
        chosen = evenly_spaced(Prompt.of(seen.real, valid=seen.real), seen.real, self.keep)
        return joined([as_they_are(seen.features, chosen)], seen.features.dtype)


@dataclass(frozen=True, slots=True)
class KeepRandom:
    """Keeps `round(n * keep)` of an image's n tokens as they are (at least 1), by a hash of (seed, token's number).

    The same on every device and in every batch; images with the same number of tokens keep the same places.

    Attributes:
        keep: share of the tokens, in (0, 1].
        seed: 0.
    """

    keep: float = 0.25
    seed: int = 0

    evidence: ClassVar[None] = None

    def __post_init__(self) -> None:
        _checks.store(self, keep=_checks.share("KeepRandom keep", self.keep))
        _checks.whole("KeepRandom seed", self.seed, 0)

    def __call__(self, seen: Encoded) -> Reduced:
        """The tokens kept, in order."""
        score = hashed_uniform(self.seed, 0, seen.real.cumsum(-1))
        chosen = best(score, seen.real, rounded(seen.real.sum(-1), self.keep))
        return joined([as_they_are(seen.features, chosen)], seen.features.dtype)
