"""mmkv on transformers: real generation from a compressed cache, with nothing patched."""

from mmkv_pipelines import Budget, Pipeline, register

from ._compat import set_attention
from .cache import CompressedCache
from .report import LayerReport, Report
from .session import Session, compress

__all__ = [
    "Budget",
    "CompressedCache",
    "LayerReport",
    "Pipeline",
    "Report",
    "Session",
    "compress",
    "register",
    "set_attention",
]
