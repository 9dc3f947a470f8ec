"""What blocks of query rows see of the cached entries, and their float32 attention weights.

Shared by the references that look at attention from the entries' side (`window`, `columns`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# The logit of what a row must not see. Finite, so that a row which sees nothing stays free of NaN: its weight is 0.
FLOOR = torch.finfo(torch.float32).min


class View(NamedTuple):
    """What R query rows see of entries 0 .. stop - 1 of one batch row (for one or all of its heads)."""

    stop: int
    seen: Tensor  # [R] bool: the rows that see something; the others are padding
    blind: Tensor | None  # indices of the other rows
    hidden: Tensor | None  # indices of the entries no row sees
    ceiling: Tensor  # [R, C] caps the logits of the last C entries: inf where visible

    def hide(self, logits: Tensor) -> None:
        """Overwrites what is not visible in logits [G, R, stop].

        Padding is filled, not capped: it may hold NaN. The rest is capped, because filling by a broadcast mask is 15
        times slower on CPUs.
        """
        if self.hidden is not None:
            logits.index_fill_(2, self.hidden, FLOOR)
        capped = logits[:, :, self.stop - self.ceiling.shape[1] :]
        torch.minimum(capped, self.ceiling, out=capped)
        if self.blind is not None:
            logits.index_fill_(1, self.blind, FLOOR)

    def counts(self) -> Tensor:
        """Number of rows that see each entry, int64 [stop]."""
        counts = self.seen.sum().repeat(self.stop)
        counts[self.stop - self.ceiling.shape[1] :] = ((self.ceiling > 0) & self.seen[:, None]).sum(0)
        return counts if self.hidden is None else counts.index_fill_(0, self.hidden, 0)


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which of N entries each of `rows` query rows sees, from the arguments `valid` and `mask` of the operators."""

    valid: Tensor | None  # [B, 1 or H, N]
    mask: Tensor | None  # [B, 1 or H, rows, N]
    rows: int
    entries: int
    device: torch.device

    @property
    def heads(self) -> int:
        """1 where all heads of a batch row see the same, else H."""
        return max(tensor.shape[1] if tensor is not None else 1 for tensor in (self.valid, self.mask))

    def views(self, batch: int, block: int) -> Iterator[tuple[int, int, slice, View]]:
        """Yields (batch row, head group, slice of query rows, their view), blocks of at most `block` rows."""
        for b in range(batch):
            for group in range(self.heads):
                for start in range(0, self.rows, block):
                    rows = slice(start, min(start + block, self.rows))
                    yield b, group, rows, self._view(b, group, rows)

    def _view(self, b: int, group: int, rows: slice) -> View:
        valid = None if self.valid is None else _of_group(self.valid, b, group)
        if self.mask is not None:
            return _masked_view(_of_group(self.mask, b, group)[rows], valid)
        first = self.entries - self.rows
        return _causal_view(valid, first + rows.start, first + rows.stop, self.device)


def head_range(group: int, groups: int, heads: int) -> range:
    """KV heads that belong to a head group: all of them where there is one group, else one."""
    return range(heads) if groups == 1 else range(group, group + 1)


def fold_queries(queries: Tensor, heads: int, scaling: float, softcap: float | None) -> Tensor:
    """Queries [B, Hq, W, D] as float32 [B, H, G, W, D], scaled, so that the far larger logits need not be."""
    scale = scaling if softcap is None else scaling / softcap
    batch, query_heads, rows, size = queries.shape
    return (queries.float() * scale).reshape(batch, heads, query_heads // heads, rows, size)


def logit_space(queries: Tensor, entries: int, block: int) -> Tensor:
    """Memory for one KV head's logits of a block of rows; fresh pages for every head would cost a third of the time."""
    _, _, group, rows, _ = queries.shape
    return queries.new_empty(group * min(rows, block) * entries)


def attention_weights(queries: Tensor, keys: Tensor, view: View, softcap: float | None, space: Tensor) -> Tensor:
    """Softmax [G, R, stop], float32, of folded queries [G, R, D] over keys [N, D] in view (blind rows: anything).

    The result lies in `space` and holds until the next call.
    """
    shape = (*queries.shape[:2], view.stop)
    logits = space[: math.prod(shape)].view(shape)
    torch.mm(queries.flatten(0, 1), keys[: view.stop].float().t(), out=logits.view(-1, view.stop))
    if softcap is not None:
        logits.tanh_().mul_(softcap)
    view.hide(logits)
    return torch.softmax(logits, -1, out=logits)


def _causal_view(valid: Tensor | None, first: int, stop: int, device: torch.device) -> View:
    """The view of rows that are entries first .. stop - 1; a valid one sees at least itself, the others are padding."""
    future = torch.ones(stop - first, stop - first, dtype=torch.bool, device=device).triu_(1)
    ceiling = torch.where(future, FLOOR, math.inf)
    if valid is None or bool(valid.all()):
        return View(stop, torch.ones(stop - first, dtype=torch.bool, device=device), None, None, ceiling)
    seen = valid[first:stop]
    return View(stop, seen, _indices(~seen), _indices(~valid[:stop]), ceiling)


def _masked_view(mask: Tensor, valid: Tensor | None) -> View:
    """The view an explicit mask [R, N] gives, less the entries that are not valid [N]."""
    visible = mask if valid is None else mask & valid
    seen = visible.any(-1)
    hidden = None if valid is None else _indices(~valid)
    return View(mask.shape[1], seen, _indices(~seen), hidden, torch.where(visible, math.inf, FLOOR))


def _of_group(tensor: Tensor, b: int, group: int) -> Tensor:
    return tensor[b, group if tensor.shape[1] > 1 else 0]


def _indices(flags: Tensor) -> Tensor | None:
    """Where `flags` [N] are set; None: nowhere."""
    indices = flags.nonzero().squeeze(1)
    return indices if indices.numel() else None
