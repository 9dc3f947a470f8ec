"""The pages against the same numbers computed from quality.json by hand."""

import base64
import dataclasses
import json
import math
import re
import zlib

import numpy as np
import pytest
from mmkv_layershare import LazyPlan
from mmkv_pipelines import Pipeline
from mmkv_quality import compared, guide, pages, plots, report, trust
from mmkv_quality.benchmark import Benchmark, joined, of_json, to_json
from mmkv_quality.cells import Cell, Method, Setting
from mmkv_quality.grid import CONTROLS, WORLDS, make_plan, only
from mmkv_quality.outcomes import Outcomes
from mmkv_quality.published import HEADLINES, Headline
from mmkv_quality.results import Result
from mmkv_quality.statistics import Estimate

COUNT, WORDS = 60, 4
MADE = {
    "seed": 1,
    "samples": COUNT,
    "block": 60,
    "versions": {"torch": "2.13.0"},
    "weights": {"one": "a" * 64},
    "tables": {},
    "code": "b" * 64,
}
WEAK = Setting("one", task="list")


def chance(cell):
    """How often a word is right: better with more budget, with BACON, and worse with MixKV."""
    if cell.method is None:
        return 0.9 if dataclasses.replace(cell.setting, arrangement="horizontal") == WEAK else 1.0
    if cell.method.score in ("random", "streamingllm"):
        return 0.1
    if not cell.method.score:
        return 0.7
    quality = 0.5 + 0.05 * math.log2(cell.budget / 16) + 0.15 * any("bacon" in wrap for wrap in cell.method.wraps)
    quality -= 0.1 * any("mixkv" in wrap for wrap in cell.method.wraps)
    return quality + 0.03 * (cell.method.share == "adakv")


def result(cell, rng):
    right = rng.random((COUNT, WORDS + 1)) < chance(cell) ** 0.2
    usual = right.copy()
    usual[:, 0] = True
    after = cell.setting.when == "after"
    return Result(
        Outcomes(right), usual.all(1).astype(float) if after else None, 1000.0 * (cell.budget or 600), 600_000.0, 1.0
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    LazyPlan(6, ((2, 4),)).save(path)
    rng, plan = np.random.default_rng(0), make_plan(["one", "two"], {}, {"one": path})
    took = {"command": "run", "seconds": 3600.0, "workers": 2}
    return Benchmark.of_run(plan, {cell.key: result(cell, rng) for cell in plan.cells}, MADE, took)


@pytest.fixture(scope="module")
def page(bench):
    return pages.render(bench)


def exact(data, key):
    """From the JSON alone, by its documented encoding."""
    stored = data["results"][key]["honest"]
    rows, columns = stored["shape"]
    bits = np.unpackbits(np.frombuffer(zlib.decompress(base64.b64decode(stored["bits"])), np.uint8))
    return [float(all(row)) for row in bits[: rows * columns].reshape(rows, columns)]


def mean_and_error(values):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))


def table_row(page, title, name):
    """Cells of a row of the table under a heading that starts with `title`."""
    below = page[page.index(title) :]
    return [x.strip() for x in re.search(rf"\n\| `{re.escape(name)}` \|(.*)\|\n", below)[1].split("|")]


@pytest.mark.parametrize("name", ["snapkv", "bacon", "adakv+mixkv", "pyramidkv+h2o"])
def test_every_number_of_the_main_table_follows_from_the_json(bench, page, name):
    data = json.loads(json.dumps(to_json(bench)))
    setting = "two/value/vertical/suffix8/normal/after"
    row = table_row(page, f"### `{setting}`", name)
    base = {"bacon": "snapkv", "adakv+mixkv": "adakv", "pyramidkv+h2o": "h2o"}.get(name)
    assert len(row) == 4
    for shown, budget in zip(row, (16, 32, 64, 128), strict=True):
        values = exact(data, f"{setting}|{name}|{budget}|w8")
        mean, error = mean_and_error(values)
        assert f"{100 * mean:.1f} ± {100 * error:.1f}" in shown
        if base is not None:
            difference, its = mean_and_error(
                [a - b for a, b in zip(values, exact(data, f"{setting}|{base}|{budget}|w8"), strict=True)]
            )
            clear = abs(difference) > 2 * its
            assert shown[-1] == ("+" if difference > 0 else "-") * clear + "=" * (not clear)


def test_a_factor_shows_every_level_at_its_budgets(bench, page):
    data = json.loads(json.dumps(to_json(bench)))

    def shown(setting, name, window, budgets):
        keys = [f"one/{setting}|{name}|{budget}|w{window}" for budget in budgets]
        return [f"{100 * mean_and_error(exact(data, key))[0]:.1f}" if key in data["results"] else "n/a" for key in keys]

    below = page[page.index("## One factor: how full the page is") :]
    row = table_row(below, "**one vertical**", "tova")
    for cell, ink in zip(row, ("sparse", "normal", "dense"), strict=True):
        assert cell.split(" / ") == shown(f"value/vertical/suffix8/{ink}/after", "tova", 8, (16, 32, 64))
    below = page[page.index("## One factor: the observation window") :]
    row = table_row(below, "**one horizontal**", "snapkv")
    for cell, window in zip(row, (8, 32), strict=True):
        assert cell.split(" / ") == shown("value/horizontal/suffix8/normal/after", "snapkv", window, (16, 32, 64, 128))
    assert row[1].startswith("n/a / n/a / ")
    assert "n/a" not in row[0]


def test_the_best_of_each_budget_is_bold(bench, page):
    setting, methods = Setting("one"), bench.methods()
    best = max(
        bench.results[Cell(setting, m, 64).key].honest.exact.mean() for m in methods if bench.get(Cell(setting, m, 64))
    )
    for method in methods:
        cell = bench.get(Cell(setting, method, 64))
        if cell is not None:
            shown = table_row(page, "### `one/value/horizontal", method.name)[2]
            assert shown.startswith("**") == (cell.honest.exact.mean() == best)


def test_a_setting_in_which_the_full_cache_fails_compares_nothing(bench, page):
    assert not bench.compares(WEAK)
    assert re.search(r"\| `one/list/horizontal/suffix8/normal/after` \|.*\| no, below 95 \|", page)
    assert re.search(r"\| `one/pair/horizontal/suffix8/normal/after` \|.*\| yes \|", page)


@pytest.mark.parametrize("metric", ["exact", "tokens"])
def test_the_mean_gain_by_hand(bench, metric):
    def mean(model, task, world, wraps, share):
        cell = Cell(Setting(model, task, world), Method(share=share, wraps=wraps), 16)
        return float(getattr(bench.results[cell.key].honest, metric).mean())

    tasks = {"one": ["value", "describe", "pair", "locate", "images", "video"], "two": ["value"]}  # list is too weak
    gains = []
    for model, share in [(m, s) for m in ("one", "two") for s in ("uniform", "pyramidkv", "adakv")]:
        where = [(task, world) for task in tasks[model] for world in ("horizontal", "vertical")]
        base, wrapped = (sum(mean(model, *x, wraps, share) for x in where) for wraps in ((), ("bacon",)))
        gains.append(wrapped / base - 1)
    found = compared.gain(bench, HEADLINES[0], 16, metric)
    assert found.mean == pytest.approx(sum(gains) / len(gains))
    assert 0 < found.error < found.mean


def test_the_range_of_gains_by_hand(bench, page):
    """MixKV on `locate`: two allocations, each over both arrangements of one model."""
    headline = next(h for h in HEADLINES if h.name == "MixKV on SnapKV, grounding")
    where = [
        Cell(Setting("one", "locate", world), Method(wraps=wraps), 32) for wraps in ((), ("mixkv",)) for world in WORLDS
    ]
    base, other, wrapped, too = (float(bench.results[cell.key].honest.tokens.mean()) for cell in where)
    one = f"{100 * ((wrapped + too) / (base + other) - 1):+.1f}"
    assert compared.spread(bench, headline, 32) == f"{one} / {one} / {one}"
    low, middle, high = map(float, compared.spread(bench, HEADLINES[0], 32).split(" / "))
    assert low < middle < high
    assert compared.spread(bench, dataclasses.replace(headline, tasks=("no such task",)), 32) == "n/a"


def test_the_guide_names_a_second_where_the_last_token_wins(bench):
    key = "{}/value/vertical/suffix8/normal/after|tova|32|w8"
    best = {key.format(m): bench.results[f"{m}/value/vertical/suffix8/normal/after|full"] for m in ("one", "two")}
    text = guide.render(dataclasses.replace(bench, results={**bench.results, **best}))
    line = next(x for x in text[text.index("## Evidence vertical") :].splitlines() if x.startswith("* **32**"))
    plain = next(x for x in guide.render(bench).splitlines() if x.startswith("* **32**"))
    assert re.match(r"\* \*\*32\*\*: `tova` answers 100.0 .* Best without `tova`: `[a-z+]*bacon` [\d.]+ %\.", line)
    assert "Best without" not in plain


@pytest.mark.parametrize("text", ["", "[]", '{"format": "mmkv-quality/1"}', '{"format": "other"}'])
def test_what_is_no_result_is_named(tmp_path, text):
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(ValueError, match=r"some\.json is no quality\.json"):
        report.write([tmp_path / "some.json"], tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        report.write([tmp_path / "nowhere"], tmp_path)


def test_the_best_gain_is_of_one_setting(bench):
    found = compared.gain(bench, HEADLINES[1], 16, "tokens")
    assert found.mean > compared.gain(bench, HEADLINES[0], 16, "tokens").mean
    assert compared.gain(bench, dataclasses.replace(HEADLINES[3], tasks=("no such task",)), 16, "tokens") is None


PUBLISHED = Headline("x", "bacon", 7.5, "mean", (), (), "somewhere")


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (None, "nothing to compare"),
        (Estimate(0.08, 0.01), "no difference that these samples show"),
        (Estimate(-0.3, 0.2), "no difference that these samples show"),
        (Estimate(0.01, 0.01), "differs, the mean shows no change"),
        (Estimate(-0.05, 0.01), "differs in sign, a loss here"),
        (Estimate(0.03, 0.01), "the same direction, less of it"),
        (Estimate(0.4, 0.01), "the same direction, more of it"),
    ],
)
def test_verdicts(ours, words):
    said = compared.verdict(PUBLISHED, ours, 16)
    assert words in said
    assert "+7.5 %" in said


def test_a_loss_is_printed_like_a_gain(page):
    mixkv = next(line for line in page.splitlines() if line.startswith("* MixKV, mean: published +5.1 %"))
    assert "differs in sign, a loss here" in mixkv
    bacon = next(line for line in page.splitlines() if line.startswith("* BACON, mean: published +7.5 %"))
    assert "a loss here" not in bacon


def test_controls_and_saturated_methods_are_left_out_of_rank_correlations(bench):
    setting = Setting("one")
    kept = trust.comparable(bench, setting, 16)
    assert not {method.score for method in kept} & {"random", "streamingllm"}
    assert len(kept) > 5
    assert Method() in kept
    as_good = {Cell(setting, Method("streamingllm"), 16).key: bench.results[Cell(setting, Method(), 16).key]}
    perfect = {Cell(setting, Method(), 16).key: bench.results[Cell(setting).key]}
    changed = dataclasses.replace(bench, results={**bench.results, **perfect, **as_good})
    left = trust.comparable(changed, setting, 16)
    assert Method() not in left
    assert Method("streamingllm") not in left


def test_the_guide_names_the_best_and_those_not_clearly_worse(bench):
    text = guide.render(bench)
    line = next(x for x in text[text.index("## Evidence vertical") :].splitlines() if x.startswith("* **32**"))
    data = json.loads(json.dumps(to_json(bench)))

    def values(name):
        both = [exact(data, f"{m}/value/vertical/suffix8/normal/after|{name}|32|w8") for m in ("one", "two")]
        return [(a + b) / 2 for a, b in zip(*both, strict=True)]

    names = [m.name for m in bench.methods() if bench.get(Cell(Setting("one"), m, 32))]
    means = {name: mean_and_error(values(name))[0] for name in names}
    best = max(means, key=means.get)
    named = re.findall(r"`([^`]+)`", line)
    assert means[named[0]] == means[best]
    close = set()
    for name in set(names) - {named[0]}:
        difference, error = mean_and_error([a - b for a, b in zip(values(name), values(named[0]), strict=True)])
        close |= {name} if abs(difference) <= 2 * error else set()
    mentioned = named[1 : 1 + guide.MENTIONED]
    assert set(mentioned) <= close
    assert f" and {len(close) - len(mentioned)} more." in line
    assert min(means[name] for name in mentioned) >= max(means[name] for name in close - set(mentioned))


def test_the_guide_recommends_nothing_that_hardly_ever_answers(bench):
    """One answer of sixty by the best pipeline, none by the others."""
    none = {key: dataclasses.replace(x, honest=Outcomes(x.honest.right & False)) for key, x in bench.results.items()}
    one = Outcomes(np.arange(COUNT)[:, None] + np.zeros((1, WORDS + 1)) == 5)
    best = {f"{m}/value/vertical/suffix8/normal/after|bacon|32|w8": one for m in ("one", "two")}
    some = {key: dataclasses.replace(bench.results[key], honest=right) for key, right in best.items()}
    full = {key: x for key, x in bench.results.items() if key.endswith("|full")}
    text = guide.render(dataclasses.replace(bench, results={**none, **some, **full}))
    line = next(x for x in text[text.index("## Evidence vertical") :].splitlines() if x.startswith("* **32**"))
    assert line == "* **32**: too few for this: the best, `bacon`, answers 1.7 ± 1.7 %, the full cache 100.0 %."


def test_pages_can_be_made_again_from_the_json_alone(bench, page, tmp_path):
    again = of_json(json.loads(json.dumps(to_json(bench))))
    assert pages.render(again) == page
    with pytest.raises(ValueError, match="not results of this benchmark"):
        of_json({"format": "other"})


def test_an_unfinished_run_has_pages_too(bench):
    some = {key: value for number, (key, value) in enumerate(bench.results.items()) if number % 3}
    partial = dataclasses.replace(bench, results=some)
    text = pages.render(partial) + guide.render(partial)
    assert f"**{len(bench.results) - len(some)} of {len(bench.results)} cells are not measured yet.**" in text
    nothing = dataclasses.replace(bench, results={})
    assert "cells are not measured yet" in pages.render(nothing)
    assert guide.render(nothing)


def test_quick_results_have_pages_too(tmp_path):
    rng, plan = np.random.default_rng(1), only(make_plan(["one"], {}, quick=True), [], ["snapkv", "bacon", "random"])
    took = {"command": "run --quick", "seconds": 60.0, "workers": 2}
    quick = Benchmark.of_run(plan, {cell.key: result(cell, rng) for cell in plan.cells}, MADE, took)
    source = tmp_path / "source.json"
    source.write_text(json.dumps(to_json(quick)))
    report.write([source], tmp_path / "pages")
    assert {path.name for path in (tmp_path / "pages").iterdir()} == {
        *report.PAGES,
        "quality-one-budget.png",
        "quality-one-bytes.png",
    }
    assert "](quality-one-budget.png)" in (tmp_path / "pages" / "quality.md").read_text()


def test_two_runs_are_joined(bench, page, tmp_path):
    """Half of the methods from each run, some from both: the page of one run, but for where its numbers come from."""
    names = [method.name for method in bench.methods()]
    more = [cell.method.name for cell in bench.plan.cells if cell.method and cell.method.name not in names]
    halves = []
    for its in ([*names[::2], *more], [*names[1::2], *names[:3]]):
        plan = only(bench.plan, [], its)
        halves.append(Benchmark.of_run(plan, {c.key: bench.results[c.key] for c in plan.cells}, MADE, {"command": "y"}))
    assert halves[0].results.keys() & halves[1].results.keys()
    for number, half in enumerate(halves):
        (tmp_path / f"{number}.json").write_text(json.dumps(to_json(half)))
    report.write([tmp_path / "0.json", tmp_path / "1.json"], tmp_path)
    text = (tmp_path / "quality.md").read_text()
    assert [len(half.results) for half in halves] == [
        int(x) for x in re.findall(r"^\* `y`: .*; (\d+) cells took", text, re.M)
    ]

    def rows(page):
        return sorted(line for line in page.splitlines() if line.startswith("| `"))

    assert rows(text) == rows(page)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 2}, "seed: 1 then, 2 now"),
        ({"versions": {"torch": "2.14.0"}}, "versions of torch: 2.13.0 then, 2.14.0 now"),
        ({"weights": {"one": "c" * 64}}, "weights of one"),
    ],
)
def test_runs_that_differ_are_not_joined(bench, changed, words):
    other = Benchmark.of_run(bench.plan, bench.results, MADE | changed, {})
    with pytest.raises(ValueError, match=words):
        joined(bench, other)
    newer = Benchmark.of_run(bench.plan, bench.results, MADE | {"code": "d" * 64}, {})
    assert joined(bench, newer).results == bench.results


def test_runs_that_disagree_are_not_joined(bench):
    key, other = "one/value/vertical/suffix8/normal/after|snapkv|32|w8", dict(bench.results)
    right = other[key].honest.right.copy()
    right[7, 2] ^= True
    other[key] = dataclasses.replace(other[key], honest=Outcomes(right), seconds=7.0)
    with pytest.raises(ValueError, match=re.escape(f"disagree about {key}")):
        joined(bench, dataclasses.replace(bench, results=other))


def test_prose_has_no_figures_of_results():
    for text in (pages.PROTOCOL, pages.LIMITS, compared.WHY):
        assert not re.search(r"\d", text)


def test_no_number_is_missing_on_the_page(page):
    assert "nan" not in page.lower().replace("finance", "")


def test_pictures(bench, tmp_path):
    names = plots.draw(bench, tmp_path)
    assert names == [
        "quality-one-budget.png",
        "quality-one-bytes.png",
        "quality-two-budget.png",
        "quality-two-bytes.png",
    ]
    assert all((tmp_path / name).stat().st_size > 20_000 for name in names)


def test_stages_are_beside_the_same_without_them(bench, page):
    data = to_json(bench)
    section = page.split("## Vision tokens left out, attention shared")[1].split("\n## ")[0]
    lines = [line.replace(r"\|", "!").split("|") for line in section.splitlines()]
    rows = {(row[1].strip(" `"), row[2].strip()): row for row in lines if len(row) > 3}
    key = "one/value/horizontal/suffix8/normal/after|"
    alone = exact(data, f"{key}fastv|0|w8")
    assert "{:.1f} ± {:.1f}".format(*(100 * x for x in mean_and_error(alone))) in rows["fastv", ""][4]
    evicting = exact(data, f"{key}fastv | adakv+bacon|32|w8")
    assert f"{100 * sum(evicting) / COUNT:.1f} ±" in rows["fastv ! adakv+bacon", "32"][4]
    assert rows["vla", ""][6].strip() == ""  # the second model has no plan
    assert "vla on two: there is no plan" in page


def test_adakv_is_counted_against_uniform_budgets(bench):
    """By hand, from the JSON; what AdaKV cannot change is named and not counted."""
    changed, data = dict(bench.results), to_json(bench)
    for key in [key for key in changed if "|adakv+tova|" in key]:
        changed[key] = bench.results[key.replace("|adakv+tova|", "|tova|")]
    text = pages.render(dataclasses.replace(bench, results=changed)).split("## AdaKV against uniform budgets")[1]
    counts = {"better": 0, "worse": 0, "neither": 0}
    for cell in bench.plan.groups[0].cells:
        method = cell.method
        if method and method.share == "adakv" and method.name != "adakv+tova" and method.score not in CONTROLS:
            uniform = Cell(cell.setting, dataclasses.replace(cell.method, share="uniform"), cell.budget)
            pairs = zip(exact(data, cell.key), exact(data, uniform.key), strict=True)
            mean, error = mean_and_error([a - b for a, b in pairs])
            counts["neither" if abs(mean) <= 2 * error else "better" if mean > 0 else "worse"] += 1
    said = "Of {} comparisons of exact match AdaKV is clearly better in {better}, clearly worse in {worse}, neither in "
    assert said.format(sum(counts.values()), **counts) + f"{counts['neither']};" in text
    assert "\nLeft out, as exact match never differs: `adakv+tova`.\n" in text
    assert "`adakv+tova`" not in text.split("never differs")[1].split("\n## ")[0].partition("\n")[2]


def test_a_floor_of_one_is_uniform_in_text(page):
    section = page.split("## AdaKV against uniform budgets")[1].split("\n## ")[0]
    shown = [line.split("|")[2].strip() for line in section.splitlines() if "adakv(floor=" in line]
    assert shown == [f"`adakv(floor={floor})`" for _ in range(2) for floor in (0.5, 0.8, 1.0)]
    assert Pipeline.parse(Method(share="adakv(floor=1.0)").text(8)).heads.floor == 1.0
