"""What was promised of an H200, beside what a device gave."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .gpu_operators import SKEW, pick, share
from .targets import Target
from .whole import share as share_of_prefill

AT: Final = {"entries": 32768, "batch": 8, "impl": "triton"}
_TINY: Final = "tiny shapes measure nothing"
_BANDWIDTHS: Final = (("key_statistics", 0.7), ("gather_kv", 0.7))
Cells = Sequence[dict[str, Any]]


def targets(found: Mapping[str, Any], *, tiny: bool) -> list[Target]:
    """All of them; of two geometries the worse one counts, and tiny shapes reach or miss nothing."""
    goals = _goals(found)
    return [Target(goal.name, goal.limit, goal.at_most, why=_TINY) for goal in goals] if tiny else goals


def _goals(found: Mapping[str, Any]) -> list[Target]:
    cells, machine, models = found["operators"], found["machine"], found["models"]
    return [
        *(_of_copy(cells, machine, name, limit, 1) for name, limit in _BANDWIDTHS),
        _of_copy(cells, machine, "window_attention", 0.6, 1, roofline=True),
        _of_copy(cells, machine, "ragged_attention", 0.8, SKEW),
        _skewed(cells),
        _prefill(models),
        _memory(models),
    ]


def _of_copy(cells: Cells, machine: Any, name: str, limit: float, skew: int, *, roofline: bool = False) -> Target:
    what = "the nearer limit" if roofline else "copy bandwidth"
    label = f"{name} at {AT['entries']:,} entries, batch {AT['batch']}{', heads 16:1' if skew > 1 else ''}, of {what}"
    there = pick(cells, operator=name, skew=skew, **AT)
    if not there or machine is None:
        return Target(label, limit, False, why=_absent(cells, name))
    each = {cell["geometry"]: share(cell, machine, roofline=roofline) for cell in there}
    why = ""
    if roofline:
        products = [cell["flops"] / machine["rate"] > cell["bytes"] / machine["bandwidth"] for cell in there]
        why = f"nearer limit: {'matrix products' if any(products) else 'bytes'}"
    return Target(label, limit, False, min(each.values()), mine=_each(each, "{:.0%}"), why=why)


def _skewed(cells: Cells) -> Target:
    label = "ragged_attention, time with heads 16:1 over equal heads"
    skewed, equal = (_by_geometry(pick(cells, operator="ragged_attention", skew=s, **AT)) for s in (SKEW, 1))
    each = {name: skewed[name] / equal[name] for name in skewed if name in equal}
    if not each:
        return Target(label, 1.1, True, why=_absent(cells, "ragged_attention"))
    return Target(label, 1.1, True, max(each.values()), mine=_each(each, "{:.3f}"))


def _by_geometry(cells: Cells) -> dict[str, float]:
    return {cell["geometry"]: statistics.median(cell["seconds"]) for cell in cells}


def _absent(cells: Cells, name: str) -> str:
    reasons = {cell["why"] for cell in cells if cell["operator"] == name and cell["impl"] == "triton"} - {""}
    return ", ".join(sorted(reasons)) or "no kernel was run at this size"


def _prefill(models: Cells) -> Target:
    label = "adakv+mixkv+bacon, 32k prompt, time inside the compression over prefill"
    each = {model["geometry"]: share_of_prefill(model) for model in models if not model["why"]}
    if not each:
        return Target(label, 0.01, True, why=_reasons(models))
    milliseconds = [1000 * statistics.median(model["inside"]) for model in models if not model["why"]]
    why = f"{max(milliseconds):.1f} ms inside"
    return Target(label, 0.01, True, max(each.values()), mine=_each(each, "{:.2%}"), why=why)


def _memory(models: Cells) -> Target:
    label = "adakv+mixkv+bacon, most bytes the cache ever holds over one full layer + budget"
    each = {model["geometry"]: model["cache_peak"] / model["allowed"] for model in models if not model["why"]}
    if not each:
        return Target(label, 1.0, True, why=_reasons(models))
    return Target(label, 1.0, True, max(each.values()), mine=_each(each, "{:.3f}"))


def _reasons(models: Cells) -> str:
    return ", ".join(sorted({model["why"] for model in models})) or "not run"


def _each(values: Mapping[str, float], form: str) -> str:
    return ", ".join(f"{name} {form.format(value)}" for name, value in values.items())
