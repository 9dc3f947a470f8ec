"""Cache layers that compress themselves once the prompt has been read.

A layer holds an immutable ragged prefix (different lengths per batch row and KV head) and a dense tail that starts with
the last prompt token. What it reports to transformers are logical lengths, so positions and masks stay right. When
every head of every layer keeps the same count, the prefix is dense too and stock attention reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mmkv_kernels import column_sums
from mmkv_scores import Observation
from mmkv_select import Kept, RaggedKV, compact
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .handle import marked
from .request import Group, at_slots
from .window import WindowRows, sees_itself


class CompressedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One self-attention layer of a `CompressedCache`.

    `keys` and `values` [B, H, t, D] are the dense part: the whole prompt while it is read, the tail afterwards, and
    prefix plus tail in the uniform form.

    Attributes:
        ordinal: index among the layers of its group.
        layer_idx: index in the model.
        followers: lazy layers that keep what this one keeps (`FollowerLayer`).
        seen: logical length, tokens that ever reached this layer.
        prefix: kept entries before the tail, or None.
        slots: [B, H, k] int32, logical columns of the first k dense entries in the uniform form, else None.
        padding: [B] int64, columns of each row's prompt that were padding, in the uniform form, else None.
        columns: [B, K] int64 ascending, the columns of the first prompt that reached this layer, -1 for a filler; None
            where pruning dropped nothing, and once something has been evicted.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False
    _dense: tuple[str, ...] = ("keys", "values", "slots", "padding", "columns")

    def __init__(self, group: Group, ordinal: int, layer_idx: int, last_reader: int) -> None:
        super().__init__()
        self.group, self.ordinal, self.layer_idx, self.last_reader = group, ordinal, layer_idx, last_reader
        self.followers: list[Any] = []
        self.keys: Tensor
        self.values: Tensor
        self._empty()

    def _empty(self) -> None:
        self.seen = 0
        self.prefix: RaggedKV | None = None
        self.slots: Tensor | None = None
        self.padding: Tensor | None = None
        self.columns: Tensor | None = None
        self._chosen_from = 0
        self._done_at = 0
        self._rows: WindowRows | None = None
        self._sums: tuple[Tensor, Tensor] | None = None

    # -- what transformers calls

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Takes dtype, device and shapes from the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty((*key_states.shape[:2], 0, key_states.shape[-1]))
        self.values = value_states.new_empty((*value_states.shape[:2], 0, value_states.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends the new keys and values and hands out the dense part, marked so that attention finds this layer.

        Raises:
            RuntimeError: the keys handed out before never reached the "mmkv" attention function, an earlier pass was
                cut short, or gradients are being recorded.
            ValueError: another batch size than what is held.
        """
        request = self.group.request
        request.check()
        if self.is_initialized and key_states.shape[0] != self.batch_size:
            raise ValueError(
                f"the cache holds {self.batch_size} rows and is given tokens of {key_states.shape[0]}; after beams or "
                "num_return_sequences it has a row for each: go on with all of them, or pick rows with "
                "cache.batch_select_indices(...)"
            )
        if key_states.requires_grad:
            raise RuntimeError("a CompressedCache is for inference; run the model under torch.no_grad()")
        request.advance(self.ordinal, self.seen + key_states.shape[-2] + (0 if self.seen else self._dropped))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = _appended(self.keys, key_states), _appended(self.values, value_states)
        self.seen = request.seen
        request.pending = self.layer_idx if self.prefix is not None or self.reading else None
        return marked(self.keys, self), self.values

    def hold(self, columns: Tensor, real: Tensor, length: int) -> None:
        """Announces the columns [B, K] int64 of a prompt of that length that will reach this layer, the first time.

        Those that are not `real` [B, K] bool are fillers.
        """
        self.columns, self._chosen_from = columns.masked_fill(~real, -1), length

    @property
    def _dropped(self) -> int:
        return 0 if self.columns is None else self._chosen_from - self.columns.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns a mask needs, and the logical column of the first; logical unless the form is uniform."""
        held = self.keys.shape[-2] if self.slots is not None else self.seen
        return held + query_length, self.seen - held

    def get_seq_length(self) -> int:
        """Tokens this layer has seen, evicted ones included."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the latest tokens; `tokens_to_remove` is negative or 0, as in transformers.

        Raises:
            ValueError: it reaches back before the last token of the compressed prompt.
        """
        count = abs(int(tokens_to_remove))  # assisted decoding of 5.17 gives a tensor, and `seen` must not become one
        if count == 0 or not self.is_initialized:
            return
        fixed = 0 if self.slots is None else self.slots.shape[-1]
        if count > self.keys.shape[-2] - fixed:
            raise ValueError(
                f"cannot remove {count} tokens: only the {self.keys.shape[-2] - fixed} since the end of the prompt "
                "(its last token included) can be taken back, what came before is compressed"
            )
        self.keys, self.values = self.keys[..., :-count, :].clone(), self.values[..., :-count, :].clone()
        self.seen -= count
        self.group.request.seen = self.seen

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the given batch rows [R], which may repeat."""
        self._apply(lambda held: held[indices], lambda prefix: prefix.rows(indices))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row i continues what row beam_idx[i] was."""
        if self.is_initialized:
            self.batch_select_indices(beam_idx.to(self.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every batch row."""
        if self.is_initialized:
            rows = torch.arange(self.batch_size, device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forgets everything."""
        self.is_initialized = False
        self.keys = self.values = None  # type: ignore[assignment]
        self._empty()

    def offload(self) -> None:
        """Moves what is held to the CPU."""
        self._move("cpu")

    @property
    def batch_size(self) -> int:
        """Rows held."""
        return self.prefix.shape[0] if self.prefix is not None else int(self.keys.shape[0])

    @property
    def kept(self) -> Tensor | None:
        """[B, H] int64, entries of the prompt that are held, its last token included; None while all are."""
        if self.prefix is not None:
            return self.prefix.lengths + 1
        if self.columns is not None:
            return (self.columns >= 0).sum(-1, keepdim=True).expand(self.keys.shape[:2])
        if self.slots is None:
            return None
        count = self.slots.shape[-1] + 1
        return torch.full(self.slots.shape[:2], count, dtype=torch.int64, device=self.slots.device)

    @property
    def attended(self) -> RaggedKV | None:
        """The prefix as attention reads it."""
        return self.prefix

    def prefetch(self) -> None:
        """Moves what is held back to its device."""
        if self.is_initialized:
            self._move(self.device)

    # -- what mmkv's attention function calls

    @property
    def reading(self) -> bool:
        """Whether a prompt is being read, so that attention has to be observed."""
        return self._done_at < self.group.request.prompt_end

    def observe(self, reader: int, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None) -> None:
        """Takes in the queries [B, Hq, n, D] of one forward pass; compresses after the last reader of a whole prompt.

        Only the queries of the layer that stores the keys count: `generate` runs Gemma 4's readers on the last token
        alone, a forward loop on all of them, and what is kept must not depend on that.

        Args:
            reader: index of the layer whose queries these are (another one's, where layers share keys).
            query: after RoPE.
            mask: [B, 1, n, S] bool, as the model's attention got it, or None for causal.
            scaling: of the logits.
            softcap: of the logits.
        """
        end = self.group.request.prompt_end
        mask = self._logical(mask)
        if self.ordinal == 0:
            self._announce_padding(mask)
        count = query.shape[-2] - max(0, self.seen - end)
        if count > 0 and reader == self.layer_idx:
            seen = min(self.seen, end)
            visible = None if mask is None else mask[:, :, :count, :seen]
            positions = self._dense_slots()[:, -query.shape[-2] :][:, :count]
            self._observe_window(query[:, :, :count], positions, visible)
            self._observe_columns(query[:, :, :count], positions, visible, scaling, softcap)
        if reader == self.last_reader and self.seen >= end:
            last = None if mask is None else mask[:, 0, mask.shape[2] - 1 - (self.seen - end), :end]
            self._compress(last, scaling, softcap)

    def _announce_padding(self, mask: Tensor | None) -> None:
        """Tells the layers that attend to images which of these queries are padding."""
        request = self.group.request
        request.padding = None
        if mask is not None and self.group.num_layers < self.group.all_layers:
            request.padding = ~sees_itself(mask, self._dense_slots()[:, -mask.shape[2] :])

    def expect(self) -> None:
        """A new prompt begins."""
        self._rows, self._sums = None, None

    @property
    def bytes_full(self) -> int:
        """Bytes a stock layer would hold after the same tokens."""
        if not self.is_initialized:
            return 0
        heads, width = self.keys.shape[1], self.keys.shape[-1] + self.values.shape[-1]
        return self.batch_size * heads * self.seen * width * self.keys.element_size()

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Everything held, dense: keys [B, H, N, D], values, slots [B, H or 1, N] int64 (-1: padding, on the left)."""
        batch, heads = self.keys.shape[:2]
        latest = self._dense_slots()[:, None].expand(batch, -1, -1)
        if self.slots is not None:
            return self.keys, self.values, torch.cat([self.slots.long(), latest.expand(-1, heads, -1)], dim=-1)
        if self.prefix is None:
            return self.keys, self.values, latest
        keys, values, slots = self.prefix.padded()
        slots = torch.cat([slots, latest.expand(-1, heads, -1)], dim=-1)
        return torch.cat([keys, self.keys], dim=2), torch.cat([values, self.values], dim=2), slots

    def _dense_slots(self) -> Tensor:
        """[B or 1, t] int64, the logical columns of the dense part without what `slots` names; -1 for a filler."""
        count = self.keys.shape[2] - (0 if self.slots is None else self.slots.shape[-1])
        if self.columns is None:
            return torch.arange(self.seen - count, self.seen, device=self.keys.device)[None]
        after = torch.arange(self._chosen_from, max(self.seen, self._chosen_from), device=self.columns.device)
        return torch.cat([self.columns, after.expand(len(self.columns), -1)], dim=1)[:, :count]

    def kept_mask(self) -> Tensor:
        """[B, H, columns] bool: the logical columns of the prompt that are held."""
        keys, _, slots = self.entries()
        columns = self._columns(slots)
        mask = torch.zeros(*keys.shape[:2], max(columns, self.seen) + 1, dtype=torch.bool, device=keys.device)
        mask.scatter_(2, (slots + 1).expand(*keys.shape[:2], -1), True)  # column 0 takes the padding
        return mask[..., 1 : columns + 1]

    def _columns(self, slots: Tensor) -> int:
        return self.group.request.prompt_end

    def tensors(self) -> list[Tensor]:
        """Every tensor this layer holds."""
        rows = self._rows
        held = [] if rows is None else [rows.queries, rows.positions, rows.mask]
        held += [*(self._sums or ()), *(self.prefix.tensors() if self.prefix else ())]
        held += [getattr(self, name) for name in self._dense] if self.is_initialized else []
        return [t for t in held if t is not None]

    # -- observation and compression

    def _observe_window(self, query: Tensor, positions: Tensor, mask: Tensor | None) -> None:
        size = self.group.pipeline.window
        if size == 0:
            return
        rows = WindowRows.of(query.detach(), positions, mask, size)
        self._rows = rows if self._rows is None else self._rows.then(rows, size)

    def _observe_columns(
        self, query: Tensor, positions: Tensor, mask: Tensor | None, scaling: float, softcap: float | None
    ) -> None:
        if "column_sums" not in self.group.pipeline.score.needs:
            return
        keys, _, slots = self._prompt_entries(min(self.seen, self.group.request.prompt_end))
        rows = WindowRows.of(query, positions, mask, query.shape[-2])
        sums, counts = column_sums(query, keys, scaling=scaling, mask=self._sees(rows, slots), softcap=softcap)
        if self._sums is not None:
            before = (F.pad(x, (0, sums.shape[-1] - x.shape[-1])) for x in self._sums)
            sums, counts = (now + then for now, then in zip((sums, counts), before, strict=True))
        self._sums = (sums, counts)

    def _prompt_entries(self, seen: int) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, slots = self.entries()
        count = keys.shape[2] - (self.seen - seen)
        return keys[:, :, :count], values[:, :, :count], slots[..., :count]

    def _logical(self, mask: Tensor | None) -> Tensor | None:
        """A mask over physical columns (uniform form, or pruned) as one over logical columns.

        What the uniform form holds is not padding; what pruning dropped is seen by nobody.
        """
        if mask is not None and self.columns is not None:
            return _spread(mask, self._dense_slots(), self.seen)
        if mask is None or self.slots is None:
            return mask
        tail = self.keys.shape[2] - self.slots.shape[-1]
        return F.pad(mask[..., -tail:], (self.seen - tail, 0), value=True)

    def _compress(self, visible: Tensor | None, scaling: float, softcap: float | None) -> None:
        """Evicts; `visible` [B, prompt_end] bool are the real tokens: the last row of a prompt sees all of them."""
        end = self.group.request.prompt_end
        try:
            keys, values, slots = self._prompt_entries(end)
            # Of the first layer alone they count: those behind a layer that prunes see fewer.
            held = torch.full(keys.shape[:1], end, device=keys.device) if visible is None else visible.sum(-1)
            lengths = held.expand(keys.shape[0]) if self.padding is None else held - self.padding
            kept = self._decide(keys, values, slots, visible, lengths, scaling, softcap)
            if kept is not None:
                self._store(keys, values, slots, kept, end - lengths)
        except BaseException as error:
            self.group.request.failed = str(error) or type(error).__name__
            raise
        finally:
            self._rows, self._sums, self._done_at = None, None, end
        self.group.finish()

    def _pair_bytes(self, keys: Tensor, values: Tensor) -> int:
        """Bytes of one KV pair in all heads of all layers: what lazy layers store of it belongs to their anchor's."""
        heads, size, group = keys.shape[1], keys.element_size(), self.group
        key, value = keys.shape[-1] * size + 4, values.shape[-1] * size
        own = group.all_layers * (key + value)
        return heads * (own + group.followers * (value + (key if group.is_visual else 0)))

    def _decide(
        self,
        keys: Tensor,
        values: Tensor,
        slots: Tensor,
        visible: Tensor | None,
        lengths: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> Kept | None:
        round_ = self.group.begin(lengths, self._pair_bytes(keys, values))
        valid = slots >= 0 if visible is None else at_slots(visible, slots) & (slots >= 0)
        queries, seen = self._window(keys, slots)
        sums, counts = self._sums or (None, None)
        observation = Observation(
            queries=queries,
            keys=keys,
            values=values,
            valid=valid,
            candidates=valid,
            slots=slots.masked_fill(~valid, -1),
            mask=seen,
            modality=self._modality(slots),
            column_sums=sums,
            column_counts=counts,
            scaling=scaling,
            softcap=softcap,
            layer=self.ordinal,
            num_layers=self.group.num_layers,
        )
        kept = round_.decide(observation, self._protect(slots))
        if kept is None and self.followers and self.group.is_visual:
            return Kept.from_mask(valid.expand(keys.shape[:3]))  # no entry goes, but lazy layers' keys of vision tokens
        return kept

    def _modality(self, slots: Tensor) -> Tensor | None:
        known = self.group.modality
        return None if known is None else at_slots(known, slots)

    def _protect(self, slots: Tensor) -> Tensor | None:
        """The last prompt token, which starts the tail, and what the user named."""
        last = slots == self.group.request.prompt_end - 1
        named = self.group.protect
        return last if named is None else last | at_slots(named, slots)

    def _window(self, keys: Tensor, slots: Tensor) -> tuple[Tensor, Tensor | None]:
        """The last queries and what they saw."""
        if self._rows is None:
            return keys.new_zeros(*keys.shape[:2], 0, keys.shape[-1]), None
        return self._rows.queries, self._sees(self._rows, slots)

    def _sees(self, rows: WindowRows, slots: Tensor) -> Tensor | None:
        """[B, H or 1, W, N] bool, or None: causal, nothing padded, and the rows are the last entries."""
        plain = rows.mask is None and self.prefix is None and self.slots is None
        return None if plain else rows.sees(slots)

    def _store(self, keys: Tensor, values: Tensor, slots: Tensor, kept: Kept, padding: Tensor) -> None:
        start = self._tail_start
        if self._uniform(kept):
            held = compact(keys, values, slots, kept)  # with the last prompt token, which saves joining them
            shape = (*held.shape, int(kept.lengths.flatten()[0]))
            self.prefix, self.slots, self.padding = None, held.slots.view(shape)[..., :-1].clone(), padding
            self.keys = _appended(held.keys.view(*shape, -1), self.keys[:, :, start + 1 :])
            self.values = _appended(held.values.view(*shape, -1), self.values[:, :, start + 1 :])
        else:
            before = kept.below(kept.size - 1)
            for follower in self.followers:
                follower.follow(before)
            self.prefix = compact(keys, values, slots, before)
            self.slots = self.padding = self.columns = None
            self.keys, self.values = self.keys[:, :, start:].clone(), self.values[:, :, start:].clone()

    @property
    def _tail_start(self) -> int:
        """Where the last prompt token stands in the dense part."""
        return self.keys.shape[2] - 1 - (self.seen - self.group.request.prompt_end)

    def _uniform(self, kept: Kept) -> bool:
        """Whether the whole cache is uniform, which its first layer decides; the tail has to belong to every row."""
        group = self.group
        if group.uniform is None:
            equal = bool((kept.lengths == kept.lengths.flatten()[0]).all() & (kept.lengths > 0).all())
            equal = equal and bool((kept.columns[kept.cu_seqlens[1:] - 1] == kept.size - 1).all())
            equal = equal and not group.request.uneven
            group.uniform = equal and group.pipeline.counts == "equal" and group.num_layers == group.all_layers
        return group.uniform

    def _move(self, device: torch.device | str) -> None:
        self._apply(
            lambda held: held.to(device, non_blocking=True), lambda prefix: prefix.to(device, non_blocking=True)
        )

    def _apply(self, dense: Callable[[Tensor], Tensor], ragged: Callable[[RaggedKV], RaggedKV]) -> None:
        """Replaces everything held."""
        if not self.is_initialized:
            return
        for name in self._dense:
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, dense(held))
        self.prefix = None if self.prefix is None else ragged(self.prefix)


def _spread(mask: Tensor, slots: Tensor, length: int) -> Tensor:
    """mask [B, 1, n, t] at slots [B or 1, t] -> [B, 1, n, length], False elsewhere; slot -1 goes nowhere."""
    index = (slots + 1)[:, None, None].expand(*mask.shape[:3], -1)
    wide = mask.new_zeros(*mask.shape[:3], length + 1)
    return wide.scatter(3, index, mask)[..., 1:]


def _appended(held: Tensor, new: Tensor) -> Tensor:
    """held + new along the tokens; the first tokens are taken as they are unless they would pin a larger buffer."""
    if held.shape[2]:
        return torch.cat([held, new], dim=2) if new.shape[2] else held
    return new if new.untyped_storage().nbytes() == new.nbytes else new.clone()
