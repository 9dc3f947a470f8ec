"""What scorers are shown, against the model's own eager attention weights: rotations and q/k norms included."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from mmkv_hf import Pipeline, compress
from mmkv_scores import Scores, SnapKV
from mmkv_testkit.families import build

WINDOW = 8


@dataclass(frozen=True, slots=True)
class Spy:
    """SnapKV without pooling that keeps what it computed."""

    base: SnapKV = field(default_factory=lambda: SnapKV(window=WINDOW, kernel=1))
    found: list = field(default_factory=list, compare=False)

    window: ClassVar[int] = WINDOW
    needs: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, seen, capacity, trace):
        score = self.base(seen, capacity, trace).rank
        self.found.append(score)
        return Scores(score, score)


@pytest.mark.parametrize(
    "name", ["llava", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v", "mistral3", "llama"]
)
def test_window_scores_equal_the_eager_weights(name):
    tiny = build(name, dtype=torch.float64)
    model, inputs = tiny.model, tiny.inputs
    spy = Spy()
    with torch.no_grad(), compress(model, Pipeline(score=spy), budget=20) as session:
        model(**inputs, past_key_values=session.cache(**inputs), use_cache=True)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(**inputs, output_attentions=True, use_cache=False).attentions
    assert len(layers) == len(spy.found)
    for weights, found in zip(layers, spy.found, strict=True):
        heads = found.shape[1]
        expected = weights[:, :, -WINDOW:].mean(2).unflatten(1, (heads, -1)).mean(2)[..., :-WINDOW]
        assert expected.std() > 1e-4, "weights that are all alike would prove nothing"
        torch.testing.assert_close(found[..., :-WINDOW].double(), expected, rtol=1e-4, atol=1e-7)
