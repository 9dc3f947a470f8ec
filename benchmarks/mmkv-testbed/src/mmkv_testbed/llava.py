"""The LLaVA architecture: a one-layer SigLIP tower, one token per cell, and a Qwen2 language model."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from .architecture import HEAD_DIM, Architecture, Dimensions, place_codes, start_language_model, text_options
from .glyphs import CELL
from .processor import build_llava_processor
from .vocabulary import GRID, IMAGE, TOKEN_ID


def _config(dimensions: Dimensions) -> LlavaConfig:
    vision = SiglipVisionConfig(
        hidden_size=dimensions.vision_hidden,
        intermediate_size=4 * dimensions.vision_hidden,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=CELL * GRID,
        patch_size=CELL,
        vision_use_head=False,
    )
    text = Qwen2Config(
        **text_options(dimensions),
        head_dim=HEAD_DIM,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=TOKEN_ID[IMAGE],
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )


@torch.no_grad()
def _build(dimensions: Dimensions) -> LlavaForConditionalGeneration:
    """Rows and columns start with `place_codes` in the vision tower, too."""
    model = LlavaForConditionalGeneration(_config(dimensions))
    start_language_model(model)
    model.model.multi_modal_projector.linear_2.weight.mul_(10)
    positions = model.model.vision_tower.embeddings.position_embedding.weight
    rows, columns = place_codes(dimensions.vision_hidden), place_codes(dimensions.vision_hidden)
    positions.copy_(0.3 * (rows[:, None] + columns).flatten(0, 1))
    return model


def _features(model: Any, patches: Tensor, cells: Tensor, columns: int) -> Tensor:
    """Any subset of a page's cells can be read; its width does not matter."""
    tower = model.model.vision_tower
    convolution = tower.embeddings.patch_embedding
    hidden = F.linear(patches, convolution.weight.flatten(1), convolution.bias)
    hidden = hidden + tower.embeddings.position_embedding.weight[cells]
    features: Tensor = model.model.multi_modal_projector(tower.encoder(inputs_embeds=hidden).last_hidden_state)
    return features


def _positions(cells: Tensor, start: int) -> tuple[Tensor, int]:
    """A crop keeps the positions it has on a full page, so that a row down is always the same distance."""
    return (start + cells)[None], start + GRID * GRID


def _vision(model: Any) -> nn.ModuleList:
    return nn.ModuleList([model.model.vision_tower, model.model.multi_modal_projector])


LLAVA: Final = Architecture(_build, _features, _positions, _vision, build_llava_processor, places=True)
