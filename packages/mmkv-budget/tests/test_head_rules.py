"""Equal and AdaKV against plain-python sorts."""

import math
import struct
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_budget import AdaKV, Equal


def f32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


# Multiples of 1/1024, so that sums are exact and the oracle's order of adding cannot matter; few values make ties.
tied = st.integers(0, 4).map(lambda x: x / 4)
spread = st.integers(0, 4095).map(lambda x: x / 1024)
friendly = st.one_of(tied, spread)
signed = st.integers(-2048, 2047).map(lambda x: x / 1024)


@st.composite
def layers(draw, values=friendly, shared_mask=None):
    """backbone, is_candidate, capacity: ragged candidates, padding, empty heads, all-equal scores."""
    batch, heads, length = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(0, 12))
    value = draw(st.sampled_from([values, st.just(draw(values))]))
    flat = draw(st.lists(value, min_size=batch * heads * length, max_size=batch * heads * length))
    rows = 1 if draw(st.booleans() if shared_mask is None else st.just(shared_mask)) else heads
    mask = draw(st.lists(st.integers(0, 3), min_size=batch * rows * length, max_size=batch * rows * length))
    capacity = draw(st.lists(st.integers(0, 14), min_size=batch, max_size=batch))
    return (
        torch.tensor(flat, dtype=torch.float32).view(batch, heads, length),
        (torch.tensor(mask) > 0).view(batch, rows, length),
        torch.tensor(capacity),
    )


def per_head(backbone, is_candidate, row):
    """Candidate scores of each head as lists of (slot, score)."""
    heads = []
    for head in range(backbone.shape[1]):
        mask = is_candidate[row, head if is_candidate.shape[1] > 1 else 0].tolist()
        heads.append([(slot, s) for slot, s in enumerate(backbone[row, head].tolist()) if mask[slot]])
    return heads


def scaled(head, capacity):
    """The published normalisation: times the share of mass in the C best."""
    best = sorted((s for _, s in head), reverse=True)
    total = math.fsum(best)
    if total == 0 or capacity == 0:
        return head
    share = math.fsum(best[:capacity]) / total
    return [(slot, f32(s * share)) for slot, s in head]


def flat_winners(heads, total):
    """How many of the `total` best of (head, slot, score) entries each head has; ties by head, then slot."""
    entries = sorted((-s, h, slot) for h, head in enumerate(heads) for slot, s in head)[:total]
    return [sum(1 for _, h, _ in entries if h == head) for head in range(len(heads))]


def floor_oracle(heads, capacity, floor, normalize):
    if normalize:
        heads = [scaled(head, capacity) for head in heads]
    ranked = [sorted(head, key=lambda e: (-e[1], e[0])) for head in heads]
    safe = int(floor * capacity)
    total = min(capacity * len(heads), sum(map(len, heads)))
    kept = [min(safe, len(head)) for head in ranked]
    won = flat_winners([head[safe:] for head in ranked], total - sum(kept))
    return [a + b for a, b in zip(kept, won, strict=True)]


def blend_oracle(heads, capacity, alpha, normalize):
    """The release, in its float32: round(n (1 - alpha) + int(C alpha)), half to even."""
    if all(len(head) <= capacity for head in heads):
        return [len(head) for head in heads]
    if normalize:
        heads = [scaled(head, capacity) for head in heads]
    won = flat_winners(heads, capacity * len(heads))
    blended = [round(f32(f32(n * f32(1 - alpha)) + int(capacity * alpha))) for n in won]
    return [min(c, len(head)) for c, head in zip(blended, heads, strict=True)]


def oracle(function, case, *settings):
    backbone, is_candidate, capacity = case
    return [
        function(per_head(backbone, is_candidate, row), int(capacity[row]), *settings)
        for row in range(backbone.shape[0])
    ]


shares = st.sampled_from([0, 0.05, 0.2, 0.25, 0.3, 0.5, 0.75, 1, 1.0])


@settings(max_examples=400, deadline=None)
@given(layers(), shares, st.booleans())
def test_floor_is_the_brute_force_sort(case, floor, normalize):
    counts = AdaKV(floor=floor, normalize=normalize)(*case)
    assert counts.dtype == torch.int64
    assert counts.tolist() == oracle(floor_oracle, case, floor, normalize)


@settings(max_examples=200, deadline=None)
@given(layers(signed), shares)
def test_floor_with_negative_scores(case, floor):
    assert AdaKV(floor=floor, normalize=False)(*case).tolist() == oracle(floor_oracle, case, floor, False)


@settings(max_examples=300, deadline=None)
@given(layers(), shares, st.booleans())
def test_blend_is_the_published_formula(case, alpha, normalize):
    counts = AdaKV(floor=alpha, mode="blend", normalize=normalize)(*case)
    assert counts.tolist() == oracle(blend_oracle, case, alpha, normalize)


@settings(max_examples=200, deadline=None)
@given(layers(st.floats(0, 1, width=32)), shares, st.booleans())
def test_totals_are_exact_and_floors_hold(case, floor, normalize):
    backbone, is_candidate, capacity = case
    sizes = is_candidate.sum(-1).expand(backbone.shape[:2])
    want = torch.minimum(capacity * backbone.shape[1], sizes.sum(-1))
    for counts in (AdaKV(floor=floor, normalize=normalize)(*case), Equal()(*case)):
        assert counts.sum(-1).tolist() == want.tolist()
        assert bool((counts <= sizes).all())
        assert bool((counts >= 0).all())
    counts = AdaKV(floor=floor, normalize=normalize)(*case)
    least = torch.tensor([[int(floor * c)] for c in capacity.tolist()]).minimum(sizes)
    assert bool((counts >= least).all())


@settings(max_examples=100, deadline=None)
@given(layers(), st.sampled_from([Equal(), AdaKV(), AdaKV(normalize=False), AdaKV(mode="blend", floor=0.5)]))
def test_a_row_alone_is_the_row_in_the_batch(case, rule):
    """Also without the columns that are nobody's candidates: padding takes part in nothing."""
    backbone, is_candidate, capacity = case
    whole = rule(*case)
    for row in range(backbone.shape[0]):
        used = is_candidate[row].any(0)
        alone = rule(
            backbone[row : row + 1][..., used], is_candidate[row : row + 1][..., used], capacity[row : row + 1]
        )
        assert alone.tolist() == whole[row : row + 1].tolist()


@settings(max_examples=100, deadline=None)
@given(
    layers(), st.sampled_from([AdaKV(), AdaKV(mode="blend")]), st.sampled_from([math.nan, math.inf, -math.inf, -9.0])
)
def test_what_lies_outside_the_candidates_is_ignored(case, rule, junk):
    backbone, is_candidate, capacity = case
    dirty = backbone.masked_fill(~is_candidate, junk)
    assert rule(dirty, is_candidate, capacity).tolist() == rule(*case).tolist()


@settings(max_examples=100, deadline=None)
@given(layers(shared_mask=False), st.randoms(use_true_random=False), st.sampled_from(["floor", "blend"]))
def test_permuted_heads_permute_the_counts_when_nothing_ties(case, random, mode):
    backbone, is_candidate, capacity = case
    distinct = list(range(1, backbone.numel() + 1))
    random.shuffle(distinct)
    backbone = torch.tensor(distinct, dtype=torch.float32).view(backbone.shape)
    order = list(range(backbone.shape[1]))
    random.shuffle(order)
    rule = AdaKV(mode=mode, normalize=False)
    permuted = rule(backbone[:, order], is_candidate[:, order], capacity)
    assert permuted.tolist() == rule(backbone, is_candidate, capacity)[:, order].tolist()


@settings(max_examples=100, deadline=None)
@given(layers(), st.integers(0, 5), shares)
def test_more_budget_keeps_more(case, extra, floor):
    backbone, is_candidate, capacity = case
    for rule in (AdaKV(floor=floor), Equal()):
        less, more = rule(*case), rule(backbone, is_candidate, capacity + extra)
        assert bool((less.sum(-1) <= more.sum(-1)).all())


def level_oracle(sizes, total):
    """Hand out one token at a time: always to a head with room that has fewest, the first of them."""
    counts = [0] * len(sizes)
    for _ in range(min(total, sum(sizes))):
        head = min((h for h in range(len(sizes)) if counts[h] < sizes[h]), key=lambda h: (counts[h], h))
        counts[head] += 1
    return counts


@settings(max_examples=200, deadline=None)
@given(layers())
def test_equal_is_as_equal_as_can_be(case):
    backbone, is_candidate, capacity = case
    want = [
        level_oracle(
            [len(head) for head in per_head(backbone, is_candidate, row)], int(capacity[row]) * backbone.shape[1]
        )
        for row in range(backbone.shape[0])
    ]
    assert Equal()(*case).tolist() == want


def test_equal_on_a_dense_cache():
    scores, mask = torch.rand(2, 3, 9), torch.ones(2, 1, 9, dtype=torch.bool)
    assert Equal()(scores, mask, torch.tensor([4, 50])).tolist() == [[4, 4, 4], [9, 9, 9]]
    assert Equal()(scores, mask.expand(2, 3, 9), torch.tensor([4, 50])).tolist() == [[4, 4, 4], [9, 9, 9]]


def test_blend_rounds_half_to_even_and_drifts():
    """n = 3, 1, 0, 0 with alpha 0.5, C = 1: 1.5, 0.5, 0, 0 becomes 2, 0, 0, 0; half-up would say 2, 1, 0, 0."""
    scores = torch.tensor([[[9.0, 8, 7, 0], [6, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]])
    mask = torch.ones(1, 1, 4, dtype=torch.bool)
    one = torch.tensor([1])
    assert AdaKV(0.5, "blend", normalize=False)(scores, mask, one).tolist() == [[2, 0, 0, 0]]
    assert AdaKV(0.5, "floor", normalize=False)(scores, mask, one).tolist() == [[3, 1, 0, 0]]


def test_blend_totals_drift_where_floor_does_not():
    scores = torch.rand(64, 4, 200, generator=torch.Generator().manual_seed(0)).pow(6)
    mask, capacity = torch.ones(64, 1, 200, dtype=torch.bool), torch.full((64,), 64)
    assert set(AdaKV(mode="blend")(scores, mask, capacity).sum(-1).tolist()) - {256}
    assert set(AdaKV()(scores, mask, capacity).sum(-1).tolist()) == {256}


def test_ties_are_taken_by_head_then_slot():
    same, mask = torch.ones(1, 3, 5), torch.ones(1, 1, 5, dtype=torch.bool)
    assert AdaKV(floor=0.5)(same, mask, torch.tensor([2])).tolist() == [[4, 1, 1]]
    assert AdaKV(floor=0)(same, mask, torch.tensor([2])).tolist() == [[5, 1, 0]]
    assert AdaKV(floor=0)(0 * same, mask, torch.tensor([2])).tolist() == [[5, 1, 0]]


def test_normalize_favours_concentrated_heads():
    sharp, flat = [8.0, 0, 0, 0], [9.0, 9, 9, 9]
    scores, mask = torch.tensor([[sharp, flat]]), torch.ones(1, 1, 4, dtype=torch.bool)
    one = torch.tensor([1])
    assert AdaKV(floor=0, normalize=False)(scores, mask, one).tolist() == [[0, 2]]
    assert AdaKV(floor=0, normalize=True)(scores, mask, one).tolist() == [[1, 1]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype):
    scores = torch.rand(2, 3, 40).to(dtype)
    mask, capacity = torch.ones(2, 1, 40, dtype=torch.bool), torch.tensor([7, 9])
    assert AdaKV()(scores, mask, capacity).tolist() == AdaKV()(scores.float(), mask, capacity).tolist()


def test_inputs_are_left_alone():
    scores, mask, capacity = torch.rand(2, 3, 40), torch.rand(2, 3, 40) > 0.2, torch.tensor([7, 9])
    copies = scores.clone(), mask.clone(), capacity.clone()
    AdaKV()(scores, mask, capacity)
    Equal()(scores, mask, capacity)
    assert all(torch.equal(a, b) for a, b in zip((scores, mask, capacity), copies, strict=True))


@pytest.mark.parametrize("mode", ["floor", "blend"])
def test_empty_inputs(mode):
    for shape in [(0, 2, 3), (2, 2, 0)]:
        scores, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        for rule in (AdaKV(mode=mode), Equal()):
            counts = rule(scores, mask, torch.full((shape[0],), 3))
            assert counts.shape == shape[:2]
            assert not counts.any()


def test_negative_scores_need_normalize_off():
    scores, mask = torch.tensor([[[1.0, -0.5]]]), torch.ones(1, 1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="normalize=False"):
        AdaKV()(scores, mask, torch.tensor([1]))
    AdaKV(normalize=False)(scores, mask, torch.tensor([1]))
    AdaKV()(scores, torch.tensor([[[True, False]]]), torch.tensor([1]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [True, False])
def test_candidates_must_be_finite(bad, normalize):
    scores, mask = torch.tensor([[[1.0, bad]]]), torch.ones(1, 1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="finite"):
        AdaKV(normalize=normalize)(scores, mask, torch.tensor([1]))


@pytest.mark.parametrize("rule", [AdaKV(), Equal()])
def test_bad_shapes(rule):
    scores, mask, capacity = torch.rand(2, 3, 4), torch.ones(2, 3, 4, dtype=torch.bool), torch.tensor([1, 1])
    with pytest.raises(ValueError, match="backbone"):
        rule(scores[0], mask, capacity)
    with pytest.raises(ValueError, match="is_candidate"):
        rule(scores, mask[:, :2], capacity)
    with pytest.raises(ValueError, match="is_candidate"):
        rule(scores, mask.float(), capacity)
    with pytest.raises(ValueError, match="capacity"):
        rule(scores, mask, capacity[:1])
    with pytest.raises(ValueError, match="capacity"):
        rule(scores, mask, capacity.float())


@pytest.mark.parametrize("floor", [-0.1, 1.1, math.nan])
def test_bad_floor(floor):
    with pytest.raises(ValueError, match="floor"):
        AdaKV(floor=floor)


def test_bad_mode():
    with pytest.raises(ValueError, match="mode"):
        AdaKV(mode="max")


def test_settings_are_values():
    assert AdaKV() == AdaKV(0.2, "floor", True)
    assert len({AdaKV(), AdaKV(0.2), AdaKV(0.5), Equal(), Equal()}) == 3
    assert (Equal.counts, AdaKV.counts) == ("equal", "dynamic")


def test_large_layers_stay_exact_and_quick():
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(1, 4, 4096, generator=generator).pow(8)
    mask = torch.ones(1, 1, 4096, dtype=torch.bool)
    mask[..., -32:] = False
    case = scores, mask, torch.tensor([480])
    started = time.perf_counter()
    counts = AdaKV()(*case)
    assert time.perf_counter() - started < 1
    assert counts.tolist() == oracle(floor_oracle, case, 0.2, True)
