"""Lazy Attention on stock models: layers that attend with another layer's queries and keys (mmkv-layershare's plans).

The queries and keys of an anchor are handed to the lazy layers of its block inside one forward pass, by the attention
function; what must live longer is in a `LazyCache`. Gradients flow: a lazy layer's loss reaches the anchor's
projections, so a model can be trained inside a session.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmkv_layershare import LazyPlan
from torch import Tensor, nn
from transformers import PreTrainedModel

from ._compat import arguments, attributes_set, modalities, recomputes
from .kinds import check_plan
from .lazy_cache import BlockLayer, Layout, LazyCache, arrives_at_once
from .opened import Opened, at_work
from .shortened import Shortened
from .split import Columns, Prefix, columns_of
from .survivors import Held
from .vision import VisionCache

_PROJECTIONS = ("q_proj", "k_proj")


class Lending:
    """What an anchor lends to the lazy layers of its block, within one forward pass.

    Attributes:
        plan: who lends to whom.
        vision: [B, S] bool, in visual mode, of this pass.
        held: layers that were given only some columns of the prompt.
        lent: lazy layers served in this pass.
        cache: of this pass, where its layers attend to prefix and tail apart.
    """

    def __init__(self, plan: LazyPlan) -> None:
        self.plan = plan
        self.vision: Tensor | None = None
        self.held: dict[int, Held] = {}
        self.lent = 0
        self.cache: LazyCache | None = None
        self._query: Tensor | None = None
        self._key: Tensor | None = None
        self._columns: tuple[Tensor | None, int, Columns] | None = None

    def begin(self, vision: Tensor | None, cache: LazyCache | None = None) -> None:
        """A forward pass over tokens of which `vision` [B, S] are vision tokens, cached ones included."""
        self.vision, self.held, self.cache, self.lent = vision, {}, cache, 0
        self._query = self._key = self._columns = None

    def exchange(self, layer: int, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, Hq, n, D] and keys [B, H, S, D] that `layer` attends with, from its own.

        Where prefix and tail are attended to apart, the keys are those of the tail.
        """
        anchor = self.plan.anchor(layer)
        if anchor == layer:
            if self.plan.last_reader(layer) > layer:
                self._query, self._key = query, key
            return query, key
        assert self._query is not None
        assert self._key is not None
        borrowed = self._query, self._key
        if self.plan.last_reader(anchor) == layer:
            self._query = self._key = None
        self.lent += 1
        if self.vision is None:
            return borrowed
        if self.cache is not None or not self.vision.any():
            return query, key
        rows = self.latest(layer, query.shape[2])[:, None, :, None]
        columns = self.latest(layer, key.shape[2])[:, None, :, None]
        return torch.where(rows, borrowed[0], query), torch.where(columns, borrowed[1], key)

    def latest(self, layer: int, count: int) -> Tensor:
        """[B, count] bool: which of the latest tokens that a layer was given are vision tokens, in visual mode."""
        assert self.vision is not None
        vision = self.vision
        if layer in self.held:
            columns, real, length = self.held[layer][:3]
            vision = torch.cat([vision.gather(1, columns) & real, vision[:, length:]], dim=1)
        return vision[:, vision.shape[1] - count :]

    def prefix_of(self, layer: int, query: Tensor, mask: Tensor | None) -> Prefix | None:
        """What `layer` attends to beside the tail it holds; None where it attends to everything at once.

        Args:
            layer: its index.
            query: [B, Hq, n, D].
            mask: bool [1 or B, 1, n, S] of logical columns, or None for causal.
        """
        own = None if self.cache is None else self.cache.layers[layer]
        if self.cache is None or not isinstance(own, BlockLayer):
            return None
        heads, lender = own.tail_values.shape[1], self.cache.layers[self.plan.anchor(layer)]
        if self._columns is None or self._columns[0] is not mask or self._columns[1] != heads:
            self._columns = mask, heads, columns_of(*self.cache.layout.parts(), mask, heads, query.shape[2])
        return Prefix(lender.prefix_keys, own.prefix_values, self._columns[2])


class _Projection(nn.Module):
    """A lazy layer's query or key projection that runs only where its result is used."""

    def __init__(self, projection: nn.Linear, lending: Lending, layer: int) -> None:
        super().__init__()
        self.projection, self.lending, self.layer = projection, lending, layer

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], self.projection.out_features)
        if self.lending.vision is None:
            return x.new_zeros(()).expand(shape)
        is_text = ~self.lending.latest(self.layer, x.shape[1])
        if bool(is_text.all()):
            everything: Tensor = self.projection(x)
            return everything
        projected: Tensor = self.projection(x[is_text])
        return projected.new_zeros(shape).index_put((is_text,), projected)


def _attention_of(model: PreTrainedModel, layer: int) -> nn.Module:
    """The attention module of a layer, with query and key projections of its own.

    Raises:
        ValueError: it has none.
    """
    module = getattr(model.get_decoder().layers[layer], "self_attn", None)
    if not isinstance(module, nn.Module) or not all(hasattr(module, name) for name in _PROJECTIONS):
        raise ValueError(
            f"layer {layer} of {type(model).__name__} has no separate query and key projections to skip; "
            "leave skip_projections out"
        )
    return module


@contextmanager
def _projections_skipped(model: PreTrainedModel, lending: Lending) -> Iterator[None]:
    modules = {layer: _attention_of(model, layer) for layer in lending.plan.lazy}
    for layer, module in modules.items():
        for name in _PROJECTIONS:
            setattr(module, name, _Projection(getattr(module, name), lending, layer))
    try:
        yield
    finally:
        for module in modules.values():
            for name in _PROJECTIONS:
                setattr(module, name, getattr(module, name).projection)


class Borrowing:
    """What a model does differently while its lazy layers borrow.

    Args:
        model: a decoder-only transformers model.
        plan: which layers are lazy.
        skip_projections: see `share`.

    Raises:
        ValueError: see `share`.
    """

    def __init__(self, model: PreTrainedModel, plan: LazyPlan, *, skip_projections: bool = False) -> None:
        check_plan(plan, model)
        self.model, self.plan, self.skip_projections = model, plan, skip_projections
        for layer in plan.lazy if skip_projections else ():
            _attention_of(model, layer)  # says now what would fail later
        self._lending = Lending(plan)

    def open(self, stack: ExitStack) -> None:
        """Puts hooks on this one instance, which the stack takes off again."""
        if self.skip_projections:
            stack.enter_context(_projections_skipped(self.model, self._lending))
        base, decoder = self.model.base_model, self.model.get_decoder()
        if any(isinstance(other, Borrowing) for other in at_work(base)):
            raise RuntimeError("layers of this model share attention already; such sessions cannot be nested")
        hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_pre_hook(self._lend, with_kwargs=True),
            decoder.register_forward_hook(self._check_lent),
        ]
        for hook in hooks:
            stack.callback(hook.remove)
        stack.callback(self._lending.begin, None)

    def _begin(self, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model = self.model
        if model.training and recomputes(model):
            raise RuntimeError("gradient checkpointing runs layers anew, out of the order lazy layers borrow in")
        kwargs = arguments(base, args, kwargs)
        cache, mask, visual = kwargs.get("past_key_values"), kwargs.get("attention_mask"), self.plan.mode == "visual"
        new = self._new(model, kwargs.get("input_ids"), kwargs)
        if isinstance(cache, VisionCache):
            if visual and new is not None:
                cache.vision.extend(new)
            self._lending.begin(cache.vision.seen)
            return
        held = cache if isinstance(cache, LazyCache) else None
        if visual and held is None and cache is not None and cache.get_seq_length():
            raise ValueError(
                f"a {type(cache).__name__} does not know which of its tokens are vision tokens; begin with the cache "
                "of session.cache()"
            )
        layout = Layout() if held is None else held.layout
        if new is not None:
            trains = model.training or torch.is_grad_enabled()
            layout.extend(new, layout.hidden(mask, new.shape[1]), may_split=not trains)
        self._lending.begin(layout.prefix if visual else None, held if layout.is_split else None)

    def shorten(self, given: Shortened, cache: Any) -> None:
        """Goes on with the vision tokens among the columns that the language model is given."""
        if self._lending.vision is not None:
            self._lending.vision = given.of(self._lending.vision)
            if isinstance(cache, VisionCache):
                cache.vision.seen = self._lending.vision

    def _new(self, model: Any, ids: Tensor | None, inputs: dict[str, Any]) -> Tensor | None:
        """[B, n] bool, which tokens of a pass stay where they are."""
        if self.plan.mode == "global":
            tokens = inputs.get("inputs_embeds") if ids is None else ids
            return None if tokens is None else arrives_at_once(tokens)
        kinds = modalities(model.config, ids, inputs.get("mm_token_type_ids"))
        if kinds is None:
            raise ValueError(
                "visual mode has to know the vision tokens: pass input_ids, or mm_token_type_ids beside inputs_embeds"
            )
        return kinds > 0

    def _lend(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "mmkv_lending": self._lending}

    def _check_lent(self, decoder: Any, args: tuple[Any, ...], output: Any) -> None:
        if self._lending.lent != len(self.plan.lazy):
            raise RuntimeError(
                f"{self._lending.lent} of {len(self.plan.lazy)} lazy layers borrowed attention: "
                f"{type(self.model).__name__} does not hand its arguments down to its attention layers"
            )


def share(model: PreTrainedModel, plan: LazyPlan, *, skip_projections: bool = False) -> LazySession:
    """A session in which lazy layers borrow their anchor's attention, in `generate`, forward passes and training.

    Example:
        >>> with share(model, LazyPlan(4, ((1, 3),))):
        ...     out = model.generate(**inputs)

    A hand-written loop in visual mode begins with `session.cache()`: a stock cache does not know the vision tokens.

    Args:
        model: a decoder-only transformers model.
        plan: which layers are lazy; see mmkv-layershare.
        skip_projections: while the session is open, the query and key projections of lazy layers are wrapped so that
            they run for text tokens only (visual mode) or not at all (global mode). The same results, fewer
            multiplications; parameters have other names meanwhile, so do not save the model inside the session.

    Raises:
        TypeError: no plan.
        ValueError: the plan does not fit the model: another number of layers, or a block of layers that cannot share;
            or there are no separate projections to skip.
    """
    return LazySession(model, plan, skip_projections=skip_projections)


class LazySession(Opened):
    """What `share` returns; enter it with `with`. Wraps `generate` on this one instance, nothing of transformers.

    Attributes:
        model: the model.
        plan: the plan.
        skip_projections: whether unused projections are skipped.
        last: the cache of the latest conversation.
    """

    def __init__(self, model: PreTrainedModel, plan: LazyPlan, *, skip_projections: bool = False) -> None:
        self.model, self.plan, self.skip_projections = model, plan, skip_projections
        self.last: LazyCache | None = None
        self._borrowing = Borrowing(model, plan, skip_projections=skip_projections)

    def _enter(self, stack: ExitStack) -> None:
        self._borrowing.open(stack)
        generate = self.model.generate
        stack.enter_context(attributes_set(self.model, generate=lambda *a, **k: self._generate(generate, *a, **k)))

    def cache(self) -> LazyCache:
        """An empty cache for a hand-written forward loop."""
        self.last = LazyCache(self.model, self.plan)
        return self.last

    def _generate(self, generate: Any, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if past_key_values is not None and not isinstance(past_key_values, LazyCache):
            raise ValueError(
                f"a lazy session continues a LazyCache, not a {type(past_key_values).__name__}; to evict as well, name "
                "the plan in compress(model, 'lazy(plan.json) | ...')"
            )
        if kwargs.get("use_cache") is False:
            return generate(*args, **kwargs)
        return generate(*args, past_key_values=past_key_values or self.cache(), **kwargs)
