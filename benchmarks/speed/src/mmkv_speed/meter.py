"""CPU seconds of the one thread that computes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

clock = time.thread_time


class Meter:
    """CPU time spent in wrapped functions; calls inside a wrapped call are not counted twice."""

    def __init__(self) -> None:
        self.seconds, self._depth = 0.0, 0

    @contextmanager
    def running(self) -> Iterator[None]:
        self._depth += 1
        start = clock()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.seconds += clock() - start

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return function(*args, **kwargs)

        return timed


def took(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of a call, and what it gave."""
    start = clock()
    result = call()
    return clock() - start, result
