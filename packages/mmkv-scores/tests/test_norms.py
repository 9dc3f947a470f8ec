"""KNorm and VNorm against numpy."""

import numpy as np
import pytest
import torch
from mmkv_scores import KNorm, Trace, VNorm

CAPACITY = torch.tensor([4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("pads", [[(0, 0)], [(3, 0)], [(0, 3)]])
def test_norms(prompt, observe, dtype, pads):
    p = prompt(11, dtype=dtype)
    seen = observe(p, window=0, pads=pads)
    left = pads[0][0]
    for scorer, sign, x in ((KNorm(), -1, p.keys), (VNorm(), 1, p.values)):
        scores = scorer(seen, CAPACITY, Trace())
        expected = sign * np.sqrt((x.double().numpy() ** 2).sum(-1))
        np.testing.assert_allclose(scores.rank[0, :, left : left + 11], expected, rtol=1e-6)
        assert scores.rank.dtype == torch.float32
        assert torch.equal(scores.rank, scores.backbone)
