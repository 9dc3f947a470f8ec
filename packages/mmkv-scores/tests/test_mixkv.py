"""MixKV against numpy loops, and in half precision against float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from mmkv_kernels import mixkv_mix
from mmkv_scores import BACON, KeyDiff, LastQuery, MixKV, ObservedAttention, SnapKV, Trace

CAPACITY = torch.tensor([4])


def units(keys):
    k = np.asarray(keys, dtype=np.float64)
    return k / np.sqrt((k**2).sum(-1, keepdims=True))


def pairwise(keys):
    """Average cosine of two different keys [n, D]."""
    unit, n = units(keys), len(keys)
    return sum(unit[i] @ unit[j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))


def min_max(x):
    return (x - x.min()) / (x.max() - x.min() + 1e-8)


def oracle(attention, keys, values, n, r):
    """One head: attention [n] over the candidates, which are the first n of all keys and values."""
    unit = units(keys)
    mean = unit.mean(0)
    level = attention.mean()
    value = min_max(np.sqrt((np.asarray(values, dtype=np.float64)[:n] ** 2).sum(-1)))
    diversity = min_max(-(unit[:n] @ mean))
    value, diversity = (x * level / (x.mean() + 1e-8) for x in (value, diversity))
    return r * diversity + (1 - r) * (attention + value)


def check(scores, base, seen, p, candidates, ratios):
    for head, r in enumerate(ratios):
        attention = base[0, head, :candidates].double().numpy()
        expected = oracle(attention, p.keys[head].numpy(), p.values[head].numpy(), candidates, r)
        np.testing.assert_allclose(scores.rank[0, head, :candidates], expected, rtol=1e-4, atol=1e-7)
    assert not scores.rank[..., candidates:].any()
    assert torch.equal(scores.backbone, base)


def biased(p, bias):
    """Keys that share a direction, so that r is neither 0 nor 1."""
    p.keys.add_(torch.randn(p.keys.shape[0], 1, p.keys.shape[2], generator=torch.Generator().manual_seed(9)) * bias)
    return p


@pytest.mark.parametrize("bias", [0.0, 0.7, 5.0])
def test_online(prompt, observe, bias):
    """r is the brute-force mean cosine of all pairs, window included."""
    p = biased(prompt(25, seed=1, heads=3), bias)
    seen = observe(p, window=6)
    ratios = [pairwise(k) for k in p.keys]
    base = SnapKV(window=6)
    check(MixKV(base)(seen, CAPACITY, Trace()), base(seen, CAPACITY, Trace()).rank, seen, p, 19, ratios)
    assert max(ratios) - min(ratios) > 0.005


@pytest.mark.parametrize("r", [0, 0.0, 0.5, 1, 0.3])
def test_fixed(prompt, observe, r):
    p = prompt(25, seed=2)
    seen, base = observe(p, window=6), SnapKV(window=6)
    check(MixKV(base, r)(seen, CAPACITY, Trace()), base(seen, CAPACITY, Trace()).rank, seen, p, 19, [r, r])


def test_table(prompt, observe):
    table = [[0.1, 0.9], [0.8, 0.2], [0.0, 1.0]]
    p, base = prompt(25, seed=3), SnapKV(window=6)
    for layer in range(3):
        seen = observe(p, window=6, layer=layer, num_layers=3)
        found = MixKV(base, table)(seen, CAPACITY, Trace())
        check(found, base(seen, CAPACITY, Trace()).rank, seen, p, 19, table[layer])
    assert hash(MixKV(base, table)) == hash(MixKV(base, tuple(map(tuple, table))))


@pytest.mark.parametrize("shape", [(2, 2), (4, 2), (3, 1), (3, 4)])
def test_table_of_another_model(prompt, observe, shape):
    seen = observe(prompt(25), window=6, num_layers=3)
    scorer = MixKV(SnapKV(window=6), np.full(shape, 0.5).tolist())
    with pytest.raises(ValueError, match=rf"\({shape[0]}, {shape[1]}\) layers x KV heads, this model needs \(3, 2\)"):
        scorer(seen, CAPACITY, Trace())


@pytest.mark.parametrize(
    "redundancy",
    ["offline", [], [[]], [[0.1], [0.1, 0.2]], [[1.5]], 2.0, -3, float("nan"), [["x"]], True, None, [0.5], [[False]]],
)
def test_bad_redundancy(redundancy):
    with pytest.raises(ValueError, match=r"MixKV: (the )?redundanc"):
        MixKV(redundancy=redundancy)


@pytest.mark.parametrize("base", [KeyDiff(), MixKV()])
def test_refuses_what_is_not_attention(base):
    with pytest.raises(ValueError, match=f"MixKV mixes attention.*{type(base).__name__} is not"):
        MixKV(base)


@pytest.mark.parametrize("base", [LastQuery(), ObservedAttention()])
def test_other_attention_bases(prompt, observe, base):
    p = biased(prompt(20, seed=4), 0.7)
    seen = observe(p, window=base.window, recent=5, columns=True)
    scorer = MixKV(base)
    assert (scorer.window, scorer.needs) == (base.window, base.needs)
    check(
        scorer(seen, CAPACITY, Trace()), base(seen, CAPACITY, Trace()).rank, seen, p, 15, [pairwise(k) for k in p.keys]
    )


def test_bacon_takes_the_place_of_attention(prompt, observe):
    """Our own composition: S in, raw window score out for budgets."""
    p, inner = biased(prompt(25, seed=5), 0.7), BACON(SnapKV(window=6))
    mixed, plain = Trace(), Trace()
    for layer in range(3):
        seen = observe(replace(p, queries=p.queries.roll(layer, 2)), window=6, layer=layer)
        found, calibrated = MixKV(inner)(seen, CAPACITY, mixed), inner(seen, CAPACITY, plain)
        assert torch.equal(found.backbone, calibrated.backbone)
        assert not torch.equal(calibrated.rank, calibrated.backbone)
        for head in range(2):
            keys, values = p.keys[head].numpy(), p.values[head].numpy()
            attention = calibrated.rank[0, head, :19].double().numpy()
            expected = oracle(attention, keys, values, 19, pairwise(keys))
            np.testing.assert_allclose(found.rank[0, head, :19], expected, rtol=1e-4)


def test_equal_value_norms(prompt, observe):
    p = prompt(20)
    values = torch.ones_like(p.values)
    seen = observe(replace(p, values=values), window=6)
    base = SnapKV(window=6)
    found = MixKV(base, 0)(seen, CAPACITY, Trace()).rank
    torch.testing.assert_close(found, base(seen, CAPACITY, Trace()).rank)


def test_equal_keys(prompt, observe):
    p = prompt(20)
    seen = observe(replace(p, keys=torch.ones_like(p.keys)), window=6)
    assert bool(MixKV(SnapKV(window=6))(seen, CAPACITY, Trace()).rank.isfinite().all())


@pytest.mark.parametrize("length", [6, 7, 8])
def test_no_one_or_two_candidates(prompt, observe, length):
    p = prompt(length, seed=6)
    seen, base = observe(p, window=6), SnapKV(window=6)
    scores = MixKV(base)(seen, CAPACITY, Trace())
    assert bool(scores.rank.isfinite().all())
    if length > 6:
        check(scores, base(seen, CAPACITY, Trace()).rank, seen, p, length - 6, [pairwise(k) for k in p.keys])


def test_all_terms_have_the_mean_of_the_attention():
    random = torch.Generator().manual_seed(0)
    attention, norms, cosines = torch.rand(3, 1, 1, 50, generator=random)
    where = torch.ones(1, 1, 50, dtype=torch.bool)
    diverse = mixkv_mix(attention, norms, cosines, torch.ones(1, 1), torch.ones(1, 1), where)
    important = mixkv_mix(attention, norms, cosines, torch.ones(1, 1), torch.zeros(1, 1), where)
    torch.testing.assert_close(diverse.mean(), attention.mean())
    torch.testing.assert_close(important.mean(), 2 * attention.mean())


def half_arithmetic(attention, keys, values, n, dtype):
    """What the release does: cosines and norms in the dtype of the cache."""
    unit = keys / keys.norm(dim=-1, keepdim=True)
    mean = unit.mean(0)
    r = float((len(keys) * mean.double().square().sum() - 1) / (len(keys) - 1))
    value, diversity = values[:n].norm(dim=-1), -(unit[:n] @ mean)
    value, diversity = ((x - x.min()) / (x.max() - x.min() + 1e-8) for x in (value, diversity))
    level = attention.to(dtype).mean()
    value, diversity = (x * level / (x.mean() + 1e-8) for x in (value, diversity))
    return r * diversity + (1 - r) * (attention.to(dtype) + value)


def overlap(one, two):
    return len(set(one.topk(32).indices.tolist()) & set(two.topk(32).indices.tolist())) / 32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bias", "r"), [(0.96, 0.48), (2.85, 0.89), (9.5, 0.989), (70.0, 0.9998)])
def test_half_precision_ranks_as_float64(prompt, observe, dtype, bias, r):
    """Gaussian keys plus a common vector: where r is near 1 diversity is the whole score, and bf16 cannot see it."""
    p = prompt(3000, seed=7, heads=1, group=2, dim=128)
    direction = torch.randn(128, generator=torch.Generator().manual_seed(8))
    keys = (p.keys + bias * direction / direction.norm() * 128**0.5).to(dtype)
    p = type(p)(p.queries.to(dtype), keys, p.values.to(dtype))
    seen, base, n = observe(p, window=32, scaling=0.01), SnapKV(), 2968
    attention = base(seen, CAPACITY, Trace()).rank[0, 0, :n]
    unit = units(p.keys[0].double())
    online = (3000 * (unit.mean(0) ** 2).sum() - 1) / 2999
    assert abs(online - r) < 0.02
    exact = torch.from_numpy(oracle(attention.double().numpy(), p.keys[0].double(), p.values[0].double(), n, online))
    ours = MixKV(base)(seen, CAPACITY, Trace()).rank[0, 0, :n]
    assert overlap(ours, exact) == 1.0
    if r > 0.98 and dtype == torch.bfloat16:
        assert overlap(half_arithmetic(attention, p.keys[0], p.values[0], n, dtype).double(), exact) < 0.9
