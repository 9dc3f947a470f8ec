"""The demo answers from the compressed cache and reports what it holds."""

import json
import sys

import numpy as np
import pytest
from mmkv_testbed import demo, exact_match, load, make_samples
from mmkv_testbed.overlay import draw_kept, side_by_side


@pytest.fixture(scope="module")
def loaded():
    return load()


@pytest.fixture(scope="module")
def samples():
    return make_samples(8, seed=30_000)


def answers(loaded, samples, pipeline, budget):
    generate = demo.Compressed(loaded[0], pipeline, budget)
    return exact_match(*loaded, samples, generate=generate), generate


def test_nothing_evicted_nothing_lost(loaded, samples):
    full = exact_match(*loaded, samples)
    result, generate = answers(loaded, samples, "adakv+mixkv+bacon", 1000)
    assert result.answers == full.answers
    assert generate.shares.min() == 1


def test_the_first_answer_token_comes_from_the_compressed_cache(loaded, samples):
    """With room for the window only the page is gone, so even the first token must suffer."""
    full = exact_match(*loaded, samples)
    result, generate = answers(loaded, samples, "snapkv", 33)
    first = [a.split()[0] == b.split()[0] for a, b in zip(result.answers, full.answers, strict=True)]
    assert sum(first) < len(first)
    assert generate.bytes_held < 0.07 * generate.bytes_full


def test_bytes_follow_the_budget(loaded, samples):
    (_, big), (_, small) = (answers(loaded, samples, "adakv", budget) for budget in (128, 64))
    assert small.bytes_full == big.bytes_full == len(samples) * 607 * 4096
    assert 0.45 < small.bytes_held / big.bytes_held < 0.55
    assert 0.10 < small.bytes_held / small.bytes_full < 0.12
    assert 0 < small.shares.mean() < big.shares.mean() < 0.25


def test_the_picture_shows_what_was_kept():
    sample = make_samples(1)[0]
    shares = np.zeros(576, dtype=np.float32)
    none = np.asarray(draw_kept(sample.image, shares, sample.box, "caption"))
    shares[:24] = 1
    some = np.asarray(draw_kept(sample.image, shares, sample.box, "caption"))
    changed = (none != some).any(-1)
    assert changed[24 : 24 + 32].mean() > 0.9
    assert not changed[24 + 32 :].any()
    assert side_by_side([sample.image] * 2, gap=10).size == (394, 192)


def test_command_line(tmp_path, monkeypatch, capsys):
    argv = [
        "demo",
        "--out",
        str(tmp_path),
        "--pages",
        "3",
        "--pipelines",
        "snapkv",
        "--budgets",
        "64",
        "--batch-size",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", argv)
    demo.main()
    assert "full cache" in capsys.readouterr().out
    lines = json.loads((tmp_path / "results.json").read_text())["lines"]
    assert [(line["pipeline"], line["budget"]) for line in lines] == [("full cache", None), ("snapkv", 64)]
    assert all(len(line["answers"]) == 3 for line in lines)
    assert "first included" in (tmp_path / "results.txt").read_text()
    assert (tmp_path / "kept.png").exists()
