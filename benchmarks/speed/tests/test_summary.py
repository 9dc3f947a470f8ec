import random
import statistics

import pytest
from mmkv_speed.summary import Ratio, Summary, growth_exponent


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_summary_is_the_median_and_the_range(count):
    values = [random.Random(count).random() for _ in range(count)]
    ordered = sorted(values)
    median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    assert Summary.of(values) == pytest.approx((median, ordered[0], ordered[-1]))


def test_its_text():
    assert Summary(0.0123, 0.01, 0.02).text(1000, 1) == "12.3 (10.0..20.0)"


def test_a_ratio_is_that_of_the_medians_with_the_rounds_own_as_range():
    mine, other = [2.0, 4.0, 9.0], [4.0, 2.0, 3.0]
    ratio = Ratio.of(mine, other)
    assert ratio.value == 4 / 3  # not the median of .5, 2 and 3
    assert (ratio.low, ratio.high) == (0.5, 3.0)
    assert ratio.text() == "1.33 (0.50..3.00)"


def test_rounds_that_do_not_pair_are_refused():
    with pytest.raises(ValueError, match="shorter"):
        Ratio.of([1.0, 2.0], [1.0])


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_found(power):
    sizes = [1024 * 2**k for k in range(7)]
    assert growth_exponent(sizes, [3e-6 * n**power for n in sizes]) == pytest.approx(power)


def test_the_exponent_is_the_best_line_through_logarithms():
    sizes, seconds = [1, 2, 4, 8, 16], [1.0, 2.5, 3.0, 9.0, 14.0]

    def misfit(slope):
        import math

        rest = [math.log(s) - slope * math.log(n) for n, s in zip(sizes, seconds, strict=True)]
        return statistics.pvariance(rest)

    found = growth_exponent(sizes, seconds)
    assert misfit(found) == pytest.approx(min(misfit(k / 1000) for k in range(2000)), rel=1e-4)
