"""`RaggedKV` and `compact` against indexing by hand."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_select import Kept, compact


def storages(tensors):
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def segments(ragged):
    """(keys, values, slots) of each (row, head), as lists."""
    bounds = ragged.cu_seqlens.tolist()
    return [
        (ragged.keys[a:b].tolist(), ragged.values[a:b].tolist(), ragged.slots[a:b].tolist())
        for a, b in pairwise(bounds)
    ]


def chosen(mask, keys, values, slots):
    """The same, from the dense cache."""
    batch, heads, _ = mask.shape
    slots = slots.expand(mask.shape)
    places = [(b, h) for b in range(batch) for h in range(heads)]
    return [tuple(x[b, h][mask[b, h]].tolist() for x in (keys, values, slots)) for b, h in places]


def make_slots(mask, per_head):
    """Any ascending numbers, different in every row (and head)."""
    batch, heads, length = mask.shape
    heads = heads if per_head else 1
    return torch.arange(batch * heads).view(batch, heads, 1) + 7 * torch.arange(length)


@settings(deadline=None, max_examples=100)
@given(data=st.data(), per_head=st.booleans(), contiguous=st.booleans())
def test_compact(masks, cache, data, per_head, contiguous):
    mask = data.draw(masks())
    keys, values = cache(mask)
    if not contiguous:  # as a cache that is a view of a larger buffer
        keys, values = (torch.cat([x, x], dim=2)[:, :, : mask.shape[-1]] for x in (keys, values))
    slots = make_slots(mask, per_head)
    ragged = compact(keys, values, slots, Kept.from_mask(mask))
    assert segments(ragged) == chosen(mask, keys, values, slots)
    assert ragged.shape == mask.shape[:2]
    assert torch.equal(ragged.lengths, mask.sum(-1))
    assert ragged.slots.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", [False, True])
def test_compact_frees_what_it_does_not_keep(cache, dtype, view):
    mask = torch.rand(2, 3, 100, generator=torch.Generator().manual_seed(0)) < 0.1
    keys, values = cache(mask, 8, dtype)
    if view:
        keys, values = (torch.cat([x, x], dim=2)[:, :, :100] for x in (keys, values))
    slots = make_slots(mask, False)
    ragged = compact(keys, values, slots, Kept.from_mask(mask))
    total = int(mask.sum())
    for tensor, width, size in (
        (ragged.keys, 8, dtype.itemsize),
        (ragged.values, 9, dtype.itemsize),
        (ragged.slots, 1, 4),
    ):
        assert tensor.untyped_storage().nbytes() == total * width * size
        assert tensor.is_contiguous()
    assert ragged.keys.dtype == ragged.values.dtype == dtype
    assert not storages(ragged.tensors()) & storages([keys, values, slots, mask])
    expected = segments(ragged)
    for tensor in (keys, values, slots):
        tensor.zero_()
    assert segments(ragged) == expected


@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 2, 10), (1, 3, 10), (3, 2, 10)])
def test_compact_refuses_another_shape(cache, shape):
    mask = torch.ones(2, 3, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match="kept is for"):
        compact(*cache(mask), make_slots(mask, False), Kept.from_mask(torch.ones(shape, dtype=torch.bool)))


@settings(deadline=None, max_examples=100)
@given(data=st.data(), per_head=st.booleans())
def test_rows(masks, cache, data, per_head):
    mask = data.draw(masks())
    keys, values = cache(mask)
    slots = make_slots(mask, per_head)
    ragged = compact(keys, values, slots, Kept.from_mask(mask))
    index = torch.tensor(data.draw(st.lists(st.integers(0, mask.shape[0] - 1), max_size=5)), dtype=torch.int64)
    rows = ragged.rows(index)
    assert segments(rows) == chosen(mask[index], keys[index], values[index], slots[index])
    assert rows.shape == (len(index), mask.shape[1])
    assert not storages(rows.tensors()) & storages(ragged.tensors())


@settings(deadline=None, max_examples=100)
@given(data=st.data(), per_head=st.booleans())
def test_padded(masks, cache, data, per_head):
    mask = data.draw(masks())
    keys, values = cache(mask)
    slots = make_slots(mask, per_head)
    parts = compact(keys, values, slots, Kept.from_mask(mask)).padded()
    width = int(mask.sum(-1).max())
    expected = chosen(mask, keys, values, slots)
    assert [p.shape[2] for p in parts] == [width] * 3
    assert parts[2].dtype == torch.int64
    for i, (k, v, s) in enumerate(expected):
        dense = [p.flatten(0, 1)[i].tolist() for p in parts]
        blank = width - len(k)
        assert dense == [[[0.0] * 3] * blank + k, [[0.0] * 4] * blank + v, [-1] * blank + s]


@settings(deadline=None, max_examples=100)
@given(data=st.data(), steps=st.integers(0, 3), shared=st.booleans())
def test_gather_mask(masks, cache, data, steps, shared):
    mask = data.draw(masks())
    batch, _, length = mask.shape
    slots = torch.arange(length).expand(batch, 1, length)
    ragged = compact(*cache(mask), slots, Kept.from_mask(mask))
    visible = torch.rand(1 if shared else batch, 1, steps, length + 2, generator=torch.Generator().manual_seed(1)) < 0.5
    found = ragged.gather_mask(visible)
    assert found.shape == (steps, len(ragged.keys))
    owners = Kept.from_mask(mask).owners() // mask.shape[1]
    for t in range(steps):
        expected = [bool(visible[0 if shared else b, 0, t, s]) for b, s in zip(owners, ragged.slots, strict=True)]
        assert found[t].tolist() == expected


def test_to_moves_everything(cache):
    mask = torch.ones(1, 2, 3, dtype=torch.bool)
    ragged = compact(*cache(mask), make_slots(mask, False), Kept.from_mask(mask))
    moved = ragged.to("meta")
    assert {t.device.type for t in moved.tensors()} == {"meta"}
    assert [t.shape for t in moved.tensors()] == [t.shape for t in ragged.tensors()]
    assert moved.shape == ragged.shape
    assert segments(ragged.to("cpu")) == segments(ragged)
