"""Reading a prompt through cache layers that look on."""

from __future__ import annotations

from typing import Any

from mmkv_pipelines import Budget, Pipeline
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from . import attention  # noqa: F401  registers the attention function
from ._compat import text_config
from .cache import make_layers
from .layers import CompressedLayer
from .request import Request


class WatchedLayer(CompressedLayer):
    """A cache layer that evicts nothing and notes something about each forward pass."""

    @property
    def reading(self) -> bool:
        return True

    def observe(self, reader: int, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        """Takes in what the layer's own queries see; those of layers that borrow its keys are left out."""
        if reader == self.layer_idx:
            self.note(query, mask, scaling, softcap)

    def note(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        """See `CompressedLayer.observe`."""
        raise AssertionError("a watched layer says what it notes")


def watched_layers(model: Any, kind: type[WatchedLayer]) -> list[CacheLayerMixin]:
    """The cache layers of a model, those with full attention of the given kind."""
    return make_layers(text_config(model), Request(Pipeline(), Budget(ratio=1.0)), kind=kind)
