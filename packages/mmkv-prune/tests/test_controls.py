"""RandomDrop and UniformDrop."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_prune import PrunePlan, RandomDrop, UniformDrop
from mmkv_prune.random_drop import hashed_uniform

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 10**6)
shares = st.sampled_from([0.01, 0.1, 0.3, 0.5, 0.7, 1.0])


def columns(mask):
    return mask.nonzero().flatten().tolist()


@quick
@given(seed=seeds, first=shares, second=shares)
def test_uniform(seed, first, second, random_prompt, images):
    """floor((k + 1/2) n / m) of the survivors of each image, in fractions."""
    p = random_prompt(seed)
    first, second = max(first, second), min(first, second)
    survivors = PrunePlan(UniformDrop((1, 2), (first, second)), 3).survivors(p) & p.vision
    for row in range(len(p.valid)):
        wanted = [[], []]
        for left in images(p, row):
            total = len(left)
            for stage, share in enumerate((first, second)):
                m = min(max(1, round(total * share)), len(left))
                left = [left[int((k + Fraction(1, 2)) * len(left) / m)] for k in range(m)]
                wanted[stage] += left
        assert [columns(survivors[layer, row]) for layer in (1, 2)] == wanted


@quick
@given(seed=seeds, first=shares, second=shares, number=st.integers(0, 5))
def test_random(seed, first, second, number, random_prompt):
    """The best of a hash, ties to the lower column, among survivors; text stays."""
    p = random_prompt(seed)
    shares = (max(first, second), min(first, second))
    method = RandomDrop((1, 3), shares, seed=number)
    plan = PrunePlan(method, 4)
    survivors = plan.survivors(p)
    for row in range(len(p.valid)):
        left = columns(p.vision[row])
        ordinal = {c: i + 1 for i, c in enumerate(left)}
        for layer, share in zip((1, 3), shares, strict=True):
            m = min(len(left), max(1, round(len(ordinal) * share)))
            score = {c: hashed_uniform(number, layer, torch.tensor(ordinal[c])).item() for c in left}
            left = sorted(sorted(left, key=lambda c: (-score[c], c))[:m])
            assert columns(survivors[layer, row] & p.vision[row]) == left
        assert (survivors[3, row] & ~p.vision[row]).equal(p.valid[row] & ~p.vision[row])
    assert plan.counts(p)[-1].tolist() == (survivors[-1] & p.vision).sum(-1).tolist()


def test_random_is_the_same_alone_and_in_any_batch(prompt):
    plan = PrunePlan(RandomDrop(), 3)
    row = [-3, 20, -2, 10, -4]
    alone, both = plan.survivors(prompt(row)), plan.survivors(prompt(row, [-2, 50, -5], pads=[(0, 0), (0, 3)]))
    assert both[2, 0, -alone.shape[2] :].equal(alone[2, 0])


def test_random_depends_on_seed_and_layer(prompt):
    p = prompt([-1, 200, -1])
    kept = {
        tuple(columns(PrunePlan(RandomDrop((layer,), seed=seed), 9).survivors(p)[8, 0]))
        for layer in (2, 3)
        for seed in (0, 1, 2)
    }
    assert len(kept) == 6


def test_hash_is_uniform_and_pinned():
    """Another value here means every result obtained with RandomDrop changes."""
    numbers = torch.arange(1, 100_001)
    values = hashed_uniform(0, 2, numbers).double()
    assert 0 <= values.min() < 1e-3
    assert 1 - 1e-3 < values.max() < 1
    bins = torch.histc(values, bins=20, min=0, max=1)
    assert ((bins - 5000).abs() < 5 * 5000**0.5).all()
    assert torch.corrcoef(torch.stack((values[1:], values[:-1])))[0, 1].abs() < 0.02
    assert torch.corrcoef(torch.stack((values, hashed_uniform(1, 2, numbers).double())))[0, 1].abs() < 0.02
    assert (hashed_uniform(7, 3, torch.arange(1, 4)) * 2**24).long().tolist() == [5783598, 13426584, 10830194]


@pytest.mark.parametrize("make", [RandomDrop, UniformDrop])
def test_bad_settings(make):
    name = make.__name__
    for settings_, message in (
        ({"layers": (1, 2)}, f"{name} keep must have one entry for each of the 2 layers"),
        ({"keep": (0.0,)}, rf"{name} keep\[0\] must be in"),
        ({"layers": (0,)}, f"{name} layers"),
        ({"layers": (1, 2), "keep": (0.3, 0.4)}, f"{name} keep must not grow"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**settings_)
    with pytest.raises(TypeError, match="RandomDrop seed must be an int"):
        RandomDrop(seed=1.5)
    assert hash(make(layers=[2], keep=[0.5])) == hash(make())
