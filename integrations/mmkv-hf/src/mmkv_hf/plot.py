"""Pictures of what was kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .grids import Grid, runs

if TYPE_CHECKING:
    from .report import Report

_LIKE = math.log(1.25)
_ASK = "pass grids=[(rows, columns), ...], one per image, which together hold all vision tokens in their order"


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
        images: a PIL image, or one per grid, to draw over, as the processor cropped them; none: the heat map alone.
        row: batch row.
        per_layer: one panel per layer instead of the mean over layers.
        grids: (rows, columns) of vision tokens of each image. By default what the inputs said, else the shape that is
            within 25 % of the image's own, else, without images, a square.

    Returns:
        `path`.

    Raises:
        ValueError: no vision tokens among the text, a shape that is not known, or images and grids that do not fit.
        ImportError: matplotlib is missing.
    """
    check_target(path)
    from matplotlib.figure import Figure

    columns = _vision_columns(report, row)
    pictures = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    known = None if report.vision_grids is None else report.vision_grids[row]
    shapes = _shapes(columns, pictures, known) if grids is None else list(grids)
    _check_fit(columns, pictures, shapes)
    pictures = pictures or [None] * len(shapes)
    ends = [sum(a * b for a, b in shapes[:i]) for i in range(len(shapes) + 1)]
    kept = report.vision_kept[row]
    titles = (
        [f"layer {layer.layer}" for layer in report.layers if layer.kind == "self"] if per_layer else ["all layers"]
    )
    maps = kept if per_layer else kept.mean(0, keepdim=True)
    figure = Figure(figsize=(max(4.8, 3.2 * len(shapes) + 1.2), 3.2 * len(maps) + 0.8), layout="constrained")
    axes = figure.subplots(len(maps), len(shapes), squeeze=False)
    for line, (values, title) in enumerate(zip(maps, titles, strict=True)):
        for i, shape in enumerate(shapes):
            drawn = _panel(axes[line][i], values[ends[i] : ends[i + 1]].view(shape), pictures[i])
            axes[line][i].set_title(title if len(shapes) == 1 else f"{title}, image {i + 1}", fontsize=9)
    figure.suptitle(f"{report.pipeline}, budget {report.budget}: vision tokens kept", fontsize=10)
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="share of KV heads that keep the token")
    figure.savefig(path, dpi=150)
    return Path(path)


def check_target(path: str | Path) -> None:
    """Refuses a file that could not be written in the end.

    Raises:
        ValueError: no such folder, or a suffix that matplotlib cannot write.
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ImportError("plotting needs matplotlib; install mmkv-hf[plot]") from error
    check_file(path)
    known = sorted(FigureCanvasBase.get_supported_filetypes())
    if Path(path).suffix[1:].lower() not in known:
        raise ValueError(f"cannot write {path}: the suffix is one of .{', .'.join(known)}")


def check_file(path: str | Path) -> None:
    """Refuses a path at which no file could be written in the end.

    Raises:
        ValueError: no such folder, or a folder itself.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.parent}")


def _vision_columns(report: Report, row: int) -> list[int]:
    columns = report.vision_columns[row] if row < len(report.vision_columns) else []
    if not columns:
        raise ValueError(f"row {row} has no vision tokens to draw")
    if any(layer.kind == "cross" for layer in report.layers):
        raise ValueError("this model keeps its vision tokens in cross-attention layers, which cannot be drawn")
    return columns


def _shapes(columns: list[int], pictures: list[Any], known: list[Grid] | None) -> list[Grid]:
    """The grid of each image when the caller named none."""
    if known is None:
        sizes = _sizes(runs(columns), len(pictures))
        known = [_guess(size, picture) for size, picture in zip(sizes, pictures or [None] * len(sizes), strict=True)]
    if not known:
        raise ValueError(f"the vision tokens are no plain grid per image (tiles, line ends or video); {_ASK}")
    for shape, picture in zip(known, pictures, strict=False):
        if _distance(shape, picture) > _LIKE:
            raise ValueError(
                f"{shape[0]} x {shape[1]} vision tokens do not have the shape of an image of {picture.height} x "
                f"{picture.width} pixels (height x width); pass the image as the processor cropped it, or {_ASK[5:]}"
            )
    return known


def _sizes(runs: list[int], pictures: int) -> list[int]:
    """Vision tokens of each image: a run each, or, as images may touch, all the same."""
    if pictures in (0, len(runs)):
        return runs
    size = sum(runs) // pictures
    if not size or size * pictures != sum(runs) or any(run % size for run in runs):
        raise ValueError(f"{pictures} images do not fit vision tokens in runs of {runs}; {_ASK}")
    return [size] * pictures


def _guess(size: int, picture: Any) -> Grid:
    """The shape nearest to the picture's, or without one a square."""
    if picture is not None:
        shapes = [(rows, size // rows) for rows in range(1, size + 1) if size % rows == 0]
        return min(shapes, key=lambda shape: _distance(shape, picture))
    side = math.isqrt(size)
    if side * side != size:
        raise ValueError(f"the shape of {size} vision tokens is not known; {_ASK}")
    return side, side


def _distance(shape: Grid, picture: Any) -> float:
    """How far two aspect ratios are apart, as a logarithm."""
    return abs(math.log(shape[0] * picture.width) - math.log(shape[1] * picture.height))


def _check_fit(columns: list[int], pictures: list[Any], shapes: list[Grid]) -> None:
    if sum(a * b for a, b in shapes) != len(columns):
        raise ValueError(f"the prompt has {len(columns)} vision tokens in runs of {runs(columns)}; {shapes} do not fit")
    if pictures and len(pictures) != len(shapes):
        raise ValueError(f"{len(pictures)} images were given for {len(shapes)} grids of vision tokens")


def _panel(axis: Any, values: Tensor, picture: Any) -> Any:
    height, width = values.shape
    extent = (0, width, height, 0)
    if picture is not None:
        axis.imshow(picture.convert("L"), cmap="gray", extent=extent, vmin=0, vmax=255)
    axis.set_xticks([])
    axis.set_yticks([])
    alpha = 1.0 if picture is None else 0.6 * (values > 0).float().numpy()  # what no head keeps is left as it is
    return axis.imshow(
        values.numpy(), cmap="plasma", vmin=0, vmax=1, extent=extent, alpha=alpha, interpolation="nearest"
    )
