"""`select` and `Select.protected` against plain sorts."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_select import Select, select

NAN, INF = math.nan, math.inf


@st.composite
def layers(draw):
    """rank (few distinct values, so many ties), counts, is_candidate, protected; masks shared by the heads or not."""
    batch, heads, length = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 10))
    size = batch * heads * length
    rank = draw(st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 3.0]), min_size=size, max_size=size))
    counts = draw(st.lists(st.integers(0, 14), min_size=batch * heads, max_size=batch * heads))
    rows = draw(st.sampled_from([1, heads]))
    kinds = draw(st.lists(st.integers(0, 3), min_size=batch * rows * length, max_size=batch * rows * length))
    kinds = torch.tensor(kinds, dtype=torch.int64).view(batch, rows, length)  # 0: neither, 1: protected, else candidate
    rank = torch.tensor(rank, dtype=torch.float32).view(batch, heads, length)
    return rank, torch.tensor(counts).view(batch, heads), kinds > 1, kinds == 1


def brute_force(rank, counts, is_candidate, protected, granularity=1):
    """Kept columns of each head, by a sort on (-rank, column)."""
    batch, heads, _ = rank.shape
    rows = []
    for b in range(batch):
        for h in range(heads):
            candidate, safe = (
                m[b, min(h, m.shape[1] - 1)].nonzero().flatten().tolist() for m in (is_candidate, protected)
            )
            count = min(int(counts[b, h]), len(candidate))
            if count < len(candidate):
                total = (count + len(safe)) // granularity * granularity
                count = max(0, total - len(safe))
            best = sorted(candidate, key=lambda i: (-float(rank[b, h, i]), i))[:count]
            rows.append(sorted(best + safe))
    return rows


def per_head(kept):
    bounds = kept.cu_seqlens.tolist()
    return [kept.columns[a:b].tolist() for a, b in pairwise(bounds)]


@settings(deadline=None, max_examples=300)
@given(layers(), st.sampled_from([1, 1, 2, 3, 4, 16]))
def test_select_against_brute_force(layer, granularity):
    kept = select(*layer, granularity=granularity)
    assert per_head(kept) == brute_force(*layer, granularity=granularity)
    assert kept.size == layer[0].shape[-1]


@settings(deadline=None)
@given(layers(), st.sampled_from([NAN, INF, -INF]))
def test_only_candidates_have_to_be_finite(layer, junk):
    rank, counts, is_candidate, protected = layer
    outside = ~is_candidate.expand(rank.shape)
    expected = per_head(select(rank, counts, is_candidate, protected))
    assert per_head(select(rank.masked_fill(outside, junk), counts, is_candidate, protected)) == expected
    if not outside.all():
        bad = rank.clone()
        bad[(~outside).nonzero()[-1].unbind()] = junk
        with pytest.raises(ValueError, match="NaN or infinite"):
            select(bad, counts, is_candidate, protected)


def test_ties_go_to_the_lower_slot():
    rank = torch.tensor([[[1.0, 2.0, 1.0, 1.0, 2.0, 1.0]]])
    everything = torch.ones(1, 1, 6, dtype=torch.bool)
    for count, expected in ((1, [1]), (2, [1, 4]), (3, [0, 1, 4]), (5, [0, 1, 2, 3, 4])):
        assert per_head(select(rank, torch.tensor([[count]]), everything, ~everything)) == [expected]


def test_granularity():
    """Rounded down in blocks, never below the protected entries, and a head that loses nothing is left alone."""
    rank = torch.arange(20.0).expand(1, 1, 20)
    protected = torch.arange(20).view(1, 1, 20) >= 17
    for count, total in ((0, 3), (4, 3), (5, 8), (12, 8), (13, 16), (16, 16), (17, 20), (99, 20)):
        kept = select(rank, torch.tensor([[count]]), ~protected, protected, granularity=8)
        assert kept.lengths.tolist() == [[total]]
        assert bool(kept.mask()[protected].all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": torch.zeros(2, 4)}, r"rank is \[B, H, N\]"),
        ({"counts": torch.ones(2, 3, dtype=torch.int64)}, r"counts \[B, H\]"),
        ({"counts": torch.tensor([[1, -1], [1, 1]])}, "negative"),
        ({"is_candidate": torch.ones(2, 2, 5, dtype=torch.bool)}, "is_candidate is bool"),
        ({"is_candidate": torch.ones(2, 2, 4)}, "is_candidate is bool"),
        ({"protected": torch.ones(2, 4, dtype=torch.bool)}, "protected is bool"),
        ({"protected": torch.ones(1, 2, 4, dtype=torch.bool)}, "protected is bool"),
    ],
)
def test_bad_arguments(change, message):
    mask = torch.ones(2, 2, 4, dtype=torch.bool)
    right = {"rank": torch.zeros(2, 2, 4), "counts": torch.ones(2, 2, dtype=torch.int64), "is_candidate": mask}
    with pytest.raises(ValueError, match=message):
        select(**{**right, "protected": ~mask, **change})


# Select.protected


@st.composite
def rows(draw):
    """valid [B, 1, N] with padding on either side (or nothing valid at all), modality, a further mask."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(0, 12))
    valid = torch.zeros(batch, 1, length, dtype=torch.bool)
    for b in range(batch):
        left = draw(st.integers(0, length))
        valid[b, 0, left : draw(st.integers(left, length))] = True
    flat = st.lists(st.integers(0, 2), min_size=batch * length, max_size=batch * length)
    modality = torch.tensor(draw(flat), dtype=torch.int8).view(batch, 1, length)
    return valid, modality, torch.tensor(draw(flat), dtype=torch.int8).view(batch, 1, length) == 0


@settings(deadline=None, max_examples=300)
@given(
    rows(),
    st.one_of(st.none(), st.integers(0, 5)),
    st.integers(0, 4),
    st.sampled_from([None, "text", "image", "video"]),
    st.integers(0, 5),
    st.booleans(),
)
def test_protected_against_lists(case, recent, sinks, protect, window, masked):
    valid, modality, mask = case
    chosen = Select(recent=recent, sinks=sinks, protect=protect).protected(
        valid, window, modality, mask if masked else None
    )
    for b, row in enumerate(valid[:, 0].tolist()):
        real = [i for i, v in enumerate(row) if v]
        last = window if recent is None else recent
        expected = set(real[:sinks]) | set(real[len(real) - min(last, len(real)) :])
        for i in real:
            if protect is not None and ["text", "image", "video"][int(modality[b, 0, i])] == protect:
                expected.add(i)
            if masked and bool(mask[b, 0, i]):
                expected.add(i)
        assert set(chosen[b, 0].nonzero().flatten().tolist()) == expected


def test_protected_per_head():
    """After an eviction heads hold different entries; the recent and the first are counted within each."""
    valid = torch.tensor([[[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]], dtype=torch.bool)
    chosen = Select(recent=1, sinks=1).protected(valid, 8)
    assert chosen.int().tolist() == [[[0, 0, 1, 0, 1], [1, 0, 0, 0, 1], [0, 0, 0, 0, 1]]]
    by_head = torch.tensor([[[1], [0], [1]]], dtype=torch.bool).expand(1, 3, 5)
    assert Select(recent=0).protected(valid[:, 1:2], 8, mask=by_head).sum(-1).tolist() == [[5, 0, 5]]


def test_protecting_a_modality_needs_to_know_it():
    with pytest.raises(ValueError, match=r"protect='image'.*modality"):
        Select(protect="image").protected(torch.ones(1, 1, 3, dtype=torch.bool), 1)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"recent": -1}, "cannot be negative"),
        ({"sinks": -1}, "cannot be negative"),
        ({"granularity": 0}, "granularity starts at 1"),
        ({"protect": "audio"}, "text, image, video, got 'audio'"),
    ],
)
def test_bad_settings(settings_, message):
    with pytest.raises(ValueError, match=message):
        Select(**settings_)


@pytest.mark.parametrize(
    ("setting", "value", "type_"),
    [
        ("recent", 1.5, r"int \| None"),
        ("recent", False, r"int \| None"),
        ("sinks", True, "int"),
        ("sinks", None, "int"),
        ("granularity", "8", "int"),
    ],
)
def test_settings_of_another_type(setting, value, type_):
    with pytest.raises(TypeError, match=f"Select: {setting} must be {type_}, got {value!r}"):
        Select(**{setting: value})
