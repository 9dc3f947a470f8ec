"""Pictures of the vision tokens a compressed cache still holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .glyphs import CELL
from .samples import Box
from .vocabulary import GRID

_ZOOM: Final = 4
_SIDE: Final = CELL * _ZOOM
_MARGIN: Final = 24
_KEPT: Final = np.array([255.0, 0.0, 90.0], dtype=np.float32)


def draw_kept(image: Image.Image, shares: NDArray[np.float32], box: Box, caption: str) -> Image.Image:
    """The page with evicted cells faded, kept cells tinted, the evidence framed, and a caption above.

    Args:
        image: The page.
        shares: `[GRID * GRID]`, how many of all (layer, KV head) pairs hold each cell, as a share.
        box: The evidence.
        caption: One line.
    """
    page = np.asarray(image.resize((image.width * _ZOOM, image.height * _ZOOM), Image.Resampling.NEAREST), np.float32)
    share = shares.reshape(GRID, GRID).repeat(_SIDE, 0).repeat(_SIDE, 1)[..., None]
    faded = 255 - 0.35 * (255 - page)
    tint = 0.15 + 0.6 * share
    blended = np.where(share > 0, (1 - tint) * page + tint * _KEPT, faded).round().astype(np.uint8)
    out = Image.new("RGB", (image.width * _ZOOM, image.height * _ZOOM + _MARGIN), "white")
    out.paste(Image.fromarray(blended), (0, _MARGIN))
    pen = ImageDraw.Draw(out)
    pen.text((6, 6), caption, fill="black", font=ImageFont.load_default_imagefont())
    left, top = box.left * _SIDE, box.top * _SIDE + _MARGIN
    pen.rectangle(
        (left - 2, top - 2, box.right * _SIDE + 1, box.bottom * _SIDE + _MARGIN + 1), outline="black", width=3
    )
    return out


def side_by_side(images: Sequence[Image.Image], gap: int = 16) -> Image.Image:
    """One picture of several, left to right on white."""
    width = sum(image.width for image in images) + gap * (len(images) - 1)
    out = Image.new("RGB", (width, max(image.height for image in images)), "white")
    left = 0
    for image in images:
        out.paste(image, (left, 0))
        left += image.width + gap
    return out
