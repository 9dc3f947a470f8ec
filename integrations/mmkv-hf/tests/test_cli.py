"""The command line; answers of a real model are tested with the bundled one, in mmkv-testbed."""

import pytest
from mmkv_hf import Pipeline, Stages
from mmkv_hf.cli import _check_grids, app
from mmkv_layershare import LazyPlan
from typer.testing import CliRunner

run = CliRunner().invoke


def test_methods_lists_every_registered_name():
    from mmkv_pipelines import methods

    out = run(app, ["methods"])
    assert out.exit_code == 0
    assert all(method.name in out.output for method in methods())


def test_methods_says_how_names_and_stages_are_joined(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    LazyPlan(4, ((2, 3),)).save("plan.json")
    *_, names, words, stages = run(app, ["methods"]).output.splitlines()
    assert Pipeline.parse(names.rpartition(": ")[2]) == Pipeline.parse("adakv+mixkv+bacon+snapkv(window=16)")
    assert '"|"' in words
    found = Stages.parse(stages)
    assert None not in (found.reduce, found.prune, found.share, found.evict)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pipeline", "adakw"], "did you mean 'adakv'"),
        (["--budget", "many"], "not 'many'"),
        (["--model", "nowhere/at/all"], "no such folder, and not a model name: nowhere/at/all"),
        (["--model", "[red]x[/red]"], "not a model name: [red]x[/red]"),
        (["--prompt", "  "], "the prompt is empty"),
        (["--plot", "kept.txt", "--image", "page.png"], "the suffix is one of"),
        (["--plot", "no/kept.png", "--image", "page.png"], "there is no folder no"),
        (["--plot", "."], "cannot write .: it is a folder"),
        (["--plot", "kept.png"], "give --image too"),
        (
            ["--plot", "kept.png", "--image", "page.png", "--pipeline", "prumerge | snapkv"],
            "a method that reduces images, PruMerge; leave one of the two out",
        ),
        (["--image", "missing.png"], "missing.png"),
    ],
)
def test_wrong_input_is_one_clear_line(monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = run(app, ["generate", "--model", "nowhere/at/all", "--prompt", "hello", *arguments])
    assert out.exit_code == 1
    assert message in " ".join(out.output.split())
    assert "Traceback" not in out.output


@pytest.mark.parametrize(("family", "is_grid"), [("llava", True), ("qwen2_vl", True), ("llava_next", False)])
def test_images_that_are_no_grid_are_refused_before_the_model_runs(kit, family, is_grid):
    tiny = kit.vlm(family)
    if is_grid:
        _check_grids(tiny.model.config, tiny.inputs)
        return
    with pytest.raises(ValueError, match="--plot draws plain grids"):
        _check_grids(tiny.model.config, tiny.inputs)
