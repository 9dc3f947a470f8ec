"""How far the order of methods can be believed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from .benchmark import Benchmark
from .cells import Cell, Method, Setting
from .grid import CONTROLS
from .markdown import code, section, table
from .outcomes import Floats
from .statistics import clear_pairs, paired, spearman, split_half

LEAST_METHODS = 3
"""A rank correlation of fewer says nothing."""


def render(bench: Benchmark) -> list[str]:
    """Split halves, clear pairs, and agreement between models."""
    words = (
        "By token accuracy. Controls (" + ", ".join(map(code, CONTROLS)) + ") are left out, and so are methods that "
        "are within two paired standard errors of the full cache or of `random`: they are at the top or at the bottom "
        "together, and their order is chance."
    )
    halves = table(
        ["setting", "budget", "methods", "split-half rank correlation", "pairs that differ by two paired errors"],
        _halves(bench),
    )
    between = list(_between(bench))
    models = table(["models", "evidence", "budget", "methods", "rank correlation"], between, left=2) if between else []
    return section("How far the order of methods can be believed", [words], halves, models) if bench.budgets() else []


def comparable(bench: Benchmark, setting: Setting, budget: int) -> dict[Method, Floats]:
    """Token accuracies `[n]` of the methods that are neither controls nor saturated."""
    full, chance = bench.full(setting), bench.get(Cell(setting, Method("random"), budget))
    if full is None or chance is None:
        return {}
    found = {m: bench.get(Cell(setting, m, budget)) for m in bench.methods() if m.score not in CONTROLS}
    values = {method: result.honest.tokens for method, result in found.items() if result is not None}
    ends = (full.honest.tokens, chance.honest.tokens)
    return {m: x for m, x in values.items() if all(paired(x, end).sign != "=" for end in ends)}


def _halves(bench: Benchmark) -> Iterator[list[str]]:
    for setting in bench.settings("main"):
        for budget in bench.budgets():
            values = np.array(list(comparable(bench, setting, budget).values()))
            row = [code(setting.key), str(budget), str(len(values))]
            if len(values) < LEAST_METHODS:
                yield [*row, "n/a", "n/a"]
            else:
                pairs = clear_pairs(values)
                share = 100 * pairs.clear / pairs.total
                yield [*row, f"{split_half(values):.2f}", f"{pairs.clear} of {pairs.total} ({share:.0f} %)"]


def _between(bench: Benchmark) -> Iterator[list[str]]:
    """The same arrangement read by two models: other seeds of one architecture, or other architectures."""
    for one, other in combinations(bench.settings("main"), 2):
        if one.model == other.model or one.arrangement != other.arrangement:
            continue
        for budget in bench.budgets():
            a, b = comparable(bench, one, budget), comparable(bench, other, budget)
            common = [method for method in a if method in b]
            rho = spearman(*(np.array([float(x[m].mean()) for m in common]) for x in (a, b))) if common else 0.0
            shown = f"{rho:.2f}" if len(common) >= LEAST_METHODS else "n/a"
            yield [f"{one.model}, {other.model}", one.arrangement, str(budget), str(len(common)), shown]
