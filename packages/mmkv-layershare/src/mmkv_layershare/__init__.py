"""Which layers can borrow a neighbour's attention: Lazy Attention / Q Cache."""

from .accounting import Cost, Geometry, lazy_cost
from .divergence import adjacent_divergences, js_divergence
from .kinds import LayerKind
from .plan import LN2, LazyPlan, Mode
from .planning import plan_lazy_layers

__version__ = "0.1.0"
__all__ = [
    "LN2",
    "Cost",
    "Geometry",
    "LayerKind",
    "LazyPlan",
    "Mode",
    "adjacent_divergences",
    "js_divergence",
    "lazy_cost",
    "plan_lazy_layers",
]
