"""Which cells there are: all methods in the default settings, then one factor at a time."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from mmkv_hf import Pipeline
from mmkv_layershare import LazyPlan

from .cells import Cell, Method, Setting
from .rule import BUDGETS, PUBLISHED_WINDOW, WINDOW
from .stages import LAZY, PRUNERS, REDUCERS, build

SCORES: Final = ("snapkv", "tova", "h2o", "streamingllm", "knorm", "vnorm", "keydiff", "random")
SHARES: Final = ("uniform", "pyramidkv", "adakv", "sparsemm")
WRAPS: Final = ((), ("mixkv",), ("bacon",), ("mixkv", "bacon"))
CONTROLS: Final = ("random", "streamingllm")

WORLDS: Final = ("horizontal", "vertical")
"""Contiguous and scattered evidence: different methods win in each, so both are measured."""
TASKS: Final = ("value", "describe", "pair", "locate", "list", "images", "video")
ARRANGEMENTS: Final = ("horizontal", "vertical", "strided")
SUFFIXES: Final = (0, 8, 24)
INKS: Final = ("sparse", "normal", "dense")

NAMED: Final = (
    *(Method(share=share, wraps=wraps) for share in ("uniform", "adakv") for wraps in WRAPS),
    *(Method(share=share, wraps=wraps) for share in ("pyramidkv", "sparsemm") for wraps in WRAPS[:3]),
    *(Method(score) for score in ("tova", "h2o", "keydiff", "vnorm", "streamingllm", "random")),
)
"""The methods that are followed through every factor."""

FACTOR_BUDGETS: Final = BUDGETS[:-1]
"""Of everything but the main grid: at the mildest budget most methods answer as the full cache does."""
QUICK_BUDGET: Final = BUDGETS[1]
SHOWN: Final = 12
"""Names listed where one is wrong."""

STAGED: Final = tuple((name,) for name in (*REDUCERS, *PRUNERS, *LAZY))
"""Stages by themselves."""
COMBINED: Final = (
    *(("visionzip 192",), ("visionzip 192", "vla")),
    *(("fastv",), ("pyramiddrop",), ("vla",), ("gla",), ("fastv", "vla")),
)
"""Stages with eviction behind them, and those that are combined without it."""
BEHIND: Final = (Method(), Method(share="adakv", wraps=("bacon",)))


@dataclass(frozen=True, slots=True)
class Group:
    """Cells that one section of the page shows together.

    Attributes:
        name: One word.
        title: What is varied.
        cells: With the full cache of every setting in front.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Something the grid names and nobody can measure."""

    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole grid.

    Attributes:
        groups: What is measured; groups may share cells.
        left_out: What is not, and why.
    """

    groups: tuple[Group, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell once."""
        return tuple(dict.fromkeys(cell for group in self.groups for cell in group.cells))


def plan_json(plan: Plan) -> dict[str, Any]:
    """Plain types: every cell once, groups by the numbers of their cells."""
    number = {cell: index for index, cell in enumerate(plan.cells)}
    return {
        "cells": [_cell_json(cell) for cell in plan.cells],
        "groups": [{"name": g.name, "title": g.title, "cells": [number[c] for c in g.cells]} for g in plan.groups],
        "left_out": [[reason.what, reason.why] for reason in plan.left_out],
    }


def plan_of_json(data: Mapping[str, Any]) -> Plan:
    """What `plan_json` gave."""
    cells = [_cell_of_json(cell) for cell in data["cells"]]
    groups = (Group(g["name"], g["title"], tuple(cells[number] for number in g["cells"])) for g in data["groups"])
    return Plan(tuple(groups), tuple(LeftOut(what, why) for what, why in data["left_out"]))


def _cell_json(cell: Cell) -> dict[str, Any]:
    data: dict[str, Any] = {"setting": cell.setting.key, "budget": cell.budget, "window": cell.window}
    if cell.method is None:
        return data
    method = cell.method
    parts = {"score": method.score, "share": method.share, "wraps": list(method.wraps), "stages": list(method.stages)}
    text = method.text(cell.window, Path("head_scores.json")) if method.score else ""
    return data | parts | {"pipeline": text}


def _cell_of_json(data: Mapping[str, Any]) -> Cell:
    method = None
    if "score" in data:
        method = Method(data["score"], data["share"], tuple(data["wraps"]), tuple(data["stages"]))
    return Cell(Setting.of(data["setting"]), method, data["budget"], data["window"])


def all_methods() -> tuple[Method, ...]:
    """Every score with every allocation and every wrap, those that cannot work included."""
    return tuple(Method(*parts) for parts in product(SCORES, SHARES, WRAPS))


def make_plan(
    models: Iterable[str], tables: Mapping[str, Path], plans: Mapping[str, Path] | None = None, *, quick: bool = False
) -> Plan:
    """The grid for these models.

    Args:
        models: Names; the first one is followed through the factors, all of them through the default settings.
        tables: Model -> visual-head scores for SparseMM; where it is missing those cells are left out.
        plans: Model -> plan of lazy layers; where it is missing those cells are left out.
        quick: Every method at one budget in the default settings, nothing else.
    """
    models = tuple(models)
    wanted = (_quick if quick else _full)(models)
    kept, left_out = zip(*(_checked(group, tables, plans or {}) for group in wanted), strict=True)
    return Plan(kept, tuple(dict.fromkeys(reason for reasons in left_out for reason in reasons)))


def without(plan: Plan, settings: Mapping[Setting, str]) -> Plan:
    """The plan less these settings, each left out for the reason given."""
    groups = tuple(replace(g, cells=tuple(c for c in g.cells if c.setting not in settings)) for g in plan.groups)
    more = tuple(LeftOut(setting.key, why) for setting, why in settings.items())
    return Plan(tuple(group for group in groups if group.cells), plan.left_out + more)


def only(plan: Plan, tasks: Collection[str], methods: Collection[str], groups: Collection[str] = ()) -> Plan:
    """The part of a plan in these groups, about these tasks and these methods; empty means all.

    Raises:
        ValueError: The plan has no such group, task or method; the message names the nearest.
    """
    _check_known("group", groups, [group.name for group in plan.groups])
    _check_known("task", tasks, {cell.setting.task: None for cell in plan.cells})
    _check_known("pipeline", methods, {cell.method.name: None for cell in plan.cells if cell.method})

    def stays(cell: Cell) -> bool:
        is_named = cell.method is None or not methods or cell.method.name in methods
        return is_named and (not tasks or cell.setting.task in tasks)

    named = (group for group in plan.groups if not groups or group.name in groups)
    cut = (replace(group, cells=tuple(filter(stays, group.cells))) for group in named)
    return Plan(tuple(group for group in cut if group.cells), plan.left_out)


def _check_known(what: str, given: Iterable[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            more = f" and {len(known) - SHOWN} more, see --dry-run" if len(known) > SHOWN else ""
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([*known][:SHOWN])}{more}"
            raise ValueError(f"no {what} {name!r} in this plan; {hint}")


def _quick(models: tuple[str, ...]) -> tuple[Group, ...]:
    settings = [Setting(model, arrangement=world) for model, world in product(models, WORLDS)]
    cells = _cells(settings, all_methods(), (QUICK_BUDGET,))
    return (Group("main", f"every method at a budget of {QUICK_BUDGET}", cells), _stages(settings))


def _stages(settings: Iterable[Setting]) -> Group:
    """Vision tokens left out and attention shared, alone and with eviction behind it."""
    settings = tuple(settings)
    alone = dict.fromkeys((*STAGED, *COMBINED))
    lone = _cells(settings, (Method("", stages=names) for names in alone), (0,))
    behind = _cells(settings, (replace(m, stages=names) for names in COMBINED for m in BEHIND), (QUICK_BUDGET,))
    return Group("stages", "vision tokens left out, attention shared", tuple(dict.fromkeys((*lone, *behind))))


def _full(models: tuple[str, ...]) -> tuple[Group, ...]:
    every = [Setting(model, arrangement=world) for model, world in product(models, WORLDS)]
    main = [setting for setting in every if setting.model == models[0]]
    factors: dict[str, tuple[str, tuple[Any, ...]]] = {
        "task": ("the task", TASKS),
        "arrangement": ("how the evidence lies", ARRANGEMENTS),
        "suffix": ("tokens between question and answer", SUFFIXES),
        "ink": ("how full the page is", INKS),
        "when": ("compression after or before the question is seen", ("after", "before")),
    }
    varied = {
        f"one factor: {title}": (name, [replace(setting, **{name: x}) for setting in main for x in levels])
        for name, (title, levels) in factors.items()
    }
    windows = tuple(cell for window in (WINDOW, PUBLISHED_WINDOW) for cell in _cells(main, NAMED, window=window))
    variants = {
        "sensitivity of MixKV to r": ("mixkv", _around("mixkv", MIXKV_SETTINGS)),
        "sensitivity of BACON to m and r": ("bacon", _around("bacon", BACON_SETTINGS)),
        "ablation of BACON's terms E, L, T": ("terms", _around("bacon", BACON_TERMS)),
        "ablation of AdaKV's floor": ("floor", (Method(), *(Method(share=share) for share in ADAKV_FLOORS))),
    }
    return (
        Group("main", "every method at every budget", _cells(every, all_methods())),
        *(Group(name, title, _cells(its, NAMED, FACTOR_BUDGETS)) for title, (name, its) in varied.items()),
        Group("window", "one factor: the observation window", windows),
        _stages(every),
        *(Group(name, title, _cells(main, its, FACTOR_BUDGETS)) for title, (name, its) in variants.items()),
    )


MIXKV_SETTINGS: Final = ("", *(f"(redundancy={r})" for r in (0.0, 0.25, 0.5, 0.75, 1.0)))
BACON_SETTINGS: Final = (
    "",
    "(terms=el)",  # m = 0: the published figures of it are those of the row without T
    *(f"(depth={m})" for m in (2, 6, 8, 10)),
    "(terms=et)",  # r = 0: those of the row without L
    *(f"(reach={r})" for r in (3, 7, 9)),
)
BACON_TERMS: Final = ("", "(terms=et)", "(terms=el)", "(terms=lt)", "(preset=paper)", "(preset=rel)")


ADAKV_FLOORS: Final = ("adakv", *(f"adakv(floor={floor})" for floor in (0.5, 0.8, 1.0)))
"""From the published 0.2 to 1, which leaves nothing to adapt: uniform budgets."""


def _around(wrap: str, settings: tuple[str, ...]) -> tuple[Method, ...]:
    """SnapKV and AdaKV, bare and with each variant of a wrap."""
    shares = ("uniform", "adakv")
    return tuple(Method(share=share, wraps=w) for share in shares for w in ((), *((wrap + x,) for x in settings)))


def _cells(
    settings: Iterable[Setting], methods: Iterable[Method], budgets: Iterable[int] = BUDGETS, window: int = WINDOW
) -> tuple[Cell, ...]:
    methods, budgets = tuple(methods), tuple(budgets)
    return tuple(
        cell
        for setting in dict.fromkeys(settings)
        for cell in (Cell(setting), *(Cell(setting, m, b, window) for m, b in product(methods, budgets)))
    )


def _checked(group: Group, tables: Mapping[str, Path], plans: Mapping[str, Path]) -> tuple[Group, tuple[LeftOut, ...]]:
    def why(cell: Cell) -> tuple[LeftOut, ...]:
        model = cell.setting.model
        return tuple(_refusals(cell, tables.get(model), plans.get(model)))

    reasons = {cell: why(cell) for cell in group.cells}
    kept = tuple(cell for cell in dict.fromkeys(group.cells) if not reasons[cell])
    return replace(group, cells=kept), tuple(reason for found in reasons.values() for reason in found)


def _refusals(cell: Cell, table: Path | None, plan: Path | None) -> Iterator[LeftOut]:
    """Why this cell cannot be measured: nothing, or one reason."""
    method = cell.method
    if method is not None and (why := _not_lazy(method.stages, plan)):
        yield LeftOut(f"{' | '.join(method.stages)} on {cell.setting.model}", why)
        return
    if method is None or not method.score:
        return
    anywhere = replace(method, share="uniform")
    if why := _refusal(anywhere, cell.window, None):
        yield LeftOut(f"{anywhere.name}, with every allocation", why)
    elif method.share == "sparsemm" and table is None:
        yield LeftOut(f"sparsemm on {cell.setting.model}", "there is no table of visual-head scores for this model")
    elif why := _refusal(method, cell.window, table):
        yield LeftOut(method.name, why)
    elif cell.budget < Pipeline.parse(method.text(cell.window, table)).least_budget:
        yield LeftOut(f"budget {cell.budget} with a window of {cell.window}", "it does not exceed the window")


def _not_lazy(stages: tuple[str, ...], plan: Path | None) -> str | None:
    """Why a model with that plan cannot run the stages, if some layers of them are lazy."""
    if not LAZY.keys() & set(stages):
        return None
    if plan is None:
        return "there is no plan of lazy layers for this model"
    try:
        build(stages, LazyPlan.load(plan).num_layers, plan)
    except ValueError as error:
        return str(error)
    return None


def _refusal(method: Method, window: int, table: Path | None) -> str | None:
    if method.score == "tova" and "bacon" in method.wraps:
        return "BACON returns its base unchanged where the window is one query"
    try:
        Pipeline.parse(method.text(window, table))
    except ValueError as error:
        return str(error)
    return None
