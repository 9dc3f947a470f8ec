"""`kth_largest` against sorting in plain Python."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmkv_kernels import kth_largest


@st.composite
def cases(draw):
    batch, heads, entries = draw(st.tuples(*(st.integers(1, n) for n in (3, 3, 70))))
    value = st.sampled_from([float("-inf"), -1.0, 0.0, 0.25, 0.5, 3.0])
    size = batch * heads * entries
    scores = torch.tensor(draw(st.lists(value, min_size=size, max_size=size))).view(batch, heads, entries)
    count = st.integers(1, entries)
    same = draw(st.none() | count)
    counts = [draw(count) if same is None else same for _ in range(batch * heads)]
    return scores, torch.tensor(counts).view(batch, heads)


@given(cases())
def test_equals_sorting(case):
    scores, counts = case
    found = kth_largest(scores, counts)
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            assert found[b, h, 0] == sorted(scores[b, h].tolist(), reverse=True)[counts[b, h] - 1]


@pytest.mark.parametrize("count", [0, 6])
def test_counts_out_of_range_are_refused(count):
    with pytest.raises(ValueError, match="from 1 to 5"):
        kth_largest(torch.zeros(1, 2, 5), torch.tensor([[3, count]]))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[B, H\]"):
        kth_largest(torch.zeros(1, 2, 5), torch.ones(2, dtype=torch.int64))
    assert kth_largest(torch.zeros(0, 2, 5), torch.ones(0, 2, dtype=torch.int64)).shape == (0, 2, 1)
