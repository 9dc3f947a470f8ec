"""Medians, ratios of what was measured in the same rounds, and how a time grows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Summary(NamedTuple):
    """A median and the range of what was measured."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Of at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def text(self, scale: float = 1.0, digits: int = 0) -> str:
        """All three, multiplied by `scale`."""
        median, low, high = (f"{scale * x:.{digits}f}" for x in self)
        return f"{median} ({low}..{high})"


class Ratio(NamedTuple):
    """The ratio of two medians, and the range of the rounds' own ratios."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, mine: Sequence[float], other: Sequence[float]) -> Ratio:
        """Of two lists with one value per round, in the same order."""
        each = [a / b for a, b in zip(mine, other, strict=True)]
        return cls(statistics.median(mine) / statistics.median(other), min(each), max(each))

    def text(self, digits: int = 2) -> str:
        """All three."""
        return f"{self.value:.{digits}f} ({self.low:.{digits}f}..{self.high:.{digits}f})"


def growth_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The p of seconds = c * size ** p, by least squares over logarithms; at least two different sizes."""
    xs, ys = ([math.log(x) for x in values] for values in (sizes, seconds))
    return statistics.linear_regression(xs, ys).slope
