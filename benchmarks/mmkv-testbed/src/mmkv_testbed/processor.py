"""The processors of the models, built from stock classes only: no torchvision, no remote code."""

from __future__ import annotations

from typing import Final

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.paddleocr_vl.processing_paddleocr_vl import PaddleOCRVLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from .glyphs import CELL, PIXEL_MEAN, PIXEL_STD
from .vocabulary import BOS, EOS, GRID, IMAGE, PAD, SPECIAL, TOKEN_ID, UNKNOWN

MERGE: Final = 2
"""Qwen2-VL merges 2 x 2 patches to one token, which is one cell."""
TEMPORAL: Final = 2
"""Frames in a Qwen2-VL patch; a still image is repeated."""

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{{ '<image> ' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' answer :' }}{% endif %}"
)
"""One user turn: images, then the question up to its fillers; the cue to answer is the generation prompt."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that splits on white space, puts `<bos>` first and pads on the left."""
    tokenizer = Tokenizer(WordLevel(TOKEN_ID, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, TOKEN_ID[BOS])]
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )


def build_llava_processor() -> LlavaProcessor:
    """Stock `LlavaProcessor`: one placeholder per 8 x 8 pixel cell, 576 for a page of 192 x 192 pixels."""
    side = {"height": CELL * GRID, "width": CELL * GRID}
    images = LlavaImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=CELL,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_qwen2vl_processor() -> PaddleOCRVLProcessor:
    """Qwen2-VL's image processor with one placeholder per cell, for images of any size.

    `Qwen2VLProcessor` itself needs torchvision, for videos. PaddleOCR-VL's does the same with images, returns the same
    tensors and needs none.
    """
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": CELL * CELL, "longest_edge": (CELL * GRID) ** 2},
        patch_size=CELL // MERGE,
        merge_size=MERGE,
        temporal_patch_size=TEMPORAL,
        image_mean=[PIXEL_MEAN] * 3,
        image_std=[PIXEL_STD] * 3,
    )
    return PaddleOCRVLProcessor(images, build_tokenizer(), chat_template=CHAT_TEMPLATE)
