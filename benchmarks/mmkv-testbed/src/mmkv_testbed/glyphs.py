"""Glyph bitmaps of one 8 x 8 pixel cell, drawn with the bitmap font that Pillow itself carries."""

from __future__ import annotations

from functools import cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .vocabulary import BLANK, DIGITS, LETTERS, SYMBOLS

CELL: Final = 8
"""Pixels along one side of a cell, which is one vision patch."""

PIXEL_MEAN: Final = 0.8
PIXEL_STD: Final = 0.3
"""What the processors take pixels (0 to 1) to be: blank paper is about 0."""

GLYPHS: Final = (BLANK, *DIGITS, *LETTERS, *SYMBOLS)
"""What a cell can hold; the names are words of the vocabulary."""

GLYPH_ID: Final = {name: index for index, name in enumerate(GLYPHS)}
SHIFTS: Final = 2
"""A glyph sits at one of `SHIFTS` x `SHIFTS` places within its cell."""


def _ink(character: str) -> NDArray[np.bool_]:
    """The inked pixels of one character, cut to its bounding box, bool `[height, width]`, at most 8 x 7."""
    canvas = Image.new("L", (16, 16), 0)
    # The font file that comes with FreeType differs between Pillow builds; this one is part of Pillow's source.
    ImageDraw.Draw(canvas).text((2, 1), character, fill=255, font=ImageFont.load_default_imagefont())
    mask = np.asarray(canvas) > 127
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1][:CELL, : CELL - 1]


@cache
def bitmaps() -> NDArray[np.bool_]:
    """Inked pixels of every glyph at every shift, bool `[glyph, right, down, 8, 8]`; glyph 0 is blank."""
    out = np.zeros((len(GLYPHS), SHIFTS, SHIFTS, CELL, CELL), dtype=np.bool_)
    for glyph, character in enumerate(GLYPHS[1:], start=1):
        ink = _ink(character)
        height, width = ink.shape
        top, left = max(0, (CELL - 1 - height) // 2), max(0, (CELL - 1 - width) // 2)
        for right in range(SHIFTS):
            for down in range(SHIFTS):
                y, x = min(top + down, CELL - height), min(left + right, CELL - width)
                out[glyph, right, down, y : y + height, x : x + width] = ink
    out.setflags(write=False)
    return out
