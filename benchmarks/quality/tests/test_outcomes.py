"""Right and wrong words."""

import json

import numpy as np
import pytest
import torch
from mmkv_quality.outcomes import Outcomes, judge, packed, unpacked

WANTED = torch.tensor([[5, 6, 7, 2], [5, 6, 7, 2], [5, 6, 7, 2], [5, 6, 7, 2]])


def test_judging():
    answers = torch.tensor([[5, 6, 7, 2, 9], [5, 9, 7, 2, 0], [5, 6, 7, 8, 2], [9, 9, 9, 9, 9]])
    outcomes = judge(answers, WANTED)
    assert outcomes.right.tolist() == [[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]
    assert outcomes.exact.tolist() == [1, 0, 0, 0]
    assert outcomes.tokens.tolist() == pytest.approx([1, 2 / 3, 1, 0])


def test_an_answer_that_stops_early_is_wrong_where_it_has_nothing():
    outcomes = judge(torch.tensor([[5, 2]] * 4), WANTED)
    assert outcomes.right.tolist() == [[1, 0, 0, 0]] * 4


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (512, 25)])
def test_bits_survive_json(shape):
    bits = np.random.default_rng(1).random(shape) < 0.3
    assert np.array_equal(unpacked(packed(bits), shape), bits)
    again = Outcomes.of_json(json.loads(json.dumps(Outcomes(bits).to_json())))
    assert np.array_equal(again.right, bits)


def test_batches_are_joined_in_order():
    one, other = Outcomes(np.zeros((2, 3), dtype=bool)), Outcomes(np.ones((1, 3), dtype=bool))
    assert Outcomes.joined([one, other]).exact.tolist() == [0, 0, 1]
