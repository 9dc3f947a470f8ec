"""Pages for `mmkv profile-heads`, and the tables it made of them for the shipped models."""

import json
import sys

import pytest
from mmkv_budget import HeadScores
from mmkv_hf.profile import read_pages
from mmkv_testbed import Arrangement, boxes, make_sample, model_names, model_path
from mmkv_testbed.accuracy import SEED as ACCURACY_SEED
from transformers import AutoConfig


def test_pages_are_read_back(tmp_path):
    samples = [make_sample(1, 0, "value", 2), make_sample(1, 1, "images", 2), make_sample(1, 2, "describe", 2)]
    pages = read_pages(boxes.write_pages(tmp_path / "new" / "folder", samples))
    for page, sample in zip(pages, samples, strict=True):
        assert page.prompt == sample.prompt
        assert [image.tobytes() for image in page.opened()] == [image.tobytes() for image in sample.images]
        assert " ".join(box.text for box in page.boxes) == sample.answer
        for box, wanted in zip(page.boxes, sample.boxes, strict=True):
            assert (box.image, *box.box) == (wanted.image, wanted.left, wanted.top, wanted.right, wanted.bottom)


def test_all_arrangements_are_profiled():
    samples = boxes.calibration(6)
    width = 8
    shapes = [(s.boxes[1].left - s.boxes[0].left, s.boxes[1].top - s.boxes[0].top) for s in samples]
    assert shapes == [(width, 0), (0, width), (4 * width, 0)] * 2
    assert len(Arrangement) == 3
    assert boxes.SEED != ACCURACY_SEED


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["boxes", "--out", str(tmp_path), "--pages", "2"])
    boxes.main()
    assert "pages.jsonl" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == len(read_pages(tmp_path / "pages.jsonl")) == 2


@pytest.mark.parametrize("name", model_names())
def test_every_model_has_a_table(name):
    table = HeadScores.load(model_path(name) / "head_scores.json")
    text = AutoConfig.from_pretrained(model_path(name)).text_config
    assert len(table.scores) == text.num_hidden_layers
    assert {len(row) for row in table.scores} == {text.num_attention_heads}
    assert (table.model, table.kind) == (name, "visual")
    assert max(map(max, table.scores)) > 1, "some head finds more than one word of four per page"
    assert "/" not in json.loads((model_path(name) / "head_scores.json").read_text())["model"]
