"""What a compressed cache holds, as a table, a dict, JSON or a picture."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cache import CompressedCache
from .cross import CrossLayer
from .grids import Grid
from .layers import CompressedLayer
from .plot import plot_kept

_NAMES = ("text", "image", "video")


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One compressed layer.

    Attributes:
        layer: index in the model.
        kind: "self", or "cross" for cross-attention to the image.
        kept: `[B][H]` entries of the prompt that are held.
        share: of the kept entries, by modality; empty when it is not known.
    """

    layer: int
    kind: str
    kept: list[list[int]]
    share: dict[str, float]


@dataclass(frozen=True, slots=True)
class Report:
    """What a cache holds.

    Attributes:
        pipeline: text form.
        budget: text form.
        prompt: tokens of the prompt that the language model was given, padding included.
        layers: the compressed layers.
        bytes_held: all live tensors of the cache.
        bytes_full: keys and values of a stock cache after the same tokens.
        vision_columns: `[B][V]` prompt columns of the vision tokens.
        vision_grids: `[B][images]` (rows, columns) of vision tokens; empty: no plain grids, None: not known.
        vision_kept: [layers, B, V] share of the KV heads that keep each vision token, for `plot`; not in the dict.
    """

    pipeline: str
    budget: str
    prompt: int
    layers: list[LayerReport]
    bytes_held: int
    bytes_full: int
    vision_columns: list[list[int]] = field(default_factory=list, repr=False)
    vision_kept: list[Tensor] = field(default_factory=list, repr=False)
    vision_grids: list[list[Grid]] | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the picture's data, in plain types."""
        layers = [asdict(layer) for layer in self.layers]
        names = ("pipeline", "budget", "prompt", "bytes_held", "bytes_full")
        return {name: getattr(self, name) for name in names} | {"layers": layers}

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        """A table with one line per layer."""
        ratio = self.bytes_held / max(1, self.bytes_full)
        lines = [
            f"{self.pipeline}, budget {self.budget}, prompt of {self.prompt} tokens",
            f"cache: {self.bytes_held:,} of {self.bytes_full:,} bytes ({ratio:.1%})",
            f"{'layer':>5}  {'kept per head: mean':>19}  {'min':>5}  {'max':>5}  share of modalities",
        ]
        return "\n".join([*lines, *(_line(layer) for layer in self.layers)])

    def plot(self, path: str | Path, images: Any = None, **options: Any) -> Path:
        """Draws which vision tokens were kept; see `mmkv_hf.plot.plot_kept`. Needs mmkv-hf[plot]."""
        return plot_kept(self, path, images, **options)


def make_report(
    cache: CompressedCache,
    stages: str,
    modality: Tensor | None,
    valid: Tensor | None = None,
    grids: list[list[Grid]] | None = None,
) -> Report:
    """Reads a cache.

    Args:
        cache: after its prompt has been read.
        stages: text form of what happened to it.
        modality: [P, N] int8 of the prompt, or None when it is not known.
        valid: [P, N] bool, False: padding, which a layer that evicted nothing still holds; None when there is none.
        grids: [P] of every image of a prompt, see `Report.vision_grids`.
    """
    prompt = cache.request.prompt_end
    layers = [layer for layer in cache.compressed_layers if layer.is_initialized]
    masks = [layer.kept_mask().cpu() for layer in layers]
    batch = masks[0].shape[0]
    if valid is not None:
        real = _repeated(valid.cpu(), batch)[:, None]
        masks = [m if isinstance(x, CrossLayer) else m & real for x, m in zip(layers, masks, strict=True)]
    if modality is not None:
        modality = _repeated(modality.cpu(), batch)
        grids = None if grids is None else [row for row in grids for _ in range(batch // len(grids))]
    vision = [(row > 0).nonzero()[:, 0] for row in modality] if modality is not None else []
    own = [m for m, layer in zip(masks, layers, strict=True) if not isinstance(layer, CrossLayer)]
    return Report(
        pipeline=stages,
        budget=str(cache.request.budget),
        prompt=prompt,
        layers=[_layer(x, m, modality) for x, m in zip(layers, masks, strict=True)],
        bytes_held=cache.bytes_held,
        bytes_full=cache.bytes_full,
        vision_columns=[columns.tolist() for columns in vision],
        vision_kept=[
            torch.stack([mask[b][:, columns].float().mean(0) for mask in own]) for b, columns in enumerate(vision)
        ],
        vision_grids=grids,
    )


def _repeated(rows: Tensor, batch: int) -> Tensor:
    """[P, N] -> [B, N]: `generate` repeats every prompt for its beams or samples."""
    return rows.repeat_interleave(batch // rows.shape[0], dim=0)


def _layer(layer: CompressedLayer, mask: Tensor, modality: Tensor | None) -> LayerReport:
    kind = "cross" if isinstance(layer, CrossLayer) else "self"
    share = {}
    if modality is not None and kind == "self":
        total = max(1, int(mask.sum()))
        here = {name: int((mask & (modality == i)[:, None]).sum()) for i, name in enumerate(_NAMES)}
        share = {name: count / total for name, count in here.items() if bool((modality == _NAMES.index(name)).any())}
    return LayerReport(layer.layer_idx, kind, mask.sum(-1).tolist(), share)


def _line(layer: LayerReport) -> str:
    counts = [count for row in layer.kept for count in row]
    share = ", ".join(f"{name} {value:.0%}" for name, value in layer.share.items())
    name = f"{layer.layer}{'x' if layer.kind == 'cross' else ''}"
    return f"{name:>5}  {sum(counts) / len(counts):>19.1f}  {min(counts):>5}  {max(counts):>5}  {share}"
