"""How the compression of one layer grows with the prompt and with KV heads, on both sides."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from .endtoend import Ask
from .methods import METHODS
from .summary import Ratio, growth_exponent

LENGTHS: Final = tuple(2**k * 1024 for k in range(7))
HEADS: Final = (2, 4, 8)
RATIO: Final = 0.5
REPEATS: Final = 2
_NEAR: Final = 1e-3

Cell = tuple[str, str, int, int]  # side, method, heads, length


def jobs(
    round_: int, sides: Sequence[str], lengths: Sequence[int], heads: Sequence[int], seed: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(side, job) of one round; both sides after each other on the same tensors."""
    order = sides if round_ % 2 == 0 else sides[::-1]
    for count in heads:
        for length in lengths:
            for side in order:
                methods = [m.name for m in METHODS if m.layer and (m.shared or side == "ours")]
                job = {"kind": "layer", "heads": count, "length": length, "methods": methods}
                yield side, job | {"repeats": REPEATS, "ratio": RATIO, "seed": seed}


def measure(ask: Ask, given: Iterator[tuple[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One round."""
    return [
        {"side": side, "method": method, "heads": job["heads"], "length": job["length"], **one}
        for side, job in given
        for method, one in ask(side, job).items()
    ]


def cells(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> dict[Cell, list[float]]:
    """Side, method, heads and length -> seconds, the median of each round's repeats."""
    found: dict[Cell, list[float]] = {}
    for round_ in rounds:
        for one in round_:
            key = one["side"], one["method"], one["heads"], one["length"]
            found.setdefault(key, []).append(statistics.median(one["seconds"]))
    return found


def check(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Both sides must have kept the same, by its count and the norm of its keys.

    Raises:
        ValueError: they have not.
    """
    for round_ in rounds:
        by = {(one["side"], one["method"], one["heads"], one["length"]): one for one in round_}
        for (side, *rest), mine in by.items():
            other = by.get(("peer", *rest)) if side == "ours" else None
            if other is None:
                continue
            masks = other["kept"] == mine["kept"] and rest[0] == "adakv"  # kvpress holds what it masks
            apart = 0.0 if masks else abs(mine["norm"] / other["norm"] - 1)
            if other["kept"] != mine["kept"] or apart > _NEAR:
                raise ValueError(f"{rest}: kept {mine['kept']} and {other['kept']}, norms apart by {apart:.1e}")


def exponents(found: Mapping[Cell, Sequence[float]]) -> dict[tuple[str, str, int], float]:
    """Side, method and heads -> exponent of the growth with length, of medians."""
    lines: dict[tuple[str, str, int], list[tuple[int, float]]] = {}
    for (side, method, heads, length), seconds in found.items():
        lines.setdefault((side, method, heads), []).append((length, statistics.median(seconds)))
    return {key: growth_exponent(*zip(*points, strict=True)) for key, points in lines.items() if len(points) > 1}


def rows(found: Mapping[Cell, Sequence[float]]) -> Iterator[list[str]]:
    """Method and heads, exponents of both sides, and both times at the shortest and the longest."""
    powers = exponents(found)
    lengths = sorted({length for *_, length in found})
    for side, method, heads in powers:
        if side != "ours":
            continue
        peer = powers.get(("peer", method, heads))
        ends = [f"{1000 * statistics.median(found[side, method, heads, n]):.2f}" for n in (lengths[0], lengths[-1])]
        other = [_beside(found, method, heads, n) for n in (lengths[0], lengths[-1])]
        yield [
            method,
            str(heads),
            f"{powers[side, method, heads]:.2f}",
            "none beside it" if peer is None else f"{peer:.2f}",
            *(cell for pair in zip(ends, other, strict=True) for cell in pair),
        ]


def _beside(found: Mapping[Cell, Sequence[float]], method: str, heads: int, length: int) -> str:
    mine, other = (found.get((side, method, heads, length)) for side in ("ours", "peer"))
    return "" if mine is None or other is None else Ratio.of(mine, other).text()
