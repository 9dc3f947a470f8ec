"""What was measured, cell by cell, as the page's JSON holds it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .cells import Cell, by_setting
from .measure import Block
from .outcomes import Floats, Outcomes, packed, unpacked
from .store import Unit, WorkFolder


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """A cell over all its samples.

    Attributes:
        honest: Every answer token from the compressed cache.
        usual: 0 or 1 `[n]`, exact match with the first token from the dense prefill; None when the question never saw
            a dense cache.
        held: Mean bytes per request after compression.
        full: Mean bytes per request of a stock cache.
        seconds: Of the CPU, for all samples, without the prefill.
    """

    honest: Outcomes
    usual: Floats | None
    held: float
    full: float
    seconds: float

    @classmethod
    def joined(cls, blocks: Sequence[Block]) -> Result:
        """The batches of a cell, in order."""
        honest = Outcomes.joined([block.honest for block in blocks])
        usual = [block.usual.exact for block in blocks if block.usual is not None]
        count = len(honest.right)
        held, full, seconds = (sum(getattr(block, name) for block in blocks) for name in ("held", "full", "seconds"))
        return cls(honest, np.concatenate(usual) if usual else None, held / count, full / count, seconds)

    def agrees(self, other: Result) -> bool:
        """Whether both have the same answers and held the same bytes."""
        mine, its = self.to_json(), other.to_json()
        return all(mine[name] == its[name] for name in ("honest", "usual", "held", "full"))

    def to_json(self) -> dict[str, Any]:
        """Plain types."""
        usual = None if self.usual is None else packed(self.usual > 0)
        sizes = {"held": round(self.held), "full": round(self.full), "seconds": round(self.seconds, 2)}
        return {"honest": self.honest.to_json(), "usual": usual, **sizes}

    @classmethod
    def of_json(cls, data: dict[str, Any]) -> Result:
        """What `to_json` gave."""
        honest, bits = Outcomes.of_json(data["honest"]), data["usual"]
        usual = None if bits is None else unpacked(bits, [len(honest.right)]).astype(np.float64)
        return cls(honest, usual, data["held"], data["full"], data["seconds"])


def collect(folder: WorkFolder, cells: Iterable[Cell], blocks: range) -> dict[str, Result]:
    """Key -> result of every cell whose batches are all finished."""
    found: dict[str, Result] = {}
    for setting, its in by_setting(cells).items():
        parts = [{block.cell: block for block in folder.blocks(Unit(setting, number))} for number in blocks]
        whole = (cell.key for cell in its if all(cell.key in part for part in parts))
        found |= {key: Result.joined([part[key] for part in parts]) for key in whole}
    return found
