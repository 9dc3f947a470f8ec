"""The grids of vision tokens that a model's inputs tell of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

Grid = tuple[int, int]


def known_grids(config: Any, modality: Tensor | None, inputs: Mapping[str, Any]) -> list[list[Grid]] | None:
    """(rows, columns) of vision tokens of each image of each prompt, as the model's inputs tell them.

    Args:
        config: of the model.
        modality: [P, N] int8.
        inputs: of the model; `image_grid_thw`, `pixel_values` and `image_sizes` are looked at.

    Returns:
        One list per prompt, empty where images are not plain grids (tiles, line ends, video); None without pixels.
    """
    grids, pixels = inputs.get("image_grid_thw"), inputs.get("pixel_values")
    if modality is None or (grids is None and pixels is None):
        return None
    prompts = [(row > 0).nonzero()[:, 0].tolist() for row in modality]
    if bool((modality == 2).any()):
        return [[] for _ in prompts]
    if grids is not None:
        merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1)
        found = [(t * h // merge, w // merge) for t, h, w in grids.tolist()]
    else:
        found = _of_pixels(pixels, inputs.get("image_sizes"), prompts)
    return _shared_out(found, [len(columns) for columns in prompts])


def _of_pixels(pixels: Any, sizes: Tensor | None, prompts: list[list[int]]) -> list[Grid]:
    """The grid of each picture [..., 3, h, w], where all of them are alike and have its exact shape; else nothing."""
    if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
        return []
    count, (height, width) = math.prod(pixels.shape[:-3]), pixels.shape[-2:]
    total = sum(len(columns) for columns in prompts)
    size = total // max(1, count)
    rows = math.isqrt(size * height // width)
    if not rows or size * count != total or size % rows or rows * width != size // rows * height:
        return []
    padded = pixels.ndim == 4 and sizes is not None and sizes.tolist() != [[height, width]] * count
    joined = pixels.ndim == 5 and any(run != size for columns in prompts for run in runs(columns))
    return [] if padded or joined else [(rows, size // rows)] * count


def _shared_out(grids: list[Grid], sizes: list[int]) -> list[list[Grid]]:
    """Which grids belong to which prompt, by its number of vision tokens."""
    rest, out = list(grids), []
    for size in sizes:
        mine: list[Grid] = []
        while rest and sum(a * b for a, b in mine) < size:
            mine.append(rest.pop(0))
        out.append(mine)
    fits = not rest and all(sum(a * b for a, b in mine) == size for mine, size in zip(out, sizes, strict=True))
    return out if fits else [[] for _ in sizes]


def runs(columns: list[int]) -> list[int]:
    """Lengths of the stretches of consecutive columns."""
    starts = [i for i, column in enumerate(columns) if i == 0 or column != columns[i - 1] + 1]
    return [b - a for a, b in zip(starts, [*starts[1:], len(columns)], strict=True)]
