"""SnapKV against plain loops in float64."""

import numpy as np
import pytest
import torch
from mmkv_scores import SnapKV, Trace
from mmkv_scores.snapkv import window_evidence

CAPACITY = torch.tensor([4])


def pooled(score, kernel, pooling):
    """Zero padding and a divisor that is always `kernel`, as in the release."""
    reach = kernel // 2
    out = np.zeros_like(score)
    for i in range(len(score)):
        around = [score[j] if 0 <= j < len(score) else 0.0 for j in range(i - reach, i + reach + 1)]
        out[i] = sum(around) / kernel if pooling == "avg" else max(around)
    return out


def oracle(attention, p, scorer, softcap=None, visible=None):
    """Score [H, N - window] and pooled last row of one prompt."""
    n, rows = p.length, min(scorer.window, p.length)
    causal = np.tril(np.ones((n, n), dtype=bool))[n - rows :]
    visible = causal if visible is None else visible
    weights = attention(p.queries[:, n - rows :], p.keys, visible, p.keys.shape[-1] ** -0.5, softcap)
    reduce = np.mean if scorer.group == "mean" else np.max
    results = []
    for part in (weights.mean(1), weights[:, -1]):
        by_group = part.reshape(len(p.keys), -1, n)
        reduced = reduce(by_group, axis=1)[:, : n - rows]
        results.append(np.stack([pooled(row, scorer.kernel, scorer.pooling) for row in reduced]))
    return results


def check(found, expected):
    np.testing.assert_allclose(found.double().numpy(), expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize(("pooling", "kernel"), [("avg", 1), ("avg", 5), ("avg", 7), ("max", 5), ("max", 7)])
def test_plain_prompt(prompt, observe, attention, group, reduce, pooling, kernel):
    scorer = SnapKV(window=6, kernel=kernel, pooling=pooling, group=reduce)
    p = prompt(23, seed=group, heads=3, group=group)
    seen = observe(p, window=6)
    scores = scorer(seen, CAPACITY, Trace())
    window, last = oracle(attention, p, scorer)
    check(scores.rank[0, :, :-6], window)
    check(scorer.evidence(seen).last[0, :, :-6], last)
    assert torch.equal(scores.rank, scores.backbone)
    assert not scores.rank[..., -6:].any()


@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize("pads", [[(0, 0)], [(5, 0)], [(0, 5)], [(3, 2)]])
def test_padding_and_softcap(prompt, observe, attention, softcap, pads):
    p = prompt(19, seed=3)
    scorer = SnapKV(window=4)
    rank = scorer(observe(p, window=4, pads=pads, softcap=softcap), CAPACITY, Trace()).rank
    left = pads[0][0]
    check(rank[0, :, left : left + 15], oracle(attention, p, scorer, softcap)[0])
    outside = torch.cat([rank[0, :, :left], rank[0, :, left + 15 :]], dim=-1)
    assert not outside.any()


def test_explicit_mask(prompt, observe, attention):
    """A model that lets window rows see only part of the prompt (sliding attention, image blocks)."""
    p = prompt(20, seed=4)
    seen = observe(p, window=5, explicit=True)
    random = torch.Generator().manual_seed(1)
    seen.mask[0, 0] &= (torch.rand(5, 20, generator=random) > 0.4) | torch.eye(5, 20, dtype=torch.bool).roll(15, 1)
    scorer = SnapKV(window=5)
    check(
        scorer(seen, CAPACITY, Trace()).rank[0, :, :15],
        oracle(attention, p, scorer, visible=seen.mask[0, 0].numpy())[0],
    )


def test_takes_the_last_rows_of_a_longer_window(prompt, observe):
    p = prompt(30)
    one, two = observe(p, window=4), observe(p, window=12, recent=4)
    for explicit in (False, True):
        two = observe(p, window=12, recent=4, explicit=explicit)
        torch.testing.assert_close(
            SnapKV(window=4)(two, CAPACITY, Trace()).rank, SnapKV(window=4)(one, CAPACITY, Trace()).rank
        )


@pytest.mark.parametrize("length", [1, 3, 7, 8, 9])
def test_prompt_about_as_short_as_the_window(prompt, observe, attention, length):
    """Nothing protected, so that scores of every entry can be compared."""
    p = prompt(length, seed=5)
    scorer = SnapKV(window=8, kernel=1)
    rank = scorer(observe(p, window=8, recent=0), CAPACITY, Trace()).rank
    rows = min(8, length)
    weights = attention(
        p.queries[:, length - rows :], p.keys, np.tril(np.ones((length, length)))[length - rows :], 8**-0.5
    )
    check(rank[0], weights.mean(1).reshape(2, 2, length).mean(1))


def test_pooling_does_not_reach_protected_entries(prompt, observe):
    """The window's columns are dropped before the pool; the last candidates see zeros there."""
    p = prompt(12)
    seen = observe(p, window=4)
    raw = window_evidence(seen, 4).window[0, :, :8].double()
    rank = SnapKV(window=4, kernel=5)(seen, CAPACITY, Trace()).rank[0, :, 7].double()
    torch.testing.assert_close(rank, raw[:, 5:].sum(-1) / 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32(prompt, observe, attention, dtype):
    p = prompt(40, seed=6, dtype=dtype)
    scorer = SnapKV(window=8)
    scores = scorer(observe(p, window=8), CAPACITY, Trace())
    assert scores.rank.dtype == torch.float32
    check(scores.rank[0, :, :-8], oracle(attention, p, scorer)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "at least one query"),
        ({"kernel": 4}, "odd and positive, got 4"),
        ({"kernel": 0}, "odd and positive"),
        ({"pooling": "min"}, "pooling is 'avg' or 'max'"),
        ({"group": "sum"}, "group 'mean' or 'max'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SnapKV(**settings)


def test_the_group_is_reduced_before_the_pool(prompt, observe, attention):
    """With a max pool the order matters: kvpress pools first and so keeps other entries."""
    p = prompt(40, seed=5, heads=2, group=4)
    scorer = SnapKV(window=4, kernel=7, pooling="max")
    rank = scorer(observe(p, window=4), CAPACITY, Trace()).rank[0, :, :-4]
    causal = np.tril(np.ones((40, 40), dtype=bool))[36:]
    per_query_head = attention(p.queries[:, 36:], p.keys, causal, p.keys.shape[-1] ** -0.5).mean(1)[:, :36]
    after = np.stack([pooled(row, 7, "max") for row in per_query_head]).reshape(2, 4, 36).mean(1)
    check(rank, oracle(attention, p, scorer)[0])
    ours, theirs = rank.topk(8).indices, torch.from_numpy(after).topk(8).indices
    assert any(set(a.tolist()) != set(b.tolist()) for a, b in zip(ours, theirs, strict=True))
