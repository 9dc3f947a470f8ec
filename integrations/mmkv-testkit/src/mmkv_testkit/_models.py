"""What each tiny family is made of: configuration, placeholders per image and vision inputs. Data, no logic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

VOCAB = 512
IMAGE, VIDEO, VISION_START, VISION_END = 500, 501, 502, 503
GRID = (1, 8, 12)  # patches of one Qwen or GLM image: not square, so that M-RoPE's rows and columns differ
IMAGE_IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
TEXT: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
SMALL_VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
}
CLIP = {**SMALL_VISION, "model_type": "clip_vision_model", "projection_dim": 32}
SIGLIP = {**SMALL_VISION, "model_type": "siglip_vision_model"}
PINPOINTS = [[56, 112], [112, 56], [112, 112]]

VisionInputs = Callable[[int, int], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Family:
    """Recipe of one family; `vision_inputs(batch, images per row)` draws the pixels and what comes with them."""

    prefix: str
    tokens: int
    vision_inputs: VisionInputs
    text: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    types: str | None = None
    """Name of the token type input, 1 at placeholders (PaliGemma: 0 everywhere, all of the prompt is prefix)."""
    layer_types: tuple[str, ...] = ()
    """Repeated over the layers."""
    text_attention: str = "sdpa"
    query_norm: float = 1.5
    """Added to the weights of the query norm; Gemma 4 does not scale its logits down, so is sharp by itself."""
    tokens_among_many: int | None = None
    """Placeholders per image where a row has several, if different (LLaVA-OneVision then drops the tiles)."""


def _no_vision(batch: int, images: int) -> dict[str, Tensor]:
    return {}


def _one_crop(batch: int, images: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch * images, 3, 56, 56)}


def _crop_with_size(batch: int, images: int) -> dict[str, Tensor]:
    return {**_one_crop(batch, images), "image_sizes": torch.tensor([[56, 56]] * (batch * images))}


def _crop_per_row(batch: int, images: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, images, 3, 56, 56)}


def _tiles(batch: int, images: int) -> dict[str, Tensor]:
    n = batch * images
    return {"pixel_values": torch.randn(n, 5, 3, 56, 56), "image_sizes": torch.tensor([[112, 112]] * n)}


def _tiles_with_counts(batch: int, images: int) -> dict[str, Tensor]:
    return {**_tiles(batch, images), "batch_num_images": torch.tensor([images] * batch)}


def _patches(batch: int, images: int) -> dict[str, Tensor]:
    n, (t, h, w) = batch * images, GRID
    return {
        "pixel_values": torch.randn(n * t * h * w, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([GRID] * n),
    }


def _gemma4_patches(batch: int, images: int) -> dict[str, Tensor]:
    side = torch.arange(4)
    positions = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).view(1, 16, 2)
    n = batch * images
    return {"pixel_values": torch.randn(n, 16, 3 * 16 * 16), "image_position_ids": positions.repeat(n, 1, 1)}


def _mllama_tiles(batch: int, images: int) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(batch, images, 2, 3, 56, 56),
        "aspect_ratio_ids": torch.ones(batch, images, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(batch, images, 2, dtype=torch.long),
    }


def _mrope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3], **more}


_QWEN_IDS = {**IMAGE_IDS, "vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}
_QWEN_VISION = {
    "depth": 2,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
_QWEN25_VISION = {**_QWEN_VISION, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
_QWEN3_VISION = {**_QWEN25_VISION, "num_position_embeddings": 64}
_DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}
_MOE: Mapping[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_IMAGE_INDEX = {"image_token_index": IMAGE, "vision_feature_layer": -1}
_IDEFICS = {"image_token_id": IMAGE, "scale_factor": 2}
_PALIGEMMA = {"image_token_index": IMAGE, "projection_dim": 64, "hidden_size": 64}
_GRID_TOKENS = GRID[0] * GRID[1] * GRID[2] // 4


def _qwen(prefix: str, vision: Mapping[str, Any], layer_types: tuple[str, ...] = (), **text: Any) -> Family:
    settings = {"rope_parameters": _mrope(), **text}
    types = "mm_token_type_ids"
    return Family(prefix, _GRID_TOKENS, _patches, settings, vision, _QWEN_IDS, types, layer_types)


FAMILY: Mapping[str, Family] = {
    "qwen2_vl": _qwen("Qwen2VL", {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64}),
    "qwen2_5_vl": _qwen("Qwen2_5_VL", {**_QWEN25_VISION, "fullatt_block_indexes": [1], "window_size": 112}),
    "qwen3_vl": _qwen("Qwen3VL", {**_QWEN3_VISION, **_DEEPSTACK}, head_dim=16),
    "qwen3_vl_moe": _qwen("Qwen3VLMoe", {**_QWEN3_VISION, **_DEEPSTACK}, head_dim=16, **_MOE),
    "llava": Family("Llava", 16, _one_crop, {"model_type": "llama"}, CLIP, _IMAGE_INDEX),
    # 112 x 112 pixels: 16 of the overview, 8 x 8 of the four tiles and a newline after each of the 8 rows
    "llava_next": Family(
        "LlavaNext", 88, _tiles, {"model_type": "llama"}, CLIP, {**_IMAGE_INDEX, "image_grid_pinpoints": PINPOINTS}
    ),
    "llava_onevision": Family(
        "LlavaOnevision",
        88,
        _tiles_with_counts,
        {"model_type": "qwen2"},
        SIGLIP,
        {**_IMAGE_INDEX, "video_token_index": VIDEO, "image_grid_pinpoints": PINPOINTS},
        tokens_among_many=17,
    ),
    "internvl": Family(
        "InternVL",
        16,
        _one_crop,
        {"model_type": "qwen2"},
        {**SMALL_VISION, "image_size": [56, 56], "patch_size": [7, 7]},
        {"image_token_id": IMAGE, "downsample_ratio": 0.5, "vision_feature_layer": -1},
    ),
    "idefics3": Family(
        "Idefics3", 16, _crop_per_row, {"model_type": "llama"}, {**SMALL_VISION, "patch_size": 7}, _IDEFICS
    ),
    "smolvlm": Family(
        "SmolVLM", 16, _crop_per_row, {"model_type": "llama"}, {**SMALL_VISION, "patch_size": 7}, _IDEFICS
    ),
    "paligemma": Family(
        "PaliGemma", 16, _one_crop, {"model_type": "gemma", "head_dim": 16}, SIGLIP, _PALIGEMMA, "token_type_ids"
    ),
    "gemma3": Family(
        "Gemma3",
        4,
        _one_crop,
        {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16, "num_hidden_layers": 6},
        SIGLIP,
        {"mm_tokens_per_image": 4, "image_token_index": IMAGE},
        "token_type_ids",
        ("sliding_attention", "sliding_attention", "full_attention"),
    ),
    "gemma4": Family(
        "Gemma4",
        4,
        _gemma4_patches,
        {
            "head_dim": 16,
            "global_head_dim": 16,
            "sliding_window": 24,
            "num_hidden_layers": 6,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
        },
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "patch_size": 16,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        },
        {**IMAGE_IDS, "audio_config": None},
        "mm_token_type_ids",
        ("sliding_attention", "full_attention"),
        query_norm=-0.5,
    ),
    "mllama": Family(
        "Mllama",
        1,
        _mllama_tiles,
        {"cross_attention_layers": [1, 3], "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {
            "hidden_size": 32,
            "attention_heads": 2,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "intermediate_size": 48,
            "image_size": 56,
            "patch_size": 14,
            "max_num_tiles": 2,
            "vision_output_dim": 64,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
        },
        {"image_token_index": IMAGE},
    ),
    "glm4v": Family(
        "Glm4v",
        _GRID_TOKENS,
        _patches,
        {"head_dim": 16, "rope_parameters": _mrope(partial_rotary_factor=1.0)},
        {**_QWEN25_VISION, "image_size": 56},
        {**IMAGE_IDS, "image_start_token_id": VISION_START, "image_end_token_id": VISION_END},
        "mm_token_type_ids",
    ),
    "mistral3": Family(
        "Mistral3",
        16,
        _crop_with_size,
        {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        {**SMALL_VISION, "model_type": "pixtral", "patch_size": 7},
        {**_IMAGE_INDEX, "spatial_merge_size": 2},
    ),
    "qwen3_5": _qwen(
        "Qwen3_5",
        _QWEN3_VISION,
        ("linear_attention", "full_attention"),
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        rope_parameters=_mrope(partial_rotary_factor=1.0, mrope_interleaved=True),
    ),
    # gemma2 caps its attention logits, which sdpa refuses
    "paligemma2": Family(
        "PaliGemma",
        16,
        _one_crop,
        {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 24},
        SIGLIP,
        _PALIGEMMA,
        "token_type_ids",
        ("sliding_attention", "full_attention"),
        text_attention="eager",
    ),
    "llama": Family("Llama", 0, _no_vision),
}
