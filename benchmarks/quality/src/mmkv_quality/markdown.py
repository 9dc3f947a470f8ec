"""Text of pages: tables and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from .statistics import Estimate

BAR = r"\|"
"""In a cell, even within code."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Lines of a table whose first `left` columns are text."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return [f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |" for row in (header, rule, *rows)]


def section(title: str, *blocks: Sequence[str], level: int = 2) -> list[str]:
    """A heading and blocks of lines with an empty line between them; nothing when there is nothing to show."""
    filled = [block for block in blocks if block]
    if not filled:
        return []
    lines = [f"{'#' * level} {title}", ""]
    return lines + [line for block in filled for line in (*block, "")]


def folded(title: str, lines: Sequence[str]) -> list[str]:
    """Lines behind a title that has to be clicked."""
    return [f"<details><summary>{title}</summary>", "", *lines, "", "</details>"]


def percent(x: float, digits: int = 1) -> str:
    """0.123 -> 12.3."""
    return "n/a" if math.isnan(x) else f"{100 * x:.{digits}f}"


def level(x: Estimate | None) -> str:
    """A share in percent, with its error."""
    return "" if x is None else f"{percent(x.mean)} ± {percent(x.error)}"


def change(x: Estimate | None) -> str:
    """A difference in percent points, with its error; bold when it is more than two of them."""
    if x is None or math.isnan(x.mean):
        return "n/a"
    text = f"{100 * x.mean:+.1f} ± {percent(x.error)}"
    return text if x.sign == "=" else f"**{text}**"


def code(text: str) -> str:
    """In the type of code."""
    return f"`{text}`"
