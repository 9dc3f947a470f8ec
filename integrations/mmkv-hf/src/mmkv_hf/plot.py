"""Pictures of what was kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from .report import Report

Grid = tuple[int, int]


def plot_kept(
    report: Report,
    path: str | Path,
    images: Any = None,
    *,
    row: int = 0,
    per_layer: bool = False,
    grids: Sequence[Grid] | None = None,
) -> Path:
    """Draws, over each image of one batch row, the share of KV heads that keep each vision token.

    Args:
        report: of a prompt with vision tokens.
        path: where to write; the suffix says the format.
        images: a PIL image, or one per image of the row, to draw over; none: the heat map alone.
        row: batch row.
        per_layer: one panel per layer instead of the mean over layers.
        grids: (rows, columns) of vision tokens of each image; by default the shape nearest to square that uses all.

    Returns:
        `path`.

    Raises:
        ValueError: no vision tokens, or images and grids that do not fit them.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib; install mmkv-hf[plot]") from error
    columns = report.vision_columns[row] if row < len(report.vision_columns) else []
    if not columns:
        raise ValueError(f"row {row} has no vision tokens to draw")
    runs = _runs(columns)
    shapes = _grids([len(run) for run in runs], grids)
    pictures = _pictures(images, len(runs))
    kept = report.vision_kept[row]
    titles = (
        [f"layer {layer.layer}" for layer in report.layers if layer.kind == "self"] if per_layer else ["all layers"]
    )
    maps = kept if per_layer else kept.mean(0, keepdim=True)
    figure = Figure(figsize=(3.2 * len(runs) + 1.2, 3.2 * len(maps) + 0.8), layout="constrained")
    axes = figure.subplots(len(maps), len(runs), squeeze=False)
    for line, (values, title) in enumerate(zip(maps, titles, strict=True)):
        for i, (run, shape) in enumerate(zip(runs, shapes, strict=True)):
            drawn = _panel(axes[line][i], values[run].view(shape), pictures[i])
            axes[line][i].set_title(title if len(runs) == 1 else f"{title}, image {i + 1}", fontsize=9)
    figure.suptitle(f"{report.pipeline}, budget {report.budget}: vision tokens kept", fontsize=10)
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="share of KV heads that keep the token")
    figure.savefig(path, dpi=150)
    return Path(path)


def _panel(axis: Any, values: Tensor, picture: Any) -> Any:
    height, width = values.shape
    extent = (0, width, height, 0)
    if picture is not None:
        axis.imshow(picture.convert("L"), cmap="gray", extent=extent, vmin=0, vmax=255)
    axis.set_xticks([])
    axis.set_yticks([])
    alpha = 1.0 if picture is None else 0.75 * values.clamp(0, 1).sqrt().numpy()
    return axis.imshow(
        values.numpy(), cmap="inferno", vmin=0, vmax=1, extent=extent, alpha=alpha, interpolation="nearest"
    )


def _runs(columns: list[int]) -> list[list[int]]:
    """Indices into `columns`, one list per stretch of consecutive columns: one image each."""
    starts = [i for i, column in enumerate(columns) if i == 0 or column != columns[i - 1] + 1]
    return [list(range(a, b)) for a, b in zip(starts, [*starts[1:], len(columns)], strict=True)]


def _grids(sizes: list[int], given: Sequence[Grid] | None) -> list[Grid]:
    if given is None:
        return [_squarest(size) for size in sizes]
    if len(given) != len(sizes) or any(a * b != size for (a, b), size in zip(given, sizes, strict=False)):
        raise ValueError(f"the prompt has images of {sizes} vision tokens; grids {list(given)} do not fit them")
    return list(given)


def _squarest(size: int) -> Grid:
    height = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0)
    return height, size // height


def _pictures(images: Any, count: int) -> list[Any]:
    pictures = [None] * count if images is None else list(images) if isinstance(images, list | tuple) else [images]
    if len(pictures) != count:
        raise ValueError(f"the prompt has {count} images, {len(pictures)} were given")
    return pictures
