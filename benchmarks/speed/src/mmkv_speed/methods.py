"""Methods that both sides have, what each side calls them, and those that ours alone has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

WINDOW: Final = 64
KERNEL: Final = 5
_SNAPKV: Final = f"snapkv(window={WINDOW},kernel={KERNEL})"


@dataclass(frozen=True, slots=True)
class Method:
    """One way to compress.

    Attributes:
        name: on the page, and of the press.
        text: what mmkv parses.
        shared: whether kvpress has it.
        same_counts: whether both must keep equally many pairs; PyramidKV rounds its layers' budgets differently.
        layer: whether it is measured on one layer alone too.
    """

    name: str
    text: str
    shared: bool = True
    same_counts: bool = True
    layer: bool = False


METHODS: Final = (
    Method("snapkv", _SNAPKV, layer=True),
    Method("adakv", f"adakv+{_SNAPKV}", layer=True),
    Method("adakv+mixkv+bacon", f"adakv+mixkv+bacon+{_SNAPKV}", shared=False, layer=True),
    Method("pyramidkv", f"pyramidkv+{_SNAPKV}", same_counts=False),
    Method("tova", "tova"),
    Method("keydiff", "keydiff", layer=True),
    Method("knorm", "knorm", layer=True),
    Method("streamingllm", "streamingllm"),
    Method("random", "random"),
    Method("mixkv", f"mixkv+{_SNAPKV}", shared=False),
    Method("bacon", f"bacon+{_SNAPKV}", shared=False),
)
BY_NAME: Final = {method.name: method for method in METHODS}


def kept(ratio: float, length: int) -> int:
    """Tokens that stay when a share of them goes, rounded as kvpress does."""
    return max(1, int(length * (1 - ratio)))
