"""Means with errors, paired differences, and how far a ranking can be believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Final, NamedTuple

import numpy as np

from .outcomes import Floats

HALVINGS: Final = 50
RESAMPLES: Final = 400
CLEAR: Final = 2.0
"""Standard errors from which a difference is called one."""


class Estimate(NamedTuple):
    """A mean and its standard error; NaN where one sample says nothing about the error."""

    mean: float
    error: float

    @property
    def sign(self) -> str:
        """ "+" or "-" for a difference of more than two standard errors, else "="."""
        if abs(self.mean) <= CLEAR * self.error or self.mean == 0:
            return "="
        return "+" if self.mean > 0 else "-"


def estimate(values: Floats) -> Estimate:
    """Mean of values `[n]` and its standard error."""
    error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return Estimate(float(values.mean()), float(error))


def paired(values: Floats, base: Floats) -> Estimate:
    """Mean difference of two methods on the same samples `[n]`, and its standard error."""
    return estimate(values - base)


def ranks(values: Floats) -> Floats:
    """Ranks from 0 `[n]`; equal values share the mean of theirs."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    mean: Floats = (np.cumsum(count) - (count + 1) / 2)[group]
    return mean


def spearman(one: Floats, other: Floats) -> float:
    """Rank correlation of two lists `[n]`; NaN where one of them is constant."""
    a, b = ranks(one), ranks(other)
    if min(a.std(), b.std()) == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def split_half(values: Floats, seed: int = 0) -> float:
    """Mean rank correlation of methods between random halves of the samples; values `[methods, n]`."""
    rng, size = np.random.default_rng(seed), values.shape[1] // 2
    found = []
    for _ in range(HALVINGS):
        order = rng.permutation(values.shape[1])
        found.append(spearman(values[:, order[:size]].mean(1), values[:, order[size : 2 * size]].mean(1)))
    return float(np.mean(found))


class Pairs(NamedTuple):
    """How many pairs of methods differ by more than two paired standard errors, of how many."""

    clear: int
    total: int


def clear_pairs(values: Floats) -> Pairs:
    """Of methods `[methods, n]` on the same samples."""
    differences = [paired(a, b) for a, b in combinations(values, 2)]
    return Pairs(sum(difference.sign != "=" for difference in differences), len(differences))


def bootstrap(statistic: Callable[[Sequence[Floats]], float], values: Sequence[Floats], seed: int = 0) -> Estimate:
    """A statistic of several lists of `[n]` paired values, and its standard error over resampled samples.

    Args:
        statistic: Of the lists.
        values: All of one length; the same samples are drawn from each.
        seed: Of the draws.
    """
    rng, count = np.random.default_rng(seed), len(values[0])
    draws = [rng.integers(0, count, count) for _ in range(RESAMPLES)]
    spread = np.std([statistic([x[draw] for x in values]) for draw in draws], ddof=1)
    return Estimate(statistic(values), float(spread))
