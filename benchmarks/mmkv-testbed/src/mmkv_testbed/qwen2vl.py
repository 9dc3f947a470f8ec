"""The Qwen2-VL architecture: patches of 4 pixels, four of them merged to one token per cell, and M-RoPE."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from .architecture import HEAD_DIM, TOKENS, Architecture, Dimensions, start_language_model, text_options
from .glyphs import CELL
from .processor import MERGE, TEMPORAL, build_qwen2vl_processor
from .vocabulary import GRID, IMAGE, TOKEN_ID, UNKNOWN


def _config(dimensions: Dimensions) -> Qwen2VLConfig:
    """Heads have `hidden / query_heads` dimensions in this architecture.

    The rotary frequencies go to time, row and column in turn. With three blocks, as in the published models, the
    columns get only the lowest ones, which heads this small cannot resolve.
    """
    if dimensions.hidden != HEAD_DIM * dimensions.query_heads:
        raise ValueError(f"hidden must be {HEAD_DIM} x query_heads, got {dimensions}")
    text = text_options(dimensions)
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1] * (HEAD_DIM // 2)}
    vision = {
        "depth": 1,
        "embed_dim": dimensions.vision_hidden,
        "hidden_size": dimensions.hidden,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": CELL // MERGE,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "initializer_range": 0.06,
    }
    unused = dict.fromkeys(("video_token_id", "vision_start_token_id", "vision_end_token_id"), TOKEN_ID[UNKNOWN])
    return Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=TOKEN_ID[IMAGE],
        tie_word_embeddings=False,
        **unused,
        **TOKENS,
    )


@torch.no_grad()
def _build(dimensions: Dimensions) -> Qwen2VLForConditionalGeneration:
    model = Qwen2VLForConditionalGeneration(_config(dimensions))
    start_language_model(model)
    model.model.visual.merger.mlp[2].weight.mul_(3)
    return model


def _features(model: Any, patches: Tensor, cells: Tensor, columns: int) -> Tensor:
    """Splits each cell into its four patches, both frames of which are the same, in the processor's order."""
    batch, count = cells.shape
    side = CELL // MERGE
    quarters = patches.view(batch, count, 3, MERGE, side, MERGE, side).permute(0, 1, 3, 5, 2, 4, 6)
    quarters = quarters[:, :, :, :, :, None].expand(-1, -1, -1, -1, -1, TEMPORAL, -1, -1)
    grid = torch.tensor([[1, MERGE * count // columns, MERGE * columns]]).expand(batch, -1)
    pixels = quarters.reshape(batch * count * MERGE * MERGE, -1)
    features: Tensor = model.model.visual(pixels, grid_thw=grid).pooler_output
    return features.view(batch, count, -1)


def _positions(cells: Tensor, start: int) -> tuple[Tensor, int]:
    """Time, row and column; an image is as long as it is wide."""
    places = torch.stack([torch.zeros_like(cells), cells // GRID, cells % GRID])
    return start + places, start + GRID


def _vision(model: Any) -> nn.ModuleList:
    return nn.ModuleList([model.model.visual])


QWEN2VL: Final = Architecture(_build, _features, _positions, _vision, build_qwen2vl_processor, places=False)
