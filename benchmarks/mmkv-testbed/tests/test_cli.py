"""`mmkv generate` on the bundled model, as a user types it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mmkv_hf.cli import _inputs, app
from mmkv_testbed import load, make_samples, model_path
from PIL import Image
from typer.testing import CliRunner


@pytest.fixture
def page(tmp_path):
    sample = make_samples(1, seed=3, task="value", suffix=0)[0]
    sample.images[0].save(tmp_path / "page.png")
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


@pytest.mark.parametrize("start", ["", "{{ bos_token }}", "{{ bos_token + ' ' }}"])
def test_the_prompt_has_one_bos(page, start):
    sample, image = page
    processor = load()[1]
    processor.chat_template = start + processor.chat_template
    words = processor.batch_decode(_inputs(processor, "value of K ?", [Image.open(image)])["input_ids"])[0].split()
    assert words == ["<bos>", *["<image>"] * 576, "value", "of", "K", "?", "answer", ":"]
    assert words.count("<bos>") == 1
    given = _inputs(processor, f"<bos> {sample.prompt}", [Image.open(image)])["input_ids"]
    assert (given == processor.tokenizer.bos_token_id).sum() == 1


def test_a_picture_that_fails_leaves_the_answer(page, tmp_path):
    sample, _ = page
    wide = sample.images[0].resize((400, 192))  # the processor squeezes it into a square
    wide.save(tmp_path / "wide.png")
    out = run("--image", str(tmp_path / "wide.png"), "--prompt", sample.prompt, "--plot", str(tmp_path / "kept.png"))
    assert out.exit_code == 1
    assert "cache: " in out.output
    assert "as the processor cropped it" in " ".join(out.output.split())
    assert "Traceback" not in out.output


def test_the_readme_from_a_shell(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    section = readme.partition("## One page, by hand")[2].partition("\n## ")[0]
    script = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1]
    answer = re.search(r"The answer is `(.*?)`", section)[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["sh", "-ec", script], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == answer
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
