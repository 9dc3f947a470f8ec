"""Which pipeline at which budget: sentences, each with its figure, from the outcomes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .benchmark import Benchmark
from .cells import Cell, Method, Setting
from .markdown import change, code, level, percent, section
from .outcomes import Floats
from .rule import WINDOW
from .statistics import Estimate, estimate, paired

MENTIONED = 4
"""Pipelines named as no worse than the best one."""
LAST_TOKEN = "tova"
USEFUL = 0.1
"""Exact match from which a pipeline is worth naming."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What a reader may be in: the settings that stand for it, and the group whose methods are compared."""

    title: str
    group: str
    settings: tuple[Setting, ...]


def render(bench: Benchmark) -> str:
    """quality-guide.md."""
    intro = (
        f"From `quality.json`: exact match over {bench.samples} samples per setting, all answer tokens from the "
        "compressed cache, ± one standard error over samples, means over the settings named. *No worse* is less than "
        "two paired standard errors below the best. It is about small models on generated pages: `quality.md` says "
        "what that cannot show. Errors are over samples, not over models. `tova` looks at the last token of the prompt "
        "alone, which was trained to point at the evidence in these models: where it wins, the best pipeline without "
        "it is named as well."
    )
    blocks = (section(situation.title, list(_advice(bench, situation))) for situation in _situations(bench))
    lines = [
        *section("Which pipeline at which budget", [intro], level=1),
        *(line for block in blocks for line in block),
    ]
    return "\n".join(lines).rstrip() + "\n"


def summary(bench: Benchmark) -> list[str]:
    """The advice over all models and both arrangements, for the top of the page of results."""
    main = tuple(setting for setting in bench.settings("main") if bench.compares(setting))
    return list(_advice(bench, Situation("", "main", main)))


def _situations(bench: Benchmark) -> Iterator[Situation]:
    main = [setting for setting in bench.settings("main") if bench.compares(setting)]
    for world in dict.fromkeys(setting.arrangement for setting in main):
        its = tuple(setting for setting in main if setting.arrangement == world)
        yield Situation(f"Evidence {world}, {_models(its)}", "main", its)
    if len(main) > 1:
        yield Situation(f"All of these together, {_models(main)}", "main", tuple(main))
    for group, words in (("suffix", "{} tokens after the question"), ("ink", "a {} page"), ("task", "the task {}")):
        yield from _levels(bench, group, words)
    before = tuple(s for s in bench.settings("when") if s.when == "before" and bench.compares(s))
    if before:
        yield Situation(f"Compressed before the question is seen, {_models(before)}", "when", before)


def _levels(bench: Benchmark, group: str, words: str) -> Iterator[Situation]:
    settings = [setting for setting in bench.settings(group) if bench.compares(setting)]
    for value in dict.fromkeys(getattr(setting, group) for setting in settings):
        its = tuple(setting for setting in settings if getattr(setting, group) == value)
        title = words.format(value)
        yield Situation(f"{title[0].upper()}{title[1:]}, {_models(its)}", group, its)


def _models(settings: Sequence[Setting]) -> str:
    return ", ".join(dict.fromkeys(setting.model for setting in settings))


def _advice(bench: Benchmark, situation: Situation) -> Iterator[str]:
    full = _over(bench, [Cell(setting) for setting in situation.settings])
    if full is None:
        return
    for budget in bench.budgets(situation.group):
        scores = _scores(bench, situation, budget)
        if not scores:
            continue
        best = max(scores, key=lambda method: float(scores[method].mean()))
        close = [m for m in scores if m != best and paired(scores[m], scores[best]).sign == "="]
        yield f"* **{budget}**: {_sentence(scores, best, close, estimate(full))}"


def _sentence(scores: dict[Method, Floats], best: Method, close: list[Method], full: Estimate) -> str:
    top = estimate(scores[best])
    whole = f"the full cache {percent(full.mean)} %."
    if top.mean < USEFUL:
        return f"too few for this: the best, {code(best.name)}, answers {level(top)} %, {whole}"
    said = f"{code(best.name)} answers {level(top)} %, {whole}"
    if close:
        close.sort(key=lambda method: -float(scores[method].mean()))
        named = ", ".join(f"{code(m.name)} {percent(float(scores[m].mean()))} %" for m in close[:MENTIONED])
        more = f" and {len(close) - MENTIONED} more" if len(close) > MENTIONED else ""
        said += f" No worse: {named}{more}."
    others = [m for m in scores if m.score != LAST_TOKEN]
    if best.score == LAST_TOKEN and others:
        other = max(others, key=lambda m: float(scores[m].mean()))
        said += f" Best without `{LAST_TOKEN}`: {code(other.name)} {percent(float(scores[other].mean()))} %."
    plain = scores.get(Method())
    if plain is not None and best != Method():
        versus = paired(scores[best], plain)
        said += f" Plain `snapkv` answers {percent(float(plain.mean()))} %: {change(versus)} for the better one."
    return said


def _scores(bench: Benchmark, situation: Situation, budget: int) -> dict[Method, Floats]:
    found = {}
    for method in bench.methods(situation.group):
        values = _over(bench, [Cell(setting, method, budget, WINDOW) for setting in situation.settings])
        if values is not None:
            found[method] = values
    return found


def _over(bench: Benchmark, cells: Sequence[Cell]) -> Floats | None:
    """Exact match `[n]` of each sample, mean over settings; None when one of them is missing."""
    results = [bench.get(cell) for cell in cells]
    if not results or any(result is None for result in results):
        return None
    values: Floats = np.mean([result.honest.exact for result in results if result is not None], axis=0)
    return values
