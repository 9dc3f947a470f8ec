"""The grid has what it promises, and says what it leaves out."""

from dataclasses import asdict, replace
from itertools import product

import pytest
from mmkv_hf import Pipeline
from mmkv_layershare import LazyPlan
from mmkv_quality.cells import Cell, Method, Setting
from mmkv_quality.grid import NAMED, WORLDS, LeftOut, Plan, make_plan, only, plan_json, plan_of_json, without
from mmkv_quality.rule import BUDGETS

SCORES = ["snapkv", "tova", "h2o", "streamingllm", "knorm", "vnorm", "keydiff", "random"]


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    path = tmp_path_factory.mktemp("tables") / "head_scores.json"
    path.write_text('{"format": "mmkv-head-scores/1", "model": "one", "kind": "visual", "scores": [[1, 2]]}')
    return {"one": path}


@pytest.fixture(scope="module")
def plan(tables):
    return make_plan(["one", "two"], tables)


def group(plan, name):
    return next(g for g in plan.groups if g.name == name)


def allowed(text):
    try:
        Pipeline.parse(text)
    except ValueError:
        return False
    return True


def test_every_method_that_can_be_built_is_there_at_every_budget_in_every_world_on_every_model(plan, tables):
    there = {
        (c.setting.model, c.setting.arrangement, c.method.name, c.budget) for c in group(plan, "main").cells if c.method
    }
    count = 0
    for score, share, wraps in product(
        SCORES, ["", "pyramidkv", "adakv", "sparsemm"], ["", "mixkv", "bacon", "mixkv+bacon"]
    ):
        shown = f"sparsemm({str(tables['one'])!r})" if share == "sparsemm" else share
        text = "+".join(part for part in (shown, wraps, score) if part)
        name = "+".join(part for part in (share, wraps, score) if part)
        name = name.removesuffix("+snapkv") if name != "snapkv" else name
        for model, world, budget in product(["one", "two"], WORLDS, BUDGETS):
            expected = (
                allowed(text) and not ("bacon" in wraps and score == "tova") and (share, model) != ("sparsemm", "two")
            )
            assert ((model, world, name, budget) in there) == expected
            count += expected
    assert count == len(there) > 700


def test_what_is_left_out_is_said_once_with_the_reason(plan):
    said = {reason.what: reason.why for reason in plan.left_out}
    assert len(said) == len(plan.left_out)
    assert "not an attention score" in said["mixkv+knorm, with every allocation"]
    assert "has none" in said["bacon+h2o, with every allocation"]
    assert "unchanged" in said["bacon+tova, with every allocation"]
    assert "no table" in said["sparsemm on two"]
    assert "sparsemm on one" not in said
    assert said["budget 32 with a window of 32"] == "it does not exceed the window"
    assert "budget 64 with a window of 32" not in said


@pytest.mark.parametrize("name", ["task", "arrangement", "suffix", "ink", "when"])
def test_one_factor_at_a_time(plan, name):
    cells = group(plan, name).cells
    defaults = asdict(Setting("one"))
    levels = set()
    for cell in cells:
        changed = {key for key, value in asdict(cell.setting).items() if value != defaults[key]}
        assert changed <= {name, "arrangement"}  # both worlds
        assert cell.window == 8
        levels.add(getattr(cell.setting, name))
    assert len(levels) == {"task": 7, "arrangement": 3, "suffix": 3, "ink": 3, "when": 2}[name]
    named = {cell.method for cell in cells} - {None}
    assert named == set(NAMED)


def test_the_window_is_varied_in_the_same_settings(plan):
    cells = group(plan, "window").cells
    assert {cell.setting for cell in cells} == {Setting("one", arrangement=world) for world in WORLDS}
    assert {cell.window for cell in cells if cell.method} == {8, 32}
    assert {cell.budget for cell in cells if cell.window == 32 and cell.method} == {64, 128}


def test_every_setting_has_its_full_cache(plan):
    for g in plan.groups:
        assert {cell.setting for cell in g.cells} == {cell.setting for cell in g.cells if cell.method is None}


def test_keys_are_unique(plan):
    assert len({cell.key for cell in plan.cells}) == len(plan.cells)


def test_quick_has_every_method_at_one_budget(tables):
    full, quick = make_plan(["one"], tables), make_plan(["one"], tables, quick=True)
    assert {c.method for c in group(quick, "main").cells} == {c.method for c in group(full, "main").cells}
    assert {c.method for c in group(quick, "stages").cells} == {c.method for c in group(full, "stages").cells}
    assert len({c.budget for c in quick.cells if c.budget}) == 1


def test_a_setting_without_its_cells(plan):
    gone = Setting("one", arrangement="vertical")
    less = without(plan, {gone: "because"})
    assert {c.setting for c in plan.cells} - {c.setting for c in less.cells} == {gone}
    assert less.left_out[-1] == LeftOut(gone.key, "because")
    assert without(Plan((group(plan, "window"),), ()), dict.fromkeys({c.setting for c in plan.cells}, "x")).groups == ()


def test_only_some(plan):
    some = only(plan, ["locate"], ["adakv+bacon"])
    assert {c.setting.task for c in some.cells} == {"locate"}
    assert {c.method for c in some.cells} == {None, Method(share="adakv", wraps=("bacon",))}
    assert [g.name for g in only(plan, [], ["bacon"], ["stages", "ink"]).groups] == ["ink", "stages"]
    assert only(plan, [], [], ["ink"]).cells == group(plan, "ink").cells
    with pytest.raises(ValueError, match="no group 'inc' in this plan; did you mean 'ink'"):
        only(plan, [], [], ["inc"])
    with pytest.raises(ValueError, match="no task 'locat' in this plan; did you mean 'locate'"):
        only(plan, ["locat"], [])
    with pytest.raises(ValueError, match=r"no pipeline 'adakv\+bakon' in this plan; did you mean 'adakv\+bacon'"):
        only(plan, [], ["adakv+bakon"])


def test_a_plan_survives_json(plan):
    again = plan_of_json(plan_json(plan))
    assert again == plan
    assert all(isinstance(cell, Cell) for cell in again.cells)
    assert replace(again, left_out=()) != plan


def test_a_stage_that_drops_tokens_inside_a_block_is_left_out(tmp_path):
    LazyPlan(4, ((0, 1), (2, 3))).save(tmp_path / "plan.json")
    plan = make_plan(["one"], {}, {"one": tmp_path / "plan.json"}, quick=True)
    stages = {cell.method.stages for cell in plan.cells if cell.method and cell.method.stages}
    assert ("vla",) in stages
    assert ("fastv", "vla") not in stages
    assert [why.what for why in plan.left_out if "which borrows from layer 0" in why.why] == ["fastv | vla on one"]
