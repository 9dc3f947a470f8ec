"""What importing a package costs beyond what it stands on, in fresh processes."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from .processes import environments
from .summary import Summary
from .targets import Target

LIMIT: Final = 50.0
_CODE: Final = (
    "import time, {base}; start = time.thread_time(); import {name}; print('seconds', time.thread_time() - start)"
)


@dataclass(frozen=True, slots=True)
class Import:
    """A package, what is imported before the clock starts, and whose environment it is in."""

    name: str
    base: str = "torch"
    side: str = "ours"

    @property
    def label(self) -> str:
        """On the page."""
        return f"import {self.name}, beyond {self.base.replace(', ', ' + ')}"


IMPORTS: Final = (
    *(Import(f"mmkv_{name}") for name in ("kernels", "scores", "budget", "select", "layershare", "prune", "pipelines")),
    Import("mmkv_hf", "torch, transformers"),
    Import("kvpress", "torch, transformers", "peer"),
)
BY_LABEL: Final = {one.label: one for one in IMPORTS}


def measure(pythons: Mapping[str, str]) -> dict[str, float]:
    """One round: label -> CPU seconds."""
    with environments() as variables:
        for side, python in pythons.items():  # compiles, and brings files into memory: nobody's cost
            everything = ", ".join(one.name for one in IMPORTS if one.side == side)
            _seconds(python, Import(everything, side=side), variables[side])
        return {
            one.label: _seconds(pythons[one.side], one, variables[one.side]) for one in IMPORTS if one.side in pythons
        }


def _seconds(python: str, one: Import, environment: Mapping[str, str]) -> float:
    code = _CODE.format(base=one.base, name=one.name)
    run = subprocess.run([python, "-c", code], env=dict(environment), capture_output=True, text=True, check=False)
    if run.returncode:
        raise ValueError(f"{one.label} fails: {run.stderr.strip().splitlines()[-1]}")
    return float(run.stdout.rsplit("seconds", 1)[1])


def target(rounds: Sequence[Mapping[str, float]]) -> Target:
    """`import mmkv_scores` within its limit."""
    label = Import("mmkv_scores").label
    values = [round_[label] for round_ in rounds if label in round_]
    if not values:
        return Target(f"{label}, ms", LIMIT, True, why="not run")
    measured = Summary.of([1000 * value for value in values])
    return Target(f"{label}, ms", LIMIT, True, measured.median, measured[1:], f"{measured.text()} ms")
