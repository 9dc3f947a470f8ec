"""ADSC: uniform downsampling of vision tokens at a few layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

from torch import Tensor

from . import _checks
from .prompt import Prompt
from .types import Positions, Seen

Layout = Literal["raster", "grid2d", "quincunx"]


@dataclass(frozen=True, slots=True)
class ADSC:
    """Keeps one of `stride` vision tokens of each image at the input of each of the `layers`; no scores.

    Attention-Driven Self-Compression (arXiv 2602.12618), *reconstructed*: the abstract states uniform downsampling at a
    few selected layers inside the LLM, attention unchanged; there is no public code and the paper's body was not at
    hand. Layers, stride, layout, offset and positions are inferred. The default schedule keeps 192 of 576 tokens on
    average (drop 66.7 %) and gives the published KV saving of 56.7 % at 101 text tokens; other schedules do so as well.
    The published 98.2 % of accuracy belongs to a model tuned with its schedule, not to use without training.

    Tokens are selected, not pooled. What is kept depends on shapes alone. An image never loses its last token.

    Attributes:
        layers: (4, 20).
        stride: r, one for all layers or one for each.
        layout: which r-th tokens. "raster": every r-th survivor in order; on a grid whose width r divides this removes
            whole columns. "grid2d": whole rows and columns, so that after all stages so far the distances between
            survivors are as near to equal in both directions as r allows (a prime r thins columns, then rows, in turn).
            "quincunx": staggered, the lattice of density 1/r with the largest smallest distance. The last two need
            grids, treat the frames of a video alike, and keep about one of r.
        offset: which of r neighbours stays, 0 to r - 1.
        positions: "keep", or "reindex".
    """

    layers: tuple[int, ...] = (4, 20)
    stride: int | tuple[int, ...] = 3
    layout: Layout = "raster"
    offset: int = 0
    positions: Positions = "keep"

    evidence: ClassVar[None] = None

    def __post_init__(self) -> None:
        layers = _checks.layers("ADSC", self.layers)
        if isinstance(self.stride, tuple | list):
            stride: int | tuple[int, ...] = _checks.each("ADSC stride", self.stride, _positive)
        else:
            stride = _positive("ADSC stride", self.stride)
        _checks.store(self, layers=layers, stride=stride)
        if len(self.strides) != len(layers):
            raise ValueError(f"ADSC stride must be one for each of the {len(layers)} layers, got {list(self.strides)}")
        _checks.one_of("ADSC layout", self.layout, ("raster", "grid2d", "quincunx"))
        _checks.one_of("ADSC positions", self.positions, ("keep", "reindex"))
        _checks.whole("ADSC offset", self.offset, 0)
        if self.offset >= min(self.strides):
            raise ValueError(f"ADSC offset must be below the stride {min(self.strides)}, got {self.offset}")

    @property
    def strides(self) -> tuple[int, ...]:
        """The stride of each layer."""
        return self.stride if isinstance(self.stride, tuple) else (self.stride,) * len(self.layers)

    def __call__(self, seen: Seen) -> Tensor:
        """Columns that enter the layer, [B, N] bool."""
        stage = self.layers.index(seen.layer)
        kept = downsample(
            seen.prompt, seen.survivors, self.strides[: stage + 1], layout=self.layout, offset=self.offset
        )
        return (seen.alive & ~seen.survivors) | kept


def downsample(
    prompt: Prompt, survivors: Tensor, strides: tuple[int, ...], *, layout: Layout = "raster", offset: int = 0
) -> Tensor:
    """Vision tokens left by the last of `strides`, [B, N] bool.

    Args:
        prompt: The prompt.
        survivors: [B, N] bool, vision tokens the earlier strides left.
        strides: Strides of all stages so far, this one last.
        layout: See `ADSC`.
        offset: See `ADSC`.

    Raises:
        ValueError: A layout that needs grids, and an image without.
    """
    if layout == "raster":
        kept = survivors & (prompt.image_ranks(survivors) % strides[-1] == offset)
    else:
        if bool((survivors & (prompt.place[..., 0] < 0)).any()):
            raise ValueError(f"ADSC layout={layout!r} needs the grid of every image; layout='raster' does not")
        on_lattice = _on_grid if layout == "grid2d" else _on_quincunx
        kept = survivors & on_lattice(prompt.place, strides, offset)
    lost = survivors & (prompt.image_sums(kept) == 0)
    return kept | (lost & (prompt.image_ranks(survivors) == 0))


def _on_grid(place: Tensor, strides: tuple[int, ...], offset: int) -> Tensor:
    (row_step, row_from), (column_step, column_from) = grid_steps(strides, offset)
    return (place[..., 1] % row_step == row_from) & (place[..., 2] % column_step == column_from)


@cache
def grid_steps(strides: tuple[int, ...], offset: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """(step, first) of the rows and of the columns that "grid2d" leaves after all of `strides`."""
    row_step = column_step = 1
    row_from = column_from = 0
    for stride in strides:
        ways = [(stride // c, c) for c in range(stride, 0, -1) if stride % c == 0]
        rows, columns = min(ways, key=lambda way: max(row_step * way[0], column_step * way[1]))
        row_from += row_step * (offset // columns)
        column_from += column_step * (offset % columns)
        row_step, column_step = row_step * rows, column_step * columns
    return (row_step, row_from), (column_step, column_from)


def _on_quincunx(place: Tensor, strides: tuple[int, ...], offset: int) -> Tensor:
    modulus, shear = quincunx(strides)
    return (place[..., 2] + shear * place[..., 1]) % modulus == offset


@cache
def quincunx(strides: tuple[int, ...]) -> tuple[int, int]:
    """(m, s): "quincunx" leaves the tokens with (column + s * row) % m == offset after all of `strides`.

    Each stage's lattice is the best of those inside the one before; of equal ones the smallest s.
    """
    modulus, shear = 1, 0
    for stride in strides:
        inside = range(shear, modulus * stride, modulus)
        modulus *= stride
        shear = max(inside, key=lambda s: _least_distance(modulus, s))
    return modulus, shear


def _least_distance(modulus: int, shear: int) -> int:
    """Squared length of the shortest vector of the lattice column + shear * row = 0 (mod modulus)."""
    # Two vectors of a lattice of this density are never all longer than sqrt(2 / sqrt(3) modulus).
    rows = range(1, math.isqrt(2 * modulus) + 1)
    columns = ((shear * row) % modulus for row in rows)
    return min(
        [modulus**2] + [row**2 + min(c, modulus - c) ** 2 for row, c in zip(rows, columns, strict=True)],
    )


def _positive(where: str, value: object) -> int:
    return _checks.whole(where, value, 1)
