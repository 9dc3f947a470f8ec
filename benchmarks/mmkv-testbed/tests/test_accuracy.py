"""The command that measures models, and the promise of the package: what it ships answers with its full cache."""

import json
import sys

import pytest
from mmkv_testbed import Arrangement, Layout, Task, accuracy, exact_match, load, make_samples, model_names, model_path

PAGES = 16
ENOUGH = 0.95


def cells(name):
    return json.loads((model_path(name) / "accuracy.json").read_text())["cells"]


@pytest.mark.parametrize("name", model_names())
def test_every_task_was_measured(name):
    measured = {(cell["task"], cell["arrangement"], cell["suffix"]) for cell in cells(name)}
    assert measured == {(t, a, s) for t in Task for a in Arrangement for s in accuracy.SUFFIXES}
    assert all(cell["pages"] >= 128 for cell in cells(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", model_names())
def test_what_was_measured_holds(name):
    """Every fifth cell, so that all tasks, arrangements and suffixes have their turn, asked again on other pages.

    Of those that compare methods, four standard errors below what that takes is a failure.
    """
    loaded = load(name)
    for cell in cells(name)[::5]:
        if cell["exact_match"] >= ENOUGH:
            layout = Layout(arrangement=cell["arrangement"])
            samples = make_samples(PAGES, 77, cell["task"], cell["suffix"], layout)
            assert exact_match(*loaded, samples).exact_match.mean >= ENOUGH - 4 * (0.05 / PAGES) ** 0.5, cell


def test_command_line(tmp_path, monkeypatch, capsys):
    name, out = model_names()[0], tmp_path / "accuracy.json"
    words = f"accuracy --model {name} --pages 2 --tasks value --arrangements vertical strided --suffixes 3 --out {out}"
    monkeypatch.setattr(sys, "argv", words.split())
    accuracy.main()
    lines = json.loads(out.read_text())["cells"]
    assert [(line["task"], line["arrangement"], line["suffix"]) for line in lines] == [
        ("value", "vertical", 3),
        ("value", "strided", 3),
    ]
    assert all(line["pages"] == 2 and 0 <= line["exact_match"] <= line["token_accuracy"] <= 1 for line in lines)
    assert "strided" in capsys.readouterr().out
