"""Questions, answers and evidence belong together."""

import hashlib

import numpy as np
import pytest
from mmkv_testbed import Arrangement, Layout, Task, make_sample, make_samples
from mmkv_testbed.glyphs import GLYPHS, bitmaps
from mmkv_testbed.vocabulary import TOKEN_ID, WORDS

WORDS_ASKED = {"value": 4, "describe": 7, "pair": 8, "list": 14, "locate": 4, "images": 4, "video": 4}


def digest(samples):
    text = "".join(f"{s.prompt}|{s.answer}|{s.evidence}" for s in samples)
    pixels = b"".join(np.asarray(image).tobytes() for s in samples for image in s.images)
    return hashlib.sha256(text.encode() + pixels).hexdigest()


def shown(image, box):
    """The glyph in a box of pixels, read from the image."""
    pixels = np.asarray(image)[box.top : box.bottom, box.left : box.right].min(-1) < 115
    return GLYPHS[int((bitmaps() != pixels).sum((-1, -2)).min((1, 2)).argmin())]


def test_samples_are_reproducible_and_prefix_stable():
    assert digest(make_samples(4, seed=1)) == digest(make_samples(7, seed=1)[:4])
    assert digest(make_samples(4, seed=1)) != digest(make_samples(4, seed=2))
    assert len({digest([sample]) for sample in make_samples(10)}) == 10


@pytest.mark.parametrize("arrangement", Arrangement)
def test_tasks_and_suffixes_are_paired(arrangement):
    layout = Layout(arrangement=arrangement)
    value, describe, pair, locate = (
        make_sample(0, 5, task, suffix, layout)
        for task, suffix in (("value", 0), ("describe", 24), ("pair", 8), ("locate", 1))
    )
    assert value.records == describe.records == pair.records[:1] == locate.records[:1]
    assert pair.records == locate.records
    assert all((np.asarray(value.images[0]) == np.asarray(s.images[0])).all() for s in (describe, pair, locate))
    assert value.answer == " ".join(value.records[0].digits)
    assert describe.answer.endswith(value.answer)
    assert pair.answer.startswith(value.answer)


@pytest.mark.parametrize("suffix", [0, 1, 24])
@pytest.mark.parametrize("task", Task)
def test_prompt_and_answer(task, suffix):
    sample = make_sample(9, 0, task, suffix)
    before, _, rest = sample.prompt.partition(" ? ")
    words = before.split()
    several = ["image1", "<image>", "image2", "<image>", "image3", "<image>"][: 2 * task.images]
    assert words[: words.index("of")] == [*(several if task.images > 1 else ["<image>"]), words[words.index("of") - 1]]
    assert len(sample.images) == len(sample.evidence) == task.images == sample.prompt.split().count("<image>")
    assert rest.split()[-2:] == ["answer", ":"]
    assert len(rest.split()) == 2 + suffix
    assert len(sample.answer.split()) == len(sample.boxes) == WORDS_ASKED[task.value]
    assert all(word in TOKEN_ID for word in [*sample.prompt.split(), *sample.answer.split()])
    assert [record.key for record in sample.records] == [word for word in words if len(word) == 1]


@pytest.mark.parametrize("arrangement", Arrangement)
@pytest.mark.parametrize("task", Task)
def test_boxes_show_the_answer(task, arrangement):
    for sample in (make_sample(3, index, task, 0, Layout(arrangement=arrangement)) for index in range(6)):
        for word, box in zip(sample.answer.split(), sample.boxes, strict=True):
            glyph = shown(sample.images[box.image], box)
            row, column = box.top // 8, box.left // 8
            if word.startswith(("row", "col")):
                assert word in {f"row{row}", f"col{column}"}
            assert glyph == word or (glyph.isalpha() and len(word) > 1)
            assert row * 24 + column in sample.evidence[box.image]


@pytest.mark.parametrize("arrangement", Arrangement)
def test_evidence_is_the_records_cells(arrangement):
    for sample in make_samples(10, task="pair", layout=Layout(arrangement=arrangement)):
        assert sample.evidence[0] == tuple(sorted(cell for record in sample.records for cell in record.cells()))


@pytest.mark.parametrize("task", ["images", "video"])
def test_only_the_named_image_answers(task):
    """Other images show the key with other digits, often, so that naming the image matters."""
    asked, elsewhere = set(), 0
    for sample in make_samples(24, task=task):
        (image,) = {box.image for box in sample.boxes}
        asked.add(image)
        assert f"within image{image + 1} ?" in sample.prompt
        assert [bool(cells) for cells in sample.evidence] == [i == image for i in range(len(sample.images))]
        others = [i for i in range(len(sample.images)) if i != image]
        same_place = ["".join(shown(sample.images[i], box) for box in sample.boxes) for i in others]
        elsewhere += any(digits != sample.answer.replace(" ", "") for digits in same_place)
    assert len(asked) == len(sample.images)
    assert elsewhere > 10


def test_frames_of_a_video_are_alike():
    """The same cells are written on in all frames."""
    frames = [np.asarray(image).min(-1) < 115 for image in make_sample(0, 0, "video").images]
    inked = [frame.reshape(24, 8, 24, 8).any((1, 3)) for frame in frames]
    assert (inked[0] == inked[1]).all()
    assert (inked[0] == inked[2]).all()
    assert (frames[0] != frames[1]).any()


def test_words_are_unique():
    assert len(set(WORDS)) == len(WORDS)
