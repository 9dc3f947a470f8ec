"""How differently the layers of a model attend, from which plans of lazy layers are made."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from mmkv_kernels import window_attention
from mmkv_layershare import LazyPlan, js_divergence
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ._compat import ATTENTION, attention_set, modalities
from .plot import check_target
from .watched import WatchedLayer, watched_layers


@torch.no_grad()
def profile_layers(model: PreTrainedModel, prompts: Iterable[Any], *, over: Literal["all", "vision"] = "all") -> Tensor:
    """Divergence of every two layers' attention, mean over prompts (Lazy Attention, arXiv 2602.01901, eq. 3).

    Args:
        model: a decoder-only transformers model.
        prompts: the model's inputs, each a batch of any size, padded on either side; wrapped in a progress bar, if one
            is wanted.
        over: which tokens are compared: all of them, as the paper does, or the vision tokens, each layer's weights on
            them normalised anew.

    Returns:
        [L, L] float64, symmetric, in nats; NaN for layers that do not attend to everything before them (their
        attention is not comparable, and they cannot be lazy). `matrix.diagonal(1)` is what `plan_lazy_layers` takes.

    Raises:
        ValueError: no prompts, or none with vision tokens where those are compared.
    """
    total, count = torch.zeros(()), 0
    for inputs in prompts:
        rows = last_rows(model, inputs)
        if over == "vision":
            kinds = modalities(model.config, inputs.get("input_ids"), inputs.get("mm_token_type_ids"))
            if kinds is None or not bool((kinds > 0).any(1).all()):
                raise ValueError("comparing vision tokens needs some in every prompt")
            rows = rows.masked_fill(kinds.cpu() == 0, 0)
        first, second = (x.expand(len(rows), *rows.shape) for x in (rows[:, None], rows[None]))
        known = ~rows.isnan().any(-1).any(-1)
        pairs = known[:, None] & known
        found = rows.new_full((*pairs.shape, rows.shape[1]), torch.nan, dtype=torch.float64)
        found[pairs] = js_divergence(first[pairs], second[pairs])
        total, count = total + found.sum(-1), count + rows.shape[1]
    if not count:
        raise ValueError("no prompts to compare the layers on")
    return total / count


@torch.no_grad()
def last_rows(model: PreTrainedModel, inputs: Any) -> Tensor:
    """Attention of each row's last real token, mean over the query heads, float32 [L, B, N] on the CPU.

    NaN for layers that do not attend to everything before them.
    """
    layers = watched_layers(model, _LastRow)
    last = _last_tokens(inputs.get("attention_mask"))
    for layer in layers:
        if isinstance(layer, _LastRow):
            layer.last = last
    with attention_set(model, ATTENTION):
        model(**inputs, past_key_values=Cache(layers=layers), use_cache=True, logits_to_keep=1)
    rows = [layer.row if isinstance(layer, _LastRow) else None for layer in layers]
    shape = next(row.shape for row in rows if row is not None)
    return torch.stack([torch.full(shape, torch.nan) if row is None else row for row in rows])


def plot_divergences(matrix: Tensor, path: str | Path, plan: LazyPlan | None = None) -> Path:
    """Draws a matrix of `profile_layers` as a heat map, with the blocks of a plan outlined.

    Raises:
        ValueError: the file cannot be written, or its suffix is none that matplotlib writes.
        ImportError: matplotlib is missing.
    """
    check_target(path)
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axis = figure.subplots()
    drawn = axis.imshow(matrix.numpy(), cmap="viridis_r", vmin=0, interpolation="nearest")
    for first, last in plan.blocks if plan is not None else ():
        size = last - first + 1
        axis.add_patch(Rectangle((first - 0.5, first - 0.5), size, size, fill=False, edgecolor="red", linewidth=1.5))
    axis.set_xlabel("layer")
    axis.set_ylabel("layer")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    title = "" if plan is None else f"{len(plan.lazy)} of {plan.num_layers} layers lazy, blocks outlined"
    axis.set_title(title, fontsize=9)
    figure.colorbar(drawn, ax=axis, label="divergence of the last token's attention (nats)")
    figure.savefig(path, dpi=150)
    return Path(path)


def _last_tokens(mask: Any) -> Tensor | None:
    """[B] int64, the column of each row's last real token by a mask [B, N]; None: the last column of all rows."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or bool(mask[:, -1].all()):
        return None
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (mask.bool() * columns).amax(1)


class _LastRow(WatchedLayer):
    """Keeps the weights of the query row of each last token, mean over the query heads."""

    last: Tensor | None = None
    row: Tensor | None = None

    def note(self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        each = torch.arange(len(query), device=query.device)
        last = torch.full_like(each, query.shape[2] - 1) if self.last is None else self.last.to(query.device)
        seen = None
        if mask is not None:
            seen = mask[..., : self.keys.shape[2]].expand(len(query), -1, -1, -1)[each, :, last][:, :, None]
        asking = query[each, :, last][:, :, None]
        self.row = window_attention(asking, self.keys, scaling=scaling, mask=seen, softcap=softcap).last.mean(1).cpu()
