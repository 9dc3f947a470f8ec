"""The picture of a GPU page: bandwidth of every operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .gpu_operators import pick, share

Cells = Sequence[dict[str, Any]]


def draw(found: Mapping[str, Any], facts: Mapping[str, Any], folder: Path, name: str) -> str | None:
    """Writes it and gives its name, if there is anything to show and matplotlib to show it."""
    cells = pick(found["operators"], skew=1)
    if not cells:
        return None
    try:
        from .plots import save
    except ImportError:
        return None
    return save(lambda figure: _panels(figure, cells, found["machine"], facts), (13, 7), folder / f"{name}.png")


def _panels(figure: Any, cells: Cells, machine: dict[str, float], facts: Mapping[str, Any]) -> None:
    operators = list(dict.fromkeys(cell["operator"] for cell in cells))
    lines = {label: f"C{i % 10}" for i, label in enumerate(sorted({_subject(cell) for cell in cells}))}
    axes = figure.subplots(2, -(-len(operators) // 2), sharex=True, squeeze=False)
    for axis, operator in zip(axes.flat, operators, strict=False):
        _panel(axis, pick(cells, operator=operator), machine, lines)
        axis.set_title(operator, fontsize=10)
    for axis in axes.flat[len(operators) :]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel("% of the device's copy")
    for axis in axes[-1]:
        axis.set_xlabel("entries per KV head")
    labelled = dict(pair for axis in axes.flat for pair in zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=3, fontsize=7)
    tiny = " (tiny shapes: not a measurement)" if facts["tiny"] else ""
    figure.suptitle(f"Achieved bandwidth of operators on {facts['device']}{tiny}", fontsize=11)


def _panel(axis: Any, cells: Cells, machine: dict[str, float], colors: Mapping[str, str]) -> None:
    points: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["entries"]):
        key = _subject(cell), cell["impl"]
        points.setdefault(key, []).append((cell["entries"], 100 * share(cell, machine)))
    for (subject, impl), line in sorted(points.items()):
        style = "-" if impl == "triton" else ":"
        label = f"{subject}, {impl}"
        axis.plot(*zip(*line, strict=True), style, color=colors[subject], marker=".", linewidth=1, label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)


def _subject(cell: Mapping[str, Any]) -> str:
    return f"{cell['geometry']}, batch {cell['batch']}"
