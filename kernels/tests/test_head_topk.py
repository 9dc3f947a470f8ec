"""`head_topk` against sorting in plain Python."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_kernels import head_topk

IMPLS = ["reference", "triton"]
INF = float("inf")


def flags(mask, b, h, entries):
    """A head's flags as a list; None: no mask."""
    return mask if mask is None else mask[b, h if mask.shape[1] > 1 else 0].tolist()


def expected(scores, counts, candidates, always):
    """Columns of every head, from a sort by (score, head, column)."""
    batch, heads, entries = scores.shape
    columns = []
    for b in range(batch):
        besides = [flags(always, b, h, entries) or [False] * entries for h in range(heads)]
        asked = [flags(candidates, b, h, entries) or [True] * entries for h in range(heads)]
        rest = [[asked[h][j] and not besides[h][j] for j in range(entries)] for h in range(heads)]
        kept = [{j for j in range(entries) if besides[h][j]} for h in range(heads)]
        for group in [range(heads)] if counts.dim() == 1 else [[h] for h in range(heads)]:
            order = sorted((-float(scores[b, h, j]), h, j) for h in group for j in range(entries) if rest[h][j])
            count = int(counts[b] if counts.dim() == 1 else counts[b, group[0]])
            for _, h, j in order[: max(0, count)]:
                kept[h].add(j)
        columns += [sorted(chosen) for chosen in kept]
    return columns


def check(kit, scores, counts, candidates=None, always=None):
    result = kit.run(head_topk, scores, counts, candidates=candidates, always=always)
    wanted = expected(scores, counts, candidates, always)
    bounds = result.cu_seqlens.tolist()
    assert [result.columns[i:j].tolist() for i, j in pairwise(bounds)] == wanted
    assert result.columns.shape[0] == bounds[-1]
    return result


@st.composite
def cases(draw):
    batch, heads, entries = draw(st.tuples(*(st.integers(1, n) for n in (2, 3, 20))))
    value = st.sampled_from([-INF, -1.0, -0.0, 0.0, 0.25, 3.0, INF])
    size = batch * heads * entries
    scores = torch.tensor(draw(st.lists(value, min_size=size, max_size=size))).view(batch, heads, entries)
    flat = draw(st.booleans())
    shape = (batch,) if flat else (batch, heads)
    many = batch * (1 if flat else heads)
    count = st.integers(-1, entries * (heads if flat else 1) + 1)
    counts = torch.tensor(draw(st.lists(count, min_size=many, max_size=many))).view(shape)
    masks = []
    for _ in range(2):
        mask_heads = draw(st.sampled_from([0, 1, heads]))
        bits = st.lists(st.booleans(), min_size=batch * mask_heads * entries, max_size=batch * mask_heads * entries)
        masks.append(torch.tensor(draw(bits)).view(batch, mask_heads, entries) if mask_heads else None)
    return scores, counts, *masks


@settings(deadline=None, max_examples=60)
@given(cases())
def test_equals_sorting(kit, case):
    check(kit, *case)


@pytest.mark.parametrize("entries", [1, 63, 1000, 5000])
@pytest.mark.parametrize("flat", [True, False])
def test_odd_lengths(kit, entries, flat):
    scores = kit.randn(1, 3, entries)
    counts = torch.tensor([entries]) if flat else torch.tensor([[entries // 3, 0, entries]])
    check(kit, scores, counts, candidates=kit.randn(1, 3, entries, seed=1) > -1)


@pytest.mark.parametrize("flat", [True, False])
def test_ties_over_many_chunks_go_to_the_lower_head_and_column(kit, flat):
    scores = torch.zeros(2, 2, 3000)
    scores[0, :, ::7] = -0.0
    scores[1, 1, 2990:] = 1
    check(kit, scores, torch.tensor([3500, 2999]) if flat else torch.tensor([[1500, 2999], [0, 1030]]))


def test_scores_that_differ_in_the_last_bit(kit):
    for sign in (1, -1):
        bits = torch.arange(1000, dtype=torch.int32) + 0x3F800000
        scores = sign * bits.view(torch.float32)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
        check(kit, scores.view(1, 1, 1000), torch.tensor([[333]]))


def test_dtypes_and_strides(kit, dtype):
    scores = kit.randn(2, 90, 3, dtype=dtype).transpose(1, 2)[..., ::2]
    candidates = (kit.randn(2, 1, 90, seed=1) > -1)[..., ::2]
    always = (kit.randn(2, 90, 3, seed=2) > 1).transpose(1, 2)[..., ::2]
    scores = scores.masked_fill(~candidates, torch.nan)
    check(kit, scores, torch.tensor([[5, 9, 0, 20, 1, 2]])[:, ::2].expand(2, 3), candidates, always)


def test_row_alone_is_the_row_in_the_batch(kit):
    scores = kit.randn(3, 2, 1100).round(decimals=1)
    for counts in (torch.tensor([[3, 700], [9, 1], [0, 1100]]), torch.tensor([900, 2200, 30])):
        batch = check(kit, scores, counts)
        for b in range(3):
            alone = kit.run(head_topk, scores[b : b + 1], counts[b : b + 1])
            start, stop = batch.cu_seqlens[2 * b], batch.cu_seqlens[2 * b + 2]
            assert torch.equal(alone.columns, batch.columns[start:stop])


def test_counts_below_none_and_what_is_kept_anyway(kit):
    scores, always = kit.randn(1, 2, 40), kit.randn(1, 2, 40, seed=1) > 0.5
    check(kit, scores, torch.tensor([[-3, 8]]))
    check(kit, scores, torch.tensor([[4, 8]]), always=always)
    check(kit, scores, torch.tensor([9]), candidates=scores > -1, always=always)


def test_nothing_to_choose_from(kit):
    for shape in ((0, 2, 5), (2, 0, 5), (2, 2, 0)):
        result = kit.run(head_topk, torch.zeros(shape), torch.ones(shape[:2], dtype=torch.int64))
        assert result.columns.shape == (0,)
        assert torch.equal(result.cu_seqlens, torch.zeros(shape[0] * shape[1] + 1, dtype=torch.int64))
    check(kit, torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.int64), always=torch.ones(1, 1, 5).bool())
    check(kit, torch.zeros(1, 2, 5), torch.tensor([9]), candidates=torch.zeros(1, 1, 5).bool())


def test_float64_keeps_its_digits():
    scores = torch.tensor([[[1.0, 1.0 + 1e-12, 1.0 - 1e-12]]], dtype=torch.float64)
    assert head_topk(scores, torch.tensor([[1]])).columns.tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scores": torch.zeros(1, 2, 5).long()}, TypeError, "scores must be float32"),
        ({"counts": torch.ones(1, 2)}, TypeError, "counts must be int64"),
        ({"counts": torch.ones(1, 3).long()}, ValueError, r"counts must be \[B, H\]"),
        ({"counts": torch.ones(2).long()}, ValueError, r"counts must be \[B\]"),
        ({"candidates": torch.ones(1, 2, 5)}, TypeError, "candidates must be bool"),
        ({"candidates": torch.ones(1, 2, 4).bool()}, ValueError, "candidates must be"),
        ({"always": torch.ones(1, 3, 5).bool()}, ValueError, "always must be"),
        ({"counts": torch.ones(1, 2, device="meta").long()}, ValueError, "must be on the device of"),
    ],
)
def test_wrong_arguments(changes, error, message):
    arguments = {"scores": torch.zeros(1, 2, 5), "counts": torch.ones(1, 2).long()} | changes
    with pytest.raises(error, match=message):
        head_topk(arguments.pop("scores"), arguments.pop("counts"), **arguments)
