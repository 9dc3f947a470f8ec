"""KeyDiff against float64."""

import numpy as np
import pytest
import torch
from mmkv_scores import KeyDiff, Trace

CAPACITY = torch.tensor([4])


def oracle(keys):
    """Minus the cosine of keys [n, D] to the mean of the normalised keys."""
    k = keys.double().numpy()
    unit = k / np.sqrt((k**2).sum(-1, keepdims=True))
    mean = unit.mean(0)
    return -(unit @ mean) / np.sqrt((mean**2).sum())


@pytest.mark.parametrize("pads", [[(0, 0)], [(6, 0)], [(0, 6)], [(1, 5)]])
def test_cosine_to_the_mean(prompt, observe, pads):
    p = prompt(33, seed=2)
    scores = KeyDiff()(observe(p, window=0, pads=pads), CAPACITY, Trace())
    left = pads[0][0]
    for head in range(2):
        np.testing.assert_allclose(scores.rank[0, head, left : left + 33], oracle(p.keys[head]), atol=1e-6)
    assert torch.equal(scores.rank, scores.backbone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_near_parallel_keys_in_half_precision(prompt, observe, dtype):
    """Where all keys point one way, arithmetic in the cache's dtype would leave a handful of distinct scores."""
    p = prompt(500, seed=3, heads=1, group=1, dim=64)
    p.keys.add_(torch.full((64,), 10.0))
    p = type(p)(p.queries.to(dtype), p.keys.to(dtype), p.values.to(dtype))
    rank = KeyDiff()(observe(p, window=0), CAPACITY, Trace()).rank[0, 0]
    expected = torch.from_numpy(oracle(p.keys[0]))
    assert set(rank.topk(32).indices.tolist()) == set(expected.topk(32).indices.tolist())
    unit = p.keys[0] / p.keys[0].norm(dim=-1, keepdim=True)
    naive = -(unit @ unit.mean(0))
    overlap = set(naive.topk(32).indices.tolist()) & set(expected.topk(32).indices.tolist())
    assert len(overlap) < 29
