"""Bytes by formula against what the tensors hold, and tolerances that find errors."""

import mmkv_kernels
import pytest
import torch
from mmkv_speed import limits
from mmkv_speed.gpu_checks import allowed, error
from mmkv_speed.operators import BY_NAME, CASES, Shape, outputs, without_case
from mmkv_speed.operators import limits as limit_seconds

SHAPES = (
    Shape(2, 6, 3, 16, 40, window=8),
    Shape(1, 4, 4, 8, 300, torch.bfloat16, share=0.1),
    Shape(3, 2, 1, 8, 17, torch.float16, skew=16),
)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for one in value for t in tensors(one)] if isinstance(value, tuple) else []


def nbytes(found):
    return sum(t.numel() * t.element_size() for t in found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_are_those_of_inputs_and_outputs(case, shape):
    inputs = case.make(shape)
    written = outputs(case.call(inputs))
    read = sum(case.passes.get(name, 1) * nbytes(tensors(value)) for name, value in inputs.items())
    if case.name == "gather_kv":  # of keys and values it reads what it copies
        read += nbytes(written) - nbytes([inputs["keys"], inputs["values"]])
    assert case.bytes(shape) == read + nbytes(written)


def test_flops_by_counting_products():
    shape = Shape(2, 6, 3, 16, 40, window=8)
    assert BY_NAME["dense_attention"].flops(shape) == sum(2 * 40 * 16 * 2 for _ in range(2 * 6))
    assert BY_NAME["window_attention"].flops(shape) == 2 * sum(2 * 8 * 40 * 16 for _ in range(2 * 6))
    assert BY_NAME["key_statistics"].flops(shape) == 0


@pytest.mark.parametrize("skew", [1, 4, 16])
def test_skewed_heads_hold_as_much_as_equal_ones(skew):
    lengths = Shape(2, 8, 4, 16, 1700, skew=skew).lengths()
    assert sum(lengths) == 8 * 1700
    assert lengths[0] / lengths[1] == pytest.approx(skew, rel=0.01)


def test_every_public_operator_has_a_case_but_the_one_that_works_in_place():
    assert without_case() == ["compact_paged"]
    assert {case.name for case in CASES} < set(mmkv_kernels.__all__)


def test_limits_are_bytes_and_products_over_what_the_machine_does():
    shape = Shape(2, 6, 3, 16, 40)
    case = BY_NAME["dense_attention"]
    assert limit_seconds(case, shape, 1e9, 1e12) == (case.bytes(shape) / 1e9, case.flops(shape) / 1e12)


def test_shares_of_the_limit():
    seconds = {"dense_attention": 1.0}
    shape = Shape(1, 8, 4, 64, 1024)
    case = BY_NAME["dense_attention"]
    round_ = {"bandwidth": case.bytes(shape) * 2, "rate": case.flops(shape) * 1.25, "seconds": seconds}
    (row,) = limits.rows([round_], shape)
    assert row[3:] == ["50 (50..50)", "80 (80..80), products"]


def test_an_error_is_counted_in_tolerances():
    expected = torch.tensor([1.0, -2.0, float("-inf"), 0.0])
    assert error(expected, expected, torch.float32, exact=False) == 0
    step = allowed(expected[:2], torch.bfloat16)[0]
    assert error(torch.tensor([1.0 + 2 * step, -2.0]), expected[:2], torch.bfloat16, exact=False) == pytest.approx(2)
    assert error(torch.tensor([1.0 + 2 * step, -2.0]), expected[:2], torch.float32, exact=False) > 1e3


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_is_an_error_without_bound(wrong):
    assert error(torch.tensor([1.0, wrong]), torch.tensor([1.0, 2.0]), torch.float32, exact=False) == float("inf")


def test_exact_operators_have_to_agree_to_the_bit():
    a, b = torch.tensor([1.0]), torch.tensor([1.0 + 1e-7])
    assert error(a, b, torch.float32, exact=True) == float("inf")
    assert error(a, a.clone(), torch.float32, exact=True) == 0
