"""What a plan of lazy layers has to respect in a transformers model."""

from __future__ import annotations

from typing import Any

from mmkv_layershare import LayerKind, LazyPlan

from ._compat import cross_layers, is_full_attention, last_readers, template_layers, text_config


def check_plan(plan: Any, model: Any) -> None:
    """Refuses to run anything but a plan that fits.

    Args:
        plan: what was given as a plan.
        model: a model or config.

    Raises:
        TypeError: no plan.
        ValueError: see `LazyPlan.check`.
    """
    if not isinstance(plan, LazyPlan):
        raise TypeError(f"lazy layers need a LazyPlan, not {plan!r}; LazyPlan.load(path) reads one from its file")
    plan.check(layer_kinds(model))


def layer_kinds(model: Any) -> list[LayerKind]:
    """What a plan has to respect, of every layer of a model or config."""
    config = text_config(model)
    template, cross, readers = template_layers(config), cross_layers(config), last_readers(config)
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(template)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return [
        LayerKind(
            config.num_attention_heads,
            heads,
            width,
            _rope(config, types[i]),
            is_full_attention(layer) and i not in cross and readers.get(i, i) == i,
        )
        for i, layer in enumerate(template)
    ]


def _rope(config: Any, kind: str) -> str:
    """The rotary parameters of layers of this type, as text."""
    parameters = getattr(config, "rope_parameters", None) or {}
    own = parameters.get(kind, parameters) if isinstance(parameters, dict) else parameters
    return repr(sorted(own.items())) if isinstance(own, dict) else repr(own)
