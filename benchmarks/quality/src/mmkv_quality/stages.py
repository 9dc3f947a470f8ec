"""Methods that change what the layers see while a prompt is read: vision tokens dropped, attention borrowed.

A recorded prefill does not serve them, so each of their cells reads the prompt itself, with the product's own sessions'
hooks on the model. Published layer numbers are of 32-layer models and follow `rule.scaled_layers`; everything else is
as published.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from mmkv_hf import Stages
from mmkv_hf.lazy import Borrowing
from mmkv_hf.prune import PruneSession
from mmkv_layershare import LazyPlan
from mmkv_prune import ADSC, FastV, Pruner, PyramidDrop, RandomDrop, SparseVLM, UniformDrop

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
LAZY: Final = {"vla": "visual", "gla": "global"}
"""Name -> mode of the plan beside the weights."""


def build(names: tuple[str, ...], layers: int, plan: Path | None) -> Stages:
    """The stages of these names.

    Args:
        names: Of `PRUNERS` and `LAZY`, at most one of each.
        layers: Of the model.
        plan: Its plan of lazy layers.

    Raises:
        ValueError: There is no plan, or the stages do not go together.
    """
    prune = next((PRUNERS[name](layers) for name in names if name in PRUNERS), None)
    mode: Any = next((LAZY[name] for name in names if name in LAZY), None)
    if mode is None:
        return Stages(prune=prune)
    if plan is None:
        raise ValueError(f"{' | '.join(names)} needs a plan of lazy layers, and the model has none")
    return Stages(prune=prune, share=replace(LazyPlan.load(plan), mode=mode))


@contextmanager
def running(model: Any, stages: Stages) -> Iterator[None]:
    """The model with these stages, whatever the cache; call it inside `observed(model)`."""
    with ExitStack() as stack:
        if stages.share is not None:
            Borrowing(model, stages.share).open(stack)
        if stages.prune is not None:
            stack.enter_context(PruneSession(model, stages.prune))
        yield
