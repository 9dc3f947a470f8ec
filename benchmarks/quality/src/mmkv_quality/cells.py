"""What is measured: one method at one budget in one setting is a cell."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from .rule import WINDOW

_SIGNED: Final = ("keydiff", "knorm")
"""Scorers with negative scores; see `rule`."""


@dataclass(frozen=True, slots=True, order=True)
class Setting:
    """What is asked of which model; one prefill serves all cells of a setting.

    Attributes:
        model: Name of the checkpoint.
        task: What is asked.
        arrangement: How the evidence lies on the page.
        suffix: Filler tokens between the question and the answer.
        ink: How much of the page is written on.
        when: "after": the cache is compressed when the whole prompt has been read; "before": when the images have
            been read and the question has not, which then runs on the compressed cache without a second eviction.
    """

    model: str
    task: str = "value"
    arrangement: str = "horizontal"
    suffix: int = 8
    ink: str = "normal"
    when: str = "after"

    @property
    def key(self) -> str:
        """A stable name, without spaces."""
        return f"{self.model}/{self.task}/{self.arrangement}/suffix{self.suffix}/{self.ink}/{self.when}"

    @classmethod
    def of(cls, key: str) -> Setting:
        """The setting of that key.

        Raises:
            ValueError: It is none.
        """
        parts = key.split("/")
        if len(parts) != 6 or not parts[3].startswith("suffix"):
            raise ValueError(f"{key!r} is not the key of a setting")
        model, task, arrangement, suffix, ink, when = parts
        return cls(model, task, arrangement, int(suffix.removeprefix("suffix")), ink, when)


@dataclass(frozen=True, slots=True)
class Method:
    """A score, how its budget is shared, what is wrapped around it, and what happens before anything is evicted.

    Attributes:
        score: A base score; "" if nothing is evicted.
        share: "uniform", "pyramidkv", "adakv" or "sparsemm".
        wraps: From the outside in, with their settings, e.g. `("mixkv", "bacon(depth=2)")`.
        stages: Names of `stages`: what is dropped or shared while the prompt is read.
    """

    score: str = "snapkv"
    share: str = "uniform"
    wraps: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As in the text form of a pipeline, without the window; stages by their names."""
        return " | ".join([*self.stages, *([self._evicting] if self.score else [])])

    @property
    def _evicting(self) -> str:
        parts = [*((self.share,) if self.share != "uniform" else ()), *self.wraps]
        return "+".join(parts if self.score == "snapkv" and parts else [*parts, self.score])

    @property
    def base(self) -> Method:
        """The same without wraps."""
        return replace(self, wraps=())

    def text(self, window: int, table: Path | None = None) -> str:
        """The pipeline as `Pipeline.parse` reads it.

        Args:
            window: Latest tokens that are protected; of SnapKV also the queries looked at.
            table: Visual-head scores of the model, for SparseMM.
        """
        share = {"sparsemm": f"sparsemm({str(table)!r})", "uniform": None}.get(self.share, self.share)
        if self.share == "adakv" and self.score in _SIGNED:
            share = "adakv(normalize=false)"
        score = [f"snapkv(window={window})"] if self.score == "snapkv" else [self.score, f"select(recent={window})"]
        return "+".join([*([share] if share else []), *self.wraps, *score])


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of the benchmark and its error.

    Attributes:
        setting: What is asked.
        method: None is the full cache.
        budget: KV pairs per KV head, window included; 0 for the full cache.
        window: Latest tokens that are protected.
    """

    setting: Setting
    method: Method | None = None
    budget: int = 0
    window: int = WINDOW

    @property
    def key(self) -> str:
        """A stable name: the setting's key, then method, budget and window."""
        if self.method is None:
            return f"{self.setting.key}|full"
        return f"{self.setting.key}|{self.method.name}|{self.budget}|w{self.window}"


def by_setting(cells: Iterable[Cell]) -> dict[Setting, tuple[Cell, ...]]:
    """The cells of each setting, in their order."""
    found: dict[Setting, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.setting, []).append(cell)
    return {setting: tuple(its) for setting, its in found.items()}
