"""What happens to a prompt in turn: images are reduced, vision tokens dropped, attention shared, entries evicted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mmkv_layershare import LazyPlan
from mmkv_prune import Pruner, Reducer

from . import text
from .pipeline import Pipeline
from .registry import STAGES, find


@dataclass(frozen=True, slots=True)
class Stages:
    """Up to four stages, run in this order, of which each may be missing.

    Attributes:
        reduce: which vision tokens the language model is given.
        prune: which vision tokens never reach deeper layers.
        share: which layers borrow a neighbour's attention.
        evict: which entries leave the cache once the prompt has been read.
    """

    reduce: Reducer | None = None
    prune: Pruner | None = None
    share: LazyPlan | None = None
    evict: Pipeline | None = None

    def __post_init__(self) -> None:
        """Refuses parts of another kind, nothing at all, and a layer that prunes in the middle of a lazy block."""
        kinds = {"reduce": Reducer, "prune": Pruner, "share": LazyPlan, "evict": Pipeline}
        given = {name: getattr(self, name) for name in kinds if getattr(self, name) is not None}
        for name, part in given.items():
            is_other = name == "reduce" and isinstance(part, Pruner)  # a method between layers looks like one before
            if is_other or not isinstance(part, kinds[name]):
                raise TypeError(f"Stages({name}=...) does not take a {type(part).__name__}")
        if not given:
            raise ValueError("Stages needs one stage at least: reduce, prune, share or evict")
        if self.prune is not None and self.share is not None:
            check_blocks(self.prune, self.share)

    @classmethod
    def parse(cls, source: str | Pipeline | Stages) -> Stages:
        """The stages named by e.g. "visionzip | adsc(layers=[4,20],stride=3) | lazy(plan.json) | adakv+mixkv+bacon".

        Each stage stands once, in any order. A method that reduces images or prunes and `lazy` are stages of their own;
        everything else is the text form of a `Pipeline`. `lazy` takes the path of a plan (and a mode), the name of a
        preset, or a plan's own settings. A `Pipeline` becomes the stage that evicts; `Stages` are returned as they are.

        Raises:
            TypeError: none of these.
            ValueError: an unknown name or setting, a stage twice, or stages that do not fit together.
            FileNotFoundError: there is no such plan.
        """
        if isinstance(source, Stages):
            return source
        if isinstance(source, Pipeline):
            return cls(evict=source)
        if not isinstance(source, str):
            raise TypeError(f"Stages.parse takes a text, a Pipeline or Stages, not {type(source).__name__}")
        found: dict[str, Any] = {}
        for piece in text.split(source, "|"):
            name, part = _stage(piece)
            if name in found:
                raise ValueError(f"{source!r} has two stages that {name}")
            found[name] = part
        return cls(**found)

    def __str__(self) -> str:
        """The canonical text form, which `parse` reads back as equal stages where the text form can say it."""
        own = [text.show(part) for part in (self.reduce, self.prune, self.share) if part is not None]
        return " | ".join([*own, *([str(self.evict)] if self.evict is not None else [])])


def check_blocks(prune: Pruner, share: LazyPlan) -> None:
    """Refuses to prune between an anchor and a layer that borrows from it.

    Raises:
        ValueError: a layer that drops tokens is not the first of its block.
    """
    for layer in prune.layers:
        anchor = share.anchor(layer)
        if anchor != layer:
            raise ValueError(
                f"{type(prune).__name__} drops tokens at layer {layer}, which borrows from layer {anchor}: "
                "queries and keys would be of other tokens; let a block of the plan begin there"
            )


def _stage(piece: str) -> tuple[str, Any]:
    """The name of the stage and what it is."""
    if not piece.strip():
        raise ValueError("a stage is missing: write reduce | prune | share | evict, leaving out what you do not want")
    parts = text.split(piece, "+")
    name = parts[0].partition("(")[0].strip()
    if len(parts) > 1 or not name or find(name).kind not in STAGES:
        return "evict", Pipeline.parse(piece)
    method, args, settings = text.read(piece)
    if method.kind == "share":
        return "share", _plan(args, settings)
    return method.kind, text.make(method, args, settings)


def _plan(args: list[Any], settings: dict[str, Any]) -> LazyPlan:
    """A plan from a file or a preset, perhaps in another mode, or from its own settings."""
    if len(args) > 1 or not all(isinstance(arg, str) for arg in args):
        raise ValueError("lazy takes the path of one plan, as in lazy(plan.json)")
    preset = settings.pop("preset", None)
    if preset is None and not args:
        made: LazyPlan = text.make(find("lazy"), [], settings)
        return made
    if preset is not None and args:
        raise ValueError("lazy takes a path or a preset, not both")
    plan = LazyPlan.load(args[0]) if args else LazyPlan.preset(str(preset))
    if settings.keys() - {"mode"}:
        raise ValueError(f"lazy: beside a plan only mode can be given, not {', '.join(settings.keys() - {'mode'})}")
    return dataclasses.replace(plan, **settings)
