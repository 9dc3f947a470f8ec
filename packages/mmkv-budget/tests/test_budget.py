"""Budget: what a user's number means, checked against decimal arithmetic."""

import math
from dataclasses import FrozenInstanceError
from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmkv_budget import Budget


def kept(budget: Budget, *lengths: int, size: int = 1) -> list[int]:
    return budget.per_head(torch.tensor(lengths, dtype=torch.int64), size).tolist()


def test_of_reads_ints_as_tokens_and_floats_as_shares():
    assert Budget.of(64) == Budget(tokens=64)
    assert Budget.of(0.1) == Budget(ratio=0.1)
    assert Budget.of(1) == Budget(tokens=1) != Budget.of(1.0) == Budget(ratio=1.0)
    same = Budget(bytes=10)
    assert Budget.of(same) is same
    assert len({Budget.of(64), Budget(tokens=64), Budget.of(0.5)}) == 2


def test_is_frozen():
    with pytest.raises(FrozenInstanceError):
        Budget.of(64).tokens = 3


@pytest.mark.parametrize("value", [True, False, "64", None, [64]])
def test_of_refuses_other_types(value):
    with pytest.raises(TypeError, match="int"):
        Budget.of(value)


@pytest.mark.parametrize("value", [0, -1, 0.0, -0.1, math.nan, math.inf, -math.inf, 1.0001])
def test_of_refuses_values_out_of_range(value):
    with pytest.raises(ValueError, match=r"at least 1|\(0, 1\]"):
        Budget.of(value)


def test_a_float_that_means_tokens_is_explained():
    with pytest.raises(ValueError, match="use the int 64 for tokens"):
        Budget.of(64.0)


@pytest.mark.parametrize("given", [{}, {"tokens": 3, "ratio": 0.5}, {"tokens": 1, "bytes": 1}])
def test_takes_exactly_one(given):
    with pytest.raises(ValueError, match="exactly one"):
        Budget(**given)


@pytest.mark.parametrize("given", [{"tokens": 64.0}, {"tokens": True}, {"bytes": 1.5}, {"ratio": True}, {"ratio": "1"}])
def test_named_budgets_are_typed(given):
    with pytest.raises(TypeError, match=next(iter(given))):
        Budget(**given)


@pytest.mark.parametrize("given", [{"bytes": 0}, {"bytes": -4}, {"ratio": 2}, {"tokens": 0}])
def test_named_budgets_are_positive(given):
    with pytest.raises(ValueError, match=r"Budget|share"):
        Budget(**given)


def test_tokens_ignore_the_prompt():
    assert kept(Budget.of(64), 10, 64, 5000, 0) == [64] * 4


@given(st.integers(1, 10**5), st.integers(0, 10**7))
def test_ratio_is_the_decimal_floor(hundred_thousandths, length):
    ratio = hundred_thousandths / 10**5
    exact = int(Decimal(hundred_thousandths) * length / 10**5)
    assert kept(Budget.of(ratio), length) == [max(exact, 1)]


def test_ratio_is_free_of_float_noise():
    assert kept(Budget.of(0.1), 30, 10, 9, 1, 0) == [3, 1, 1, 1, 1]
    assert kept(Budget.of(0.29), 100) == [29]
    assert kept(Budget.of(1 / 3), 30) == [10]
    assert kept(Budget.of(1e-12), 10**6) == [1]
    assert kept(Budget.of(1.0), 7) == [7]


@given(st.integers(1, 10**12), st.integers(1, 10**6))
def test_bytes_are_per_request(size, per_token):
    if size >= per_token:
        assert kept(Budget(bytes=size), 5, 99, size=per_token) == [size // per_token] * 2
    else:
        with pytest.raises(ValueError, match=f"least that works is {per_token:,} bytes"):
            kept(Budget(bytes=size), 5, size=per_token)


def test_bytes_of_a_real_cache():
    layers, heads, dim, itemsize = 28, 4, 128, 2
    per_token = layers * heads * (2 * dim * itemsize + 4)
    (pairs,) = kept(Budget(bytes=64 * 2**20), 4096, size=per_token)
    assert pairs * per_token <= 64 * 2**20 < (pairs + 1) * per_token


def test_per_head_checks_its_inputs():
    with pytest.raises(ValueError, match="lengths"):
        Budget.of(3).per_head(torch.ones(2), 1)
    with pytest.raises(ValueError, match="lengths"):
        Budget.of(3).per_head(torch.ones(2, 1, dtype=torch.int64), 1)
    with pytest.raises(ValueError, match="bytes_per_token"):
        kept(Budget(bytes=10), 3, size=0)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=5), st.floats(0.001, 1), st.floats(0.001, 1))
def test_ratio_is_monotone(lengths, first, second):
    low, high = sorted((first, second))
    assert all(a <= b for a, b in zip(kept(Budget.of(low), *lengths), kept(Budget.of(high), *lengths), strict=True))


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget.of(64), "64 tokens"),
        (Budget.of(1), "1 token"),
        (Budget.of(0.1), "10% of the prompt"),
        (Budget.of(0.125), "12.5% of the prompt"),
        (Budget(bytes=2**20), "1,048,576 bytes"),
    ],
)
def test_str(budget, text):
    assert str(budget) == text
