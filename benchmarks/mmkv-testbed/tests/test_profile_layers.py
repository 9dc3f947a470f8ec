"""`mmkv profile-layers` on bundled models, as a user types it."""

import pytest
from mmkv_hf import calibrate
from mmkv_hf.cli import app
from mmkv_layershare import LazyPlan
from mmkv_testbed import boxes, make_sample, model_path
from typer.testing import CliRunner


@pytest.fixture
def run(tmp_path):
    """Runs the command on one page; gives its result and the plan it wrote."""
    pages = boxes.write_pages(tmp_path / "pages", [make_sample(1, 0, "value", 2)])
    out = tmp_path / "plan.json"

    def command(model, *settings):
        given = ["--model", str(model_path(model)), "--pages", str(pages), "--out", str(out), *settings]
        result = CliRunner().invoke(app, ["profile-layers", *given])
        return result, LazyPlan.load(out) if out.exists() else None

    return command


def test_a_share_that_so_few_layers_do_not_reach_is_refused_before_they_are_measured(run, monkeypatch):
    """A block of five and one layer alone: four of six are lazy at most, though of many layers it would be 80 %."""
    monkeypatch.setattr(calibrate, "profile_layers", None)
    result, plan = run("base-seed0", "--lazy-share", "0.75")
    assert result.exit_code == 1
    assert "at most 66.7% of the layers can be lazy with blocks of 5, so not 75.0%" in result.output
    assert plan is None


def test_a_plan_without_lazy_layers_comes_with_a_warning(run):
    result, plan = run("small-seed0", "--epsilon", "0.0001")
    assert result.exit_code == 0
    assert plan == LazyPlan(4)
    assert "warning: no layer is lazy: neighbours differ by 0." in result.stderr


def test_a_plan_with_lazy_layers_comes_with_none(run):
    result, plan = run("small-seed0", "--lazy-share", "0.5")
    assert result.exit_code == 0
    assert len(plan.lazy) >= 2
    assert "warning" not in result.stderr
