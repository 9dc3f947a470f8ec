"""The work folder: one file of finished cells for every batch of every setting, and what they were made with."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from .cells import Setting
from .measure import Block

FORMAT: Final = "mmkv-quality/1"
_MEASURED_BY: Final = (
    *("mmkv_kernels", "mmkv_scores", "mmkv_budget", "mmkv_select", "mmkv_layershare", "mmkv_prune"),
    *("mmkv_pipelines", "mmkv_hf"),
    *(f"mmkv_testbed.{part}" for part in ("evaluate", "glyphs", "pages", "samples", "vocabulary")),
    *(f"mmkv_quality.{part}" for part in ("cells", "measure", "outcomes", "replay", "rule", "stages", "worlds")),
)


@dataclass(frozen=True, slots=True)
class Made:
    """What results were made with; a folder holds results of one such thing.

    Attributes:
        seed: Of the samples, which are held out from training whatever it is.
        samples: Per cell.
        block: Samples per batch.
        versions: Of torch, transformers and Python.
        code: SHA-256 of all source files that the numbers depend on.
        weights: Model -> SHA-256.
        tables: Model -> SHA-256 of its visual-head scores.
        format: Of the folder.
    """

    seed: int
    samples: int
    block: int
    versions: Mapping[str, str]
    code: str
    weights: Mapping[str, str]
    tables: Mapping[str, str]
    format: str = FORMAT


@dataclass(frozen=True, slots=True, order=True)
class Unit:
    """One batch of one setting: the work between two prefills."""

    setting: Setting
    block: int

    @property
    def file(self) -> str:
        """Name of its file."""
        return f"{self.setting.key.replace('/', '_')}.{self.block:03d}.jsonl"


def versions() -> dict[str, str]:
    """What numbers may depend on besides our own code."""
    return {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()}


def code_digest() -> str:
    """SHA-256 over the names and contents of all modules that measure."""
    digest = hashlib.sha256()
    for name in _MEASURED_BY:
        source = Path(str(importlib.import_module(name).__file__))
        files = sorted(source.parent.rglob("*.py")) if source.name == "__init__.py" else [source]
        for path in files:
            digest.update(f"{name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


class WorkFolder:
    """Finished cells on disk.

    Args:
        path: Made when it is not there.

    Raises:
        OSError: It cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            (path / "cells").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path / "cells"):
                pass
        except OSError as error:
            raise OSError(f"cannot write to the results folder {path}: {error.strerror or error}") from error

    def begin(self, made: Made) -> None:
        """Marks a fresh folder as made so; a folder with results has to be made the same way, models may be added.

        Raises:
            ValueError: It was made with something else; the message names what.
        """
        file = self.path / "made.json"
        now: dict[str, Any] = asdict(made)
        if file.is_file():
            then = json.loads(file.read_text())
            changed = list(changes(then, now))
            if changed:
                raise ValueError(
                    f"{self.path} holds results of another run ({'; '.join(changed)}): finish it with what it was "
                    "begun with, or give another folder"
                )
            for name in ("weights", "tables"):
                now[name] = then[name] | now[name]
        write_atomically(file, json.dumps(now, indent=1))

    def blocks(self, unit: Unit) -> list[Block]:
        """The finished cells of a unit; a line that an interruption cut short is not one."""
        file = self.path / "cells" / unit.file
        return [Block.of_json(data) for data in _lines(file)] if file.is_file() else []

    def mend(self, unit: Unit) -> None:
        """Takes away a line that was cut short, so that the next one begins at a new line."""
        file = self.path / "cells" / unit.file
        if file.is_file() and not file.read_bytes().endswith(b"\n"):
            whole = file.read_text().rpartition("\n")[0]
            write_atomically(file, f"{whole}\n" if whole else "")

    def append(self, unit: Unit, block: Block) -> None:
        """Adds one finished cell; one process at a time works on a unit."""
        with (self.path / "cells" / unit.file).open("a") as file:
            file.write(json.dumps(block.to_json()) + "\n")

    def note(self, name: str, data: Any) -> None:
        """Writes a JSON file beside the cells."""
        write_atomically(self.path / name, json.dumps(data, indent=1))

    def noted(self, name: str) -> Any:
        """Reads it; None when it is not there."""
        file = self.path / name
        return json.loads(file.read_text()) if file.is_file() else None


def write_atomically(path: Path, text: str) -> None:
    """All of it or nothing, whenever the process ends."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def changes(
    then: Mapping[str, Any],
    now: Mapping[str, Any],
    same: Iterable[str] = ("format", "seed", "samples", "block", "code"),
) -> Iterator[str]:
    """How two runs differ: in what has to be the same, and in versions, weights and tables that both have."""
    for name in same:
        if then.get(name) != now[name]:
            yield f"{name}: {_short(then.get(name))} then, {_short(now[name])} now"
    for name in ("versions", "weights", "tables"):
        both = then.get(name, {}).keys() & now[name].keys()
        yield from (
            f"{name} of {key}: {_short(then[name][key])} then, {_short(now[name][key])} now"
            for key in sorted(both)
            if then[name][key] != now[name][key]
        )


def _short(value: Any) -> str:
    return str(value)[:12]
