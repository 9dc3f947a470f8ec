"""Scoring, and the promise the package makes: the shipped model answers at least 95 % of held-out questions."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from mmkv_testbed import exact_match, load, make_sample, make_samples
from mmkv_testbed.evaluate import score

PAGES = 64
HELD_OUT = 20_000


@pytest.fixture(scope="module")
def loaded():
    return load()


def test_score_counts():
    samples = make_samples(4, task="value", suffix=0)
    right = samples[0].answer
    wrong_last = " ".join([*samples[1].answer.split()[:3], "x"])
    result = score([right, wrong_last, "", samples[3].answer + " 1"], samples)
    assert result.exact.tolist() == [True, False, False, False]
    np.testing.assert_allclose(result.tokens, [1, 0.75, 0, 1])
    assert result.exact_match.mean == 0.25
    assert result.exact_match.error == pytest.approx(0.25)  # sqrt(.25 * .75 * 4 / 3 / 4)


@pytest.mark.parametrize("suffix", [0, 24])
@pytest.mark.parametrize("task", ["value", "describe"])
def test_full_cache_exact_match(loaded, task, suffix):
    result = exact_match(*loaded, make_samples(PAGES, seed=HELD_OUT, task=task, suffix=suffix), batch_size=32)
    assert result.exact_match.mean >= 0.95, result.exact_match
    assert result.token_accuracy.mean >= 0.98


def test_the_answer_comes_from_the_page(loaded):
    """Asked about another page, the model must fail: nothing but the pixels holds the digits."""
    samples = make_samples(17, seed=HELD_OUT, task="value", suffix=0)
    swapped = [replace(sample, images=other.images) for sample, other in pairwise(samples)]
    assert exact_match(*loaded, swapped).exact_match.mean == 0


def test_mixed_suffixes_in_one_padded_batch(loaded):
    samples = [make_sample(HELD_OUT, i // 2, suffix=24 * (i % 2)) for i in range(16)]
    together, alone = (exact_match(*loaded, samples, batch_size=n).answers for n in (16, 1))
    assert together == alone


def test_bfloat16(loaded):
    samples = make_samples(16, seed=HELD_OUT, task="value")
    assert exact_match(*load(dtype=torch.bfloat16), samples).exact_match.mean >= 0.85


def test_an_answer_that_never_ends_is_wrong(loaded):
    model, processor = loaded

    def too_short(inputs, new_tokens):
        return model.generate(**inputs, max_new_tokens=new_tokens - 1, do_sample=False)

    result = exact_match(model, processor, make_samples(4, seed=HELD_OUT), generate=too_short)
    assert not result.exact.any()
