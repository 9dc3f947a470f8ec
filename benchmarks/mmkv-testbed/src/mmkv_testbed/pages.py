"""Pages: a grid of 8 x 8 pixel cells with keyed records among distractors.

A record is a key letter and `VALUE_LENGTH` digits to its right, all in one ink. Runs of digits without a key, runs of
symbols, textured blanks and pixel noise surround the records, so a reader has to find the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .glyphs import CELL, GLYPH_ID, SHIFTS, bitmaps
from .vocabulary import COLOURS, DIGITS, GRID, LETTERS, SYMBOLS

VALUE_LENGTH: Final = 4
RECORD_LENGTH: Final = VALUE_LENGTH + 1
_SLOT: Final = RECORD_LENGTH + 1
_PATCH: Final = 4
"""Side, in cells, of a patch of equal background texture."""

_INKS: Final = np.array(
    [
        [0.90, 0.10, 0.10],
        [0.10, 0.70, 0.10],
        [0.10, 0.20, 0.95],
        [0.85, 0.75, 0.05],
        [0.75, 0.10, 0.80],
        [0.05, 0.75, 0.80],
    ],
    dtype=np.float32,
)


def _textures() -> NDArray[np.float32]:
    """Four background textures, float32 0 or 1 `[4, 8, 8]`: none, diagonal, vertical, horizontal."""
    y, x = np.mgrid[0:CELL, 0:CELL]
    return np.stack([np.zeros_like(x), (x + y) % 4 == 0, x % 4 == 0, y % 4 == 0]).astype(np.float32)


_TEXTURES: Final = _textures()


@dataclass(frozen=True, slots=True)
class Layout:
    """Size and filling of a page.

    Attributes:
        rows: Cells from top to bottom.
        columns: Cells from left to right.
        records: Keyed records; keys never repeat, so at most 26.
        digit_share: Share of the other slots that hold digits without a key.
        symbol_share: Share of the other slots that hold symbols.
    """

    rows: int = GRID
    columns: int = GRID
    records: int = 20
    digit_share: float = 0.25
    symbol_share: float = 0.15

    @property
    def slots_per_row(self) -> int:
        """Places for a run of `RECORD_LENGTH` cells in one row."""
        return self.columns // _SLOT

    def __post_init__(self) -> None:
        """Refuses a page that cannot hold its records."""
        if not 0 < self.records <= min(len(LETTERS), self.rows * self.slots_per_row):
            raise ValueError(f"{self.records} records do not fit a page of {self.rows} x {self.columns} cells")


FULL_PAGE: Final = Layout()


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a page's table: what it says and where (`row`, `column` of the key's cell)."""

    key: str
    digits: str
    colour: str
    row: int
    column: int

    def cells(self, columns: int = GRID) -> tuple[int, ...]:
        """Row-major indices of the key's cell and its digits' cells: the vision tokens that are the evidence."""
        first = self.row * columns + self.column
        return tuple(range(first, first + RECORD_LENGTH))


@dataclass(frozen=True, slots=True)
class Page:
    """What is written where.

    Attributes:
        glyphs: int64 `[rows, columns]`, index into `GLYPHS`.
        inks: int64 `[rows, columns]`, index into `COLOURS`.
        textures: int64 `[rows, columns]`, background of each cell.
        records: The table.
    """

    glyphs: NDArray[np.int64]
    inks: NDArray[np.int64]
    textures: NDArray[np.int64]
    records: tuple[Record, ...]


def _starts(rng: np.random.Generator, layout: Layout) -> list[tuple[int, int]]:
    """First cells of all slots in random order; each row's spare cells are shared out at random between its slots."""
    count = layout.slots_per_row
    spare = layout.columns - count * RECORD_LENGTH
    gaps = np.sort(rng.integers(0, spare + 1, (layout.rows, count)), axis=1)
    columns = gaps + np.arange(count) * RECORD_LENGTH
    cells = [(row, int(column)) for row in range(layout.rows) for column in columns[row]]
    return [cells[i] for i in rng.permutation(len(cells))]


def _distractor(rng: np.random.Generator, layout: Layout) -> list[int]:
    """Glyphs of a slot without a key: digits, one repeated symbol, or nothing."""
    kind = rng.random()
    if kind < layout.digit_share:
        return [GLYPH_ID[DIGITS[d]] for d in rng.integers(0, len(DIGITS), VALUE_LENGTH)]
    if kind < layout.digit_share + layout.symbol_share:
        return [GLYPH_ID[SYMBOLS[rng.integers(len(SYMBOLS))]]] * VALUE_LENGTH
    return []


def make_page(rng: np.random.Generator, layout: Layout = FULL_PAGE) -> Page:
    """A page drawn from `rng`; the same generator state gives the same page."""
    shape = (layout.rows, layout.columns)
    glyphs = np.zeros(shape, dtype=np.int64)
    inks = rng.integers(0, len(COLOURS), shape)
    coarse = rng.integers(0, len(_TEXTURES), (-(-shape[0] // _PATCH), -(-shape[1] // _PATCH)))
    textures = coarse.repeat(_PATCH, 0).repeat(_PATCH, 1)[: shape[0], : shape[1]]
    keys = rng.permutation(len(LETTERS))
    records = []
    for index, (row, column) in enumerate(_starts(rng, layout)):
        ink = int(rng.integers(len(COLOURS)))
        if index < layout.records:
            key, digits = LETTERS[keys[index]], "".join(DIGITS[d] for d in rng.integers(0, len(DIGITS), VALUE_LENGTH))
            records.append(Record(key, digits, COLOURS[ink], row, column))
            run = [GLYPH_ID[character] for character in key + digits]
        else:
            run = [0, *_distractor(rng, layout)]
        glyphs[row, column : column + len(run)] = run
        inks[row, column : column + len(run)] = ink
    return Page(glyphs, inks, textures, tuple(records))


def draw_cells(
    rng: np.random.Generator, glyphs: NDArray[np.int64], inks: NDArray[np.int64], textures: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Pixels of every cell, uint8 `[rows, columns, 8, 8, 3]`: jittered glyph and ink, tinted paper, noise."""
    shape = glyphs.shape
    mask = bitmaps()[glyphs, rng.integers(0, SHIFTS, shape), rng.integers(0, SHIFTS, shape)][..., None]
    paper = 0.75 + 0.25 * rng.random(3, dtype=np.float32)
    ground = paper * (1 - 0.12 * _TEXTURES[textures][..., None])
    ink = _INKS[inks] + 0.08 * rng.standard_normal((*shape, 3), dtype=np.float32)
    pixels = np.where(mask, ink.clip(0, 1)[:, :, None, None], ground)
    pixels = pixels + 0.04 * rng.standard_normal(pixels.shape, dtype=np.float32)
    levels: NDArray[np.uint8] = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return levels


def draw(rng: np.random.Generator, page: Page) -> Image.Image:
    """The page as an RGB image of 8 * columns x 8 * rows pixels."""
    cells = draw_cells(rng, page.glyphs, page.inks, page.textures)
    rows, columns = page.glyphs.shape
    return Image.fromarray(np.ascontiguousarray(cells.transpose(0, 2, 1, 3, 4)).reshape(rows * CELL, columns * CELL, 3))
