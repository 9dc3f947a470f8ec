"""Pages: a grid of 8 x 8 pixel cells with keyed records among distractors.

A record is a key letter and `VALUE_LENGTH` digits, all in one ink. The page's arrangement says where the digits are:
side by side (horizontal), below one another (vertical) or `STRIDE` cells apart with other records between them
(strided). The paper's ruling tells the three apart. Runs of digits without a key, runs of symbols and pixel noise
surround the records, so a reader has to find the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .glyphs import CELL, GLYPH_ID, SHIFTS, bitmaps
from .vocabulary import COLOURS, DIGITS, GRID, LETTERS, SYMBOLS

VALUE_LENGTH: Final = 4
RECORD_LENGTH: Final = VALUE_LENGTH + 1
STRIDE: Final = 4
"""Cells between a strided record's glyphs: a pooling kernel of 7 around one of them reaches no other."""
SHADES: Final = 4
"""A ruling is drawn fainter or darker from patch to patch."""
_PATCH: Final = 4
"""Side, in cells, of a patch of equal shade."""

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


class Arrangement(StrEnum):
    """Where a record's digits are."""

    HORIZONTAL = "horizontal"
    VERTICAL = "vertical"
    STRIDED = "strided"

    @property
    def step(self) -> tuple[int, int]:
        """Rows and columns from one glyph of a record to the next."""
        return _STEPS[self]


_STEPS: Final = {Arrangement.HORIZONTAL: (0, 1), Arrangement.VERTICAL: (1, 0), Arrangement.STRIDED: (0, STRIDE)}


class Ink(StrEnum):
    """How much of a full page is written on: about 23, 39 or 70 % of its cells."""

    SPARSE = "sparse"
    NORMAL = "normal"
    DENSE = "dense"

    @property
    def shares(self) -> tuple[float, float]:
        """Shares of the slots without a record that hold digits, and symbols."""
        return _SHARES[self]


_SHARES: Final = {Ink.SPARSE: (0.06, 0.04), Ink.NORMAL: (0.25, 0.15), Ink.DENSE: (0.65, 0.35)}


def _rulings() -> NDArray[np.float32]:
    """How much darker the paper is, float32 `[arrangement * SHADES, 8, 8]`: lines, columns, diagonals in each shade."""
    y, x = np.mgrid[0:CELL, 0:CELL]
    shades = np.linspace(0.08, 0.2, SHADES)
    return np.stack([shade * (line % 4 == 0) for line in (y, x, x + y) for shade in shades]).astype(np.float32)


_RULINGS: Final = _rulings()


@dataclass(frozen=True, slots=True)
class Layout:
    """Size and filling of a page.

    Attributes:
        rows: Cells from top to bottom.
        columns: Cells from left to right.
        records: Keyed records; keys never repeat, so at most 26.
        arrangement: Where the records' digits are.
        ink: How many of the other slots are written on.
    """

    rows: int = GRID
    columns: int = GRID
    records: int = 20
    arrangement: Arrangement = Arrangement.HORIZONTAL
    ink: Ink = Ink.NORMAL

    @property
    def slots(self) -> int:
        """Places for a record."""
        if self.arrangement is Arrangement.STRIDED:
            return self.rows * (self.columns // (STRIDE * RECORD_LENGTH)) * STRIDE
        lines, length = self.lines
        return lines * (length // (RECORD_LENGTH + 1))

    @property
    def lines(self) -> tuple[int, int]:
        """Number and length of the lines that records are written along."""
        vertical = self.arrangement is Arrangement.VERTICAL
        return (self.columns, self.rows) if vertical else (self.rows, self.columns)

    def __post_init__(self) -> None:
        """Refuses a page that cannot hold its records; takes names for the enumerations."""
        object.__setattr__(self, "arrangement", Arrangement(self.arrangement))
        object.__setattr__(self, "ink", Ink(self.ink))
        if not 0 < self.records <= min(len(LETTERS), self.slots):
            raise ValueError(
                f"{self.records} {self.arrangement} records do not fit a page of {self.rows} x {self.columns} cells"
            )


FULL_PAGE: Final = Layout()


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a page's table: what it says and where (`row`, `column` of the key's cell)."""

    key: str
    digits: str
    colour: str
    row: int
    column: int
    arrangement: Arrangement = Arrangement.HORIZONTAL

    def cells(self, columns: int = GRID) -> tuple[int, ...]:
        """Row-major indices of the key's cell and its digits' cells: the vision tokens that are the evidence."""
        first, (down, right) = self.row * columns + self.column, self.arrangement.step
        return tuple(first + i * (down * columns + right) for i in range(RECORD_LENGTH))


@dataclass(frozen=True, slots=True)
class Page:
    """What is written where.

    Attributes:
        glyphs: int64 `[rows, columns]`, index into `GLYPHS`.
        inks: int64 `[rows, columns]`, index into `COLOURS`.
        rulings: int64 `[rows, columns]`, background of each cell: `SHADES * arrangement + shade`.
        records: The table.
    """

    glyphs: NDArray[np.int64]
    inks: NDArray[np.int64]
    rulings: NDArray[np.int64]
    records: tuple[Record, ...]


def _run_starts(rng: np.random.Generator, lines: int, length: int, run: int, count: int) -> NDArray[np.int64]:
    """Where `count` runs begin in each line, `[lines, count]`; spare cells are shared out at random between them."""
    gaps = np.sort(rng.integers(0, length - count * run + 1, (lines, count)), axis=1)
    starts: NDArray[np.int64] = gaps + np.arange(count) * run
    return starts


def _starts(rng: np.random.Generator, layout: Layout) -> list[tuple[int, int]]:
    """First cells (row, column) of all slots, in random order."""
    lines, length = layout.lines
    if layout.arrangement is Arrangement.STRIDED:
        run = STRIDE * RECORD_LENGTH  # of `STRIDE` interleaved slots
        starts = _run_starts(rng, lines, length, run, length // run)[..., None] + np.arange(STRIDE)
    else:
        starts = _run_starts(rng, lines, length, RECORD_LENGTH, length // (RECORD_LENGTH + 1))
    cells = [(line, int(start)) for line in range(lines) for start in starts[line].flat]
    if layout.arrangement is Arrangement.VERTICAL:
        cells = [(start, line) for line, start in cells]
    return [cells[i] for i in rng.permutation(len(cells))]


def _distractor(rng: np.random.Generator, layout: Layout) -> list[int]:
    """Glyphs of a slot without a key: digits, one repeated symbol, or nothing."""
    kind, (digits, symbols) = rng.random(), layout.ink.shares
    if kind < digits:
        return [GLYPH_ID[DIGITS[d]] for d in rng.integers(0, len(DIGITS), VALUE_LENGTH)]
    if kind < digits + symbols:
        return [GLYPH_ID[SYMBOLS[rng.integers(len(SYMBOLS))]]] * VALUE_LENGTH
    return []


def make_page(rng: np.random.Generator, layout: Layout = FULL_PAGE) -> Page:
    """A page drawn from `rng`; the same generator state gives the same page."""
    shape, arrangement = (layout.rows, layout.columns), layout.arrangement
    glyphs = np.zeros(shape, dtype=np.int64)
    inks = rng.integers(0, len(COLOURS), shape)
    coarse = rng.integers(0, SHADES, (-(-shape[0] // _PATCH), -(-shape[1] // _PATCH)))
    shades = coarse.repeat(_PATCH, 0).repeat(_PATCH, 1)[: shape[0], : shape[1]]
    keys = rng.permutation(len(LETTERS))
    records, (down, right) = [], arrangement.step
    for index, (row, column) in enumerate(_starts(rng, layout)):
        ink = int(rng.integers(len(COLOURS)))
        if index < layout.records:
            key, digits = LETTERS[keys[index]], "".join(DIGITS[d] for d in rng.integers(0, len(DIGITS), VALUE_LENGTH))
            records.append(Record(key, digits, COLOURS[ink], row, column, arrangement))
            run = [GLYPH_ID[character] for character in key + digits]
        else:
            run = [0, *_distractor(rng, layout)]
        offsets = np.arange(len(run))
        glyphs[row + down * offsets, column + right * offsets] = run
        inks[row + down * offsets, column + right * offsets] = ink
    return Page(glyphs, inks, SHADES * tuple(Arrangement).index(arrangement) + shades, tuple(records))


def change_digits(rng: np.random.Generator, page: Page, share: float) -> Page:
    """The page some time later: the same, but each record has, with probability `share`, new digits."""
    glyphs, records = page.glyphs.copy(), []
    for record in page.records:
        digits = rng.integers(0, len(DIGITS), VALUE_LENGTH)
        if rng.random() < share:
            changed = "".join(DIGITS[d] for d in digits)
            record = Record(record.key, changed, record.colour, record.row, record.column, record.arrangement)
            glyphs.flat[list(record.cells(glyphs.shape[1])[1:])] = [GLYPH_ID[d] for d in changed]
        records.append(record)
    return Page(glyphs, page.inks, page.rulings, tuple(records))


def draw_cells(
    rng: np.random.Generator, glyphs: NDArray[np.int64], inks: NDArray[np.int64], rulings: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Pixels of every cell, uint8 `[rows, columns, 8, 8, 3]`: jittered glyph and ink, tinted ruled paper, noise."""
    shape = glyphs.shape
    mask = bitmaps()[glyphs, rng.integers(0, SHIFTS, shape), rng.integers(0, SHIFTS, shape)][..., None]
    paper = 0.75 + 0.25 * rng.random(3, dtype=np.float32)
    ground = paper * (1 - _RULINGS[rulings][..., None])
    ink = _INKS[inks] + 0.08 * rng.standard_normal((*shape, 3), dtype=np.float32)
    pixels = np.where(mask, ink.clip(0, 1)[:, :, None, None], ground)
    pixels = pixels + 0.04 * rng.standard_normal(pixels.shape, dtype=np.float32)
    levels: NDArray[np.uint8] = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return levels


def draw(rng: np.random.Generator, page: Page) -> Image.Image:
    """The page as an RGB image of 8 * columns x 8 * rows pixels."""
    cells = draw_cells(rng, page.glyphs, page.inks, page.rulings)
    rows, columns = page.glyphs.shape
    return Image.fromarray(np.ascontiguousarray(cells.transpose(0, 2, 1, 3, 4)).reshape(rows * CELL, columns * CELL, 3))
