"""The attention function that transformers calls while a session is open."""

from __future__ import annotations

from typing import Any

import torch
from mmkv_kernels import AttentionOutput, ragged_attention
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ._compat import ATTENTION
from .cross import CrossLayer
from .handle import layer_of
from .layers import CompressedLayer
from .split import split_attention


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over whatever the cache holds; stock sdpa for every cache that is not ours.

    Args:
        module: the attention layer that calls.
        query: [B, Hq, n, D] after RoPE.
        key: [B, H, S, D] from the cache's `update`, or from the layer that is read.
        value: [B, H, S, Dv].
        attention_mask: bool [B, 1, n, S], float with -inf or the smallest number, or None for causal.
        dropout: only without a cache.
        scaling: of the logits; D ** -0.5 when None.
        **kwargs: handed on to sdpa; `softcap` is honoured here.

    Returns:
        [B, n, Hq, Dv] and None for the weights.
    """
    watch, lending = kwargs.pop("mmkv_watch", None), kwargs.pop("mmkv_lending", None)
    _check_extras(kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    softcap = kwargs.pop("softcap", None)
    layer = layer_of(key)
    if lending is not None:
        query, key = lending.exchange(module.layer_idx, query, key)
        prefix = lending.prefix_of(module.layer_idx, query, _as_bool(attention_mask))
        if prefix is not None:
            return split_attention(query, key, value, prefix, scaling, softcap), None
    if watch is not None:
        watch(query, key, _as_bool(attention_mask), scaling, softcap)
    if layer is None:
        return _dense(module, query, key, value, attention_mask, dropout, scaling, softcap, kwargs), None
    layer.group.request.pending = None
    _check_reader(module, layer, key)
    mask = _as_bool(attention_mask)
    if layer.prefix is None:
        out = _dense(module, query, key, value, attention_mask, dropout, scaling, softcap, kwargs)
    else:
        out = _ragged(layer, query, key, value, mask, scaling, softcap)
    if layer.reading:
        layer.observe(getattr(module, "layer_idx", layer.layer_idx), query, mask, scaling, softcap)
    return out, None


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float,
    softcap: float | None,
    kwargs: dict[str, Any],
) -> Tensor:
    if softcap is None:
        settings = {"dropout": dropout, "scaling": scaling, **kwargs}
        stock: Tensor = sdpa_attention_forward(module, query, key, value, mask, **settings)[0]
        return stock
    return _softcapped(query, key, value, _as_bool(mask), scaling, softcap).transpose(1, 2).contiguous()


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Tensor:
    """Attention with capped logits, which sdpa does not know; gradients flow, as training inside a session needs."""
    rows, columns = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, heads, width = query.shape[0], key.shape[1], query.shape[3]
    grouped = query.reshape(batch, heads, -1, rows, width).to(wide)
    logits = softcap * torch.tanh(grouped @ key[:, :, None].to(wide).transpose(-1, -2) * scaling / softcap)
    weights = logits.masked_fill(~mask[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0)  # padding sees nothing
    return (weights @ value[:, :, None].to(wide)).flatten(1, 2).to(query.dtype)


def _ragged(
    layer: CompressedLayer,
    query: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Tensor:
    prefix = layer.attended
    assert prefix is not None
    cross = isinstance(layer, CrossLayer)
    if cross:  # what it hands out is the prefix
        tail_keys = prefix.keys.new_empty(*prefix.shape, 0, prefix.keys.shape[-1])
        tail_values = prefix.values.new_empty(*prefix.shape, 0, prefix.values.shape[-1])
    prefix_mask = tail_mask = None
    if mask is not None:
        tail = tail_keys.shape[2]
        prefix_mask = prefix.gather_mask(mask)
        tail_mask = mask[..., layer.seen - tail : layer.seen] if tail else mask[..., :0]
        tail_mask = tail_mask.expand(query.shape[0], -1, -1, -1)
    output: AttentionOutput = ragged_attention(
        query,
        prefix.keys,
        prefix.values,
        prefix.cu_seqlens,
        tail_keys,
        tail_values,
        scaling=scaling,
        softcap=softcap,
        prefix_mask=prefix_mask,
        tail_mask=tail_mask,
        causal=not cross,
    )
    return output.out.transpose(1, 2).contiguous()


def _check_extras(kwargs: dict[str, Any]) -> None:
    for name, what in (("s_aux", "attention sinks"), ("position_bias", "position biases")):
        if kwargs.get(name) is not None:
            raise ValueError(f"{what} ({name}) are not supported by mmkv; this model cannot be compressed yet")


def _check_reader(module: nn.Module, layer: CompressedLayer, key: Tensor) -> None:
    held = layer.keys
    if (
        layer.prefix is not None
        and not isinstance(layer, CrossLayer)
        and held is not None
        and key.shape[:3] != held.shape[:3]
    ):
        raise RuntimeError(
            f"layer {getattr(module, 'layer_idx', '?')} reads the keys of layer {layer.layer_idx}, which was "
            "compressed before its last reader ran; this version of transformers shares KV in a way mmkv does not know"
        )


def _as_bool(mask: Tensor | None) -> Tensor | None:
    if mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool):
        return mask
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"mmkv reads tensor masks, not {type(mask).__name__}; leave flex_attention until after the prompt"
        )
    return mask > torch.finfo(mask.dtype).min / 2


AttentionInterface.register(ATTENTION, attention_forward)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without it the mask would silently be None
