"""The page of results: every number on it is computed here from the outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from statistics import mean

from . import compared, guide, rule, trust
from .benchmark import COMPARES, Benchmark, Part, base_of, difference, exact
from .cells import Cell, Method, Setting
from .grid import CONTROLS, Group
from .markdown import change, code, folded, level, percent, section, table
from .statistics import estimate, paired

PROTOCOL = (
    "Greedy answers. *Honest*: every answer token, the first included, comes from the compressed cache: the prompt is "
    "read, the cache compressed and cropped by one, and the last prompt token run again on what is left. *Usual*: the "
    "first token comes from the dense prefill, as a user of `compress(...)` and the papers have it. Numbers are honest "
    "unless said otherwise, in percent, with one standard error over samples. Budgets are KV pairs per KV head, the "
    "protected latest tokens included. A mark compares with the base on the same samples (a wrap with the same "
    "pipeline without wraps, an allocation with the uniform one): `+` better, `-` worse by more than two paired "
    "standard errors, `=` neither. An exact match is the whole answer and its end."
)
LIMITS = """\
* Small models, trained by one recipe on generated pages. Absolute accuracies say nothing about models of billions of
  parameters; signs of effects and the order of methods may carry over, and only where they agree between models.
* Retrieval is what these models were trained for, with losses that point heads at the evidence: attention is sharper
  than in a large model, heads differ less by themselves, and layers have jobs of their own.
* The rest of a page is noise by construction. Real documents repeat themselves, so diversity has more to win there.
* Prompts are short. Costs that grow with the prompt, and windows that are a tiny share of it, are not seen.
* Answers are copied, not reasoned: nothing here needs the whole page at once.
* The last token of a prompt was trained to point at the evidence. A method that looks at that token alone (`tova`) has
  all it needs where one question asks for one thing; where an answer leads on to other evidence (the tasks `pair` and
  `list`), or nobody has asked yet, it does not, and only there can it be compared with the others."""


def render(bench: Benchmark, pictures: Sequence[str] = ()) -> str:
    """quality.md, with pictures of these names."""
    lines = [
        *section("What compression costs in answers", [PROTOCOL], _made(bench), _unfinished(bench), level=1),
        *section("In short: exact match of the task `value`, mean over models and arrangements", guide.summary(bench)),
        *section("Settings: one rule", str(rule.__doc__).splitlines()[2:]),
        *section("The full cache", _full(bench)),
        *section("Pictures", [f"![{name}]({name})" for name in pictures]),
        *section("Every method", *(_main(bench, setting) for setting in bench.settings("main"))),
        *compared.render(bench),
        *section("AdaKV against uniform budgets", *_adakv(bench)),
        *section("The first token", *_first_token(bench)),
        *section("Vision tokens left out, attention shared", *_stages(bench)),
        *(line for group in bench.plan.groups if group.name in FACTORS for line in _factor(bench, group)),
        *trust.render(bench),
        *section("What small models cannot show", LIMITS.splitlines()),
        *section("Left out", [f"* {reason.what}: {reason.why}" for reason in bench.plan.left_out]),
    ]
    return "\n".join(lines).rstrip() + "\n"


FACTORS = ("task", "arrangement", "suffix", "ink", "when", "window")


def _made(bench: Benchmark) -> list[str]:
    made = bench.parts[0].made
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    digests = {name: digest for part in bench.parts for name, digest in part.made["weights"].items()}
    weights = ", ".join(f"{name} `{digest[:12]}`" for name, digest in digests.items())
    return [
        f"{made['samples']} samples per cell, seed {made['seed']}, batches of {made['block']}, float32; {versions}; "
        f"weights {weights}. `quality.json` has the outcome of every word of every sample.",
        "",
        *map(_part, bench.parts),
    ]


def _part(part: Part) -> str:
    took = part.took
    return (
        f"* `{took.get('command', '?')}`: {took.get('seconds', 0) / 3600:.2f} hours with {took.get('workers', '?')} "
        f"processes of one thread, code `{part.made['code'][:12]}`; {part.cells} cells took {part.hours:.2f} CPU hours "
        "beside the prefills."
    )


def _unfinished(bench: Benchmark) -> list[str]:
    return [f"**{bench.missing} of {len(bench.plan.cells)} cells are not measured yet.**"] if bench.missing else []


def _full(bench: Benchmark) -> list[str]:
    settings = dict.fromkeys(s for group in bench.plan.groups for s in bench.settings(group.name))
    rows = []
    for setting in settings:
        full = bench.results[Cell(setting).key]
        verdict = "yes" if bench.compares(setting) else f"no, below {percent(COMPARES, 0)}"
        rows.append(
            [code(setting.key), level(estimate(full.honest.exact)), level(estimate(full.honest.tokens)), verdict]
        )
    return table(["setting", "exact match", "token accuracy", "compares methods"], rows)


def _main(bench: Benchmark, setting: Setting) -> list[str]:
    budgets, methods = bench.budgets(), _measured(bench, setting, bench.methods())
    best = {b: max((x.mean for m in methods if (x := exact(bench, Cell(setting, m, b)))), default=2.0) for b in budgets}
    rows = []
    for method in methods:
        cells = [Cell(setting, method, budget) for budget in budgets]
        rows.append([code(method.name), *(_marked(bench, cell, best[cell.budget]) for cell in cells)])
    names = ["pipeline", *map(str, budgets)]
    detail = table(names, ([code(m.name), *(_detail(bench, Cell(setting, m, b)) for b in budgets)] for m in methods))
    full = exact(bench, Cell(setting))
    title = f"{code(setting.key)}: exact match, full cache {level(full)}"
    more = "token accuracy / exact match with the usual first token / kilobytes held"
    return [f"### {title}", "", *table(names, rows), "", *folded(f"{setting.key}: {more}", detail)]


def _measured(bench: Benchmark, setting: Setting, methods: Iterable[Method]) -> list[Method]:
    budgets = bench.budgets()
    return [m for m in methods if any(bench.get(Cell(setting, m, budget)) for budget in budgets)]


def _marked(bench: Benchmark, cell: Cell, best: float) -> str:
    value = exact(bench, cell)
    if value is None:
        return ""
    text = f"**{level(value)}**" if value.mean == best else level(value)
    return f"{text} {_mark(bench, cell)}".strip()


def _mark(bench: Benchmark, cell: Cell) -> str:
    base = base_of(cell)
    versus = None if base is None else difference(bench, cell, base)
    return "" if versus is None else versus.sign


def _detail(bench: Benchmark, cell: Cell) -> str:
    result = bench.get(cell)
    if result is None:
        return ""
    usual = "" if result.usual is None else percent(float(result.usual.mean()))
    return f"{percent(float(result.honest.tokens.mean()))} / {usual} / {result.held / 1000:.0f}"


def _factor(bench: Benchmark, group: Group) -> list[str]:
    """A factor: one table for each model and world, a column for each level, all budgets in a cell."""
    groups: dict[str, dict[str, list[Cell]]] = {}
    for cell in group.cells:
        level_name = str(cell.window if group.name == "window" else getattr(cell.setting, group.name))
        world = "" if group.name == "arrangement" else cell.setting.arrangement
        groups.setdefault(f"{cell.setting.model} {world}".strip(), {}).setdefault(level_name, []).append(cell)
    note = [
        f"Exact match at budgets of {' / '.join(map(str, bench.budgets(group.name)))}; standard errors are at most "
        f"{percent(_largest_error(bench, group.cells))}. Marks as above."
    ]
    budgets = bench.budgets(group.name)
    tables = [line for title, levels in groups.items() for line in _levels(bench, title, levels, budgets)]
    return section(group.title[0].upper() + group.title[1:], note, tables) if tables else []


def _largest_error(bench: Benchmark, cells: Sequence[Cell]) -> float:
    return max((x.error for cell in cells if (x := exact(bench, cell))), default=float("nan"))


def _levels(bench: Benchmark, title: str, levels: dict[str, list[Cell]], budgets: Sequence[int]) -> list[str]:
    shown = {name: cells for name, cells in levels.items() if any(bench.get(cell) for cell in cells)}
    if not shown:
        return []
    methods = dict.fromkeys(cell.method for cells in shown.values() for cell in cells)
    rows = []
    for method in methods:
        name = "full cache" if method is None else code(method.name)
        asked = (0,) if method is None else budgets
        rows.append([name, *(_row_of_budgets(bench, method, cells, asked) for cells in shown.values())])
    return [f"**{title}**", "", *table(["pipeline", *shown], rows), ""]


def _row_of_budgets(bench: Benchmark, method: Method | None, cells: Sequence[Cell], budgets: Sequence[int]) -> str:
    its = {cell.budget: cell for cell in cells if cell.method == method}
    return " / ".join(_short(bench, its.get(budget)) for budget in budgets)


def _short(bench: Benchmark, cell: Cell | None) -> str:
    value = None if cell is None else exact(bench, cell)
    return "n/a" if cell is None or value is None else f"{percent(value.mean)}{_mark(bench, cell)}"


def _adakv(bench: Benchmark) -> list[list[str]]:
    """AdaKV minus the uniform budget, everything else equal."""
    budgets = bench.budgets()
    adaptive = [m for m in bench.methods() if m.share == "adakv" and m.score not in CONTROLS]
    found = {
        (setting, m): [
            difference(bench, Cell(setting, m, b), Cell(setting, replace(m, share="uniform"), b)) for b in budgets
        ]
        for setting, m in product(bench.settings("main"), adaptive)
    }
    differ = {m for (_, m), its in found.items() if any(x is not None and (x.mean or x.error) for x in its)}
    shown = {key: its for key, its in found.items() if key[1] in differ and any(its)}
    if not shown:
        return []
    signs = Counter(x.sign for its in shown.values() for x in its if x is not None)
    words = [
        f"Of {signs.total()} comparisons of exact match AdaKV is clearly better in {signs['+']}, clearly worse in "
        f"{signs['-']}, neither in {signs['=']}; of so many a few are clear by chance."
    ]
    same = dict.fromkeys(code(m.name) for (_, m), its in found.items() if any(its) and m not in differ)
    if same:
        words.append(f"Left out, as exact match never differs: {', '.join(same)}.")
    rows = ([code(setting.key), code(m.name), *map(change, its)] for (setting, m), its in shown.items())
    return [words, table(["setting", "pipeline", *map(str, budgets)], rows, left=2), *_floors(bench)]


def _floors(bench: Benchmark) -> list[list[str]]:
    """What is lost or won by adapting, against how much of it the floor allows."""
    budgets, rows = bench.budgets("floor"), []
    for setting in bench.settings("floor"):
        for method in bench.methods("floor"):
            found = [difference(bench, Cell(setting, method, b), Cell(setting, Method(), b)) for b in budgets]
            if method != Method() and any(found):
                rows.append([code(setting.key), code(method.name), *map(change, found)])
    if not rows:
        return []
    words = "The same by AdaKV's floor, the share of its budget that every head keeps (published: 0.2; 1 is uniform):"
    return [[words], table(["setting", "pipeline", *map(str, budgets)], rows, left=2)]


def _stages(bench: Benchmark) -> list[list[str]]:
    """Stages alone and with eviction behind them, one column for each setting."""
    group = bench.group("stages")
    if group is None:
        return []
    kinds = dict.fromkeys((cell.method, cell.budget) for cell in group.cells if cell.method and cell.method.stages)
    settings = bench.settings("stages")
    rows = []
    for method, budget in kinds:
        cells = [Cell(setting, method, budget) for setting in settings]
        if any(bench.get(cell) for cell in cells):
            both = [(result, bench.full(cell.setting)) for cell in cells if (result := bench.get(cell))]
            held = [result.held / full.held for result, full in both if full]
            share = f"{percent(min(held))} to {percent(max(held))}"
            rows.append([code(method.name), str(budget or ""), share, *(_marked(bench, cell, 2.0) for cell in cells)])
    words = (
        "Training-free, as all of this page; the papers of ADSC and of lazy attention train afterwards. Each cell "
        "reads the prompt with its stages on the model. Marks compare with the same without stages, or with the full "
        "cache."
    )
    header = ["stages", "budget", "bytes held, %", *(code(f"{s.model}/{s.task}/{s.arrangement}") for s in settings)]
    return [[words], table(header, rows, left=2)]


def _first_token(bench: Benchmark) -> list[list[str]]:
    """What the dense first token hides: usual minus honest, over all methods of a setting."""
    rows = []
    for setting in bench.settings("main"):
        for budget in bench.budgets():
            cells = [Cell(setting, method, budget) for method in bench.methods()]
            gaps = [
                (paired(result.usual, result.honest.exact).mean, cell)
                for cell in cells
                if (result := bench.get(cell)) and result.usual is not None
            ]
            if gaps:
                most, where = max(gaps, key=lambda gap: gap[0])
                name = where.method.name if where.method else "full cache"
                average = mean(gap for gap, _ in gaps)
                rows.append([code(setting.key), str(budget), percent(average), percent(most), code(name)])
    if not rows:
        return []
    header = ["setting", "budget", "mean over methods", "largest", "of"]
    words = (
        "Exact match with the first token from the dense prefill, minus that with all tokens from the compressed cache."
    )
    return [[words], table(header, rows)]
