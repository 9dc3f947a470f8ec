"""`python -m mmkv_speed gpu`: checks, operators and whole models in one go, within ten minutes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from . import device as device_
from . import gpu_checks, gpu_operators, gpu_page, gpu_plots, gpu_targets, whole
from .deadline import Deadline
from .geometry import TINY, WHOLE
from .machine import versions, where
from .store import check_writable, write_pages

PARTS: Final = ("checks", "operators", "models")
_SHARES: Final = {"checks": 0.25, "operators": 0.35, "models": 0.4}


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure.

    Attributes:
        device: "cuda", or "cpu" with `tiny`.
        tiny: tiny shapes, which show that everything runs and measure nothing.
        parts: of `PARTS`.
        minutes: for everything; each part has its share of what is left.
        out: folder of the pages, or None.
        tests: whether pytest runs the kernels' own tests.
    """

    device: str = "cuda"
    tiny: bool = False
    parts: tuple[str, ...] = PARTS
    minutes: float = 9.0
    out: Path | None = None
    tests: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of caches and models."""
        return torch.float32 if self.tiny else torch.bfloat16


def run(settings: Settings, say: Callable[[str], None]) -> str:
    """Measures, writes the pages if there is a place for them, and gives the page.

    Raises:
        OSError: a folder that cannot be written to.
        ValueError: an unknown part, no such device, or a CPU without `tiny`.
    """
    _check(settings)
    if settings.out is not None:
        check_writable(settings.out)
    start = time.monotonic()
    found: dict[str, Any] = {"machine": None, "checks": None, "operators": [], "models": []}
    page = ""
    for part in (part for part in PARTS if part in settings.parts):
        left = 60 * settings.minutes - (time.monotonic() - start)
        rest = sum(_SHARES[other] for other in settings.parts if PARTS.index(other) >= PARTS.index(part))
        say(f"{part}: {left * _SHARES[part] / rest:.0f} s at most")
        _MEASURES[part](settings, Deadline(left * _SHARES[part] / rest), found)
        page = _page(settings, found, time.monotonic() - start)  # whatever happens later, this part is on it
    return page


def _page(settings: Settings, found: Mapping[str, Any], wall: float) -> str:
    """The page of what is there so far, written if there is a place for it."""
    facts = _facts(settings, wall)
    if settings.out is None:
        return gpu_page.render(found, facts, None)
    name = file_name(settings)
    page = gpu_page.render(found, facts, gpu_plots.draw(found, facts, settings.out, name))
    targets = [target.to_json() for target in gpu_targets.targets(found, tiny=settings.tiny)]
    write_pages(settings.out, name, page, {"facts": facts, "targets": targets, **found})
    return page


def file_name(settings: Settings) -> str:
    """speed-<device>, in letters that every file system takes."""
    words = device_.name(settings.device).lower().removeprefix("nvidia ")
    return f"speed-{'tiny-' if settings.tiny else ''}{re.sub(r'[^a-z0-9]+', '-', words).strip('-')}"


def _check(settings: Settings) -> None:
    unknown = sorted(set(settings.parts) - set(PARTS))
    if unknown:
        raise ValueError(f"no part {', '.join(unknown)}; parts are {', '.join(PARTS)}")
    if not settings.device.startswith(("cuda", "cpu")):
        raise ValueError(f"--device is cuda or cpu, got {settings.device!r}")
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("this machine has no GPU that torch can use; --tiny --device cpu shows that the script runs")
    if settings.device == "cpu" and not settings.tiny:
        raise ValueError("on a CPU only --tiny runs, which measures nothing; `cpu` measures CPUs")


def _checks(settings: Settings, deadline: Deadline, found: dict[str, Any]) -> None:
    geometry, lengths = (TINY[0], gpu_checks.FEW) if settings.tiny else (WHOLE[0], gpu_checks.ENTRIES)
    shape = geometry.shape(2, 1, settings.dtype, settings.device)
    found["checks"] = gpu_checks.run(shape, lengths, deadline)
    if settings.tests and not settings.tiny:
        found["checks"]["tests"] = gpu_checks.kernel_tests(deadline)


def _operators(settings: Settings, deadline: Deadline, found: dict[str, Any]) -> None:
    grid = gpu_operators.SMALL if settings.tiny else gpu_operators.Grid()
    found["machine"] = gpu_operators.machine(settings.device, grid, settings.dtype)
    found["operators"] = gpu_operators.run(settings.device, settings.dtype, grid, deadline)


def _models(settings: Settings, deadline: Deadline, found: dict[str, Any]) -> None:
    size, geometries = (whole.SMALL, TINY) if settings.tiny else (whole.Size(), WHOLE)
    found["models"] = [whole.run(one, size, settings.dtype, settings.device, deadline) for one in geometries]


_MEASURES: Final[Mapping[str, Callable[[Settings, Deadline, dict[str, Any]], None]]] = {
    "checks": _checks,
    "operators": _operators,
    "models": _models,
}


def _facts(settings: Settings, wall: float) -> dict[str, Any]:
    """What has to be said about a run."""
    tiny = " --tiny --device cpu" if settings.tiny else ""
    return {
        "device": device_.name(settings.device),
        "host": where(),
        "versions": versions(("torch", "triton", "transformers", "mmkv-kernels", "mmkv-hf")),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "parts": list(settings.parts),
        "wall": wall,
        "tiny": settings.tiny,
        "command": f"python -m mmkv_speed gpu{tiny} --minutes {settings.minutes:g}",
    }
