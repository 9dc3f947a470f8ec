"""Visual-head scores of a model, for SparseMM: which heads look at the words on a page while the model reads them out.

SparseMM (arXiv 2506.05344), section 3 and its release: the model is asked to read a page whose words' boxes are known.
Whenever it generates a word that stands in exactly one box, every head whose largest attention weight lies on one of
that box's vision tokens scores 1 / (number of those tokens). A head's score is the mean over pages of its sums.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmkv_budget import HeadScores
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ._compat import ATTENTION, attention_set, modalities
from .grids import Grid, known_grids
from .watched import WatchedLayer, watched_layers

READ_ALOUD = "Provide all the OCR results of this image."
"""The question SparseMM's release asks of every page."""


@dataclass(frozen=True, slots=True)
class TextBox:
    """Where some text stands.

    Attributes:
        text: what is written there.
        box: left, top, right and bottom in pixels of the image, right and bottom exclusive.
        image: index of the image among the page's.
    """

    text: str
    box: tuple[float, float, float, float]
    image: int = 0

    def __post_init__(self) -> None:
        left, top, right, bottom = self.box
        if not self.text.strip() or not (0 <= left < right and 0 <= top < bottom) or self.image < 0:
            raise ValueError(f"a text box needs text, 0 <= left < right and 0 <= top < bottom, got {self}")


@dataclass(frozen=True, slots=True)
class LabelledPage:
    """Images and the boxes of what is written on them.

    Attributes:
        images: PIL images, or paths of image files.
        boxes: the text.
        prompt: the question; with the model's image placeholders in it, the whole prompt.
    """

    images: tuple[Any, ...]
    boxes: tuple[TextBox, ...]
    prompt: str = READ_ALOUD

    def opened(self) -> list[Any]:
        """The images as RGB PIL images."""
        from PIL import Image

        return [(x if isinstance(x, Image.Image) else Image.open(x)).convert("RGB") for x in self.images]


def read_pages(path: str | Path) -> list[LabelledPage]:
    """Pages from a JSON Lines file.

    One page a line: `{"images": ["page.png"], "prompt": "...", "boxes": [{"text": "total 4.20", "box": [8, 16, 96, 24],
    "image": 0}]}`. Image paths are relative to the file; `prompt`, `boxes`
    and `image` may be left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is no such page; the message names it.
    """
    path = Path(path)
    pages = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                pages.append(_page(json.loads(line), path.parent))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no labelled page: {error!r}") from error
    if not pages:
        raise ValueError(f"{path} holds no pages")
    return pages


def _page(line: dict[str, Any], folder: Path) -> LabelledPage:
    boxes = tuple(TextBox(box["text"], tuple(box["box"]), box.get("image", 0)) for box in line.get("boxes", []))
    if isinstance(line["images"], str):
        raise TypeError("images is a list of paths")
    return LabelledPage(tuple(folder / name for name in line["images"]), boxes, line.get("prompt", READ_ALOUD))


@torch.no_grad()
def profile_heads(
    model: PreTrainedModel,
    prepare: Callable[[str, list[Any]], Any],
    decode: Callable[[int], str],
    pages: Iterable[LabelledPage],
    *,
    max_new_tokens: int = 1024,
) -> HeadScores:
    """Scores of all query heads of the full-attention layers.

    Args:
        model: a vision-language model whose vision tokens are plain grids (not tiles or video).
        prepare: prompt and images of one page -> the model's inputs, batch of one, on its device.
        decode: a token's text.
        pages: wrapped in a progress bar, if one is wanted.
        max_new_tokens: most tokens read aloud per page; 1024 as released.

    Returns:
        Scores of kind "visual", a row per layer and a number per query head; layers count among those mmkv compresses.

    Raises:
        ValueError: no pages, vision tokens that are no plain grid, boxes outside their image, or not one generated word
            that stands in exactly one box.
    """
    total, count = torch.zeros(0), 0
    for page in pages:
        images = page.opened()
        inputs = prepare(page.prompt, images)
        columns = [box_columns(box, images, *_layout(model, inputs)) for box in page.boxes]
        tokens, looked = _read_aloud(model, inputs, max_new_tokens)
        found = head_hits([decode(int(token)) for token in tokens], looked, page.boxes, columns)
        total, count = found if not count else total + found, count + 1
    if not count:
        raise ValueError("no pages to profile the heads on")
    if not bool(total.any()):
        raise ValueError(
            f"on {count} pages no head looked at a word that was generated and stands in exactly one box; does the "
            "model read these pages, and are the boxes in pixels of the images?"
        )
    return HeadScores((total / count).tolist(), model=model.name_or_path or type(model).__name__, kind="visual")


def head_hits(
    words: Sequence[str], looked: Tensor, boxes: Sequence[TextBox], columns: Sequence[Sequence[int]]
) -> Tensor:
    """What one page adds to the scores, float64 [L, Hq].

    Args:
        words: text of each generated token.
        looked: int64 [steps, L, Hq], the column each head looked at most when it generated them.
        boxes: of the page.
        columns: prompt columns of each box's vision tokens.
    """
    hits = torch.zeros(looked.shape[1:], dtype=torch.float64)
    for word, where in zip(words, looked, strict=True):
        inside = [i for i, box in enumerate(boxes) if word.strip() and word.strip() in box.text]
        if len(inside) == 1:
            there = columns[inside[0]]
            hits += torch.isin(where, torch.tensor(there)).double() / len(there)
    return hits


def box_columns(box: TextBox, images: Sequence[Any], grids: Sequence[Grid], vision: Sequence[int]) -> list[int]:
    """Prompt columns of the vision tokens a box touches.

    Args:
        box: in pixels of its image, which the processor may have scaled, but not cropped.
        images: of the page.
        grids: (rows, columns) of vision tokens of each image.
        vision: prompt columns of all vision tokens, image by image, row by row.

    Raises:
        ValueError: the box lies outside its image.
    """
    if box.image >= len(images):
        raise ValueError(f"{box} is on image {box.image} of {len(images)}")
    (left, top, right, bottom), image = box.box, images[box.image]
    if right > image.width or bottom > image.height:
        raise ValueError(f"{box} lies outside its image of {image.width} x {image.height} pixels")
    rows, width = grids[box.image]
    start = sum(a * b for a, b in grids[: box.image])
    down = range(int(top * rows / image.height), math.ceil(bottom * rows / image.height))
    across = range(int(left * width / image.width), math.ceil(right * width / image.width))
    return [vision[start + row * width + column] for row in down for column in across]


class _Looked(WatchedLayer):
    """Notes the column of the largest logit of each query head's last row, which no soft cap moves."""

    def _empty(self) -> None:
        super()._empty()
        self.looked: list[Tensor] = []

    def note(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        last = query[0, :, -1].reshape(self.keys.shape[1], -1, query.shape[-1]).float()
        logits = (last @ self.keys[0].float().transpose(-1, -2)).flatten(0, 1)
        if mask is not None:
            logits = logits.masked_fill(~mask[0, :, -1, : logits.shape[-1]], -torch.inf)
        self.looked.append(logits.argmax(-1).cpu())


def _read_aloud(model: PreTrainedModel, inputs: Any, max_new_tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy tokens [steps] and, for each, the column every head looked at most, [steps, L, Hq]."""
    layers = watched_layers(model, _Looked)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": False}
    with attention_set(model, ATTENTION):
        out = model.generate(**inputs, past_key_values=Cache(layers=layers), **settings)
    tokens = out[0, inputs["input_ids"].shape[1] :].cpu()
    looked = [torch.stack(layer.looked) for layer in layers if isinstance(layer, _Looked)]
    return tokens, torch.stack(looked, 1)


def _layout(model: PreTrainedModel, inputs: Any) -> tuple[list[Grid], list[int]]:
    """Grids and prompt columns of the vision tokens."""
    kinds = modalities(model.config, inputs["input_ids"], inputs.get("mm_token_type_ids"))
    grids = known_grids(model.config, kinds, inputs)
    if not grids or not grids[0] or kinds is None:
        raise ValueError(
            f"the vision tokens of {type(model).__name__} are no plain grid per image (tiles, line ends or video), so "
            "boxes cannot be found among them"
        )
    return grids[0], kinds[0].nonzero()[:, 0].tolist()
