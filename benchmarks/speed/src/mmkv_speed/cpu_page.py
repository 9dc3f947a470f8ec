"""The page about the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from . import endtoend, growth, imports, limits
from .endtoend import CEILING, Answers, Key, overheads, speeds
from .markdown import picture, section, table
from .methods import BY_NAME
from .operators import Shape, without_case
from .processes import NAMES
from .sides import NONE
from .summary import Summary
from .targets import HEAD, Target, tally

_NOT_MEASURED: Final = "Not measured."
_COLUMNS: Final = (
    "", "method", "removed", "prefill s", "inside ms", "first ms", "overhead ms", "with credit ms", "total ms",
    "decode tok/s", "MiB after first step", "KV pairs attended / held",
)  # fmt: skip
_JUDGED: Final = """*Overhead* is the time inside the compression (mmkv: opening and closing the session, making the
cache, and `CompressedLayer.observe`, which compresses; kvpress: opening the press, and its forward hook) plus what the
first decode step takes longer than the median uncompressed one of the same process, where work put off would show.
*With credit* counts a faster first step, the cache being smaller, in favour. *total* is the plain difference of prefill
plus first step from the uncompressed run of the same round: it contains everything, but two prefills of the same thing
differ by more than the overhead. Methods without a second line are ours alone: none beside it. kvpress's H2O
(ObservedAttention) needs eager attention and is left out."""
_CEILING: Final = """The *ceiling* is the same model's step after a prompt of {short} tokens, over a stock cache: what a
step costs that no cache method can save. A ratio of decode rates is bounded by ceiling over the other's rate."""
_GROWTH: Final = """One layer, two query heads per KV head, head size 64, float32, half of the entries removed, the same
tensors on both sides; mmkv: `Observation`, `Round.decide`, `compact`; kvpress: the press's `compress`, which also
projects the window's queries, as it must. kvpress's AdaKV copies nothing: it masks. Exponents are of time over N from
{low:,} to {high:,}: 1 is linear."""
_LIMITS: Final = """The reference implementations, one thread, {shape}. Bytes are what the operator's contract says it
reads and writes; the share is of the bandwidth at which the same thread copies memory in the same round
({bandwidth} GB/s, read and written), and of the nearer of two limits, that bandwidth and the measured rate of matrix
products ({rate} GFLOP/s)."""
_IMPORTS: Final = """CPU seconds of `import`, each in a fresh process, after what it stands on has been imported."""


def render(found: Mapping[str, Any], facts: Mapping[str, Any], shape: Shape, pictures: Mapping[str, str]) -> str:
    """The page as markdown.

    Args:
        found: part -> finished rounds.
        facts: of the run.
        shape: of the operators.
        pictures: part -> name of its file.
    """
    targets = all_targets(found)
    lines = [
        "# Speed on the CPU, beside kvpress and beside the machine",
        "",
        _facts(facts, {part: len(rounds) for part, rounds in found.items()}),
        "",
        "Medians over rounds, lowest and highest in brackets. The spread of a ratio is that of the rounds' own ratios.",
        "",
        *section("Targets", f"{tally(targets)}.", table(HEAD, (target.cells for target in targets))),
        *_requests(endtoend.answers(found["requests"]), pictures),
        *_growth(found["growth"], pictures),
        *_limits(found["limits"], shape, pictures),
        *_imports(found["imports"], pictures),
    ]
    return "\n".join(lines).rstrip() + "\n"


def all_targets(found: Mapping[str, Any]) -> list[Target]:
    """Everything promised of CPUs."""
    return [*endtoend.targets(endtoend.answers(found["requests"])), imports.target(found["imports"])]


def _facts(facts: Mapping[str, Any], rounds: Mapping[str, int]) -> str:
    said = "; ".join(
        f"{side} side: {', '.join(f'{name} {number}' for name, number in its.items())}"
        for side, its in facts["versions"].items()
    )
    counts = ", ".join(f"{count} of {part}" for part, count in rounds.items())
    note = f", {facts['note']}" if facts["note"] else ""
    return (
        f"{facts['machine']} when it ended{note}. {said}. Seed {facts['seed']}; interleaved rounds: {counts}; "
        f"{facts['steps']} decode steps, prompt {facts['prompt']}, one thread, CPU seconds of that thread; "
        f"{facts['wall']:.0f} s of wall time; code `{facts['code'][:12]}`. `{facts['command']}`."
    )


def _requests(given: Answers, pictures: Mapping[str, str]) -> list[str]:
    if not given:
        return section("Requests", _NOT_MEASURED)
    elsewhere = max(run["elsewhere"] for runs in given.values() for run in runs)
    return section(
        "Requests",
        _JUDGED,
        f"CPU time of other threads is at most {1000 * elsewhere:.0f} ms in any run.",
        table(_COLUMNS, _request_rows(given)),
        _CEILING.format(short=endtoend.SHORT),
        table(("", "tok/s", "ms a step"), _ceilings(given)),
        picture(pictures.get("overhead"), "What compression costs"),
        picture(pictures.get("decode"), "Decoding afterwards"),
    )


def _request_rows(given: Answers) -> Iterator[list[str]]:
    names = [NONE, CEILING, *BY_NAME]
    for key in sorted(given, key=lambda key: (key[2], names.index(key[1]), key[0])):
        if key[1] != CEILING:
            yield _request_row(given, key)


def _request_row(given: Answers, key: Key) -> list[str]:
    side, method, ratio = key
    runs, plain = given[key], method == NONE
    cells = [NAMES[side], method, "-" if plain else f"{ratio:.1f}"]
    cells.append(Summary.of([run["prefill"] for run in runs]).text(1, 2))
    parts = ("inside", "first", "strict", "judged", "total")
    cells += ["-" if plain else Summary.of(overheads(given, key, part)).text(1000) for part in parts]
    cells += [Summary.of(speeds(given, key)).text(1, 1), f"{runs[0]['bytes'] / 2**20:.2f}"]
    return [*cells, f"{runs[0]['attended']:,} / {runs[0]['stored']:,}"]


def _ceilings(given: Answers) -> Iterator[list[str]]:
    for side, name in NAMES.items():
        rates = speeds(given, (side, CEILING, 0.0))
        if rates:
            yield [name, Summary.of(rates).text(1, 1), Summary.of([1 / x for x in rates]).text(1000, 1)]


def _growth(rounds: Sequence[Any], pictures: Mapping[str, str]) -> list[str]:
    if not rounds:
        return section("Growth with the prompt and with heads", _NOT_MEASURED)
    cells = growth.cells(rounds)
    lengths = sorted({length for *_, length in cells})
    ends = lengths[0], lengths[-1]
    times = [f"{what} {n:,}" for n in ends for what in ("ms at", "beside kvpress at")]
    head = ("method", "KV heads", "exponent", "kvpress's", *times)
    text = _GROWTH.format(low=ends[0], high=ends[1])
    return section(
        "Growth with the prompt and with heads",
        text,
        table(head, growth.rows(cells)),
        picture(pictures.get("growth"), "Growth"),
    )


def _limits(rounds: Sequence[Any], shape: Shape, pictures: Mapping[str, str]) -> list[str]:
    if not rounds:
        return section("Operators against the limit", _NOT_MEASURED)
    said = f"batch {shape.batch}, {shape.query_heads} query heads, {shape.heads} KV heads, head size {shape.size}, "
    said += f"{shape.entries:,} entries, {str(shape.dtype).removeprefix('torch.')}"
    best = {name: Summary.of([round_[name] for round_ in rounds]).text(1e-9, 1) for name in ("bandwidth", "rate")}
    head = ("operator", "MiB", "ms", "% of copying", "% of the nearer limit, which")
    missing = without_case()
    return section(
        "Operators against the limit",
        _LIMITS.format(shape=said, **best),
        table(head, limits.rows(rounds, shape)),
        *([f"Not measured: {', '.join(missing)}."] if missing else []),
        picture(pictures.get("limits"), "Operators against the limit"),
    )


def _imports(rounds: Sequence[Mapping[str, float]], pictures: Mapping[str, str]) -> list[str]:
    if not rounds:
        return section("Import time", _NOT_MEASURED)
    rows = ([f"`{label}`", Summary.of([x[label] for x in rounds]).text(1000)] for label in rounds[0])
    return section("Import time", _IMPORTS, table(("", "ms"), rows), picture(pictures.get("imports"), "Import time"))
