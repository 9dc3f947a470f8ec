"""The demo answers from the compressed cache and reports what it holds."""

import json
import sys
from itertools import pairwise

import numpy as np
import pytest
from mmkv_testbed import demo, exact_match, load, make_samples
from mmkv_testbed.evaluate import Result
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


@pytest.fixture(scope="module")
def sample():
    return make_samples(1)[0]


def picture(sample, shares):
    return np.asarray(draw_kept(sample.images[0], shares.astype(np.float32), sample.evidence[0], "caption"), np.float32)


def test_the_picture_shows_what_was_kept(sample):
    shares = np.zeros(576)
    none = picture(sample, shares)
    shares[:24] = 1
    changed = (none != picture(sample, shares)).any(-1)
    first, last = changed.any(1).nonzero()[0][[0, -1]]
    assert last - first + 1 == 32, "one row of cells"
    assert changed[first : last + 1].mean() > 0.9
    assert side_by_side([sample.images[0]] * 2, gap=10).size == (394, 192)


def test_one_head_of_many_is_seen_and_more_heads_are_redder(sample):
    def redness(share):
        seen = picture(sample, np.full(576, share))[100:700]
        return (seen[..., 0] - seen[..., 1:].mean(-1)).mean()

    values = [redness(share) for share in (0, 1 / 16, 0.5, 1)]
    assert abs(values[0]) < 2, "evicted cells are grey"
    assert values[1] > 40, "a tint, not a grey"
    assert all(more > less + 30 for less, more in pairwise(values))


def test_the_picture_says_what_it_shows(sample):
    """Caption above and legend below the page."""
    shown = picture(sample, np.zeros(576))
    assert shown.shape[0] > 768 + 60
    for strip in (shown[:30], shown[-60:-30], shown[-28:]):
        assert (strip < 128).all(-1).sum() > 50


def line(pipeline, budget, right):
    exact = np.arange(10) < right
    return demo.Line(pipeline, budget, Result(("",) * 10, exact, exact.astype(np.float64)), 1, 1, 1.0)


def test_the_verdict_is_computed():
    lines = [line("full cache", None, 10), line("snapkv", 64, 8), line("adakv+bacon", 64, 9)]
    lines += [line("adakv+mixkv+bacon", 64, 7), line("snapkv", 40, 3), line("adakv+bacon", 40, 3)]
    words = demo.verdict(lines)
    assert "64: adakv+bacon (90 %); 40: snapkv, adakv+bacon (30 %)." in words
    assert "mixkv changes adakv+bacon by -20 at 64 (" in words
    assert demo.verdict([*lines[:3], line("adakv+mixkv+bacon", 64, 10)]).count("+10 at 64") == 1
    assert "mixkv" not in demo.verdict(lines[:2])
    assert demo.verdict(lines[:1]) == ""


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
    shown = capsys.readouterr().out
    assert "full cache" in shown
    assert "Best exact match by budget: 64: snapkv" in shown
    lines = json.loads((tmp_path / "results.json").read_text())["lines"]
    assert [(line["pipeline"], line["budget"]) for line in lines] == [("full cache", None), ("snapkv", 64)]
    assert all(len(line["answers"]) == 3 for line in lines)
    assert "first included" in (tmp_path / "results.txt").read_text()
    assert (tmp_path / "kept.png").exists()
