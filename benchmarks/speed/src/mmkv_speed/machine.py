"""What has to be said about the machine and the software of a run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


def processor() -> str:
    """Its name, as the machine tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def load() -> str:
    """Average number of running processes over 1, 5 and 15 minutes."""
    return "/".join(f"{x:.1f}" for x in os.getloadavg())


def where() -> str:
    """Processor, cores and load."""
    return f"{processor()}, {os.cpu_count()} cores, load {load()}"


def versions(names: Iterable[str]) -> dict[str, str]:
    """Distribution -> version; 'source' where it is imported without being installed, 'none' where it is not there."""
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none" if find_spec(name.replace("-", "_")) is None else "source"
