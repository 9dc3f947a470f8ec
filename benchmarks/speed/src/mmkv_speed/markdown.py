"""Tables and sections of pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table and an empty one."""
    lines = (head, ["---"] * len(head), *rows)
    return ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines] + [""]


def section(title: str, *blocks: str | Sequence[str]) -> list[str]:
    """A heading and its blocks: paragraphs, or lines of a table."""
    lines = [f"## {title}", ""]
    for block in blocks:
        lines += [block, ""] if isinstance(block, str) else block
    return lines


def picture(name: str | None, caption: str) -> list[str]:
    """A picture beside the page, or nothing."""
    return [] if name is None else [f"![{caption}]({name})", ""]
