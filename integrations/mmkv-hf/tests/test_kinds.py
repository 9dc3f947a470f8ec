"""What is refused before a plan of lazy layers runs on a model."""

import pytest
from mmkv_hf.kinds import check_plan
from mmkv_layershare import LazyPlan
from mmkv_testkit.families import build


@pytest.mark.parametrize("given", [None, "plan.json", LazyPlan, [(1, 2)]])
def test_what_is_no_plan_is_named(given):
    with pytest.raises(TypeError, match=r"need a LazyPlan, not .*; LazyPlan\.load\(path\) reads one") as error:
        check_plan(given, build("llava").model)
    assert repr(given) in str(error.value)


def test_a_plan_that_does_not_fit_is_refused():
    tiny = build("llava")
    check_plan(LazyPlan(4, ((1, 2),)), tiny.model)
    check_plan(LazyPlan(4, ((1, 2),)), tiny.model.config)
    with pytest.raises(ValueError, match="made for 5 layers"):
        check_plan(LazyPlan(5), tiny.model)
