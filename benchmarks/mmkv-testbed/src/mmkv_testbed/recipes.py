"""What decides the outcome of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from .batches import View
from .model import Size, architecture_of
from .pages import Arrangement
from .samples import MAX_SUFFIX, Task


@dataclass(frozen=True, slots=True)
class Stage:
    """One part of the curriculum.

    Attributes:
        name: For the log.
        views: Kinds of steps.
        steps: Most steps.
        suffix: Longest run of fillers after a question.
        auxiliary: Weight of the auxiliary losses.
        goal: The stage ends early when token accuracy over the steps since the last log line passes this.
        rate: Share of the recipe's learning rates; what is learnt about places survives only gentle later stages.
        decay: Whether the learning rate falls to zero over the second half.
    """

    name: str
    views: tuple[View, ...]
    steps: int
    suffix: int
    auxiliary: float
    goal: float = 1.0
    rate: float = 1.0
    decay: bool = False

    @property
    def shares(self) -> list[float]:
        """How often each view is chosen."""
        total = sum(view.weight for view in self.views)
        return [view.weight / total for view in self.views]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the outcome."""

    size: Size
    seed: int
    stages: tuple[Stage, ...]
    alignment_steps: int = 1600
    muon: float = 0.02
    adamw: float = 1.5e-3
    head_dropout: float = 0.05


_H, _V, _S = ((arrangement,) for arrangement in Arrangement)
_IMAGES: Final = (Task.IMAGES,)
_VIDEO: Final = (Task.VIDEO,)


def _stages(single: tuple[Task, ...]) -> tuple[Stage, ...]:
    """The curriculum, for these tasks with one image and all with several."""
    return (
        Stage(
            "glimpse",
            (
                View(3, 12, 5, 6, 16, single, _H),
                View(6, 6, 5, 6, 16, single, _V),
                View(2, 20, 5, 6, 16, single, _S),
                View(3, 12, 5, 6, 8, _IMAGES, _H, weight=0.4),
                View(6, 6, 5, 6, 8, _VIDEO, _V, weight=0.4),
                View(2, 20, 5, 6, 8, _IMAGES, _S, weight=0.4),
            ),
            steps=700,
            suffix=4,
            auxiliary=1.0,
            goal=0.85,
        ),
        Stage(
            "patch",
            (
                View(6, 12, 9, 8, 12, single, _H + _V, weight=2),
                View(4, 20, 9, 8, 12, single, _S),
                View(6, 12, 9, 8, 6, _IMAGES, _H + _V, weight=0.5),
                View(4, 20, 9, 8, 6, _VIDEO, _S, weight=0.5),
            ),
            steps=150,
            rate=0.5,
            suffix=8,
            auxiliary=1.0,
            goal=0.9,
        ),
        Stage(
            "block",
            (
                View(6, 24, 14, 10, 8, single, weight=2),
                View(12, 12, 14, 10, 8, single, _H + _V),
                View(6, 12, 9, 10, 6, _VIDEO, _H + _V, weight=0.7),
                View(4, 20, 9, 10, 8, _IMAGES, _S, weight=0.7),
            ),
            steps=150,
            rate=0.5,
            suffix=16,
            auxiliary=0.5,
            goal=0.92,
        ),
        Stage(
            "half",
            (
                View(12, 24, 18, 10, 6, single, weight=2),
                View(6, 24, 14, 10, 6, _IMAGES),
                View(6, 24, 14, 10, 4, _VIDEO),
            ),
            steps=100,
            rate=0.5,
            suffix=MAX_SUFFIX,
            auxiliary=0.3,
            goal=0.95,
        ),
        Stage(
            "page",
            (
                View(24, 24, 20, 12, 4, single, weight=3),
                View(24, 24, 20, 8, 2, _IMAGES),
                View(24, 24, 20, 8, 1, _VIDEO),
            ),
            steps=500,
            rate=0.5,
            suffix=MAX_SUFFIX,
            auxiliary=0.2,
            decay=True,
        ),
    )


def recipe_for(size: Size, seed: int) -> Recipe:
    """The recipe of the shipped models; where image features do not tell places, nothing that needs them is asked."""
    if not architecture_of(size).places:
        return Recipe(size, seed, _stages((Task.VALUE, Task.PAIR)), alignment_steps=800)
    return Recipe(size, seed, _stages((Task.VALUE, Task.DESCRIBE, Task.PAIR, Task.LIST, Task.LOCATE)))
