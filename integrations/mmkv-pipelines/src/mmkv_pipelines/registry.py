"""Names of methods, and how third parties add theirs."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, get_args

import mmkv_budget
import mmkv_layershare
import mmkv_prune
import mmkv_scores
import mmkv_select

Kind = Literal["score", "wrap", "layers", "heads", "select", "reduce", "prune", "share"]
STAGES: frozenset[Kind] = frozenset({"reduce", "prune", "share"})
"""Kinds that are stages of their own, before a pipeline that evicts."""


@dataclass(frozen=True, slots=True)
class Method:
    """A named part of a pipeline.

    Attributes:
        name: as written in the text form.
        kind: its place: "score" (base), "wrap" (takes a score as its first argument), "layers", "heads" or "select" in
            a pipeline that evicts; "reduce", "prune" and "share" are stages of their own.
        factory: a frozen dataclass.
        order: wraps are applied from low to high, so BACON (0) is inside MixKV (1); of one order, the first named is
            the outermost.
    """

    name: str
    kind: Kind
    factory: Callable[..., Any]
    order: int = 2

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (self.factory.__doc__ or "").strip().partition("\n")[0]


_METHODS: dict[str, Method] = {}


def register(name: str, kind: Kind, factory: Callable[..., Any], *, order: int = 2) -> None:
    """Makes a method known to `Pipeline.parse` and `mmkv methods`.

    Raises:
        TypeError: the factory is not a dataclass.
        ValueError: the name is taken by something else, or is not lower-case letters, digits and underscores; no such
            kind.
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"a method's name is lower-case letters, digits and underscores, got {name!r}")
    if kind not in get_args(Kind):
        raise ValueError(f"{name!r}: kind is one of {', '.join(get_args(Kind))}, got {kind!r}")
    if not (isinstance(factory, type) and is_dataclass(factory)):
        raise TypeError(f"{name!r}: the factory must be a dataclass, whose fields are its settings, got {factory!r}")
    known = _METHODS.get(name)
    if known is not None and known.factory is not factory:
        raise ValueError(f"the name {name!r} is taken by {known.factory!r}")
    _METHODS[name] = Method(name, kind, factory, order)


def methods() -> tuple[Method, ...]:
    """All registered methods, in order of registration."""
    return tuple(_METHODS.values())


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: unknown name; the message names the nearest.
    """
    method = _METHODS.get(name.lower())
    if method is None:
        near = difflib.get_close_matches(name.lower(), _METHODS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_METHODS)}"
        raise ValueError(f"unknown method {name!r}; {hint}")
    return method


def named(part: object) -> Method | None:
    """The registered method that `part` is an instance of, if any."""
    return next((m for m in _METHODS.values() if m.factory is type(part)), None)


for _name, _kind, _factory, _order in (
    ("snapkv", "score", mmkv_scores.SnapKV, 2),
    ("tova", "score", mmkv_scores.LastQuery, 2),
    ("h2o", "score", mmkv_scores.ObservedAttention, 2),
    ("streamingllm", "score", mmkv_scores.StreamingLLM, 2),
    ("knorm", "score", mmkv_scores.KNorm, 2),
    ("vnorm", "score", mmkv_scores.VNorm, 2),
    ("keydiff", "score", mmkv_scores.KeyDiff, 2),
    ("random", "score", mmkv_scores.Random, 2),
    ("bacon", "wrap", mmkv_scores.BACON, 0),
    ("mixkv", "wrap", mmkv_scores.MixKV, 1),
    ("uniform", "layers", mmkv_budget.Uniform, 2),
    ("pyramidkv", "layers", mmkv_budget.PyramidKV, 2),
    ("equal", "heads", mmkv_budget.Equal, 2),
    ("adakv", "heads", mmkv_budget.AdaKV, 2),
    ("sparsemm", "heads", mmkv_budget.SparseMM, 2),
    ("headkv", "heads", mmkv_budget.HeadKV, 2),
    ("select", "select", mmkv_select.Select, 2),
    ("visionzip", "reduce", mmkv_prune.VisionZip, 2),
    ("prumerge", "reduce", mmkv_prune.PruMerge, 2),
    ("prumergeplus", "reduce", mmkv_prune.PruMergePlus, 2),
    ("keepuniform", "reduce", mmkv_prune.KeepUniform, 2),
    ("keeprandom", "reduce", mmkv_prune.KeepRandom, 2),
    ("adsc", "prune", mmkv_prune.ADSC, 2),
    ("fastv", "prune", mmkv_prune.FastV, 2),
    ("pyramiddrop", "prune", mmkv_prune.PyramidDrop, 2),
    ("sparsevlm", "prune", mmkv_prune.SparseVLM, 2),
    ("randomdrop", "prune", mmkv_prune.RandomDrop, 2),
    ("uniformdrop", "prune", mmkv_prune.UniformDrop, 2),
    ("lazy", "share", mmkv_layershare.LazyPlan, 2),
):
    register(_name, _kind, _factory, order=_order)  # type: ignore[arg-type]
