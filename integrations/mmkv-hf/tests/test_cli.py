"""The command line; answers of a real model are tested with the bundled one, in mmkv-testbed."""

import pytest
from mmkv_hf.cli import app
from typer.testing import CliRunner

run = CliRunner().invoke


def test_methods_lists_every_registered_name():
    from mmkv_pipelines import methods

    out = run(app, ["methods"])
    assert out.exit_code == 0
    assert all(method.name in out.output for method in methods())


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
        (["--plot", "kept.png"], "give --image too"),
        (["--image", "missing.png"], "missing.png"),
    ],
)
def test_wrong_input_is_one_clear_line(monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = run(app, ["generate", "--model", "nowhere/at/all", "--prompt", "hello", *arguments])
    assert out.exit_code == 1
    assert message in " ".join(out.output.split())
    assert "Traceback" not in out.output
