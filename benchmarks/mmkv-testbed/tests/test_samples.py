"""Questions, answers and evidence belong together."""

import hashlib

import numpy as np
import pytest
from mmkv_testbed import Task, make_sample, make_samples
from mmkv_testbed.vocabulary import TOKEN_ID, WORDS


def digest(samples):
    text = "".join(f"{s.prompt}|{s.answer}|{s.evidence}" for s in samples)
    return hashlib.sha256(text.encode() + b"".join(np.asarray(s.image).tobytes() for s in samples)).hexdigest()


def test_samples_are_reproducible_and_prefix_stable():
    assert digest(make_samples(4, seed=1)) == digest(make_samples(7, seed=1)[:4])
    assert digest(make_samples(4, seed=1)) != digest(make_samples(4, seed=2))
    assert len({digest([sample]) for sample in make_samples(10)}) == 10


def test_tasks_and_suffixes_are_paired():
    a, b = make_sample(0, 5, Task.VALUE, 0), make_sample(0, 5, "describe", 24)
    assert a.record == b.record
    assert (np.asarray(a.image) == np.asarray(b.image)).all()
    assert a.answer == " ".join(a.record.digits)
    assert b.answer.endswith(a.answer)


@pytest.mark.parametrize("suffix", [0, 1, 24])
@pytest.mark.parametrize("task", Task)
def test_prompt_and_answer(task, suffix):
    sample = make_sample(9, 0, task, suffix)
    words = sample.prompt.split()
    assert words[:5] == ["<image>", task.value, "of", sample.record.key, "?"]
    assert words[-2:] == ["answer", ":"]
    assert len(words) == 7 + suffix
    assert len(sample.answer.split()) == {"value": 4, "describe": 7}[task.value]
    assert all(word in TOKEN_ID for word in words + sample.answer.split())


def test_box_and_evidence_name_the_same_cells():
    for sample in make_samples(20):
        box, record = sample.box, sample.record
        cells = [row * 24 + column for row in range(box.top, box.bottom) for column in range(box.left, box.right)]
        assert tuple(cells) == sample.evidence == record.cells()
        assert sample.answer.split()[1:3] == [f"row{box.top}", f"col{box.left}"]


def test_words_are_unique():
    assert len(set(WORDS)) == len(WORDS)
