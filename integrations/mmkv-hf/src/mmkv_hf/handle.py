"""How attention finds the cache layer that handed out the keys it is given."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .layers import CompressedLayer

_HANDLE = "_mmkv_layer"


def layer_of(keys: Tensor) -> CompressedLayer | None:
    """The layer that handed out `keys`, if it was one of ours."""
    handle = getattr(keys, _HANDLE, None)
    return None if handle is None else handle()


def marked(keys: Tensor, layer: CompressedLayer) -> Tensor:
    """A view of `keys` from which attention finds `layer`."""
    keys = keys.view_as(keys)
    setattr(keys, _HANDLE, weakref.ref(layer))  # weak: layer -> keys -> layer would keep memory until a gc run
    return keys
