"""What all sessions share: mmkv's attention function for a while, and the model as it was afterwards."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from torch import nn
from transformers import PreTrainedModel

from . import attention  # noqa: F401  registers the attention function
from ._compat import ATTENTION, attention_set


class Context:
    """A context around `model`; what `_enter` puts on the stack is undone on exit."""

    model: PreTrainedModel
    _stack: ExitStack

    def __enter__(self) -> Self:
        if hasattr(self, "_stack"):
            raise RuntimeError("this session is open already")
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def _open(self, stack: ExitStack) -> None:
        self._enter(stack)

    def _enter(self, stack: ExitStack) -> None:
        raise AssertionError("a session says what it does when it opens")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        del self._stack


def at_work(module: nn.Module) -> list[Any]:
    """The objects whose methods are called before a forward pass of this module."""
    return [getattr(hook, "__self__", None) for hook in module._forward_pre_hooks.values()]


class Opened(Context):
    """A context in which `model` attends through mmkv."""

    def _open(self, stack: ExitStack) -> None:
        stack.enter_context(attention_set(self.model, ATTENTION))
        self._enter(stack)
