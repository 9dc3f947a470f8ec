"""H2O at prefill against full attention in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mmkv_scores import ObservedAttention, Trace

CAPACITY = torch.tensor([4])


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("pads", [[(0, 0)], [(4, 0)], [(0, 4)], [(1, 3)]])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_raw_and_corrected(prompt, observe, attention, group, pads, softcap):
    p = prompt(14, seed=group, group=group)
    seen = observe(p, window=0, recent=3, columns=True, pads=pads, softcap=softcap)
    weights = attention(p.queries, p.keys, np.tril(np.ones((14, 14))), 8**-0.5, softcap)
    sums = weights.sum(1).reshape(2, group, 14).mean(1)[:, :11]
    left = pads[0][0]
    for corrected, divisor in ((False, 1), (True, 14 - np.arange(11))):
        scores = ObservedAttention(corrected=corrected)(seen, CAPACITY, Trace())
        np.testing.assert_allclose(scores.rank[0, :, left : left + 11], sums / divisor, rtol=2e-5)
        assert torch.equal(scores.rank, scores.backbone)
        assert not scores.rank[0, :, left + 11 :].any()
        assert not scores.rank[0, :, :left].any()


def test_needs_column_sums(prompt, observe):
    seen = observe(prompt(9), window=0)
    assert ObservedAttention().needs == {"column_sums"}
    with pytest.raises(ValueError, match="column_sums"):
        ObservedAttention()(seen, CAPACITY, Trace())
    with pytest.raises(ValueError, match="column_counts"):
        ObservedAttention()(replace(seen, column_sums=torch.zeros(1, 2, 9)), CAPACITY, Trace())


def test_an_entry_nobody_could_see_scores_zero(prompt, observe):
    seen = observe(prompt(9), window=0, columns=True)
    seen.column_counts[..., 3] = 0
    seen.column_sums[..., 3] = 0
    assert not ObservedAttention()(seen, CAPACITY, Trace()).rank[..., 3].any()
