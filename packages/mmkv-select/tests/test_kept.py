"""`Kept`: round trips between its forms."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_select import Kept


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_round_trips(masks, data):
    mask = data.draw(masks())
    kept = Kept.from_mask(mask)
    heads = [row.nonzero().flatten().tolist() for row in mask.flatten(0, 1)]
    assert kept.columns.tolist() == [i for head in heads for i in head]
    assert kept.lengths.flatten().tolist() == [len(head) for head in heads]
    assert kept.cu_seqlens.tolist() == [sum(map(len, heads[:i])) for i in range(len(heads) + 1)]
    assert kept.owners().tolist() == [i for i, head in enumerate(heads) for _ in head]
    assert torch.equal(kept.mask(), mask)
    assert (kept.columns.dtype, kept.cu_seqlens.dtype, kept.lengths.dtype) == (torch.int64,) * 3
    assert kept.size == mask.shape[-1]


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_below(masks, data):
    mask = data.draw(masks())
    column = data.draw(st.integers(0, mask.shape[-1] + 2))
    below, expected = Kept.from_mask(mask).below(column), mask.clone()
    expected[..., column:] = False
    whole = Kept.from_mask(expected)
    assert torch.equal(below.columns, whole.columns)
    assert torch.equal(below.cu_seqlens, whole.cu_seqlens)
    assert torch.equal(below.lengths, whole.lengths)
    assert below.size == mask.shape[-1]


@settings(deadline=None, max_examples=100)
@given(data=st.data(), shared=st.booleans())
def test_is_everything(masks, data, shared):
    valid = data.draw(masks())
    valid = valid[:, :1] if shared else valid
    full = valid.expand(-1, 3 if shared else -1, -1)
    assert Kept.from_mask(full).is_everything(valid)
    if full.any():
        less = full.clone()
        less[full.nonzero()[0].unbind()] = False
        assert not Kept.from_mask(less).is_everything(valid)
