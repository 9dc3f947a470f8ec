"""Where vision tokens are, against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_prune import Prompt

quick = settings(deadline=None, max_examples=60)


def mask(text):
    return torch.tensor([[c == "v" for c in row] for row in text.split()])


def test_runs_are_images():
    p = Prompt.of(mask("tvvtvt vvvttt tttttt"))
    assert p.image.tolist() == [[-1, 0, 0, -1, 1, -1], [0, 0, 0, -1, -1, -1], [-1] * 6]
    assert p.counts.tolist() == [3, 3, 0]
    assert (p.place == -1).all()
    assert p.valid.all()


def test_shapes_split_runs_and_join_frames():
    p = Prompt.of(mask("tvvvvt vvtvvt"), shapes=[[3, 1], [(2, 1, 2)]])
    assert p.image.tolist() == [[-1, 0, 0, 0, 1, -1], [0, 0, -1, 0, 0, -1]]
    assert p.place[1].tolist() == [[0, 0, 0], [0, 0, 1], [-1] * 3, [1, 0, 0], [1, 0, 1], [-1] * 3]


@quick
@given(prompt_seed=st.integers(0, 10**6), grids=st.booleans())
def test_places_and_ranks(prompt_seed, grids, random_prompt, images):
    p = random_prompt(prompt_seed, grids)
    g = torch.Generator().manual_seed(prompt_seed)
    some = torch.rand(p.valid.shape, generator=g) < 0.6
    sums, ranks = p.image_sums(some), p.image_ranks(some)
    for row in range(len(p.valid)):
        for columns in images(p, row):
            chosen = [c for c in columns if some[row, c]]
            assert [ranks[row, c].item() for c in chosen] == list(range(len(chosen)))
            assert {sums[row, c].item() for c in columns} == {len(chosen)}
            places = p.place[row, columns].tolist()
            assert places == sorted(places)
        assert not sums[row][~p.vision[row]].any()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing(shape):
    p = Prompt.of(torch.zeros(shape, dtype=torch.bool))
    assert p.image_sums(p.vision).shape == p.image_ranks(p.vision).shape == shape
    assert p.counts.tolist() == [0] * shape[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shapes": [[3], []]}, r"shapes make \[3, 0\] vision tokens in each row, the prompt has \[2, 0\]"),
        ({"shapes": [[2]]}, "shapes make"),
        ({"shapes": [[(1, 0, 2)], []]}, "all positive ints"),
        ({"shapes": [[(1, 2)], []]}, "frames, rows, columns"),
        ({"shapes": [[2.0], []]}, "shape is"),
        ({"valid": torch.zeros(2, 3, dtype=torch.bool)}, "every vision token must be valid"),
        ({"valid": torch.ones(1, 3, dtype=torch.bool)}, "like vision"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Prompt.of(mask("vvt ttt"), **arguments)


def test_refused_tensors():
    with pytest.raises(ValueError, match="vision must be bool"):
        Prompt.of(torch.ones(2, 3))
    p = Prompt.of(mask("vvt ttt"))
    with pytest.raises(ValueError, match="valid must be bool"):
        Prompt(p.valid.long(), p.image, p.place)
    with pytest.raises(ValueError, match="image must be int64"):
        Prompt(p.valid, p.image[:1], p.place)
    with pytest.raises(ValueError, match="place must be int64"):
        Prompt(p.valid, p.image, p.place.int())
