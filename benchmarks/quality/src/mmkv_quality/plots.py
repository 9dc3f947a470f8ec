"""Pictures: accuracy against budget and against bytes held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

from .benchmark import Benchmark
from .cells import Cell, Method, Setting
from .results import Result
from .statistics import estimate

LINES: Final = (
    Method(),
    Method(wraps=("bacon",)),
    Method(wraps=("mixkv",)),
    Method(share="adakv"),
    Method(share="adakv", wraps=("bacon",)),
    Method(share="adakv", wraps=("mixkv", "bacon")),
    Method(share="pyramidkv"),
    Method("tova"),
    Method("h2o"),
    Method("random"),
)
_COLUMNS: Final = 4


def draw(bench: Benchmark, folder: Path) -> list[str]:
    """Writes the pictures; gives their names."""
    mpl.use("Agg")
    names = []
    for model in dict.fromkeys(setting.model for setting in bench.settings("main")):
        settings = dict.fromkeys(s for name in ("main", "task") for s in bench.settings(name) if s.model == model)
        for kind, x, label in (
            ("budget", _budget, "KV pairs per head"),
            ("bytes", _kilobytes, "kilobytes per request"),
        ):
            name = f"quality-{model}-{kind}.png"
            _figure(bench, tuple(settings), x, label, folder / name)
            names.append(name)
    return names


def _budget(cell: Cell, result: Result) -> float:
    return cell.budget


def _kilobytes(cell: Cell, result: Result) -> float:
    return result.held / 1000


def _figure(
    bench: Benchmark, settings: Sequence[Setting], x: Callable[[Cell, Result], float], label: str, path: Path
) -> None:
    from matplotlib import pyplot as plt

    columns = min(_COLUMNS, len(settings))
    rows = -(-len(settings) // columns)
    size = (4.2 * columns + 2.4, 3.4 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, setting in zip(axes.flat, settings, strict=False):
        _panel(axis, bench, setting, x)
        axis.set_title(f"{setting.task}, {setting.arrangement}", fontsize=10)
        axis.set_xlabel(label)
    for axis in list(axes.flat)[len(settings) :]:
        axis.axis("off")
    axes[0][0].set_ylabel(f"exact match of {settings[0].model}, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, bench: Benchmark, setting: Setting, x: Callable[[Cell, Result], float]) -> None:
    for number, method in enumerate(LINES):
        cells = [Cell(setting, method, budget) for budget in bench.budgets()]
        there = [(cell, result) for cell in cells if (result := bench.get(cell))]
        if there:
            values = [estimate(result.honest.exact) for _, result in there]
            axis.errorbar(
                [x(*both) for both in there],
                [100 * value.mean for value in values],
                [100 * value.error for value in values],
                label=method.name,
                color=f"C{number}",
                marker="osD^v<>PXx"[number],
                markersize=4,
                linewidth=1.2,
                capsize=2,
            )
    full = bench.full(setting)
    if full is not None:
        axis.axhline(100 * full.honest.exact.mean(), color="black", linestyle="--", linewidth=1, label="full cache")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(-3, 103)
    axis.grid(alpha=0.3)
