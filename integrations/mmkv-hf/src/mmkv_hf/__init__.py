"""mmkv on transformers: real generation from a compressed cache, with nothing patched."""

from mmkv_pipelines import Budget, Pipeline, Stages, register

from ._compat import set_attention
from .cache import CompressedCache
from .calibrate import plot_divergences, profile_layers
from .encoder import ReduceSession, reduce_images
from .lazy import LazySession, share
from .lazy_cache import LazyCache
from .profile import LabelledPage, TextBox, profile_heads, read_pages
from .prune import PruneSession, prune
from .report import LayerReport, Report
from .session import Session, compress

__all__ = [
    "Budget",
    "CompressedCache",
    "LabelledPage",
    "LayerReport",
    "LazyCache",
    "LazySession",
    "Pipeline",
    "PruneSession",
    "ReduceSession",
    "Report",
    "Session",
    "Stages",
    "TextBox",
    "compress",
    "plot_divergences",
    "profile_heads",
    "profile_layers",
    "prune",
    "read_pages",
    "reduce_images",
    "register",
    "set_attention",
    "share",
]
