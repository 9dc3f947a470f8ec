"""Published figures beside the same figures measured here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, median

from .benchmark import Benchmark, difference
from .cells import Cell, Method, Setting
from .markdown import change, code, percent, section, table
from .outcomes import Floats
from .published import DOCVQA_BASE, DOCVQA_SENSITIVITY, DOCVQA_SENSITIVITY_BASE, DOCVQA_TERMS, HEADLINES, Headline
from .rule import WINDOW, WINDOWS_PER_BUDGET
from .statistics import CLEAR, Estimate, bootstrap

LEAST_BASE = 0.05
"""A relative gain over less than this says nothing and is left out."""

WHY = """\
Where figures differ, these may be why. They are guesses; the tables below say where each of them holds:
* Papers average over tasks most of which hardly suffer; here every task needs its evidence, and whoever loses it fails.
* The published protocol takes the first answer token from the dense prefill, which is free of any loss.
* The published figures are of other metrics and other tasks, so the same size is no replication. Token accuracy gives
  points to chance, too.
* BACON should mend windows that say little about the question: compare the suffixes. MixKV should win where keys repeat
  themselves or nobody knows the question yet: compare the inks, and compression before the question.
* One base that has collapsed can carry a mean: compare the range over the pairs of model and allocation. SparseMM's
  does at tight budgets where words follow the question.
* Gains relative to a base that nearly fails are large, and those relative to one that nearly succeeds small, whatever
  the method: the points of exact match in the tables say which it is."""

METRICS = ("exact", "tokens")


@dataclass(frozen=True, slots=True)
class Pair:
    """A base and what is wrapped around it, on one model: the cells of all its settings."""

    base: tuple[Cell, ...]
    wrapped: tuple[Cell, ...]


def render(bench: Benchmark) -> list[str]:
    """Headlines, ablation and sensitivity."""
    return [
        *section("Published headlines, and the same measured here", *_headlines(bench)),
        *section("BACON's terms", *_variants(bench, "terms", _published_terms)),
        *section("BACON's depth m and reach r", *_variants(bench, "bacon", _published_sensitivity)),
        *section("MixKV's r", *_variants(bench, "mixkv", lambda method: [])),
    ]


def _headlines(bench: Benchmark) -> Iterator[list[str]]:
    budgets = bench.budgets()
    if not budgets:
        return
    rows, verdicts = [], []
    for headline in HEADLINES:
        ours = {metric: [gain(bench, headline, budget, metric) for budget in budgets] for metric in METRICS}
        published, names = f"{headline.gain:+.1f} %", ("exact match", "token accuracy")
        for metric, name in zip(METRICS, names, strict=True):
            rows.append([headline.name, published, name, *map(change, ours[metric])])
        if headline.of == "mean":
            if len(headline.shares) != 1:
                its = [spread(bench, headline, budget) for budget in budgets]
                rows.append([headline.name, "", "token accuracy, lowest / median / highest pair", *its])
            said = verdict(headline, ours["tokens"][0], budgets[0])
            verdicts.append(f"* {headline.name}: {said} ({headline.source}.)")
    yield [
        "Relative gains over the base pipeline in percent, with standard errors from resampled samples. Published "
        f"figures are for a budget of two windows, which is {WINDOWS_PER_BUDGET[0] * WINDOW} here. Gains are means "
        "over the tasks and arrangements in which the full cache compares methods, then over models and base methods; "
        f"bases below {percent(LEAST_BASE, 0)} % are left out. The best one is picked after the fact, here as there, "
        "which makes it large: no sentence compares it. Errors are over samples; the range over pairs of model and "
        "allocation says how much depends on those. Sentences are about token accuracy at the tightest budget, as the "
        "published metrics give credit for parts."
    ]
    yield table(["figure", "published", "metric here", *map(str, budgets)], rows, left=3)
    yield verdicts
    yield WHY.splitlines()


def verdict(headline: Headline, ours: Estimate | None, budget: int) -> str:
    """Whether the figure measured here is the published one."""
    if ours is None or math.isnan(ours.mean):
        return f"published {headline.gain:+.1f} %; nothing to compare here."
    here = f"published {headline.gain:+.1f} %, here {change(ours)} % at {budget}:"
    if abs(100 * ours.mean - headline.gain) <= CLEAR * 100 * ours.error:
        return f"{here} no difference that these samples show."
    if ours.sign == "=":
        return f"{here} differs, the mean shows no change here."
    if (ours.mean > 0) != (headline.gain > 0):
        return f"{here} **differs in sign, a loss here**."
    size = "more" if 100 * ours.mean > headline.gain else "less"
    return f"{here} the same direction, {size} of it."


def gain(bench: Benchmark, headline: Headline, budget: int, metric: str) -> Estimate | None:
    """The headline's relative gain as measured here; None when there is nothing to compute it from."""
    pairs = [pair for pair in _pairs(bench, headline, budget) if _is_big(bench, pair, metric)]
    if headline.of == "best":
        single = (Pair((base,), (wrap,)) for p in pairs for base, wrap in zip(p.base, p.wrapped, strict=True))
        pairs = [pair for pair in single if _is_big(bench, pair, metric)]
    if not pairs:
        return None
    combine = max if headline.of == "best" else mean
    sizes = [len(pair.base) for pair in pairs]
    values = [x for pair in pairs for x in _values(bench, (*pair.base, *pair.wrapped), metric)]

    def statistic(lists: Sequence[Floats]) -> float:
        means, gains = iter([float(x.mean()) for x in lists]), []
        for size in sizes:
            base, wrapped = (sum(next(means) for _ in range(size)) for _ in range(2))
            gains.append(wrapped / max(base, 1e-9) - 1)
        return float(combine(gains))

    return bootstrap(statistic, values)


def spread(bench: Benchmark, headline: Headline, budget: int) -> str:
    """Relative gains in token accuracy of the pairs of model and allocation: lowest / median / highest, in percent."""
    pairs = [pair for pair in _pairs(bench, headline, budget) if _is_big(bench, pair, "tokens")]
    if not pairs:
        return "n/a"
    means = (
        [mean(float(x.mean()) for x in _values(bench, its, "tokens")) for its in (p.base, p.wrapped)] for p in pairs
    )
    gains = [wrapped / base - 1 for base, wrapped in means]
    return " / ".join(f"{100 * pick(gains):+.1f}" for pick in (min, median, max))


def _pairs(bench: Benchmark, headline: Headline, budget: int) -> Iterator[Pair]:
    settings = dict.fromkeys((*bench.settings("main"), *bench.settings("task")))
    chosen = [s for s in settings if bench.compares(s) and (not headline.tasks or s.task in headline.tasks)]
    for model in dict.fromkeys(setting.model for setting in chosen):
        for share in headline.shares:
            its = [_with_wrap(s, share, headline.wrap, budget) for s in chosen if s.model == model]
            there = [both for both in its if all(bench.get(cell) for cell in both)]
            if there:
                base, wrapped = zip(*there, strict=True)
                yield Pair(base, wrapped)


def _with_wrap(setting: Setting, share: str, wrap: str, budget: int) -> tuple[Cell, Cell]:
    return Cell(setting, Method(share=share), budget), Cell(setting, Method(share=share, wraps=(wrap,)), budget)


def _values(bench: Benchmark, cells: Sequence[Cell], metric: str) -> list[Floats]:
    return [getattr(bench.results[cell.key].honest, metric) for cell in cells]


def _is_big(bench: Benchmark, pair: Pair, metric: str) -> bool:
    return mean(float(x.mean()) for x in _values(bench, pair.base, metric)) >= LEAST_BASE


def _published_terms(method: Method) -> list[str]:
    return [_points(DOCVQA_TERMS.get("+".join(method.wraps), {}).get(method.share), DOCVQA_BASE[method.share])]


def _published_sensitivity(method: Method) -> list[str]:
    known = DOCVQA_SENSITIVITY.get("+".join(method.wraps)) if method.share == "uniform" else None
    return [_points(known, DOCVQA_SENSITIVITY_BASE)]


def _points(value: float | None, base: float) -> str:
    return "" if value is None else f"{value - base:+.1f}"


def _variants(bench: Benchmark, group: str, published: Callable[[Method], list[str]]) -> Iterator[list[str]]:
    """Differences of each variant to its base in points of exact match, one table for each setting."""
    budgets, methods = bench.budgets(group), [m for m in bench.methods(group) if m.wraps]
    beside = ["published, DocVQA"] if methods and published(methods[0]) else []
    for setting in bench.settings(group):
        rows = []
        for method in methods:
            found = [difference(bench, Cell(setting, method, b), Cell(setting, method.base, b)) for b in budgets]
            rows.append([code(method.name), *published(method), *map(change, found)])
        header = ["pipeline", *beside, *map(str, budgets)]
        yield [f"{code(setting.key)}, points of exact match over the base:", "", *table(header, rows)]
