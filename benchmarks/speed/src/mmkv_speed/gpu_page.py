"""The page about one GPU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from .gpu_operators import bandwidth, pick, share
from .gpu_targets import targets
from .markdown import picture, section, table
from .operators import without_case
from .summary import Ratio, Summary
from .targets import HEAD, tally

_NOT_MEASURED: Final = "Not measured."
_TINY: Final = """**Not a measurement.** Tiny shapes, to show that the script runs from end to end. No figure below says
anything about speed."""
_OPERATORS: Final = """The public functions with `impl` as named, one layer, {dtype}, window 32, half of the entries
gathered, 64 dense entries after ragged ones. Medians; every call starts with cold caches. Bytes are what the contract
says is read and written. The device copies {bandwidth:.0f} GB/s (read and written) and multiplies {rate:.1f} TFLOP/s;
the last column is the share of the nearer of these two limits. Targets were set for an H200."""
_MODELS: Final = """Full geometry, random weights, one prompt of random text tokens (no vision tower), {pipeline}.
*Inside* is the time within `CompressedLayer.observe` on the device; *whole difference* is the plain difference of two
prefills. The padded cache holds the same entries in a dense tensor, every head as long as the longest, behind SDPA with
a mask. *Most held* counts the storages of the cache around every layer's compression; *allocated* is the allocator's
peak beyond the weights, activations included. Step times are wall time of a whole step, launches included, right
after the prompt."""
_CELL: Final = ("geometry", "entries", "batch", "operator", "heads", "impl", "ms", "GB/s", "% of copy", "% of limit")


def render(found: Mapping[str, Any], facts: Mapping[str, Any], drawn: str | None) -> str:
    """The page as markdown; `drawn` names the picture beside it."""
    goals = targets(found, tiny=facts["tiny"])
    lines = [
        f"# Speed on {facts['device']}",
        "",
        *([_TINY, ""] if facts["tiny"] else []),
        _facts(facts),
        "",
        *section("Targets", f"{tally(goals)}.", table(HEAD, (goal.cells for goal in goals))),
        *_checks(found["checks"]),
        *_operators(found, facts, drawn),
        *_models(found["models"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _facts(facts: Mapping[str, Any]) -> str:
    said = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    return f"{facts['device']}; host {facts['host']}. {said}. {facts['wall']:.0f} s of wall time. `{facts['command']}`."


def _checks(found: Mapping[str, Any] | None) -> list[str]:
    title = "Kernels against their references"
    if found is None:
        return section(title, _NOT_MEASURED)
    checks = found["checks"]
    failed = [check for check in checks if not check["passed"]]
    skipped = f"; {found['skipped']} skipped, no time left" if found["skipped"] else ""
    text = f"{len(checks) - len(failed)} of {len(checks)} within tolerance{skipped}."
    if found["why"]:
        text = f"Not checked: {found['why']}."
    by: dict[str, list[float]] = {}
    for check in checks:
        by.setdefault(check["operator"], []).append(math.inf if check["error"] is None else check["error"])
    rows = ([name, str(len(errors)), f"{max(errors):.2g}"] for name, errors in by.items())
    tests = f"The kernels' own tests on this device: {found.get('tests', 'not run')}."
    return section(
        title,
        text,
        table(("operator", "shapes", "greatest error, in tolerances"), rows) if by else [],
        table(("failed", "on"), ([check["operator"], check["what"]] for check in failed)) if failed else [],
        tests,
    )


def _operators(found: Mapping[str, Any], facts: Mapping[str, Any], drawn: str | None) -> list[str]:
    cells, machine = found["operators"], found["machine"]
    if not cells:
        return section("Operators", _NOT_MEASURED)
    text = _OPERATORS.format(dtype=facts["dtype"], bandwidth=machine["bandwidth"] / 1e9, rate=machine["rate"] / 1e12)
    missing = sorted({cell["operator"] for cell in cells if cell["impl"] == "reference"})
    missing = [name for name in missing if not any(c["operator"] == name and c["impl"] == "triton" for c in cells)]
    notes = [f"No kernel besides the reference: {', '.join(missing)}."] if missing else []
    notes += [f"No case, not measured: {', '.join(without_case())}."] if without_case() else []
    return section(
        "Operators",
        text,
        table(_CELL, _cell_rows(pick(cells), machine)),
        *notes,
        *_left_out(cells),
        picture(drawn, "Bandwidth of operators"),
    )


def _cell_rows(cells: Sequence[dict[str, Any]], machine: dict[str, float]) -> Iterator[list[str]]:
    by = ("geometry", "entries", "batch", "operator", "skew", "impl")
    for c in sorted(cells, key=lambda c: [c[name] for name in by]):
        time = f"{1000 * statistics.median(c['seconds']):.3f}"
        shares = [f"{100 * share(c, machine, roofline=both):.0f}" for both in (False, True)]
        heads = "equal" if c["skew"] == 1 else f"{c['skew']}:1"
        yield [
            c["geometry"], f"{c['entries']:,}", str(c["batch"]), c["operator"], heads, c["impl"], time,
            f"{bandwidth(c) / 1e9:.0f}", *shares,
        ]  # fmt: skip


def _left_out(cells: Sequence[dict[str, Any]]) -> list[str]:
    """One line for every reason."""
    by: dict[str, list[str]] = {}
    for c in cells:
        if c["why"]:
            where = f"{c['operator']} ({c['impl']}, {c['geometry']}, {c['entries']:,} x {c['batch']})"
            by.setdefault(c["why"], []).append(where)
    return [f"Not measured, {why}: {', '.join(names)}." for why, names in by.items()]


def _models(models: Sequence[dict[str, Any]]) -> list[str]:
    if not models:
        return section("Whole models", _NOT_MEASURED)
    whole = [model for model in models if not model["why"]]
    left = [f"{model['geometry']}: not measured, {model['why']}." for model in models if model["why"]]
    if not whole:
        return section("Whole models", *left)
    head = ("", *(model["geometry"] for model in whole))
    rows = [[label, *(of(model) for model in whole)] for label, of in _ROWS]
    return section("Whole models", _MODELS.format(pipeline=whole[0]["pipeline"]), table(head, rows), *left)


def _ms(name: str) -> Any:
    return lambda model: Summary.of(model[name]).text(1000, 2)


def _mib(name: str) -> Any:
    return lambda model: f"{model[name] / 2**20:,.1f}"


def _beside(mine: str, other: str) -> Any:
    def text(model: dict[str, Any]) -> str:
        return f"{statistics.median(model[mine]) / statistics.median(model[other]):.3f}"

    return text


def _inside_share(model: dict[str, Any]) -> str:
    return f"{100 * statistics.median(model['inside']) / statistics.median(model['plain_prefill']):.2f}"


def _difference(model: dict[str, Any]) -> str:
    pairs = zip(model["prefill"], model["plain_prefill"], strict=False)
    mine, other = zip(*pairs, strict=True)
    return Ratio.of(mine, other).text(3)


_ROWS: Final = (
    ("prompt, tokens", lambda model: f"{model['prompt']:,}"),
    ("kept per KV head, mean", lambda model: f"{model['budget']:,}"),
    ("weights, MiB", _mib("weights")),
    ("prefill, stock, ms", _ms("plain_prefill")),
    ("prefill, compressing, ms", _ms("prefill")),
    ("whole difference, compressing over stock", _difference),
    ("inside, ms", _ms("inside")),
    ("inside, % of prefill", _inside_share),
    ("step, full cache, ms", _ms("plain_step")),
    ("step, compressed, ms", _ms("step")),
    ("step, padded and SDPA, ms", _ms("padded_step")),
    ("step, compressed over full", _beside("step", "plain_step")),
    ("step, compressed over padded", _beside("step", "padded_step")),
    ("cache, full, MiB", _mib("plain_bytes")),
    ("cache, compressed, MiB", _mib("bytes")),
    ("cache, padded, MiB", _mib("padded_bytes")),
    ("most held while compressing, MiB", _mib("cache_peak")),
    ("one full layer + budget, MiB", _mib("allowed")),
    ("allocated, stock, MiB (0: not known)", _mib("plain_peak")),
    ("allocated, compressing, MiB (0: not known)", _mib("peak")),
)
