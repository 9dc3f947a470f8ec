"""Plans as objects and files, and the one preset."""

import json

import pytest
from mmkv_layershare import LazyPlan

PLAN = LazyPlan(6, ((0, 2), (4, 5)), "global", model="m", inferred=True)


def test_anchors_and_readers():
    assert PLAN.lazy == (1, 2, 5)
    assert [PLAN.anchor(layer) for layer in range(6)] == [0, 0, 0, 3, 4, 4]
    assert [PLAN.last_reader(layer) for layer in range(6)] == [2, 1, 2, 3, 5, 5]
    assert LazyPlan(4).lazy == ()


def test_files_round_trip(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    loaded = LazyPlan.load(tmp_path / "plan.json")
    assert (loaded, loaded.model, loaded.inferred) == (PLAN, "m", True)


def test_the_preset_has_the_paper_s_number_of_lazy_layers():
    plan = LazyPlan.preset("llava-1.5-7b")
    assert len(plan.lazy) == 23
    assert plan.inferred
    assert all(plan.anchor(layer) == layer for layer in (0, 1, 31))
    with pytest.raises(ValueError, match=r"no plan 'llava'; known are llava-1\.5-7b"):
        LazyPlan.preset("llava")


@pytest.mark.parametrize(
    ("num_layers", "blocks", "message"),
    [
        (0, (), "above 0"),
        (True, (), "above 0"),
        (4, ((2, 2),), "at least two layers"),
        (4, ((2, 4),), "below 4"),
        (4, ((-1, 1),), "at least two layers"),
        (4, ((0, 1, 2),), "first and last"),
        (4, ((0, 1.0),), "first and last"),
        (4, 5, r"blocks is a list of \[first, last\], got 5"),
        (4, None, "blocks is a list"),
        (4, (2, 3), r"blocks is a list of \[first, last\], got \(2, 3\)"),
        (4, "23", "blocks is a list"),
        (4, ((0, 1), (1, 3)), "must not overlap"),
        (4, ((2, 3), (0, 1)), "ascending"),
    ],
)
def test_impossible_plans_are_refused(num_layers, blocks, message):
    with pytest.raises(ValueError, match=message):
        LazyPlan(num_layers, blocks)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "found 'list'"),
        ({"format": "mmkv-head-scores/1"}, "found 'mmkv-head-scores/1'"),
        ({"format": "mmkv-lazy-plan/1", "num_layers": 4, "mode": "visual"}, "lacks blocks"),
        ({"format": "mmkv-lazy-plan/1", "num_layers": 4, "mode": "visual", "blocks": [[3, 4]]}, "below 4"),
        (
            {"format": "mmkv-lazy-plan/1", "num_layers": 4, "mode": "visual", "blocks": 5},
            "plan.json.* got 5",
        ),
        ({"format": "mmkv-lazy-plan/1", "num_layers": 4, "mode": "visual", "blocks": None}, "blocks is .* got None"),
        ({"format": "mmkv-lazy-plan/1", "num_layers": 4, "mode": "visual", "blocks": [2, 3]}, "blocks is a list"),
        ({"format": "mmkv-lazy-plan/1", "num_layers": 4, "mode": "x", "blocks": []}, "mode is"),
    ],
)
def test_files_that_are_no_plan_are_named(tmp_path, content, message):
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message):
        LazyPlan.load(path)
    with pytest.raises(FileNotFoundError, match="profile-layers"):
        LazyPlan.load(tmp_path / "none.json")


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(ValueError, match=r"made for 6 layers \(m\), the model has 4"):
        PLAN.check([None] * 4)
