"""Pictures, one for each part of a page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

from . import endtoend, growth, imports
from .endtoend import CEILING, Answers
from .methods import METHODS
from .operators import BY_NAME, Shape, limits
from .processes import NAMES
from .sides import NONE
from .summary import Summary

_COLORS: Final = {"ours": "C0", "peer": "C1"}
Draw = Callable[[Any], None]


def draw_cpu(found: Mapping[str, Any], shape: Shape, folder: Path, name: str) -> dict[str, str]:
    """Writes the pictures of what was measured; gives part -> name of the file."""
    given = endtoend.answers(found["requests"])
    wanted: dict[str, tuple[Any, Draw, tuple[float, float]]] = {
        "overhead": (given, lambda figure: _overheads(figure, given), (11, 4.6)),
        "decode": (given, lambda figure: _decoding(figure, given), (11, 4.6)),
        "growth": (found["growth"], lambda figure: _growths(figure, found["growth"]), (12, 6.6)),
        "limits": (found["limits"], lambda figure: _against(figure, found["limits"], shape), (8, 4)),
        "imports": (found["imports"], lambda figure: _importing(figure, found["imports"]), (8, 3.8)),
    }
    return {
        part: save(draw, size, folder / f"{name}-{part}.png") for part, (data, draw, size) in wanted.items() if data
    }


def save(draw: Draw, size: tuple[float, float], path: Path) -> str:
    """Draws into a figure of its own and writes it; gives the file's name."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path.name


def _overheads(figure: Any, given: Answers) -> None:
    ratios = endtoend.ratios_of(given)
    axes = figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
    for axis, ratio in zip(axes, ratios, strict=True):
        _bars(axis, given, ratio, lambda key: [1000 * x for x in endtoend.overheads(given, key)])
        axis.set_title(f"{ratio:.0%} removed", fontsize=10)
    axes[0].set_ylabel("overhead, CPU ms over all layers")
    axes[0].legend(fontsize=8)
    figure.suptitle("What compressing a prompt costs, medians and range of rounds", fontsize=11)


def _decoding(figure: Any, given: Answers) -> None:
    ratios = endtoend.ratios_of(given)
    axes = figure.subplots(1, len(ratios), sharey=True, squeeze=False)[0]
    for axis, ratio in zip(axes, ratios, strict=True):
        _bars(axis, given, ratio, lambda key: endtoend.speeds(given, key))
        for method, style in ((CEILING, ":"), (NONE, "--")):
            rates = endtoend.speeds(given, ("ours", method, 0.0))
            label = "stock model, empty cache" if method == CEILING else "stock model, full cache"
            axis.axhline(statistics.median(rates), color="black", linestyle=style, linewidth=1, label=label)
        axis.set_title(f"{ratio:.0%} removed", fontsize=10)
    axes[0].set_ylabel("tokens per CPU second")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle("Decoding from what is left, medians and range of rounds", fontsize=11)


def _bars(axis: Any, given: Answers, ratio: float, values: Callable[[endtoend.Key], Sequence[float]]) -> None:
    """Both sides' bars beside each other, one pair per method."""
    for number, (side, label) in enumerate(NAMES.items()):
        there = [(i, Summary.of(x)) for i, m in enumerate(METHODS) if (x := values((side, m.name, ratio)))]
        if there:
            _bar(axis, [i + 0.4 * number - 0.2 for i, _ in there], [x for _, x in there], _COLORS[side], label)
    axis.set_xticks(range(len(METHODS)), [m.name for m in METHODS], rotation=40, ha="right", fontsize=8)
    axis.grid(alpha=0.3, axis="y")
    axis.set_axisbelow(True)


def _bar(axis: Any, places: Sequence[float], values: Sequence[Summary], color: str, label: str) -> None:
    middle = [x.median for x in values]
    error = [[x.median - x.low for x in values], [x.high - x.median for x in values]]
    axis.bar(places, middle, 0.38, yerr=error, color=color, label=label, capsize=2, error_kw={"linewidth": 0.8})


def _growths(figure: Any, rounds: Sequence[Any]) -> None:
    cells = growth.cells(rounds)
    methods = [m.name for m in METHODS if any(m.name == method for _, method, *_ in cells)]
    axes = figure.subplots(2, -(-len(methods) // 2), sharex=True, sharey=True, squeeze=False)
    for axis, method in zip(axes.flat, methods, strict=False):
        for (side, heads), points in _lines(cells, method):
            style = dict(zip(growth.HEADS, ("-", "--", ":"), strict=True)).get(heads, "-")
            label = f"{NAMES[side]}, {heads} KV heads"
            axis.plot(*zip(*points, strict=True), style, color=_COLORS[side], label=label, marker=".", linewidth=1)
        axis.set_title(method, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}k")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    for i in range(len(methods), axes.size):
        axes.flat[i].axis("off")
        axes.flat[i - axes.shape[1]].tick_params(labelbottom=True)
    for axis in axes[:, 0]:
        axis.set_ylabel("CPU ms for one layer")
    for axis in axes[-1]:
        axis.set_xlabel("entries per KV head")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle("One layer's compression, half of the entries removed", fontsize=11)


def _lines(
    cells: Mapping[growth.Cell, Sequence[float]], method: str
) -> Iterator[tuple[tuple[str, int], list[tuple[int, float]]]]:
    """(side, heads) and its points (entries, ms)."""
    found: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for (side, name, heads, length), seconds in sorted(cells.items()):
        if name == method:
            found.setdefault((side, heads), []).append((length, 1000 * statistics.median(seconds)))
    yield from found.items()


def _against(figure: Any, rounds: Sequence[Mapping[str, Any]], shape: Shape) -> None:
    axis, names = figure.subplots(), list(rounds[0]["seconds"])
    for number, (kind, color) in enumerate((("copying memory", "C0"), ("multiplying matrices", "C2"))):
        each = [
            [100 * limits(BY_NAME[name], shape, r["bandwidth"], r["rate"])[number] / r["seconds"][name] for r in rounds]
            for name in names
        ]
        places = [i + 0.4 * number - 0.2 for i in range(len(names))]
        _bar(axis, places, [Summary.of(x) for x in each], color, f"of {kind}")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axis.set_ylabel("% of what one thread can")
    axis.axhline(100, color="black", linewidth=0.8, linestyle="--")
    axis.grid(alpha=0.3, axis="y")
    axis.set_axisbelow(True)
    axis.legend(fontsize=8)
    axis.set_title("Operators (reference) against the machine's measured limits", fontsize=11)


def _importing(figure: Any, rounds: Sequence[Mapping[str, float]]) -> None:
    axis, labels = figure.subplots(), list(rounds[0])[::-1]
    values = [Summary.of([1000 * round_[label] for round_ in rounds]) for label in labels]
    error = [[x.median - x.low for x in values], [x.high - x.median for x in values]]
    colors = [_COLORS["peer" if "kvpress" in label else "ours"] for label in labels]
    axis.barh(labels, [x.median for x in values], xerr=error, color=colors, capsize=2)
    axis.axvline(imports.LIMIT, color="black", linewidth=0.8, linestyle="--", label="target of mmkv_scores")
    axis.set_xscale("log")
    axis.set_xlabel("CPU ms (logarithmic)")
    axis.tick_params(axis="y", labelsize=8)
    axis.legend(fontsize=8)
    axis.set_title("Import time in fresh processes", fontsize=11)
