"""StreamingLLM: the order it keeps entries in."""

import pytest
import torch
from mmkv_scores import StreamingLLM, Trace

CAPACITY = torch.tensor([4])


@pytest.mark.parametrize("pads", [[(0, 0)], [(3, 0)], [(0, 3)], [(2, 4)]])
@pytest.mark.parametrize("sinks", [0, 1, 4, 40])
def test_sinks_first_then_the_latest(prompt, observe, pads, sinks):
    scores = StreamingLLM(sinks=sinks)(observe(prompt(15), window=0, pads=pads), CAPACITY, Trace())
    left = pads[0][0]
    row = scores.rank[0, 1, left : left + 15].tolist()
    order = sorted(range(15), key=lambda i: (-row[i], i))
    first = list(range(min(sinks, 15)))
    assert order == first + list(range(14, len(first) - 1, -1))
    assert not scores.rank[0, :, :left].any()
    assert torch.equal(scores.rank[0, 0], scores.rank[0, 1])


def test_recency_is_distinct_in_a_long_prompt(prompt, observe):
    rank = StreamingLLM()(observe(prompt(200_000, heads=1, group=1, dim=1), window=0), CAPACITY, Trace()).rank[0, 0]
    assert bool((rank[4:].diff() > 0).all())


def test_negative_sinks():
    with pytest.raises(ValueError, match="negative"):
        StreamingLLM(sinks=-1)
