"""`mixkv_mix` against float64, head by head."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_kernels import mixkv_mix

IMPLS = ["reference", "triton"]
EPS = 1e-8


def oracle(attention, norms, cosines, length, r):
    """One head, all entries candidates."""
    parts = []
    for x in (norms, -cosines * length):
        scaled = (x - x.min()) / (x.max() - x.min() + EPS)
        parts.append(scaled * attention.mean() / (scaled.mean() + EPS))
    return r * parts[1] + (1 - r) * (attention + parts[0])


def inputs(kit, batch, heads, entries, seed=0):
    attention, norms, cosines = (kit.randn(batch, heads, entries, seed=seed + i) for i in range(3))
    mean_norm, redundancy = (kit.randn(batch, heads, seed=seed + i).abs().clamp(0.1, 1) for i in (3, 4))
    return attention.abs(), norms.abs() + 3, cosines.tanh(), mean_norm, redundancy


class Result(NamedTuple):
    """The kit takes operators that return tuples."""

    mixed: torch.Tensor


def run(kit, *arguments):
    return kit.run(lambda *tensors, impl: Result(mixkv_mix(*tensors, impl=impl)), *arguments).mixed


def check(kit, tensors, candidates):
    result = run(kit, *tensors, candidates)
    for b in range(result.shape[0]):
        for h in range(result.shape[1]):
            chosen = candidates[b, h if candidates.shape[1] > 1 else 0]
            assert not result[b, h, ~chosen].any()
            if chosen.any():
                wanted = oracle(*(x[b, h, chosen].double() for x in tensors[:3]), *(x[b, h] for x in tensors[3:]))
                torch.testing.assert_close(result[b, h, chosen].double(), wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("entries", [1, 63, 1000, 5000])
def test_odd_lengths(kit, entries):
    check(kit, inputs(kit, 1, 2, entries), torch.ones(1, 1, entries, dtype=torch.bool))


@pytest.mark.parametrize("heads", [1, 3])
def test_candidates(kit, heads):
    candidates = kit.randn(2, heads, 80, seed=9) > 0
    candidates[1, -1], candidates[0, 0, 3:] = False, False
    check(kit, inputs(kit, 2, 3, 80), candidates)
    check(kit, inputs(kit, 2, 3, 40), candidates[..., ::2])
    attention, norms, cosines, *heads_of = inputs(kit, 2, 3, 80)
    check(kit, (attention, norms, cosines.abs() + 1, *heads_of), candidates)


def test_equal_values_strides_and_none(kit):
    attention, norms, cosines, mean_norm, redundancy = inputs(kit, 2, 2, 30)
    mask = torch.ones(2, 1, 30, dtype=torch.bool)
    check(kit, (attention, torch.ones_like(norms), torch.ones_like(cosines), mean_norm, redundancy), mask)
    strided = [x.repeat_interleave(2, -1)[..., ::2] for x in (attention, norms, cosines, mean_norm, redundancy)]
    check(kit, strided, mask)
    for shape in ((0, 2, 5), (2, 0, 5), (2, 2, 0)):
        empty, head = torch.zeros(shape), torch.zeros(shape[:2])
        assert run(kit, empty, empty, empty, head, head, torch.ones(shape).bool()).shape == shape


def test_row_alone_is_bitwise_the_row_in_the_batch(kit):
    tensors, candidates = inputs(kit, 3, 2, 2100), kit.randn(3, 1, 2100, seed=9) > -1
    batch = run(kit, *tensors, candidates)
    for b in range(3):
        row = slice(b, b + 1)
        assert torch.equal(run(kit, *(x[row].clone() for x in tensors), candidates[row]), batch[row])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 99))
def test_any_shape(kit, batch, heads, entries, seed):
    check(kit, inputs(kit, batch, heads, entries, seed), kit.randn(batch, heads, entries, seed=seed) > 0.5)


@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    [
        (0, torch.zeros(1, 2, 5).half(), TypeError, "attention must be float32"),
        (1, torch.zeros(1, 2, 4), ValueError, "value_norms must be"),
        (3, torch.zeros(1, 3), ValueError, "mean_norm must be"),
        (5, torch.ones(1, 1, 5), TypeError, "candidates must be bool"),
        (4, torch.zeros(1, 2, device="meta"), ValueError, "must be on the device of"),
    ],
)
def test_wrong_arguments(place, value, error, message):
    arguments = [*(torch.zeros(1, 2, 5),) * 3, *(torch.zeros(1, 2),) * 2, torch.ones(1, 1, 5).bool()]
    arguments[place] = value
    with pytest.raises(error, match=message):
        mixkv_mix(*arguments)


def test_what_is_no_candidate_may_hold_nan(kit):
    candidates = kit.randn(2, 1, 50, seed=9) > 0
    tensors = inputs(kit, 2, 3, 50)
    clean = run(kit, *tensors, candidates)
    spoilt = [x.masked_fill(~candidates, torch.nan) for x in tensors[:3]]
    assert torch.equal(run(kit, *spoilt, *tensors[3:], candidates), clean)
    assert not clean.masked_select(~candidates).any()
