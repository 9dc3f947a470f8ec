"""Reductions and neighbourhoods against plain loops; what lies outside the mask must not matter."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_kernels.masked import masked_mean, masked_min_max, neighbourhood_mean, pool


@st.composite
def cases(draw, low=0.0):
    n = draw(st.integers(0, 12))
    values = draw(st.lists(st.floats(low, 4, width=16), min_size=n, max_size=n))
    mask = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return values, mask


def tensors(values, mask):
    return torch.tensor(values, dtype=torch.float32).view(1, 1, -1), torch.tensor(mask, dtype=torch.bool).view(1, 1, -1)


@settings(deadline=None)
@given(cases(-4.0))
def test_mean_and_min_max(case):
    values, mask = case
    x, where = tensors(values, mask)
    inside = [v for v, m in zip(values, mask, strict=True) if m]
    mean = sum(inside) / len(inside) if inside else 0.0
    assert math.isclose(float(masked_mean(x, where).squeeze()), mean, abs_tol=1e-5)
    scaled = masked_min_max(x, where).flatten().tolist()
    for v, m, s in zip(values, mask, scaled, strict=True):
        expected = (v - min(inside)) / (max(inside) - min(inside) + 1e-8) if m else 0.0
        assert math.isclose(s, expected, abs_tol=1e-5)


@settings(deadline=None)
@given(cases(), st.sampled_from([1, 3, 5, 7, 31]), st.sampled_from(["avg", "max"]))
def test_pool(case, kernel, pooling):
    values, mask = case
    reach = kernel // 2
    found = pool(*tensors(values, mask), kernel, pooling).flatten().tolist()
    for i, m in enumerate(mask):
        around = [values[j] if 0 <= j < len(mask) and mask[j] else 0.0 for j in range(i - reach, i + reach + 1)]
        expected = (sum(around) / kernel if pooling == "avg" else max(around)) if m else 0.0
        assert math.isclose(found[i], expected, abs_tol=1e-5)


@settings(deadline=None)
@given(cases(), st.integers(0, 9))
def test_neighbourhood_mean(case, radius):
    values, mask = case
    found = neighbourhood_mean(*tensors(values, mask), radius).flatten().tolist()
    for i, m in enumerate(mask):
        around = [values[j] for j in range(len(mask)) if mask[j] and abs(i - j) <= radius]
        assert math.isclose(found[i], sum(around) / len(around) if m else 0.0, abs_tol=1e-5)
