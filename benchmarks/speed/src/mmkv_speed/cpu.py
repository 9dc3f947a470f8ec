"""`python -m mmkv_speed cpu`: all parts, round after round, and the page."""

from __future__ import annotations

import hashlib
import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from . import cpu_page, endtoend, growth, imports, limits
from .machine import versions, where
from .processes import NAMES, Worker, pythons, workers
from .store import Rounds, check_writable, write_pages

PARTS: Final = ("requests", "growth", "limits", "imports")
WORKERS: Final = {"requests", "growth"}
"""Parts that need a process of each side."""
NAME: Final = "speed-cpu"
SEED: Final = 0
_MEASURED: Final = (
    *("mmkv_kernels", "mmkv_scores", "mmkv_budget", "mmkv_select", "mmkv_layershare", "mmkv_prune"),
    *("mmkv_pipelines", "mmkv_hf"),
    *(f"mmkv_speed.{name}" for name in ("endtoend", "growth", "limits", "imports", "operators", "device", "sides")),
    *(f"mmkv_speed.{name}" for name in ("ours", "model", "methods", "meter", "held", "worker")),
)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure.

    Attributes:
        peer: python of kvpress's environment, or None.
        parts: of `PARTS`.
        rounds: repeats of everything.
        minutes: no round begins that would likely end later.
        steps: decode steps, the first included.
        prompt: tokens.
        lengths: of one layer's cache.
        heads: KV heads of one layer.
        ratios: shares removed.
        work: folder of finished rounds.
        out: folder of the pages, or None.
        fresh: whether to forget an interrupted run.
        note: what else ran on the machine, for the page.
        quick: whether this is one small round.
    """

    peer: str | None
    parts: tuple[str, ...] = PARTS
    rounds: int = 3
    minutes: float = 20.0
    steps: int = 33
    prompt: int = 4096
    lengths: tuple[int, ...] = growth.LENGTHS
    heads: tuple[int, ...] = growth.HEADS
    ratios: tuple[float, ...] = (0.5, 0.9)
    work: Path = Path("speed-output")
    out: Path | None = None
    fresh: bool = False
    note: str = ""
    quick: bool = False

    def smaller(self) -> Settings:
        """One round in a few minutes."""
        small = {"rounds": 1, "lengths": self.lengths[:3], "heads": self.heads[:2], "ratios": self.ratios[:1]}
        return replace(self, quick=True, **small)  # type: ignore[arg-type]

    @property
    def shape(self) -> Any:
        """Of the operators' cache."""
        return limits.QUICK if self.quick else limits.SHAPE

    @property
    def command(self) -> str:
        """What to type for the same numbers, without this machine's paths."""
        options = f"--rounds {self.rounds} --minutes {self.minutes:g} --steps {self.steps} --prompt {self.prompt}"
        parts = "" if self.parts == PARTS else "".join(f" --parts {part}" for part in self.parts)
        peer = " --peer PY" if self.peer else ""
        return f"python -m mmkv_speed cpu{peer} {'--quick ' if self.quick else ''}{options}{parts}"


def run(settings: Settings, say: Callable[[str], None]) -> str:
    """Measures, writes the pages if there is a place for them, and gives the page.

    Raises:
        OSError: no such Python, or a folder that cannot be written to.
        ValueError: a part that does not exist, an environment without its library, sides that did different work.
    """
    unknown = sorted(set(settings.parts) - set(PARTS))
    if unknown:
        raise ValueError(f"no part {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    for folder in (settings.work, settings.out):
        if folder is not None:
            check_writable(folder)
    start = time.monotonic()
    sides = pythons(settings.peer)
    with workers(sides if WORKERS & set(settings.parts) else {}, settings.prompt, SEED) as running:
        check_alike(running)
        rounds = Rounds(settings.work, made(settings, running), fresh=settings.fresh)
        measure(settings, running, rounds, start, say)
        facts = gather(settings, running, start)
    found = {part: rounds.of(part) for part in PARTS}
    endtoend.check(endtoend.answers(found["requests"]))
    growth.check(found["growth"])
    page = finish(settings, found, facts)
    rounds.forget()
    return page


def finish(settings: Settings, found: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Writes the page, its numbers and pictures, or gives the page alone where there is no place for them."""
    if settings.out is None:
        return cpu_page.render(found, facts, settings.shape, {})
    from .plots import draw_cpu

    page = cpu_page.render(found, facts, settings.shape, draw_cpu(found, settings.shape, settings.out, NAME))
    targets = [target.to_json() for target in cpu_page.all_targets(found)]
    write_pages(settings.out, NAME, page, {"facts": facts, "targets": targets, "rounds": found})
    return page


def measure(
    settings: Settings, running: Mapping[str, Worker], rounds: Rounds, start: float, say: Callable[[str], None]
) -> None:
    """All rounds that are not finished, as long as there is time."""
    longest = 0.0
    for number in range(settings.rounds):
        begin = time.monotonic()
        if number and begin + longest > start + 60 * settings.minutes:
            say(f"no time for round {number + 1}")
            return
        for part in settings.parts:
            if len(rounds.of(part)) <= number:
                say(f"round {number + 1} of {settings.rounds}: {part}")
                rounds.add(part, measured(part, settings, running, number, say))
        longest = max(longest, time.monotonic() - begin)


def measured(
    part: str, settings: Settings, running: Mapping[str, Worker], number: int, say: Callable[[str], None]
) -> Any:
    """One round of one part."""
    sides = tuple(running)

    def ask(side: str, job: dict[str, Any]) -> dict[str, Any]:
        what = " ".join(f"{job[name]}" for name in ("method", "ratio", "heads", "length") if name in job)
        say(f"  {NAMES[side]:>7} {job['kind']} {what}")
        return running[side].ask(job)

    if part == "requests":
        return endtoend.measure(ask, endtoend.jobs(number, settings.ratios, sides), settings.steps)
    if part == "growth":
        return growth.measure(ask, growth.jobs(number, sides, settings.lengths, settings.heads, SEED))
    if part == "limits":
        return limits.measure(settings.shape)
    return imports.measure(pythons(settings.peer))


def check_alike(running: Mapping[str, Worker]) -> None:
    """Both environments must have built the same.

    Raises:
        ValueError: they have not.
    """
    if len({worker.hello["fingerprint"] for worker in running.values()}) > 1:
        raise ValueError("the two environments built different models or prompts")


def made(settings: Settings, running: Mapping[str, Worker]) -> dict[str, Any]:
    """What the numbers depend on."""
    sizes = {name: getattr(settings, name) for name in ("steps", "prompt", "lengths", "heads", "ratios", "quick")}
    return {**sizes, "software": {side: worker.hello for side, worker in running.items()}, "code": code_digest()}


def code_digest() -> str:
    """Over the sources of everything that is measured or measures; pages and pictures may change meanwhile."""
    digest = hashlib.sha256()
    for name in _MEASURED:
        source = Path(str(importlib.import_module(name).__file__))
        files = sorted(source.parent.rglob("*.py")) if source.name == "__init__.py" else [source]
        for path in files:
            digest.update(f"{name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


def gather(settings: Settings, running: Mapping[str, Worker], start: float) -> dict[str, Any]:
    """What has to be said about a run."""
    said = {NAMES[side]: worker.hello["versions"] for side, worker in running.items()}
    return {
        "machine": where(),
        "note": settings.note,
        "versions": said or {"mmkv": versions(("torch", "transformers"))},
        "threads": torch.get_num_threads(),
        "seed": SEED,
        "steps": settings.steps,
        "prompt": settings.prompt,
        "wall": time.monotonic() - start,
        "command": settings.command,
        "code": code_digest(),
    }
