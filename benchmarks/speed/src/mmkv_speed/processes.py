"""Workers and other processes in the two environments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
NAMES: Final = {"ours": "mmkv", "peer": "kvpress"}


class Worker:
    """A worker process.

    Raises:
        ValueError: its environment lacks what it needs.
        OSError: it cannot be started.
    """

    def __init__(self, python: str, side: str, options: list[str], environment: Mapping[str, str]) -> None:
        self.side = side
        self.process = subprocess.Popen(
            [python, "-m", f"{HERE.name}.worker", side, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            text=True,
        )
        self.hello = self._read()
        if "error" in self.hello:
            self.close()
            raise ValueError(f"{python} cannot run {NAMES[side]}'s side: {self.hello['error']}")

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        """What it measured."""
        assert self.process.stdin is not None
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """Ends it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise ValueError(f"the worker of {NAMES[self.side]} stopped with code {code}; what it said stands above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def checked_python(path: str) -> str:
    """The path, if a Python answers there.

    Raises:
        FileNotFoundError: none does.
    """
    try:
        subprocess.run([path, "-c", ""], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise FileNotFoundError(
            f"--peer {path}: there is no Python; it is that of an environment with kvpress 0.5.5"
        ) from error
    return path


@contextmanager
def environments() -> Iterator[dict[str, dict[str, str]]]:
    """Side -> environment variables: one thread, offline, and this package alone beside what the peer has installed."""
    quiet = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / HERE.name).symlink_to(HERE)
        yield {"ours": quiet, "peer": {**quiet, "PYTHONPATH": folder}}


@contextmanager
def workers(pythons: Mapping[str, str], prompt: int, seed: int) -> Iterator[dict[str, Worker]]:
    """Side -> worker; all are ended afterwards."""
    with ExitStack() as stack:
        variables = stack.enter_context(environments())
        found = {}
        for side, python in pythons.items():
            options = ["--prompt", str(prompt), "--seed", str(seed)]
            found[side] = Worker(python, side, options, variables[side])
            stack.callback(found[side].close)
        yield found


def pythons(peer: str | None) -> dict[str, str]:
    """Side -> python; kvpress's is left out when it is not given."""
    return {"ours": sys.executable} | ({} if peer is None else {"peer": checked_python(peer)})
