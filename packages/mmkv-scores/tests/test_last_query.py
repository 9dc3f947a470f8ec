"""TOVA against plain loops in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mmkv_scores import LastQuery, Trace

CAPACITY = torch.tensor([4])


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("across", [True, False])
def test_last_row(prompt, observe, attention, group, across):
    p = prompt(17, seed=group, heads=2, group=group)
    rank = LastQuery(across_heads=across)(observe(p, window=1), CAPACITY, Trace()).rank
    weights = attention(p.queries[:, -1:], p.keys, np.ones((1, 17)), 8**-0.5)[:, 0, :-1]
    per_head = weights.reshape(2, group, 16).mean(1)
    expected = np.broadcast_to(weights.mean(0), per_head.shape) if across else per_head
    np.testing.assert_allclose(rank[0, :, :-1], expected, rtol=2e-5)
    assert not rank[..., -1].any()


def test_kernel(prompt, observe):
    seen = observe(prompt(12), window=1)
    raw = LastQuery()(seen, CAPACITY, Trace()).rank[0, 0].double()
    found = LastQuery(kernel=3)(seen, CAPACITY, Trace()).rank[0, 0].double()
    expected = [sum(raw[j] for j in range(max(i - 1, 0), min(i + 2, 11))) / 3 for i in range(11)]
    torch.testing.assert_close(found[:11], torch.stack(expected), rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="odd"):
        LastQuery(kernel=2)


def test_heads_that_hold_different_entries_are_averaged_by_slot(prompt, observe):
    """A second turn finds other entries in every head: head 0 has lost slot 2, head 1 slot 5."""
    seen = observe(prompt(10, group=1), window=1)
    held = [[s for s in range(10) if s != lost] for lost in (2, 5)]
    index = torch.tensor(held)
    ragged = replace(
        seen,
        keys=seen.keys.gather(2, index[None, :, :, None].expand(1, 2, 9, 8)),
        values=seen.values.gather(2, index[None, :, :, None].expand(1, 2, 9, 10)),
        slots=index[None],
        valid=torch.ones(1, 2, 9, dtype=torch.bool),
        candidates=index[None] < 9,
    )
    own = LastQuery(across_heads=False)(ragged, CAPACITY, Trace()).rank[0]
    by_slot = {}
    for head in range(2):
        for column, slot in enumerate(held[head][:-1]):
            by_slot.setdefault(slot, []).append(float(own[head, column]))
    rank = LastQuery()(ragged, CAPACITY, Trace()).rank[0]
    for head in range(2):
        expected = [sum(by_slot[s]) / len(by_slot[s]) for s in held[head][:-1]]
        np.testing.assert_allclose(rank[head, :-1], expected, rtol=1e-5)
