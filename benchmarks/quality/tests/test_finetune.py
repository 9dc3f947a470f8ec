"""The fine-tuning script trains what its sessions use, reads pages nobody trained on, and prints what it stored."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmkv_layershare import LazyPlan
from mmkv_testbed import load, make_sample, make_samples, train
from mmkv_testbed.batches import IGNORED, normalised
from mmkv_testbed.evaluate import Result, batch_inputs
from mmkv_testbed.glyphs import CELL
from mmkv_testbed.pages import Arrangement
from mmkv_testbed.samples import Task
from mmkv_testbed.vocabulary import EOS, GRID, encode

SCRIPT = Path(__file__).parents[2] / "finetune" / "run.py"
PAGE = Path(__file__).parents[2] / "results" / "finetune"
PLAN = LazyPlan(4, ((0, 1), (2, 3)))

if not SCRIPT.exists():
    pytest.skip("the script is not part of the sdist", allow_module_level=True)
spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
finetune = importlib.util.module_from_spec(spec)
sys.modules["finetune"] = finetune
spec.loader.exec_module(finetune)

SETTINGS = finetune.Settings(steps=2, batch=1, pages=3)


def arm(name, steps=2):
    return next(arm for arm in finetune.arms_of(4, PLAN, steps) if arm.name == name)


@pytest.mark.parametrize("name", ["full", "ADSC", "VLA", "GLA"])
def test_what_two_steps_of_training_change(name):
    """Lazy layers' own queries and keys only where they read text; the anchors' and all values always; no features."""
    model, _ = load()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = finetune.finetune(SETTINGS, model, arm(name))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert len(losses) == 2
    for layer in range(4):
        for part in "qkvo":
            used = name != "GLA" or layer not in PLAN.lazy or part in "vo"
            weight = f"model.language_model.layers.{layer}.self_attn.{part}_proj.weight"
            assert (weight in changed) is used, weight
    assert not any("vision_tower" in key or "projector" in key for key in changed)


@pytest.mark.parametrize("name", ["VLA", "GLA"])
def test_gradients_of_a_lazy_layer_reach_its_anchor(name):
    """With what the anchors' own attention writes cut off, all that is left of their keys is what they lend.

    Keys, for what vision tokens ask in the last layer, which is lazy, no answer depends on.
    """
    model, _ = load()
    layers = model.get_decoder().layers
    for anchor in (0, 2):
        layers[anchor].self_attn.o_proj.register_forward_hook(lambda m, args, out: out.detach())
    inputs = next(finetune.training_batches(SETTINGS))
    with arm(name).session(model, 0):
        model(**inputs, use_cache=False).loss.backward()
    assert all(layers[anchor].self_attn.k_proj.weight.grad.any() for anchor in (0, 2))
    own = [layers[lazy].self_attn.k_proj.weight.grad for lazy in PLAN.lazy]
    assert all((grad is None or not grad.any()) is (name == "GLA") for grad in own)


def test_training_goes_through_the_curriculum_and_use_does_not():
    model, _ = load()
    strides = [arm("ADSC", 6).session(model, step).plan.method.strides for step in range(6)]
    assert strides == [(5, 5)] * 2 + [(4, 4)] * 2 + [(3, 3)] * 2
    assert arm("ADSC", 6).session(model, None).plan.method.strides == (3, 3)
    assert arm("ADSC").session(model, None).plan.method.layers == (1, 3)


def test_pages_that_are_read_are_not_trained_on(monkeypatch):
    read = []

    def answers(model, processor, samples):
        read.extend(samples)
        return Result((), np.ones(len(samples), dtype=bool), np.ones(len(samples)))

    monkeypatch.setattr(finetune, "exact_match", answers)
    run = finetune.evaluate(SETTINGS, None, None, arm("full"), "as it is")
    assert finetune.TRAINING[0] == train._TRAINING
    assert [sample.answer for sample in read[:3]] == [s.answer for s in make_samples(3, finetune.EVALUATION, "value")]
    assert set(run.hits) == {f"{task} {way}" for task in ("value", "describe") for way in ("horizontal", "vertical")}
    trained = {inputs["pixel_values"].numpy().tobytes() for inputs in finetune.training_batches(SETTINGS)}
    shown = {batch_inputs(load()[1], [sample])["pixel_values"].numpy().tobytes() for sample in read}
    assert not trained & shown


def test_batches_are_what_the_processor_makes():
    sample = make_sample(5, 0, Task.DESCRIBE, suffix=7)
    picture = np.asarray(sample.images[0]).reshape(GRID, CELL, GRID, CELL, 3).swapaxes(1, 2)
    question, answer = encode(sample.prompt.split()[1:]), encode([*sample.answer.split(), EOS])
    view = finetune.View(GRID, GRID, 20, 1, 1, finetune.TASKS, tuple(Arrangement))
    batch = replace(
        finetune.make_batch(np.random.default_rng(0), view, 0),
        patches=torch.from_numpy(normalised(picture))[None],
        tokens=torch.tensor([question + answer]),
        labels=torch.tensor([[IGNORED] * len(question) + answer]),
    )
    inputs, stock = finetune.stock_inputs(batch), batch_inputs(load()[1], [sample])
    length = stock["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"][:, :length], stock["input_ids"])
    assert torch.allclose(inputs["pixel_values"], stock["pixel_values"], atol=1e-6)
    assert inputs["labels"][0, length:].tolist() == answer
    assert (inputs["labels"][0, :length] == IGNORED).all()


def test_a_stored_run_is_not_made_again(tmp_path):
    made = finetune.Run("full", "nothing", "as it is", {"value horizontal": "101"}, {"value horizontal": 0.5})
    path = tmp_path / "work" / "run.json"
    assert finetune.stored(path, SETTINGS, lambda: made) == made
    assert finetune.stored(path, SETTINGS, lambda: pytest.fail("made again")) == made
    with pytest.raises(SystemExit, match="other settings"):
        finetune.stored(path, replace(SETTINGS, steps=3), lambda: made)


def test_vertical_records_in_columns_that_stay_are_untouched():
    whole = finetune.untouched(SETTINGS, 3)
    columns = [sample.records[0].column for sample in finetune.held_out(SETTINGS, *finetune.CELLS[1])]
    assert whole["value vertical"] == "".join(str(int(column % 3 == 0)) for column in columns)
    assert whole["describe horizontal"] == "000"


def test_errors_of_ratios_are_those_of_resampling():
    rng = np.random.default_rng(0)
    full = (rng.random(400) < 0.9).astype(float)
    mine = full * (rng.random(400) < 0.5)
    drawn = rng.integers(0, 400, (2000, 400))
    error = 100 * (mine[drawn].mean(1) / full[drawn].mean(1)).std()
    ratio, _, shown = finetune.retained(mine, full).split()
    assert float(ratio) == pytest.approx(100 * mine.mean() / full.mean(), abs=0.05)
    assert float(shown) == pytest.approx(error, rel=0.1)
    assert finetune.retained(full, full) == "100.0 ± 0.0"


def test_the_page_is_that_of_its_numbers():
    content = json.loads(PAGE.with_suffix(".json").read_text())
    assert finetune.render(content) == PAGE.with_suffix(".md").read_text()
    assert [run["arm"] for run in content["runs"]] == [arm for arm in ("full", "ADSC", "VLA", "GLA") for _ in range(2)]
    assert all(len(hits) >= 256 for run in content["runs"] for hits in run["hits"].values())
