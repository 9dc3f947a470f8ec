"""What vision towers are like, and what they attend to while they run."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from mmkv_prune import TowerEvidence, tower_attention, tower_keys
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

LISTENING = "mmkv_tower"


@dataclass(frozen=True, slots=True)
class Site:
    """Where a model turns patches into tokens of its language model.

    Attributes:
        tower: name of the vision tower in the base model.
        projector: name of the module that maps each token for itself to the width of the language model.
        by_place: whether a token stands for a place of a grid, by its position or by the line ends around it; else
            tokens are a sequence.
        hands_on_cls: whether the CLS token, cut off before the projector, has a feature that fits it.
    """

    tower: str
    projector: str
    by_place: bool = False
    hands_on_cls: bool = False


SITES = {
    "llava": Site("vision_tower", "multi_modal_projector", hands_on_cls=True),
    "llava_next": Site("vision_tower", "multi_modal_projector", by_place=True),
    "internvl": Site("vision_tower", "multi_modal_projector"),
    "idefics3": Site("vision_model", "connector.modality_projection"),
    "smolvlm": Site("vision_model", "connector.modality_projection"),
    "qwen2_vl": Site("visual", "visual.merger.mlp", by_place=True),
}


class Heard(NamedTuple):
    """One pass of a tower's attention layer.

    Attributes:
        queries: [b, T, heads, D].
        keys: [b, T, heads, D].
        valid: [b, T] bool, patches that are no padding; None: all.
    """

    queries: Tensor
    keys: Tensor
    valid: Tensor | None


_LISTENERS: weakref.WeakKeyDictionary[nn.Module, list[Heard]] = weakref.WeakKeyDictionary()


def site_of(model: PreTrainedModel) -> Site:
    """Where this model could be given fewer vision tokens.

    Raises:
        ValueError: it is not known, or its features are taken from the tower in another way than its CLS token says.
    """
    site = SITES.get(model.config.model_type)
    if site is None:
        raise ValueError(
            f"{type(model).__name__} ({model.config.model_type}) cannot be given fewer vision tokens; "
            f"models that can: {', '.join(SITES)}"
        )
    tower = model.base_model.get_submodule(site.tower)
    strategy = getattr(model.config, "vision_feature_select_strategy", None)
    if has_cls(tower) != (strategy == "default"):
        raise ValueError(
            f"vision_feature_select_strategy={strategy!r} does not cut off exactly the CLS token of this model's "
            f"{type(tower).__name__}"
        )
    return site


def has_cls(tower: nn.Module) -> bool:
    """Whether the first token of the tower is a CLS token."""
    return any(name.endswith(("class_embedding", "cls_token")) for name, _ in tower.named_parameters())


@contextmanager
def listening(tower: Any, layer: int) -> Iterator[list[Heard]]:
    """What layer `layer` of the tower attends to; the tower runs on sdpa for as long as the context is open.

    Raises:
        RuntimeError: another context listens to this tower.
        ValueError: the tower has no such layer.
    """
    before = tower.config._attn_implementation
    if before == LISTENING:
        raise RuntimeError("a session that reduces images is open on this model already; sessions cannot be nested")
    layers = next(module for module in tower.modules() if isinstance(module, nn.ModuleList))
    if not -len(layers) <= layer < 0:
        raise ValueError(f"the method looks at layer {layer} of the vision tower, which has {len(layers)}")
    heard: list[Heard] = []
    tower.set_attn_implementation(LISTENING)
    watched = list(layers[layer].modules())
    _LISTENERS.update((module, heard) for module in watched)
    try:
        yield heard
    finally:
        tower.set_attn_implementation(before)
        for module in watched:
            del _LISTENERS[module]


def evidence_of(heard: Heard, how: TowerEvidence, *, group: int, cls: bool, runs: bool) -> tuple[Tensor, Tensor]:
    """Attention [b, V] float32 and keys [b, V, D] of tokens, as mmkv-prune's `Encoded` wants them.

    A token that is made of several patches gets their attention in all, and the mean of their keys.

    Args:
        heard: one pass.
        how: what the method looks at.
        group: patches of a token.
        cls: whether the first patch is a CLS token.
        runs: whether the patches of a token follow one another; else they are a block of a square.
    """
    attention = tower_attention(heard.queries, heard.keys, heads=how.heads, has_cls=cls, valid=heard.valid)
    keys = tower_keys(heard.keys, heads=how.heads, has_cls=cls)
    return _of_tokens(attention, group, runs).sum(2), _of_tokens(keys, group, runs).mean(2)


def _of_tokens(x: Tensor, group: int, runs: bool) -> Tensor:
    """x [b, P, ...] of patches as [b, P / group, group, ...] of tokens."""
    if runs or group == 1:
        return x.reshape(len(x), -1, group, *x.shape[2:])
    block = math.isqrt(group)
    side = math.isqrt(x.shape[1]) // block
    cells = x.reshape(len(x), side, block, side, block, *x.shape[2:]).transpose(2, 3)
    return cells.flatten(3, 4).flatten(1, 2)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """Stock sdpa; what passes through a layer that is listened to is noted."""
    heard = _LISTENERS.get(module)
    if heard is not None:
        valid = None if attention_mask is None else attention_mask[:, 0].any(1)
        heard.append(Heard(query.detach().transpose(1, 2), key.detach().transpose(1, 2), valid))
    out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return out


AttentionInterface.register(LISTENING, _attend)
AttentionMaskInterface.register(LISTENING, sdpa_mask)
