"""Layers of random requests, and running a pipeline over them.

`request_of` draws the contents of one row for all layers; `decide` lays rows out as a batch, as an adapter does, and
returns which real tokens each row keeps.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from mmkv_kernels import column_sums
from mmkv_pipelines import Pipeline
from mmkv_scores import Observation

torch.set_num_threads(1)

LAYERS, HEADS, GROUP, DIM = 4, 2, 2, 4


@dataclass(frozen=True)
class Request:
    """Of one row: queries [L, Hq, n, D], keys and values [L, H, n, D], modality [n], protect [n]."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    modality: torch.Tensor
    protect: torch.Tensor

    @property
    def length(self):
        return self.keys.shape[2]


def make_request(length, seed=0, named=()):
    random = torch.Generator().manual_seed(seed)
    sizes = ((LAYERS, HEADS * GROUP), (LAYERS, HEADS), (LAYERS, HEADS))
    tensors = [torch.randn(*size, length, DIM, generator=random) for size in sizes]
    tensors[0] *= 2  # sharper attention, so that heads differ
    modality = torch.randint(0, 3, (length,), generator=random).to(torch.int8)
    protect = torch.zeros(length, dtype=torch.bool)
    protect[[i for i in named if i < length]] = True
    return Request(*tensors, modality, protect)


def row(x, left, right, junk):
    """x [..., n, D] or [n] with junk before and after."""
    if x.ndim == 1:
        return torch.cat([x.new_full((left,), junk), x, x.new_full((right,), junk)])
    shape = x.shape[:-2]
    return torch.cat([x.new_full((*shape, left, DIM), junk), x, x.new_full((*shape, right, DIM), junk)], dim=-2)


def last_rows(requests, pads, rows, layer):
    """The last `rows` queries of each row of the batch, right-aligned, and what they see."""
    queries, masks = [], []
    for r, (left, right) in zip(requests, pads, strict=True):
        seen = min(rows, r.length)
        queries.append(row(r.queries[layer, :, r.length - seen :], rows - seen, 0, math.nan))
        columns, own = torch.arange(-left, r.length + right), torch.arange(r.length - rows, r.length)[:, None]
        masks.append((columns >= 0) & (columns <= own))
    return torch.stack(queries), torch.stack(masks)[:, None]


def make_layer(requests, pads, layer, pipeline):
    valid = torch.stack([row(torch.ones(r.length), *p, 0) for r, p in zip(requests, pads, strict=True)])[:, None] > 0
    keys, values = (
        torch.stack([row(getattr(r, name)[layer], *p, math.nan) for r, p in zip(requests, pads, strict=True)])
        for name in ("keys", "values")
    )
    longest = max(r.length for r in requests)
    queries, mask = last_rows(requests, pads, min(pipeline.window, longest), layer)
    sums = counts = None
    if "column_sums" in pipeline.score.needs:
        every_query, full = last_rows(requests, pads, longest, layer)
        sums, counts = column_sums(every_query, keys, scaling=0.5, valid=valid, mask=full)
    slots = torch.arange(valid.shape[-1]).masked_fill(~valid, -1)  # logical columns: padding on the left counts
    modality = torch.stack([row(r.modality, *p, 1) for r, p in zip(requests, pads, strict=True)])[:, None]
    return Observation(
        queries=queries,
        keys=keys,
        values=values,
        valid=valid,
        candidates=valid,
        slots=slots,
        mask=mask,
        modality=modality,
        column_sums=sums,
        column_counts=counts,
        scaling=0.5,
        layer=layer,
        num_layers=LAYERS,
    )


def run_decide(pipeline, budget, *requests, pads=None, before_layer=None, bytes_per_token=None):
    """Kept real tokens: for each row a bool tensor [L, H, n]; and for each layer what `decide` returned.

    Args:
        pipeline: a pipeline or its text.
        budget: tokens, the same for every row or a list.
        requests: the rows.
        pads: (left, right) of each; shorter rows are padded on the left unless given.
        before_layer: called with the round before every layer.
        bytes_per_token: of a budget that was given in bytes.
    """
    pipeline = Pipeline.parse(pipeline)
    lengths = torch.tensor([r.length for r in requests])
    pads = pads or [(int(lengths.max()) - r.length, 0) for r in requests]
    budget = torch.tensor([budget] * len(requests) if isinstance(budget, int) else budget)
    round_ = pipeline.start(budget, LAYERS, lengths, bytes_per_token=bytes_per_token)
    protect = torch.stack([row(r.protect, *p, True) for r, p in zip(requests, pads, strict=True)])[:, None]
    rows, answers = [[] for _ in requests], []
    for layer in range(LAYERS):
        if before_layer is not None:
            before_layer(round_)
        seen = make_layer(requests, pads, layer, pipeline)
        kept = round_.decide(seen, protect)
        answers.append(kept)
        mask = seen.valid.expand(-1, HEADS, -1) if kept is None else kept.mask()
        assert not bool((mask & ~seen.valid).any()), "padding is kept"
        for b, (r, (left, _)) in enumerate(zip(requests, pads, strict=True)):
            rows[b].append(mask[b, :, left : left + r.length])
    return [torch.stack(x) for x in rows], answers


@pytest.fixture(scope="session")
def request_of():
    return make_request


@pytest.fixture(scope="session")
def decide():
    return run_decide
