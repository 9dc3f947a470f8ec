"""mmkv beside kvpress on the CPU: what compression costs, how fast decoding is afterwards, what stays in memory.

Starts one worker per environment, gives them the same jobs in turn, and compares medians with the targets.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "speed-cpu"
RATIOS = (0.5, 0.9)
METHODS = {"ours": ("snapkv", "adakv", "adakv+mixkv+bacon"), "peer": ("snapkv", "adakv")}
NAMES = {"ours": "mmkv", "peer": "kvpress"}
COLUMNS = (
    "", "method", "removed", "prefill s", "inside ms", "first ms", "inside + first ms", "total ms", "of minima ms",
    "decode tok/s", "MiB after first step", "KV pairs attended / held",
)  # fmt: skip
JUDGED = """Overhead is judged by *inside + first*: the time inside the compression (mmkv: opening and closing the
session, making the cache, and `CompressedLayer.observe`, which compresses; kvpress: opening the press, and its forward
hook) plus what the first decode step takes longer than the median uncompressed one of the same process, where work put
off would show (negative: it is faster, the cache being smaller). *Without credit* a faster first step counts as 0.
*total* is the plain difference of prefill plus first step from the uncompressed run of the same round, *of minima* that
between the fastest runs: they have to agree with it within their spread, which the noise of two prefills makes wide."""
Key = tuple[str, str, float]  # side, method, ratio
Answers = dict[Key, list[dict[str, Any]]]


class Worker:
    """A worker process in one environment."""

    def __init__(self, python: str, side: str, options: list[str]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [python, str(HERE / "worker.py"), side, *options]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        self.hello = self._read()

    def ask(self, method: str, ratio: float, steps: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps({"method": method, "ratio": ratio, "steps": steps}), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the worker stopped with code {self.process.wait()}; what it printed stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Summary:
    """A median and the range of what was measured."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Summary:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, scale: float = 1.0, digits: int = 0) -> str:
        median, low, high = (f"{scale * x:.{digits}f}" for x in (self.median, self.low, self.high))
        return f"{median} ({low}..{high})"


@dataclass(frozen=True)
class Target:
    """One line of the comparison: the ratio of two numbers, and what it should be."""

    name: str
    limit: float
    at_most: bool
    mine: str
    other: str
    ratio: float
    spread: tuple[float, float]
    hit: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hit", self.ratio <= self.limit if self.at_most else self.ratio >= self.limit)


def jobs(round_: int, ratios: tuple[float, ...]) -> Iterator[Key]:
    """Every configuration once; the two sides alternate, and so does which of them goes first."""
    order = ("ours", "peer") if round_ % 2 == 0 else ("peer", "ours")
    for method, ratio in [("none", 0.0), *((m, r) for r in ratios for m in METHODS["ours"])]:
        yield from ((side, method, ratio) for side in order if method in ("none", *METHODS[side]))


def collect(workers: dict[str, Worker], arguments: argparse.Namespace, stop: float) -> Answers:
    """All answers, one per round and configuration; no round begins that would likely end after `stop` (monotonic)."""
    answers: Answers = {}
    longest = 0.0
    for round_ in range(arguments.rounds):
        begin = time.monotonic()
        if round_ and begin + longest > stop:
            break
        for key in jobs(round_, arguments.ratios):
            side, method, ratio = key
            answers.setdefault(key, []).append(workers[side].ask(method, ratio, arguments.steps))
            progress(f"round {round_ + 1}/{arguments.rounds}", key, answers[key][-1])
        longest = max(longest, time.monotonic() - begin)
    return answers


def progress(when: str, key: Key, run: dict[str, Any]) -> None:
    side, method, ratio = key
    took = f"prefill {run['prefill']:.2f} s, inside {1000 * run['inside']:.0f} ms"
    print(f"{when} {NAMES[side]:>7} {method:<17} {ratio:.1f}  {took}", file=sys.stderr)


def overheads(answers: Answers, key: Key, part: str = "judged") -> list[float]:
    """Seconds of overhead per round.

    judged: time inside the compression plus what the first step takes longer than an uncompressed one (negative when
    it is faster); strict: the same without that credit; first: only that difference; total: the plain difference of
    prefill plus first step, to check that nothing was missed.
    """
    base = answers[(key[0], "none", 0.0)]
    first = statistics.median(run["first"] for run in base)
    found = {
        "inside": [run["inside"] for run in answers[key]],
        "first": [run["first"] - first for run in answers[key]],
        "total": [
            run["prefill"] + run["first"] - plain["prefill"] - plain["first"]
            for run, plain in zip(answers[key], base, strict=True)
        ],
    }
    found["judged"] = [a + b for a, b in zip(found["inside"], found["first"], strict=True)]
    found["strict"] = [a + max(0.0, b) for a, b in zip(found["inside"], found["first"], strict=True)]
    return found[part]


def least(answers: Answers, key: Key) -> float:
    """The total overhead between the fastest runs, which noise touches least."""
    fastest = [min(run["prefill"] + run["first"] for run in answers[k]) for k in (key, (key[0], "none", 0.0))]
    return float(fastest[0] - fastest[1])


def speeds(answers: Answers, key: Key) -> list[float]:
    """Tokens per second of CPU time, per round; the first step belongs to the overhead."""
    return [1 / statistics.median(run["steps"]) for run in answers[key]]


def compared(
    name: str, limit: float, at_most: bool, mine: list[float], other: list[float], show: Callable[[Summary], str]
) -> Target:
    """The ratio of two medians; its spread is that of the rounds' own ratios."""
    each = [a / b for a, b in zip(mine, other, strict=True)]
    ratio = statistics.median(mine) / statistics.median(other)
    shown = (show(Summary.of(mine)), show(Summary.of(other)))
    return Target(name, limit, at_most, *shown, ratio, (min(each), max(each)))


def milliseconds(x: Summary) -> str:
    return x.text(1000) + " ms"


def per_second(x: Summary) -> str:
    return x.text(1, 1) + " tok/s"


def mebibytes(x: Summary) -> str:
    return f"{x.median / 2**20:.2f} MiB"


def targets(answers: Answers) -> list[Target]:
    """Everything that was promised."""
    ratios = sorted({ratio for _, method, ratio in answers if method != "none"})
    found = []
    for part, label in (("judged", "overhead"), ("strict", "overhead without credit")):
        for method, other, limit in (("snapkv", "snapkv", 0.5), ("adakv+mixkv+bacon", "adakv", 1.0)):
            for r in ratios:
                mine, beside = (overheads(answers, k, part) for k in (("ours", method, r), ("peer", other, r)))
                title = f"{label}, {method} / kvpress {other}, {r}"
                found.append(compared(title, limit, True, mine, beside, milliseconds))
    for r in ratios:
        mine, beside = (speeds(answers, ("ours", method, r)) for method in ("adakv", "snapkv"))
        found.append(compared(f"decode, adakv / our snapkv, {r}", 0.9, False, mine, beside, per_second))
    mine, beside = (speeds(answers, (side, "adakv", 0.5)) for side in ("ours", "peer"))
    found.append(compared("decode, adakv / kvpress adakv, 0.5", 1.7, False, mine, beside, per_second))
    mine, beside = ([float(run["bytes"]) for run in answers[(side, "adakv", 0.5)]] for side in ("ours", "peer"))
    # Half of the keys and values, and 4 bytes per kept pair for its position.
    found.append(compared("bytes, adakv / kvpress adakv, 0.5", 0.505, True, mine, beside, mebibytes))
    return found


def check(workers: dict[str, Worker], answers: Answers) -> None:
    """The two sides must have done the same work."""
    if len({worker.hello["fingerprint"] for worker in workers.values()}) != 1:
        raise SystemExit("the two environments built different models or prompts")
    for (side, method, ratio), runs in answers.items():
        if method not in METHODS["peer"]:
            continue
        other = answers[("peer" if side == "ours" else "ours", method, ratio)]
        if runs[0]["attended"] != other[0]["attended"]:
            counts = f"{runs[0]['attended']} and {other[0]['attended']}"
            raise SystemExit(f"{method} at {ratio}: {counts} KV pairs are attended to")
    plain = [answers[(side, "none", 0.0)][0]["logits"] for side in ("ours", "peer")]
    apart = max(abs(a - b) for a, b in zip(*plain, strict=True))
    if apart > 1e-3:
        raise SystemExit(f"the uncompressed models differ by {apart} in their logits")


def detail_rows(answers: Answers) -> Iterator[str]:
    for key, runs in sorted(answers.items(), key=lambda item: (item[0][2], item[0][1], item[0][0])):
        side, method, ratio = key
        cells = [NAMES[side], method, "-" if method == "none" else f"{ratio:.1f}"]
        cells.append(Summary.of([run["prefill"] for run in runs]).text(1, 2))
        if method == "none":
            cells += ["-"] * 5
        else:
            parts = ("inside", "first", "judged", "total")
            cells += [Summary.of(overheads(answers, key, part)).text(1000) for part in parts]
            cells.append(f"{1000 * least(answers, key):.0f}")
        cells += [Summary.of(speeds(answers, key)).text(1, 1), f"{runs[0]['bytes'] / 2**20:.2f}"]
        cells.append(f"{runs[0]['attended']:,} / {runs[0]['stored']:,}")
        yield "| " + " | ".join(cells) + " |"


def render(answers: Answers, facts: dict[str, Any]) -> str:
    """The report as markdown."""
    lines = [
        "# Speed on the CPU beside kvpress",
        "",
        f"{facts['machine']}. {facts['versions']}. Seed {facts['seed']}, {facts['rounds']} interleaved rounds, "
        f"{facts['steps']} decode steps, prompt {facts['prompt']}, one thread, CPU seconds of that thread; "
        f"{facts['wall']:.0f} s of wall time. `{facts['command']}`.",
        "",
        "Medians over rounds, lowest and highest in brackets. The spread of a ratio is that of the rounds' own ratios.",
        "",
        "| what | mmkv | beside it | ratio | spread | target | |",
        "|---|---|---|---|---|---|---|",
    ]
    for t in targets(answers):
        limit = f"{'<=' if t.at_most else '>='} {t.limit}"
        spread = f"{t.spread[0]:.2f}..{t.spread[1]:.2f}"
        verdict = "hit" if t.hit else "**miss**"
        lines.append(f"| {t.name} | {t.mine} | {t.other} | {t.ratio:.3f} | {spread} | {limit} | {verdict} |")
    lines += [
        "",
        JUDGED,
        f"CPU time of other threads is at most {1000 * facts['elsewhere']:.0f} ms in any run.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" * len(COLUMNS) + "|",
        *detail_rows(answers),
        "",
    ]
    return "\n".join(lines)


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def command(arguments: argparse.Namespace) -> str:
    """What to type for the same numbers, without this machine's paths."""
    names = ("rounds", "minutes", "steps", "prompt", "seed")
    options = " ".join(f"--{name} {getattr(arguments, name):g}" for name in names)
    return f"python benchmarks/speed/compare.py --ours PY --peer PY {'--quick ' if arguments.quick else ''}{options}"


def gather_facts(
    workers: dict[str, Worker], answers: Answers, arguments: argparse.Namespace, start: float
) -> dict[str, Any]:
    """What has to be said about a run."""
    versions = "; ".join(
        f"{NAMES[side]} side: " + ", ".join(f"{k} {v}" for k, v in worker.hello["versions"].items())
        for side, worker in workers.items()
    )
    load = "/".join(f"{x:.1f}" for x in os.getloadavg())
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, shared, load {load}",
        "versions": versions, "seed": arguments.seed, "rounds": len(answers[("ours", "none", 0.0)]),
        "steps": arguments.steps,
        "prompt": arguments.prompt, "wall": time.monotonic() - start,
        "elsewhere": max(run["elsewhere"] for runs in answers.values() for run in runs),
        "command": command(arguments),
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", required=True, metavar="PY", help="python of an environment with mmkv-hf")
    parser.add_argument("--peer", required=True, metavar="PY", help="python of an environment with kvpress 0.5.5")
    parser.add_argument("--quick", action="store_true", help="one round, ratio 0.5; writes only with --out")
    parser.add_argument("--rounds", type=int, help="repeats of every configuration (5; quick: 1)")
    parser.add_argument("--minutes", type=float, default=11.0, help="begin no round that would end later")
    parser.add_argument("--steps", type=int, default=65, help="decode steps, the first included")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="files to write, without suffix (benchmarks/results/speed-cpu)")
    arguments = parser.parse_args()
    arguments.ratios = RATIOS[:1] if arguments.quick else RATIOS
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 5)
    arguments.out = arguments.out or (None if arguments.quick else RESULTS)
    return arguments


def main() -> None:
    arguments, start = parse(), time.monotonic()
    options = ["--prompt", str(arguments.prompt), "--seed", str(arguments.seed)]
    workers = {side: Worker(getattr(arguments, side), side, options) for side in NAMES}
    answers = collect(workers, arguments, start + 60 * arguments.minutes)
    for worker in workers.values():
        worker.close()
    check(workers, answers)
    facts = gather_facts(workers, answers, arguments, start)
    report = render(answers, facts)
    print(report)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        raw = [{"side": k[0], "method": k[1], "removed": k[2], "runs": runs} for k, runs in answers.items()]
        data = {"facts": facts, "targets": [vars(t) for t in targets(answers)], "answers": raw}
        arguments.out.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report)


if __name__ == "__main__":
    main()
