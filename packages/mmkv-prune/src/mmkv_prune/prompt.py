"""Where the vision tokens of a batch of prompts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = int | tuple[int, int, int]
"""Tokens of an image whose grid is not known, or the grid (frames, rows, columns) of its tokens."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A batch of prompts, B rows of N columns, as pruning sees them: what is real, what is vision, and where in it.

    Numbers of images ascend along a row, and so do the tokens of one image in (frame, row, column) order. Padding may
    stand on either side. "Image" is an image or a video throughout.

    Attributes:
        valid: [B, N] bool, real tokens; False is padding.
        image: [B, N] int64, which image of its row a column belongs to, from 0; -1 for text and padding.
        place: [B, N, 3] int64, frame, row and column of the token in its image's grid; -1 where no grid is known.
    """

    valid: Tensor
    image: Tensor
    place: Tensor

    def __post_init__(self) -> None:
        if self.valid.ndim != 2 or self.valid.dtype != torch.bool:
            raise ValueError(f"valid must be bool [B, N], got {self.valid.dtype} {list(self.valid.shape)}")
        shape = self.valid.shape
        for name, tensor, wanted in (("image", self.image, shape), ("place", self.place, (*shape, 3))):
            if tensor.dtype != torch.int64 or tensor.shape != torch.Size(wanted):
                raise ValueError(f"{name} must be int64 {list(wanted)}, got {tensor.dtype} {list(tensor.shape)}")

    @classmethod
    def of(
        cls, vision: Tensor, *, valid: Tensor | None = None, shapes: Sequence[Sequence[Shape]] | None = None
    ) -> Prompt:
        """The prompt whose vision tokens are at `vision`.

        Args:
            vision: [B, N] bool.
            valid: [B, N] bool, real tokens; None: all.
            shapes: For each row, its images in order: a grid (frames, rows, columns) in *tokens* (after a patch merger;
                newline features count as a column of their own), or an int where there is no grid. An image's tokens
                need not be adjacent (timestamps between frames). None: every run of adjacent vision tokens is an image
                without a grid.

        Raises:
            ValueError: Shapes or dtypes that disagree, vision tokens in the padding, or `shapes` that do not add up to
                a row's vision tokens.
        """
        if vision.ndim != 2 or vision.dtype != torch.bool:
            raise ValueError(f"vision must be bool [B, N], got {vision.dtype} {list(vision.shape)}")
        valid = torch.ones_like(vision) if valid is None else valid
        if valid.shape != vision.shape or bool((vision & ~valid).any()):
            raise ValueError("valid must be [B, N] like vision, and every vision token must be valid")
        image, place = _runs(vision) if shapes is None else _shaped(vision, shapes)
        return cls(valid=valid, image=image, place=place)

    @property
    def vision(self) -> Tensor:
        """[B, N] bool, vision tokens."""
        return self.image >= 0

    @property
    def counts(self) -> Tensor:
        """[B] int64, vision tokens of each row."""
        return self.vision.sum(-1)

    def image_sums(self, mask: Tensor) -> Tensor:
        """How many columns of `mask` [B, N] bool each column's image has, [B, N] int64; 0 outside the images."""
        if mask.shape[-1] == 0:
            return mask.long()
        return self._table(mask).gather(-1, self.image + 1)

    def image_ranks(self, mask: Tensor) -> Tensor:
        """The place of each column among those of its image in `mask` [B, N] bool, from 0; meaningful where True."""
        if mask.shape[-1] == 0:
            return mask.long()
        table = self._table(mask)
        before = table.cumsum(-1) - table
        return (mask & self.vision).cumsum(-1) - 1 - before.gather(-1, self.image + 1)

    def _table(self, mask: Tensor) -> Tensor:
        """Columns of `mask` per image, [B, 1 + images] int64; entry 0 stands for what is no image and stays 0."""
        table = mask.new_zeros(len(mask), int(self.image.max()) + 2 if self.image.numel() else 1, dtype=torch.int64)
        return table.scatter_add(-1, self.image + 1, (mask & self.vision).long())


def _runs(vision: Tensor) -> tuple[Tensor, Tensor]:
    before = torch.nn.functional.pad(vision, (1, 0))[:, :-1]
    image = (vision & ~before).cumsum(-1) - 1
    return image.masked_fill(~vision, -1), image.new_full((*image.shape, 3), -1)


def _shaped(vision: Tensor, shapes: Sequence[Sequence[Shape]]) -> tuple[Tensor, Tensor]:
    rows = [[_grid(shape) for shape in row] for row in shapes]
    found = [sum(len(grid) for grid in row) for row in rows]
    if len(rows) != len(vision) or found != vision.sum(-1).tolist():
        raise ValueError(f"shapes make {found} vision tokens in each row, the prompt has {vision.sum(-1).tolist()}")
    image = torch.full(vision.shape, -1)
    place = torch.full((*vision.shape, 3), -1)
    for row, grids in enumerate(rows):
        columns = vision[row].nonzero().flatten().cpu()
        sizes = torch.tensor([len(grid) for grid in grids], dtype=torch.int64)
        image[row, columns] = torch.arange(len(grids)).repeat_interleave(sizes)
        if grids:
            place[row, columns] = torch.cat(grids)
    return image.to(vision.device), place.to(vision.device)


def _grid(shape: Shape) -> Tensor:
    """Places [n, 3] of an image's tokens."""
    sides = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    if len(sides) not in (1, 3) or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"a shape is a number of tokens or (frames, rows, columns), all positive ints, got {shape!r}")
    if len(sides) == 1:
        return torch.full((sides[0], 3), -1)
    return torch.cartesian_prod(*(torch.arange(side) for side in sides))
