"""What a plan saves, exactly: stored keys and values, the transient Q cache, parameters and multiply-adds."""

from __future__ import annotations

from dataclasses import dataclass, fields

from .plan import LazyPlan


@dataclass(frozen=True, slots=True)
class Geometry:
    """A decoder with equal layers and no biases in its attention.

    Attributes:
        num_layers: L.
        hidden: width of the residual stream.
        intermediate: width of the gated MLP, which has three matrices.
        query_heads: Hq.
        kv_heads: H.
        head_dim: D.
        itemsize: bytes of a stored number.
    """

    num_layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    itemsize: int = 2

    def __post_init__(self) -> None:
        """Refuses sizes that no model has."""
        for part in fields(self):
            if getattr(self, part.name) < 1:
                raise ValueError(f"Geometry: {part.name} must be above 0, got {getattr(self, part.name)}")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"Geometry: {self.query_heads} query heads are no multiple of {self.kv_heads} KV heads")


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one prompt.

    Attributes:
        kv_bytes: keys and values stored after the prompt.
        q_cache_bytes: the largest shared query buffer, alive while the prompt is read only: queries of one layer, all
            tokens (global) or the vision tokens (visual). A decoding step shares the queries of one token at most.
        parameters: of the decoder layers' matrices that are used at all; the global mode has no use for the query and
            key projections of lazy layers.
        macs: multiply-adds of reading the prompt, with the full square of attention, decoder layers only.
    """

    kv_bytes: int
    q_cache_bytes: int
    parameters: int
    macs: int


def lazy_cost(plan: LazyPlan, geometry: Geometry, *, vision: int, text: int) -> Cost:
    """The cost of a prompt of `vision` and `text` tokens under a plan; a plan without blocks is the plain model.

    With n lazy of L layers keys and values shrink by n / 2L (global) or V / (V + T) n / 2L (visual), multiply-adds by
    the query and key projections that are not computed (arXiv 2602.01901, section 3; grouped-query heads are ours).
    Tokens generated later count as text: lazy layers store their keys in visual mode and none in global mode.

    Raises:
        ValueError: a plan for another number of layers, or negative lengths.
    """
    if plan.num_layers != geometry.num_layers:
        raise ValueError(f"the plan is for {plan.num_layers} layers, the geometry has {geometry.num_layers}")
    if min(vision, text) < 0:
        raise ValueError(f"lengths cannot be negative, got {vision} vision and {text} text tokens")
    tokens, lazy = vision + text, len(plan.lazy)
    shared = tokens if plan.mode == "global" else vision  # tokens whose keys and queries a lazy layer borrows
    key, query = geometry.kv_heads * geometry.head_dim, geometry.query_heads * geometry.head_dim
    layer = geometry.hidden * (2 * query + 2 * key + 3 * geometry.intermediate)
    projections = geometry.hidden * (query + key)
    plain = geometry.num_layers * (layer * tokens + 2 * tokens**2 * query)
    unused = lazy * projections if plan.mode == "global" else 0
    return Cost(
        kv_bytes=(2 * geometry.num_layers * tokens - lazy * shared) * key * geometry.itemsize,
        q_cache_bytes=(shared * query * geometry.itemsize if lazy else 0),
        parameters=geometry.num_layers * layer - unused,
        macs=plain - lazy * shared * projections,
    )
