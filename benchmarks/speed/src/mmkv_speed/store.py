"""Finished rounds on disk, so that an interruption costs the one under way, and pages written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Rounds:
    """The finished rounds of one measurement, in a work folder.

    Args:
        folder: made when it is not there.
        made: what the numbers depend on; a folder holds rounds of one such thing.
        fresh: whether to forget what is there.

    Raises:
        OSError: it cannot be written to.
        ValueError: it holds rounds of something else; the message names what.
    """

    def __init__(self, folder: Path, made: Mapping[str, Any], *, fresh: bool = False) -> None:
        check_writable(folder)
        self._file, self._made = folder / "rounds.jsonl", folder / "made.json"
        if fresh:
            self.forget()
        now = json.loads(json.dumps(made))
        if self._made.is_file():
            then = json.loads(self._made.read_text())
            changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
            if changed:
                raise ValueError(
                    f"{folder} holds rounds of an interrupted run with other {', '.join(changed)}: go on with what it "
                    "was begun with, or give --fresh"
                )
        write_atomically(self._made, json.dumps(now, indent=1) + "\n")

    def of(self, part: str) -> list[Any]:
        """What every finished round of a part gave, in order; a line that was cut short is not one."""
        lines = self._file.read_text().splitlines(keepends=True) if self._file.is_file() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return [record["data"] for record in records if record["part"] == part]

    def add(self, part: str, data: Any) -> None:
        """A round is finished."""
        text = self._file.read_text() if self._file.is_file() else ""
        whole = text[: text.rfind("\n") + 1]
        write_atomically(self._file, whole + json.dumps({"part": part, "data": data}) + "\n")

    def forget(self) -> None:
        """Nothing is left of them: the pages hold everything."""
        for path in (self._file, self._made):
            path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Makes a folder, and tries it.

    Raises:
        OSError: it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}") from error


def write_atomically(path: Path, text: str) -> None:
    """All of it or nothing, whenever the process ends."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text)
    part.replace(path)


def write_pages(folder: Path, name: str, page: str, data: Any) -> None:
    """`name`.md and `name`.json."""
    write_atomically(folder / f"{name}.md", page)
    write_atomically(folder / f"{name}.json", json.dumps(data, indent=1) + "\n")
