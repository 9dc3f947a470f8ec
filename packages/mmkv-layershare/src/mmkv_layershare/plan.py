"""Plans: which layers are lazy, and whose attention they borrow."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal, get_args

from .kinds import LayerKind, may_share

FORMAT: Final = "mmkv-lazy-plan/1"
LN2: Final = math.log(2)
"""The largest Jensen-Shannon divergence there is, in nats."""

Mode = Literal["visual", "global"]
"""visual: VLA, lazy layers borrow queries and keys of vision tokens only. global: GLA, of all tokens."""


@dataclass(frozen=True, slots=True)
class LazyPlan:
    """Blocks of consecutive layers that share one layer's attention (Lazy Attention / Q Cache, arXiv 2602.01901).

    The first layer of a block, its anchor, is an ordinary layer; the others are lazy: they attend with the anchor's
    queries and keys and their own values (eqs. 5-8). Values are never shared, and neither are probabilities: attention
    is computed anew in every layer.

    As a file: JSON `{"format": "mmkv-lazy-plan/1", "model": ..., "num_layers": 32, "mode": "visual", "blocks":
    [[2, 6], ...], "inferred": false}`, each block as its first and last layer. Other keys are ignored.

    Attributes:
        num_layers: layers of the model.
        blocks: (first, last) of each block, both inclusive, ascending, of two layers or more.
        mode: "visual" (VLA, the paper's headline mode and the default) or "global" (GLA).
        model: what it was made for.
        inferred: the blocks are our reading of a publication, not taken from it.
    """

    num_layers: int
    blocks: tuple[tuple[int, int], ...] = ()
    mode: Mode = "visual"
    model: str = field(default="unnamed", compare=False)
    inferred: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        """Refuses blocks that overlap, are too short or lie outside the model."""
        if not _is_count(self.num_layers) or self.num_layers < 1:
            raise ValueError(f"LazyPlan: num_layers must be a whole number above 0, got {self.num_layers!r}")
        if self.mode not in get_args(Mode):
            raise ValueError(f"LazyPlan: mode is 'visual' or 'global', got {self.mode!r}")
        object.__setattr__(self, "blocks", _blocks(self.blocks, self.num_layers))

    @classmethod
    def preset(cls, name: str) -> LazyPlan:
        """A plan for a published model.

        "llava-1.5-7b": 23 of 32 layers lazy, layers 2 to 30 in blocks of at most five. Inferred: the paper says that
        layers 0, 1 and 31 are unlike their neighbours and, by its parameter counts, that 23 layers are lazy; which
        ones it does not say.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in _PRESETS:
            raise ValueError(f"there is no plan {name!r}; known are {', '.join(_PRESETS)}")
        return _PRESETS[name]

    @property
    def lazy(self) -> tuple[int, ...]:
        """The lazy layers, ascending."""
        return tuple(layer for first, last in self.blocks for layer in range(first + 1, last + 1))

    def anchor(self, layer: int) -> int:
        """The layer whose queries and keys `layer` uses: itself, if it is not lazy."""
        return next((first for first, last in self.blocks if first <= layer <= last), layer)

    def last_reader(self, layer: int) -> int:
        """The last layer that uses the queries and keys of `layer`; itself, if no other does."""
        return next((last for first, last in self.blocks if first == layer), layer)

    def check(self, kinds: Sequence[LayerKind]) -> None:
        """Refuses to run on a model whose layers cannot share as planned.

        Args:
            kinds: of all layers of the model.

        Raises:
            ValueError: another number of layers, a block with a layer that does not attend to everything, or layers of
                different heads or rotary embeddings in one block.
        """
        if len(kinds) != self.num_layers:
            raise ValueError(
                f"the plan was made for {self.num_layers} layers ({self.model}), the model has {len(kinds)}"
            )
        for first, last in self.blocks:
            for layer in range(first, last):
                if not may_share(kinds, layer):
                    raise ValueError(
                        f"layers {layer} and {layer + 1} of block {first}..{last} cannot share attention: "
                        f"{_difference(kinds[layer], kinds[layer + 1])}"
                    )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON."""
        data = {
            "format": FORMAT, "model": self.model, "num_layers": self.num_layers, "mode": self.mode,
            "blocks": self.blocks, "inferred": self.inferred,
        }  # fmt: skip
        Path(path).write_text(json.dumps(data) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LazyPlan:
        """The plan stored at `path`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a plan of this format, or not one that can be.
        """
        name = os.fspath(path)
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"no lazy plan at {name!r}; make one with `mmkv profile-layers`") from None
        except ValueError as error:
            raise ValueError(f"{name!r} is not JSON: {error}") from error
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        if found != FORMAT:
            raise ValueError(f"{name!r} is not a lazy plan: expected format {FORMAT!r}, found {found!r}")
        missing = [key for key in ("num_layers", "mode", "blocks") if key not in data]
        if missing:
            raise ValueError(f"the lazy plan {name!r} lacks {', '.join(missing)}")
        try:
            model, inferred = str(data.get("model", "unnamed")), bool(data.get("inferred", False))
            return cls(data["num_layers"], data["blocks"], data["mode"], model, inferred)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name!r}: {error}") from error


def _blocks(blocks: Any, num_layers: int) -> tuple[tuple[int, int], ...]:
    if not _is_list(blocks) or not all(map(_is_list, blocks)):
        raise ValueError(f"LazyPlan: blocks is a list of [first, last], got {blocks!r}")
    pairs = [tuple(block) for block in blocks]
    for pair in pairs:
        if len(pair) != 2 or not all(map(_is_count, pair)) or not 0 <= pair[0] < pair[1] < num_layers:
            raise ValueError(
                f"LazyPlan: a block is its first and last of at least two layers below {num_layers}, got {list(pair)}"
            )
    if any(after[0] <= before[1] for before, after in pairwise(pairs)):
        raise ValueError(
            f"LazyPlan: blocks must be ascending and must not overlap, got {[list(pair) for pair in pairs]}"
        )
    return tuple((first, last) for first, last in pairs)


def _is_list(x: object) -> bool:
    return isinstance(x, Sequence) and not isinstance(x, str)


def _is_count(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _difference(a: LayerKind, b: LayerKind) -> str:
    if not (a.full and b.full):
        return "one of them does not attend to everything before it (sliding window, linear or recurrent)"
    names = ("query_heads", "kv_heads", "head_dim", "rope")
    return ", ".join(
        f"{name} {getattr(a, name)} and {getattr(b, name)}" for name in names if getattr(a, name) != getattr(b, name)
    )


_PRESETS: Final = {
    "llava-1.5-7b": LazyPlan(
        32, ((2, 6), (7, 11), (12, 16), (17, 21), (22, 26), (27, 30)), model="llava-hf/llava-1.5-7b-hf", inferred=True
    )
}
