"""The benchmark as the pages see it: the plan, the outcomes, and how they were made."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from .cells import Cell, Method, Setting
from .grid import Group, Plan, plan_json, plan_of_json
from .results import Result
from .statistics import Estimate, estimate, paired
from .store import FORMAT, changes

COMPARES: Final = 0.95
"""Exact match of the full cache from which a setting compares methods."""


@dataclass(frozen=True, slots=True)
class Part:
    """One run that results come from.

    Attributes:
        made: What the numbers were made with: seed, samples, versions, digests.
        took: The command, wall seconds, processes.
        cells: How many were measured.
        hours: Of the CPU, beside the prefills.
    """

    made: Mapping[str, Any]
    took: Mapping[str, Any]
    cells: int
    hours: float


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Everything the pages are computed from.

    Attributes:
        plan: What was to be measured.
        results: Cell key -> result; cells that are not finished are missing.
        parts: The runs they come from, at least one.
    """

    plan: Plan
    results: Mapping[str, Result]
    parts: tuple[Part, ...]

    @classmethod
    def of_run(
        cls, plan: Plan, results: Mapping[str, Result], made: Mapping[str, Any], took: Mapping[str, Any]
    ) -> Benchmark:
        """The results of a single run."""
        hours = round(sum(result.seconds for result in results.values()) / 3600, 3)
        return cls(plan, results, (Part(made, took, len(results), hours),))

    @property
    def samples(self) -> int:
        """Per cell."""
        return int(self.parts[0].made["samples"])

    def get(self, cell: Cell) -> Result | None:
        """The cell's result, if it is there."""
        return self.results.get(cell.key)

    def full(self, setting: Setting) -> Result | None:
        """The full cache in this setting."""
        return self.get(Cell(setting))

    def group(self, name: str) -> Group | None:
        """The group of that name, if it is in the plan."""
        return next((group for group in self.plan.groups if group.name == name), None)

    def settings(self, name: str) -> tuple[Setting, ...]:
        """The measured settings of a group."""
        group = self.group(name)
        cells = () if group is None else group.cells
        return tuple(setting for setting in dict.fromkeys(c.setting for c in cells) if self.full(setting))

    def compares(self, setting: Setting) -> bool:
        """Whether the full cache answers well enough for the setting to compare methods."""
        full = self.full(setting)
        return full is not None and full.honest.exact.mean() >= COMPARES

    @property
    def missing(self) -> int:
        """Cells that are not finished."""
        return sum(cell.key not in self.results for cell in self.plan.cells)

    def budgets(self, name: str = "main") -> tuple[int, ...]:
        """The budgets of a group, from aggressive to mild."""
        group = self.group(name)
        return () if group is None else tuple(sorted({cell.budget for cell in group.cells} - {0}))

    def methods(self, name: str = "main") -> tuple[Method, ...]:
        """The methods of a group, in the plan's order."""
        group = self.group(name)
        return () if group is None else tuple(dict.fromkeys(cell.method for cell in group.cells if cell.method))


def exact(bench: Benchmark, cell: Cell) -> Estimate | None:
    """Exact match of a cell."""
    result = bench.get(cell)
    return None if result is None else estimate(result.honest.exact)


def difference(bench: Benchmark, cell: Cell, base: Cell) -> Estimate | None:
    """Paired difference of exact match between two cells with the same samples."""
    one, other = bench.get(cell), bench.get(base)
    return None if one is None or other is None else paired(one.honest.exact, other.honest.exact)


def base_of(cell: Cell) -> Cell | None:
    """What a cell is compared with: the same without wraps, and without wraps the same with a uniform budget.

    With stages it is the same without them; the full cache where nothing is evicted.
    """
    method = cell.method
    if method is not None and method.stages:
        bare = replace(method, stages=()) if method.score else None
        return Cell(cell.setting, bare, cell.budget, cell.window)
    if method is None or (not method.wraps and method.share == "uniform"):
        return None
    base = method.base if method.wraps else Method(method.score)
    return Cell(cell.setting, base, cell.budget, cell.window)


def joined(one: Benchmark, other: Benchmark) -> Benchmark:
    """The cells of two runs over the same samples, as of code that has grown in between or of two machines.

    Raises:
        ValueError: They had other samples, versions or weights, or disagree about a cell that both have measured; the
            message names what.
    """
    changed = [x for p in one.parts for q in other.parts for x in changes(p.made, q.made, same=("seed", "samples"))]
    if changed:
        raise ValueError(f"runs that differ cannot be joined: {'; '.join(changed)}")
    for key in one.results.keys() & other.results.keys():
        if not one.results[key].agrees(other.results[key]):
            raise ValueError(f"the runs disagree about {key}: other code, another machine, or a damaged file")
    names = dict.fromkeys(group.name for bench in (one, other) for group in bench.plan.groups)
    both = ([group for bench in (one, other) if (group := bench.group(name))] for name in names)
    groups = tuple(replace(its[0], cells=tuple(dict.fromkeys(c for g in its for c in g.cells))) for its in both)
    left_out = tuple(dict.fromkeys(one.plan.left_out + other.plan.left_out))
    return Benchmark(Plan(groups, left_out), {**other.results, **one.results}, one.parts + other.parts)


def to_json(bench: Benchmark) -> dict[str, Any]:
    """Plain types; outcomes of every sample included, so that a reader can compute every number again."""
    results = {key: result.to_json() for key, result in bench.results.items()}
    return {
        "format": FORMAT,
        "parts": [asdict(part) for part in bench.parts],
        "plan": plan_json(bench.plan),
        "results": results,
    }


def of_json(data: Mapping[str, Any]) -> Benchmark:
    """What `to_json` gave.

    Raises:
        ValueError: It is something else.
    """
    if data.get("format") != FORMAT:
        raise ValueError(f"not results of this benchmark: format {data.get('format')!r} instead of {FORMAT!r}")
    results = {key: Result.of_json(result) for key, result in data["results"].items()}
    return Benchmark(plan_of_json(data["plan"]), results, tuple(Part(**part) for part in data["parts"]))


def read(path: Path) -> Benchmark:
    """The benchmark of a quality.json.

    Raises:
        ValueError: It is something else.
    """
    try:
        return of_json(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no quality.json: {error}") from error
