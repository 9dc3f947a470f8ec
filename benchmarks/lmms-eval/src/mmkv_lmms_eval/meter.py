"""What the caches of many `generate` calls held, and the first error among them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mmkv_hf import Budget, Pipeline, compress
from mmkv_hf.session import Session
from transformers import PreTrainedModel


class Held(NamedTuple):
    """Bytes of caches after an answer: what was held, and what a stock cache would hold after the same tokens."""

    held: int
    full: int


@dataclass(slots=True)
class Meter:
    """Stands in for `generate` inside a session.

    lmms-eval's models catch what `generate` raises and answer with an empty text, which would be scored as a wrong
    answer of the method. The first error is therefore kept, and raised again by every later call, so that a run ends
    soon and its caller can see why.

    Attributes:
        session: the open session.
        generate: the session's `generate`.
        calls: one entry for each call that succeeded.
        error: of the first call that failed.
    """

    session: Session
    generate: Callable[..., Any]
    calls: list[Held] = field(default_factory=list)
    error: Exception | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`generate`, measured."""
        if self.error is not None:
            raise self.error
        try:
            out = self.generate(*args, **kwargs)
        except Exception as error:
            self.error = error
            raise
        cache = self.session.last
        if cache is not None:
            self.calls.append(Held(cache.bytes_held, cache.bytes_full))
        return out

    @property
    def total(self) -> Held:
        """Sums over all calls."""
        return Held(sum(call.held for call in self.calls), sum(call.full for call in self.calls))


@contextmanager
def metered(model: PreTrainedModel, pipeline: Pipeline, budget: Budget) -> Iterator[Meter]:
    """`compress(model, pipeline, budget)`, every `generate` in it measured."""
    with compress(model, pipeline, budget) as session:
        meter = Meter(session, model.generate)
        model.generate = meter  # the session removes it from the instance when it closes
        yield meter
