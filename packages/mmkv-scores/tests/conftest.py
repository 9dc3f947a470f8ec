"""Observations for the tests, and attention in float64.

Fixtures that are functions: `prompt` makes the contents of one row, `observe` lays rows out as a batch (padding on
either side is NaN and must not matter), `attention` is the oracle of everything that looks at attention.
"""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from mmkv_kernels import column_sums
from mmkv_scores import Observation

torch.set_num_threads(1)


@dataclass(frozen=True)
class Prompt:
    """One row without padding: queries [Hq, n, D], keys [H, n, D], values [H, n, Dv]."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def length(self):
        return self.keys.shape[1]


def make_prompt(length, seed=0, heads=2, group=2, dim=8, dtype=torch.float32):
    random = torch.Generator().manual_seed(seed)
    sizes = ((heads * group, dim), (heads, dim), (heads, dim + 2))
    return Prompt(*(torch.randn(h, length, d, generator=random).to(dtype) for h, d in sizes))


def pad(x, left, right, junk=math.nan):
    """x [H, n, D] with `left` and `right` rows of junk."""
    h, _, d = x.shape
    return torch.cat([x.new_full((h, left, d), junk), x, x.new_full((h, right, d), junk)], dim=1)


def last_rows(prompts, pads, rows):
    """The last `rows` queries of each prompt, right-aligned after junk, and the causal mask of what they see."""
    queries, masks = [], []
    for p, (left, right) in zip(prompts, pads, strict=True):
        seen = min(rows, p.length)
        queries.append(pad(p.queries[:, p.length - seen :], rows - seen, 0))
        columns = torch.arange(-left, p.length + right)
        own = torch.arange(p.length - rows, p.length)[:, None]
        masks.append((columns >= 0) & (columns <= own))
    return torch.stack(queries), torch.stack(masks)[:, None]


def make_observation(
    *prompts,
    window=8,
    recent=None,
    sinks=0,
    pads=None,
    explicit=False,
    columns=False,
    layer=0,
    num_layers=4,
    softcap=None,
    scaling=None,
):
    """A batch of prompts. `pads`: (left, right) of each; unless given, shorter rows are padded on the left."""
    lengths = [p.length for p in prompts]
    pads = pads or [(max(lengths) - n, 0) for n in lengths]
    total = lengths[0] + sum(pads[0])
    assert all(n + sum(p) == total for n, p in zip(lengths, pads, strict=True))
    rows = min(window, max(lengths))
    recent = window if recent is None else recent
    valid = torch.zeros(len(prompts), 1, total, dtype=torch.bool)
    candidates = torch.zeros_like(valid)
    slots = torch.full(valid.shape, -1)
    for b, (n, (left, _)) in enumerate(zip(lengths, pads, strict=True)):
        valid[b, 0, left : left + n] = True
        candidates[b, 0, left + sinks : max(left, left + n - recent)] = True
        slots[b, 0, left : left + n] = torch.arange(left, left + n)  # logical columns: padding counts
    queries, mask = last_rows(prompts, pads, rows)
    keys, values = (
        torch.stack([pad(getattr(p, name), *q) for p, q in zip(prompts, pads, strict=True)])
        for name in ("keys", "values")
    )
    scaling = keys.shape[-1] ** -0.5 if scaling is None else scaling
    sums = counts = None
    if columns:
        every_query, full_mask = last_rows(prompts, pads, max(lengths))
        sums, counts = column_sums(every_query, keys, scaling=scaling, valid=valid, mask=full_mask, softcap=softcap)
    return Observation(
        queries=queries,
        keys=keys,
        values=values,
        valid=valid,
        candidates=candidates,
        slots=slots,
        mask=mask if explicit or any(right for _, right in pads) else None,
        column_sums=sums,
        column_counts=counts,
        scaling=scaling,
        softcap=softcap,
        layer=layer,
        num_layers=num_layers,
    )


def attend(queries, keys, visible, scaling, softcap=None):
    """Weights [Hq, W, N] float64 of queries [Hq, W, D] over keys [H, N, D]; zeros where nothing is visible."""
    q, k = queries.double().numpy(), keys.double().numpy()
    group = len(q) // len(k)
    weights = np.zeros((len(q), q.shape[1], k.shape[1]))
    for head in range(len(q)):
        for row in range(q.shape[1]):
            columns = np.flatnonzero(visible[row])
            if not len(columns):
                continue
            logits = k[head // group, columns] @ q[head, row] * scaling
            if softcap is not None:
                logits = softcap * np.tanh(logits / softcap)
            power = np.exp(logits - logits.max())
            weights[head, row, columns] = power / power.sum()
    return weights


@pytest.fixture(scope="session")
def prompt():
    return make_prompt


@pytest.fixture(scope="session")
def observe():
    return make_observation


@pytest.fixture(scope="session")
def attention():
    return attend
