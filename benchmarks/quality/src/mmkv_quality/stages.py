"""Methods that change what the layers see while a prompt is read: vision tokens left out, attention borrowed.

A recorded prefill does not serve them, so each of their cells reads the prompt itself, with the product's own sessions'
hooks on the model. Published layer numbers are of 32-layer models and follow `rule.scaled_layers`; everything else is
as published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final

from mmkv_hf import CompressedCache, Stages
from mmkv_hf.encoder import ReduceSession
from mmkv_hf.lazy import Borrowing
from mmkv_hf.prune import PruneSession
from mmkv_hf.shortened import Shortened, Stage
from mmkv_layershare import LazyPlan
from mmkv_prune import (
    ADSC,
    FastV,
    KeepRandom,
    KeepUniform,
    PruMerge,
    PruMergePlus,
    Pruner,
    PyramidDrop,
    RandomDrop,
    Reducer,
    SparseVLM,
    TowerEvidence,
    UniformDrop,
    VisionZip,
)

from .rule import scaled_layers

PRUNERS: Final[Mapping[str, Callable[[int], Pruner]]] = {
    "adsc": lambda layers: ADSC(layers=scaled_layers((4, 20), layers)),
    "fastv": lambda layers: FastV(layer=scaled_layers((2,), layers)[0]),
    "pyramiddrop": lambda layers: PyramidDrop(layers=scaled_layers((8, 16, 24), layers)),
    "sparsevlm": lambda layers: SparseVLM(layers=scaled_layers((3, 7, 16), layers)),
    "randomdrop": lambda layers: RandomDrop(layers=scaled_layers((2,), layers)),
    "uniformdrop": lambda layers: UniformDrop(layers=scaled_layers((2,), layers)),
}
"""Name -> method for a model with so many layers."""


@dataclass(frozen=True, slots=True)
class ShallowVisionZip(VisionZip):
    """VisionZip for towers with a single layer, where it has to look at that one and not at the last but one."""

    evidence: ClassVar[TowerEvidence] = TowerEvidence(layer=-1, heads="apart")


REDUCERS: Final[Mapping[str, Reducer]] = {
    "visionzip 64": ShallowVisionZip(),
    "visionzip 192": ShallowVisionZip(dominant=162, contextual=30),
    "prumerge": PruMerge(),
    "prumergeplus": PruMergePlus(),
    "keepuniform 64": KeepUniform(64 / 576),
    "keepuniform 192": KeepUniform(192 / 576),
    "keeprandom 192": KeepRandom(192 / 576),
}
"""Name -> method: VisionZip's published 64 and 192 tokens of 576, the tokens that PruMerge finds, and controls."""
LAZY: Final = {"vla": "visual", "gla": "global"}
"""Name -> mode of the plan beside the weights."""


def build(names: tuple[str, ...], layers: int, plan: Path | None) -> Stages:
    """The stages of these names.

    Args:
        names: Of `REDUCERS`, `PRUNERS` and `LAZY`, at most one of each.
        layers: Of the model.
        plan: Its plan of lazy layers.

    Raises:
        ValueError: There is no plan, or the stages do not go together.
    """
    reduce = next((REDUCERS[name] for name in names if name in REDUCERS), None)
    prune = next((PRUNERS[name](layers) for name in names if name in PRUNERS), None)
    mode: Any = next((LAZY[name] for name in names if name in LAZY), None)
    if mode is None:
        return Stages(reduce=reduce, prune=prune)
    if plan is None:
        raise ValueError(f"{' | '.join(names)} needs a plan of lazy layers, and the model has none")
    return Stages(reduce=reduce, prune=prune, share=replace(LazyPlan.load(plan), mode=mode))


class _Caches:
    """Tells a cache what the language model was given of its prompt, as the product's session does."""

    def shorten(self, given: Shortened, cache: CompressedCache) -> None:
        cache.shorten(given)


@contextmanager
def running(model: Any, stages: Stages) -> Iterator[None]:
    """The model with these stages, whatever the cache; call it inside `observed(model)`."""
    told: list[Stage] = [_Caches()]
    with ExitStack() as stack:
        if stages.share is not None:
            borrowing = Borrowing(model, stages.share)
            borrowing.open(stack)
            told.append(borrowing)
        if stages.prune is not None:
            told.append(stack.enter_context(PruneSession(model, stages.prune)))
        if stages.reduce is not None:
            stack.enter_context(ReduceSession(model, stages.reduce, stages=told))
        yield
