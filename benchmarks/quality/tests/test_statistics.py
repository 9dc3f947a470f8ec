"""Against the definitions, spelled out."""

import math
from itertools import combinations

import numpy as np
import pytest
from mmkv_quality.statistics import Estimate, bootstrap, clear_pairs, estimate, paired, ranks, spearman, split_half

RNG = np.random.default_rng(0)


def by_hand(values):
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def rank_by_hand(values):
    return [sum(y < x for y in values) + (sum(y == x for y in values) - 1) / 2 for x in values]


def spearman_by_hand(one, other):
    a, b = rank_by_hand(one), rank_by_hand(other)
    ma, mb = sum(a) / len(a), sum(b) / len(b)
    top = sum((x - ma) * (y - mb) for x, y in zip(a, b, strict=True))
    return top / math.sqrt(sum((x - ma) ** 2 for x in a) * sum((y - mb) ** 2 for y in b))


def test_mean_and_error():
    values = RNG.integers(0, 2, 40).astype(float)
    assert estimate(values) == pytest.approx(by_hand(list(values)))
    assert math.isnan(estimate(np.ones(1)).error)


def test_paired_errors_are_of_the_differences():
    base = RNG.random(50)
    better = base + 0.1
    assert paired(better, base).mean == pytest.approx(0.1)
    assert paired(better, base).error == pytest.approx(0, abs=1e-9)
    other = RNG.random(50)
    assert paired(other, base) == pytest.approx(by_hand(list(other - base)))


def test_signs():
    assert Estimate(0.1, 0.04).sign == "+"
    assert Estimate(-0.1, 0.04).sign == "-"
    assert Estimate(0.1, 0.06).sign == "="
    assert Estimate(0.0, 0.0).sign == "="


def test_ranks_and_their_correlation():
    for _ in range(20):
        one, other = RNG.integers(0, 5, 12).astype(float), RNG.integers(0, 5, 12).astype(float)
        assert ranks(one).tolist() == rank_by_hand(list(one))
        assert spearman(one, other) == pytest.approx(spearman_by_hand(list(one), list(other)))
    assert spearman(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1)
    assert math.isnan(spearman(np.ones(4), np.arange(4.0)))


def test_split_half_is_one_for_methods_far_apart_and_nothing_for_the_same_one():
    samples = RNG.random((1, 400))
    apart = samples + np.arange(6)[:, None]
    assert split_half(apart) == pytest.approx(1)
    assert abs(split_half((RNG.random((12, 400)) < 0.5).astype(float))) < 0.4
    close = (RNG.random((6, 400)) < np.linspace(0.45, 0.55, 6)[:, None]).astype(float)
    assert split_half(close) < 0.95


def test_clear_pairs():
    values = (RNG.random((5, 300)) < np.array([0.1, 0.12, 0.5, 0.5, 0.9])[:, None]).astype(float)
    count = 0
    for a, b in combinations(values, 2):
        mean, error = by_hand(list(a - b))
        count += abs(mean) > 2 * error
    assert clear_pairs(values) == (count, 10)
    assert 5 <= count < 10


def test_bootstrap_of_a_mean_is_its_error():
    values = RNG.random(500)
    found = bootstrap(lambda lists: float(lists[0].mean()), [values])
    assert found.mean == values.mean()
    assert found.error == pytest.approx(estimate(values).error, rel=0.15)


def test_bootstrap_draws_the_same_samples_from_each_list():
    values = RNG.random(200)
    found = bootstrap(lambda lists: float(lists[0].mean() - lists[1].mean()), [values, values + 1])
    assert found.mean == pytest.approx(-1)
    assert found.error == pytest.approx(0, abs=1e-9)
