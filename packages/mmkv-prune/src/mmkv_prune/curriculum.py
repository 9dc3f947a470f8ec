"""Training with a compression that changes: what ADSC's "reverse curriculum" may look like."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from . import _checks
from .adsc import ADSC


@dataclass(frozen=True, slots=True)
class Curriculum:
    """The ADSC to train with at each step, in `levels` equal parts of `steps`; `target` from the last part on.

    A summary of arXiv 2602.12618 says "reverse curriculum over pruning ratios" and no more, so this is a hook and *not*
    the paper's schedule. Anything that maps a step to an `ADSC` will do in its place.

    Attributes:
        target: what the model is tuned for.
        steps: training steps.
        levels: strides r + levels - 1, ..., r + 1, r are gone through (forward: from below, never under 1).
        order: "reverse": from strong compression to the target (the literal reading); "forward": from weak.
    """

    target: ADSC
    steps: int
    levels: int = 3
    order: Literal["reverse", "forward"] = "reverse"

    def __post_init__(self) -> None:
        if not isinstance(self.target, ADSC):
            raise TypeError(f"Curriculum target must be an ADSC, got {self.target!r}")
        _checks.whole("Curriculum steps", self.steps, 1)
        _checks.whole("Curriculum levels", self.levels, 1)
        _checks.one_of("Curriculum order", self.order, ("reverse", "forward"))

    def __call__(self, step: int) -> ADSC:
        """The method at a training step, counted from 0; steps after the last have the target.

        Raises:
            ValueError: not a whole number; what is none, NaN first of all, compares in ways that would pass for a step.
        """
        if step != step // 1:
            raise ValueError(f"Curriculum: a step is a whole number, got {step}")
        away = self.levels - 1 - min(max(int(step), 0) * self.levels // self.steps, self.levels - 1)
        away = away if self.order == "reverse" else -away
        lowest = self.target.offset + 1
        return replace(self.target, stride=tuple(max(lowest, stride + away) for stride in self.target.strides))
