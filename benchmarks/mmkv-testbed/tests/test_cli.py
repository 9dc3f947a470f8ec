"""`mmkv generate` on the bundled model, as a user types it."""

import json

import pytest
from mmkv_hf.cli import app
from mmkv_testbed import make_samples, model_path
from PIL import Image
from typer.testing import CliRunner


@pytest.fixture
def page(tmp_path):
    sample = make_samples(1, seed=3, task="value", suffix=0)[0]
    sample.image.save(tmp_path / "page.png")
    return sample, str(tmp_path / "page.png")


def run(*arguments):
    return CliRunner().invoke(app, ["generate", "--model", str(model_path()), *arguments])


def test_reads_a_value_from_a_compressed_cache_and_draws_what_it_kept(page, tmp_path):
    sample, image = page
    out = run("--image", image, "--prompt", sample.prompt, "--budget", "128", "--plot", str(tmp_path / "kept.png"))
    assert out.exit_code == 0, out.output
    assert sample.answer in out.output
    assert "budget 128 tokens" in out.output
    assert Image.open(tmp_path / "kept.png").size[0] > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0"], "must be at least 1, got 0"),
        (["--budget", "-4"], "must be at least 1, got -4"),
        (["--budget", "20"], "least that works is 33"),
        (["--budget", "1.5"], "budget"),
        (["--pipeline", "adakv+nothing"], "unknown method 'nothing'"),
        (["--pipeline", "sparsemm(heads.json)"], "heads.json"),
    ],
)
def test_wrong_settings_are_one_clear_line(page, arguments, message):
    sample, image = page
    out = run("--image", image, "--prompt", sample.prompt, *arguments)
    assert out.exit_code == 1
    assert message in " ".join(out.output.split())
    assert "Traceback" not in out.output


def test_a_table_for_another_model_is_refused(page, tmp_path):
    sample, image = page
    table = {"format": "mmkv-head-scores/1", "model": "other", "kind": "visual", "scores": [[1.0] * 32] * 28}
    (tmp_path / "heads.json").write_text(json.dumps(table))
    out = run("--image", image, "--prompt", sample.prompt, "--pipeline", f"sparsemm({tmp_path}/heads.json)")
    assert out.exit_code == 1
    assert "28" in out.output
    assert "4" in out.output
