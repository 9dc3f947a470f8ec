"""Examples of pages, word for word on a bundled model; tables and lists of pages are whole."""

import re
from pathlib import Path

import pytest
import torch
from mmkv_hf import Stages
from mmkv_testbed import batch_inputs, load, make_samples

ROOT = Path(__file__).parents[3]
README = ROOT / "integrations" / "mmkv-hf" / "README.md"
PAGE = ROOT / "docs" / "transformers.md"
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="the pages are not part of the sdist")


def written(page, language="python"):
    """The code blocks of a page."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [block for kind, block in blocks if kind == language]


@pytest.mark.parametrize("page", [README, PAGE], ids=lambda page: page.name)
def test_examples_run_one_after_the_other_as_they_are_written(tmp_path, monkeypatch, page):
    monkeypatch.chdir(tmp_path)
    model, processor = load()
    samples = make_samples(2)
    given = {"model": model, "inputs": batch_inputs(processor, samples), "image": samples[0].images[0], "torch": torch}
    scope = {} if page == README else given
    for example in written(page):
        exec(example, scope)
    assert (tmp_path / "plan.json").exists()
    stages = scope["session"].stages
    assert None not in (stages.reduce, stages.prune, stages.share, stages.evict)
    report = scope["session"].report()
    assert report.prompt < scope["inputs"]["input_ids"].shape[1] / 2
    held = [sum(layer.kept[0]) for layer in report.layers]
    assert held[0] == 4 * 64
    assert held[-1] < 4 * 64, "what was pruned before its layer is not there to be kept"


def test_the_text_for_a_large_model_can_be_read():
    text = next(block for block in written(README, "") if "visionzip" in block)
    stages = Stages.parse(text)
    assert stages.prune.layers[-1] < stages.share.num_layers == 32


@pytest.mark.parametrize("page", [*ROOT.glob("docs/*.md"), *ROOT.glob("*/*/README.md")], ids=lambda x: x.parent.name)
def test_every_table_has_a_head(page):
    """A blank line in the middle leaves the rest of it as lines of text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert all(re.fullmatch(r"[| :-]+", table.splitlines()[1]) for table in tables)


def test_the_first_page_names_every_package():
    index = (ROOT / "docs" / "index.md").read_text()
    assert [page.name for page in ROOT.glob("docs/packages/*.md") if f"(packages/{page.name})" not in index] == []
