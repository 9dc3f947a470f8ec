"""Whole requests of both sides: what compression costs, what stays in memory, how fast decoding is afterwards."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from .methods import BY_NAME, METHODS
from .sides import NONE
from .summary import Summary
from .targets import Target, compared

CEILING: Final = "ceiling"
SHORT: Final = 16
"""Tokens of the prompt behind the ceiling: a step reads next to nothing but weights."""
BARE: Final = "random"
"""A method that looks at no keys: what it costs is choosing and copying."""
_APART: Final = 1e-3
_POSITIONS: Final = 1.01
"""Beside keys and values we hold 4 bytes per pair for its position, and both hold what was decoded."""

Key = tuple[str, str, float]  # side, method, ratio removed
Answers = Mapping[Key, Sequence[dict[str, Any]]]
Ask = Callable[[str, dict[str, Any]], dict[str, Any]]


def jobs(round_: int, ratios: Sequence[float], sides: Sequence[str]) -> Iterator[Key]:
    """Every configuration once; the sides alternate, and so does which of them goes first.

    The order is drawn anew for every round: what a run finds in the allocator depends on the one before it.
    """
    order = sides if round_ % 2 == 0 else sides[::-1]
    wanted = [(NONE, 0.0), (CEILING, 0.0), *((m.name, r) for r in ratios for m in METHODS)]
    for method, ratio in random.Random(round_).sample(wanted, len(wanted)):
        yield from ((side, method, ratio) for side in order if side == "ours" or _peer_has(method))


def _peer_has(method: str) -> bool:
    return method not in BY_NAME or BY_NAME[method].shared


def measure(ask: Ask, keys: Iterator[Key], steps: int) -> list[dict[str, Any]]:
    """One round."""
    found = []
    for side, method, ratio in keys:
        job: dict[str, Any] = {"kind": "request", "method": method, "ratio": ratio, "steps": steps}
        if method == CEILING:
            job |= {"method": NONE, "length": SHORT}
        found.append({"side": side, "method": method, "removed": ratio, "run": ask(side, job)})
    return found


def answers(rounds: Sequence[Sequence[Mapping[str, Any]]]) -> Answers:
    """Configuration -> its run of every round."""
    found: dict[Key, list[dict[str, Any]]] = {}
    for round_ in rounds:
        for one in round_:
            found.setdefault((one["side"], one["method"], one["removed"]), []).append(one["run"])
    return found


def check(given: Answers) -> None:
    """The two sides must have done the same work.

    Raises:
        ValueError: they have not.
    """
    for (side, method, ratio), runs in given.items():
        other = given.get(("peer", method, ratio), ())
        if side == "ours" and other and (method not in BY_NAME or BY_NAME[method].same_counts):
            counts = runs[0]["attended"], other[0]["attended"]
            if counts[0] != counts[1]:
                raise ValueError(f"{method} at {ratio}: {counts[0]} and {counts[1]} KV pairs are attended to")
    plain = [given[(side, NONE, 0.0)][0]["logits"] for side in ("ours", "peer") if (side, NONE, 0.0) in given]
    apart = max((abs(a - b) for a, b in zip(*plain, strict=True)), default=0.0) if len(plain) == 2 else 0.0
    if apart > _APART:
        raise ValueError(f"the uncompressed models differ by {apart} in their logits")


def overheads(given: Answers, key: Key, part: str = "strict") -> list[float]:
    """Seconds of overhead per round.

    strict: time inside the compression plus what the first step takes longer than an uncompressed one, 0 when it is
    faster; judged: the same with credit for a faster step; inside, first: the two parts; total: the plain difference of
    prefill plus first step, to check that nothing was missed.
    """
    runs, base = given.get(key, ()), given.get((key[0], NONE, 0.0), ())
    if not runs:
        return []
    first = statistics.median(run["first"] for run in base)
    return [_parts(run, plain, first)[part] for run, plain in zip(runs, base, strict=True)]


def _parts(run: Mapping[str, Any], plain: Mapping[str, Any], first: float) -> dict[str, float]:
    """One run's overhead in all its readings; `first` is what the first step takes without compression."""
    later = run["first"] - first
    return {
        "inside": run["inside"],
        "first": later,
        "judged": run["inside"] + later,
        "strict": run["inside"] + max(0.0, later),
        "total": run["prefill"] + run["first"] - plain["prefill"] - plain["first"],
    }


def speeds(given: Answers, key: Key) -> list[float]:
    """Tokens per second of CPU time, per round; the first step belongs to the overhead."""
    return [1 / statistics.median(run["steps"]) for run in given.get(key, ())]


def held(given: Answers, key: Key) -> list[float]:
    """Bytes held after the first step, per round."""
    return [float(run["bytes"]) for run in given.get(key, ())]


def ratios_of(given: Answers) -> list[float]:
    """Shares removed, ascending."""
    return sorted({ratio for _, method, ratio in given if method in BY_NAME})


def targets(given: Answers) -> list[Target]:
    """Everything that was promised of requests."""
    ratios = ratios_of(given) or [0.5, 0.9]
    found = [_overhead(given, m.name, m.name, r, 0.5) for m in METHODS if m.shared for r in ratios]
    found += [_overhead(given, "adakv+mixkv+bacon", "adakv", r, 1.0) for r in ratios]
    limits = {0.5: 1.9, 0.9: 3.0}
    found += [_decode(given, r, limits[r]) for r in ratios if r in limits]
    found += [_like_uniform(given, r) for r in ratios]
    return found + [_bytes(given, r) for r in ratios]


def _overhead(given: Answers, method: str, other: str, ratio: float, limit: float) -> Target:
    mine, beside = (overheads(given, key) for key in (("ours", method, ratio), ("peer", other, ratio)))

    def why() -> str:
        over = 1000 * (statistics.median(mine) - limit * statistics.median(beside))
        bare = overheads(given, ("ours", BARE, ratio))
        base = f"; our {BARE}, which looks at no keys, takes {1000 * statistics.median(bare):.1f} ms" if bare else ""
        return f"{over:.1f} ms too much over all layers{'' if method == BARE else base}"

    name = f"overhead, {method} / kvpress {other}, {ratio:g} removed"
    return compared(name, limit, at_most=True, mine=mine, other=beside, show=milliseconds, why=why)


def _decode(given: Answers, ratio: float, limit: float) -> Target:
    mine, beside = (speeds(given, (side, "adakv", ratio)) for side in ("ours", "peer"))

    def why() -> str:
        return even_nothing(speeds(given, ("ours", CEILING, 0.0)), mine, beside)

    name = f"decode, adakv / kvpress adakv, {ratio:g} removed"
    return compared(name, limit, at_most=False, mine=mine, other=beside, show=per_second, why=why)


def even_nothing(ceiling: Sequence[float], mine: Sequence[float], beside: Sequence[float]) -> str:
    """How much of a ratio of decode rates no cache method can give, from rates per round."""
    if not ceiling:
        return "the ceiling was not measured"
    most, ours, other = (statistics.median(x) for x in (ceiling, mine, beside))
    return (
        f"even a cache of nothing gives {most / other:.2f} times ({most:.1f} tok/s): of our {1000 / ours:.1f} ms a "
        f"step, {1000 / most:.1f} ms do not read the cache"
    )


def _like_uniform(given: Answers, ratio: float) -> Target:
    mine, beside = (speeds(given, ("ours", method, ratio)) for method in ("adakv", "snapkv"))

    def why() -> str:
        longer = 1000 * (1 / statistics.median(mine) - 1 / statistics.median(beside))
        return f"heads of different lengths take {longer:.1f} ms a step more than equal ones"

    name = f"decode, adakv / our snapkv, {ratio:g} removed"
    return compared(name, 0.9, at_most=False, mine=mine, other=beside, show=per_second, why=why)


def _bytes(given: Answers, ratio: float) -> Target:
    mine, beside = (held(given, (side, "adakv", ratio)) for side in ("ours", "peer"))
    limit = round((1 - ratio) * _POSITIONS, 4)
    name = f"bytes, adakv / kvpress adakv, {ratio:g} removed"
    return compared(name, limit, at_most=True, mine=mine, other=beside, show=mebibytes)


def milliseconds(x: Summary) -> str:
    """Of seconds."""
    return x.text(1000, 1) + " ms"


def per_second(x: Summary) -> str:
    """Of tokens per second."""
    return x.text(1, 1) + " tok/s"


def mebibytes(x: Summary) -> str:
    """Of bytes."""
    return f"{x.median / 2**20:.2f} MiB"
