"""PruMerge, PruMerge+ and VisionZip against loops in float64."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_prune import (
    Encoded,
    KeepRandom,
    KeepUniform,
    PruMerge,
    PruMergePlus,
    Reducer,
    TowerEvidence,
    VisionZip,
    tower_attention,
    tower_keys,
)
from mmkv_prune.prumerge import outliers

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 10**6)


def encoded(seed, sizes, spread=1.0, has_cls=False, dtype=torch.float32):
    """Images of these sizes, junk in the padding; a larger spread makes outliers of attention."""
    g = torch.Generator().manual_seed(seed)
    batch, length = len(sizes), max(sizes)
    valid = torch.arange(length) < torch.tensor(sizes)[:, None]
    attention = torch.exp(spread * torch.randn(batch, length, generator=g))
    attention = attention / attention.sum(-1, keepdim=True)
    features, keys = torch.randn(batch, length, 6, generator=g), torch.randn(batch, length, 5, generator=g)
    for x in (attention, features, keys):
        x[~valid] = torch.nan
    cls = torch.randn(batch, 6, generator=g).to(dtype) if has_cls else None
    return Encoded(features.to(dtype), attention, keys, valid, cls)


def row_of(seen, row):
    """A row without its padding, numpy float64."""
    real = seen.real[row]
    return [x[row][real].double().numpy() for x in (seen.features, seen.attention, seen.keys)]


def cosine(keys):
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    return keys @ keys.T


def check(found, row, features, source):
    number = len(source)
    assert found.valid[row].tolist() == [True] * number + [False] * (found.valid.shape[1] - number)
    assert found.source[row].tolist() == [*source, *[-1] * (found.valid.shape[1] - number)]
    if number:
        np.testing.assert_allclose(found.features[row, :number].double(), np.array(features), rtol=2e-5, atol=2e-6)
    assert not found.features[row, number:].any()


def merged(x, a, keys, kept, neighbours):
    out, alike = [], cosine(keys)
    for i in kept:
        others = sorted((j for j in range(len(a)) if j != i), key=lambda j: (-alike[i, j], j))[:neighbours]
        out.append(x[i] + sum((a[j] * x[j] for j in others), np.zeros(x.shape[1])))
    return out


def rest(x, a, kept):
    dropped = [j for j in range(len(a)) if j not in kept]
    return ([sum(a[j] * x[j] for j in dropped)], [-1]) if dropped else ([], [])


def outlying(a):
    q1, q3 = np.percentile(a, [25, 75])
    return [i for i in range(len(a)) if a[i] > q3 + 1.5 * (q3 - q1)]


@quick
@given(seed=seeds, sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3), neighbours=st.integers(1, 34))
def test_prumerge(seed, sizes, neighbours):
    seen = encoded(seed, sizes)
    found = PruMerge(neighbours)(seen)
    for row in range(len(sizes)):
        x, a, keys = row_of(seen, row)
        kept = outlying(a)
        tail, place = rest(x, a, kept)
        check(found, row, merged(x, a, keys, kept, neighbours) + tail, kept + place)


@quick
@given(
    seed=seeds, sizes=st.lists(st.integers(1, 60), min_size=1, max_size=3), spread=st.sampled_from([0.0, 0.3, 1.0, 3.0])
)
def test_prumerge_plus(seed, sizes, spread):
    seen = encoded(seed, sizes, spread)
    found = PruMergePlus()(seen)
    for row in range(len(sizes)):
        x, a, keys = row_of(seen, row)
        kept = outlying(a)
        step = max(1, int(int(len(a) / len(kept)) / 3)) if kept else len(a)
        kept = sorted({*kept, *range(0, len(a) - 1, step)})
        tail, place = rest(x, a, kept)
        check(found, row, merged(x, a, keys, kept, 32) + tail, kept + place)


def test_no_outliers():
    """The release divides by zero in PruMerge+; PruMerge itself leaves one summed token."""
    features = torch.arange(8.0).view(1, 8, 1)
    seen = Encoded(features, torch.full((1, 8), 0.125), torch.ones(1, 8, 3))
    plain, plus = PruMerge()(seen), PruMergePlus()(seen)
    assert plain.source.tolist() == [[-1]]
    assert plain.features.tolist() == [[[3.5]]]
    assert plus.source.tolist() == [[0, -1]]


def test_more_than_a_third_are_outliers():
    """Impossible by quartiles (at most a quarter lies above Q3), but a step of 0 must not come of it either."""
    a = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    assert PruMergePlus()(Encoded(torch.ones(1, 6, 1), a, torch.ones(1, 6, 1))).source.tolist() == [[0, 2, 4, 5, -1]]
    a = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
    found = PruMergePlus()(Encoded(torch.ones(1, 4, 1), a, torch.ones(1, 4, 1)))
    assert found.source.tolist() == [[0, 1, 2, 3]]  # everything: nothing is dropped, no summed token


def test_images_do_not_share_quartiles():
    """The release takes them over the batch, so that a neighbour decides what an image keeps."""
    quiet, loud = encoded(3, [30], 1.0), encoded(4, [30], 1.0)
    both = Encoded(
        *(
            torch.cat((getattr(quiet, n), getattr(loud, n) * s))
            for n, s in (("features", 1), ("attention", 50), ("keys", 1))
        )
    )
    assert outliers(both.attention, both.real)[0].equal(outliers(quiet.attention, quiet.real)[0])
    assert outliers(quiet.attention, quiet.real).any()


def zipped(x, a, keys, dominant, contextual):
    best = sorted(sorted(range(len(a)), key=lambda i: (-a[i], i))[:dominant])
    others = [i for i in range(len(a)) if i not in best]
    out = [x[i] for i in best]
    targets = others[:: max(1, len(others) // contextual)][:contextual] if contextual else []
    alike = cosine(keys)
    gone = {t: [] for t in targets}
    for i in others if targets else ():
        if i not in targets:
            gone[max(targets, key=lambda t: (alike[i, t], -t))].append(i)
    out += [x[t] + (np.mean([x[i] for i in gone[t]], axis=0) if gone[t] else 0) for t in targets]
    return out, best + targets


@quick
@given(
    seed=seeds,
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    dominant=st.integers(1, 12),
    contextual=st.integers(0, 7),
    has_cls=st.booleans(),
)
def test_visionzip(seed, sizes, dominant, contextual, has_cls):
    seen = encoded(seed, sizes, has_cls=has_cls)
    found = VisionZip(dominant, contextual)(seen)
    for row in range(len(sizes)):
        x, a, keys = row_of(seen, row)
        features, source = zipped(x, a, keys, dominant - has_cls, contextual)
        if has_cls:
            features, source = [seen.cls[row].double().numpy(), *features], [-1, *source]
        check(found, row, features, source)


def test_visionzip_is_a_sum_of_two():
    features = torch.tensor([[[9.0], [1.0], [3.0], [5.0]]])
    seen = Encoded(features, torch.tensor([[1.0, 0, 0, 0]]), torch.ones(1, 4, 2))
    found = VisionZip(1, 1)(seen)
    assert found.features.flatten().tolist() == [9.0, 1.0 + 4.0]
    assert found.source.tolist() == [[0, 1]]


@pytest.mark.parametrize("method", [PruMerge(), PruMergePlus(), VisionZip(5, 3)])
def test_rows_alone_and_dtype(method):
    """A batch of three sizes gives each image what it gets alone; bf16 in, bf16 out; ties by place."""
    seen = encoded(11, [25, 9, 17], dtype=torch.bfloat16)
    found = method(seen)
    assert found.features.dtype == torch.bfloat16
    assert isinstance(method, Reducer)
    for row, size in enumerate((25, 9, 17)):
        own = Encoded(*(getattr(seen, n)[row : row + 1, :size] for n in ("features", "attention", "keys")))
        alone = method(own)
        number = int(found.valid[row].sum())
        assert alone.valid.all()
        assert alone.source[0].equal(found.source[row, :number])
        assert alone.features[0].equal(found.features[row, :number])


def test_ties_go_to_the_lower_place():
    seen = Encoded(torch.arange(9.0).view(1, 9, 1), torch.ones(1, 9), torch.ones(1, 9, 2))
    found = VisionZip(3, 2)(seen)
    assert found.source.tolist() == [[0, 1, 2, 3, 6]]
    assert found.features.flatten().tolist() == [0, 1, 2, 3 + (4 + 5 + 7 + 8) / 4, 6]


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("heads", ["joined", "apart"])
def test_tower(heads, has_cls):
    g = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 2, 7, 3, 4, generator=g).unbind()
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 5:] = False
    q[1, 5:], k[1, 5:] = torch.nan, torch.nan
    found = tower_attention(q, k, heads=heads, has_cls=has_cls, valid=valid)
    found_keys = tower_keys(k, heads=heads, has_cls=has_cls)
    for b, number in enumerate((7, 5)):
        x, y = (t[b, :number].double().numpy() for t in (q, k))
        if heads == "joined":
            x, y = x.reshape(number, 1, 12), y.reshape(number, 1, 12)
        total = np.zeros((number, number))
        for h in range(x.shape[1]):
            e = np.exp(x[:, h] @ y[:, h].T / math.sqrt(x.shape[2]))
            total += e / e.sum(-1, keepdims=True)
        wanted, first = (total[0, 1:], 1) if has_cls else (total.mean(0), 0)
        np.testing.assert_allclose(found[b, : number - first], wanted, rtol=1e-5)
        assert not found[b, number - first :].any()
        wanted_keys = y[first:, 0] if heads == "joined" else y[first:].mean(1)
        np.testing.assert_allclose(found_keys[b, : number - first], wanted_keys, rtol=1e-5, atol=1e-6)
    assert found_keys.shape[1] == found.shape[1] == 7 - has_cls


def test_evidence():
    assert PruMerge.evidence == PruMergePlus.evidence == TowerEvidence(-1, "joined")
    assert VisionZip.evidence == TowerEvidence(-2, "apart")


def test_refused():
    x, a = torch.ones(2, 4, 3), torch.ones(2, 4)
    for arguments in ((x, a[:, :3], x), (x[:, 0], a, x), (x, a, x, a), (x, a, x, None, x)):
        with pytest.raises(ValueError, match=r"expected features|cls must be"):
            Encoded(*arguments)
    with pytest.raises(ValueError, match="NaN or infinite"):
        Encoded(x, a * torch.nan, x)
    for make, bad in ((PruMerge, "neighbours"), (PruMergePlus, "neighbours"), (VisionZip, "dominant")):
        with pytest.raises(ValueError, match=f"{make.__name__} {bad} must be at least 1"):
            make(**{bad: 0})
        with pytest.raises(TypeError, match=f"{make.__name__} {bad} must be an int"):
            make(**{bad: 1.0})
    with pytest.raises(ValueError, match="VisionZip contextual"):
        VisionZip(contextual=-1)


def test_no_images():
    none = Encoded(torch.ones(0, 5, 3), torch.ones(0, 5), torch.ones(0, 5, 2))
    for method in (PruMerge(), PruMergePlus(), VisionZip()):
        assert method(none).features.shape[0] == 0


@quick
@given(
    seed=seeds,
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    keep=st.sampled_from([0.01, 0.25, 0.5, 1.0]),
)
def test_controls(seed, sizes, keep):
    seen = encoded(seed, sizes)
    uniform, random = KeepUniform(keep)(seen), KeepRandom(keep, seed)(seen)
    for row, size in enumerate(sizes):
        x, number = row_of(seen, row)[0], min(max(1, round(size * keep)), size)
        wanted = [int((k + Fraction(1, 2)) * size / number) for k in range(number)]
        check(uniform, row, [x[i] for i in wanted], wanted)
        chosen = random.source[row, random.valid[row]].tolist()
        assert len(chosen) == number
        assert chosen == sorted(chosen)
        check(random, row, [x[i] for i in chosen], chosen)
        alone = KeepRandom(keep, seed)(encoded(seed + 1, [size]))
        assert alone.source[0].tolist() == chosen


def test_controls_ask_for_nothing():
    assert KeepUniform.evidence is KeepRandom.evidence is None
    assert isinstance(KeepUniform(), Reducer)
    assert KeepRandom(0.5, 1)(encoded(0, [40])).source.tolist() != KeepRandom(0.5, 2)(encoded(0, [40])).source.tolist()
    for wrong in ({"keep": 0.0}, {"keep": 1.5}, {"seed": -1}):
        with pytest.raises(ValueError, match="KeepRandom"):
            KeepRandom(**wrong)
    with pytest.raises(TypeError, match="KeepUniform keep"):
        KeepUniform("all")
