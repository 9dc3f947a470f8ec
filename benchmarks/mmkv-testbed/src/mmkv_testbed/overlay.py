"""Pictures of the vision tokens a compressed cache still holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .glyphs import CELL
from .vocabulary import GRID

_ZOOM: Final = 4
_SIDE: Final = CELL * _ZOOM
_TEXT: Final = 18
"""Size of captions and legends, in pixels."""
_MARGIN: Final = 32
_LEGEND: Final = 62
_PALE: Final = 0.25
"""How much of an evicted cell's ink is left."""
_RED: Final = np.array([230.0, 0.0, 60.0], dtype=np.float32)
_FAINTEST: Final = 0.3
"""Tint of the smallest share, so that one head of many is seen."""
_STEPS: Final = (0.1, 0.25, 0.5, 1.0)


def draw_kept(image: Image.Image, shares: NDArray[np.float32], evidence: Sequence[int], caption: str) -> Image.Image:
    """The page with evicted cells pale, kept cells tinted, the evidence framed, a caption above and a legend below.

    Args:
        image: The page.
        shares: `[GRID * GRID]`, how many of all (layer, KV head) pairs hold each cell, as a share.
        evidence: The cells that hold it.
        caption: One line.
    """
    zoomed = image.resize((image.width * _ZOOM, image.height * _ZOOM), Image.Resampling.NEAREST)
    page = np.asarray(zoomed, np.float32)
    page = (page * (255 / np.median(page, (0, 1)))).clip(0, 255)  # on white paper the tint has its own colour
    grey = np.asarray(zoomed.convert("L"), np.float32)[..., None]
    share = shares.reshape(GRID, GRID).repeat(_SIDE, 0).repeat(_SIDE, 1)[..., None]
    blended = np.where(share > 0, page * _tint(share) / 255, 255 - _PALE * (255 - grey)).round().astype(np.uint8)
    out = Image.new("RGB", (zoomed.width, zoomed.height + _MARGIN + _LEGEND), "white")
    out.paste(Image.fromarray(blended), (0, _MARGIN))
    pen = ImageDraw.Draw(out)
    pen.text((6, 5), caption, fill="black", font=ImageFont.load_default(_TEXT))
    _frame(pen, frozenset(evidence))
    _legend(pen, _MARGIN + zoomed.height + 6)
    return out


def _frame(pen: ImageDraw.ImageDraw, cells: frozenset[int]) -> None:
    """Black lines around every group of adjacent cells."""
    for cell in cells:
        top, left = (i * _SIDE for i in divmod(cell, GRID))
        top, bottom, right = top + _MARGIN, top + _MARGIN + _SIDE, left + _SIDE
        sides = {
            cell - GRID: (left, top, right, top),
            cell + GRID: (left, bottom, right, bottom),
            cell - 1: (left, top, left, bottom),
            cell + 1: (right, top, right, bottom),
        }
        for neighbour, line in sides.items():
            if neighbour not in cells:
                pen.line(line, fill="black", width=3)


def _tint(share: NDArray[np.float32] | float) -> NDArray[np.float32]:
    """What white paper becomes."""
    strength = _FAINTEST + (1 - _FAINTEST) * np.asarray(share, np.float32)
    colour: NDArray[np.float32] = 255 - strength * (255 - _RED)
    return colour


def _legend(pen: ImageDraw.ImageDraw, top: int) -> None:
    font, left = ImageFont.load_default(_TEXT), 6
    for share in _STEPS:
        red, green, blue = (int(value) for value in _tint(share))
        pen.rectangle((left, top + 2, left + 22, top + 22), fill=(red, green, blue))
        pen.text((left + 28, top), f"{share:.0%}", fill="black", font=font)
        left += 82
    pen.text((left, top), "of layers and KV heads keep the cell; pale: none", fill="black", font=font)
    below = "black lines: the evidence; the last cells, bottom right, lie in the protected window"
    pen.text((6, top + 26), below, fill="black", font=font)


def side_by_side(images: Sequence[Image.Image], gap: int = 16) -> Image.Image:
    """One picture of several, left to right on white."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    out = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        out.paste(image, (left, 0))
        left += image.width + gap
    return out
