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
        (["--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--image", "missing.png"], "missing.png"),
    ],
)
def test_wrong_input_is_one_clear_line(monkeypatch, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = run(app, ["generate", "--model", "nowhere/at/all", "--prompt", "hello", *arguments])
    assert out.exit_code == 1
    assert message in " ".join(out.output.split())
    assert "Traceback" not in out.output
