"""What was promised, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from .summary import Ratio, Summary

HEAD: Final = ("what", "measured", "beside it", "ratio", "target", "", "why")
NOT_MEASURED: Final = "not measured"


@dataclass(frozen=True, slots=True)
class Target:
    """One line: a number, and what it should be.

    Attributes:
        name: what is compared.
        limit: what the value should be.
        at_most: whether it should be no more than that, or no less.
        value: what was measured; None where it was not.
        spread: range over the rounds, where there is one.
        mine: the measured side in words.
        other: what it is compared with, in words.
        why: what keeps a miss from the limit, as far as it was measured, or why nothing was measured.
    """

    name: str
    limit: float
    at_most: bool
    value: float | None = None
    spread: tuple[float, float] | None = None
    mine: str = ""
    other: str = ""
    why: str = ""

    @property
    def verdict(self) -> str:
        """hit, miss, or not measured."""
        if self.value is None:
            return NOT_MEASURED
        reached = self.value <= self.limit if self.at_most else self.value >= self.limit
        return "hit" if reached else "miss"

    @property
    def cells(self) -> list[str]:
        """A row under `HEAD`."""
        limit = f"{'<=' if self.at_most else '>='} {self.limit:g}"
        spread = "" if self.spread is None else f" ({self.spread[0]:.3g}..{self.spread[1]:.3g})"
        value = "" if self.value is None else f"{self.value:.3g}{spread}"
        verdict = self.verdict if self.verdict == "hit" else f"**{self.verdict}**"
        return [self.name, self.mine, self.other, value, limit, verdict, "" if self.verdict == "hit" else self.why]

    def to_json(self) -> dict[str, Any]:
        """Plain types, with the verdict."""
        return {**asdict(self), "verdict": self.verdict}


Show = Callable[[Summary], str]


def compared(
    name: str,
    limit: float,
    *,
    at_most: bool,
    mine: Sequence[float],
    other: Sequence[float],
    show: Show,
    why: Callable[[], str] = str,
) -> Target:
    """The ratio of two lists of one value per round; not measured when either is empty."""
    if not mine or not other:
        return Target(name, limit, at_most, why="ours was not run" if not mine else "kvpress was not run")
    ratio = Ratio.of(mine, other)
    shown = show(Summary.of(mine)), show(Summary.of(other))
    target = Target(name, limit, at_most, ratio.value, (ratio.low, ratio.high), *shown)
    return target if target.verdict == "hit" else replace(target, why=why())


def tally(targets: Iterable[Target]) -> str:
    """How many were hit, missed and not measured."""
    verdicts = [target.verdict for target in targets]
    return ", ".join(f"{verdicts.count(name)} {name}" for name in ("hit", "miss", NOT_MEASURED))
