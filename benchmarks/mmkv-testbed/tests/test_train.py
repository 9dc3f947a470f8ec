"""The training script: same seed, same losses; its shortcuts agree with the stock models; a killed run continues."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmkv_testbed import Arrangement, Task, make_sample, model_names, model_path
from mmkv_testbed.batches import Batch, View, make_batch, normalised
from mmkv_testbed.glyphs import GLYPHS, PIXEL_MEAN, PIXEL_STD, bitmaps
from mmkv_testbed.model import Size, architecture_of, build_model
from mmkv_testbed.prompts import build_prompts, question_mask, question_offsets
from mmkv_testbed.recipes import Recipe, Stage, recipe_for
from mmkv_testbed.train import Trainer, opening, save
from mmkv_testbed.vocabulary import COLOURS, WORDS

KEYED = (Task.VALUE, Task.DESCRIBE, Task.PAIR, Task.LOCATE)
TINY = View(6, 20, 6, 5, 3, KEYED)
STAGE = Stage("tiny", (TINY, View(6, 20, 4, 2, 2, (Task.IMAGES,))), steps=4, suffix=4, auxiliary=1.0)
IMAGE = 3


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def recipe(seed=0, size=Size.SMALL, stages=(STAGE,)):
    return Recipe(size, seed, stages, alignment_steps=3)


def read_glyph(patch):
    """The glyph whose bitmap differs from the dark pixels of a normalised patch `[192]` in the fewest places."""
    dark = patch.view(3, 8, 8).amin(0).numpy() * PIXEL_STD + PIXEL_MEAN < 0.45
    return GLYPHS[int((bitmaps() != dark).sum((-1, -2)).min((1, 2)).argmin())]


@pytest.mark.parametrize("size", ["small", "qwen2vl"])
def test_steps_reproduce(size):
    first = opening(recipe(size=Size(size)), 3)
    assert first == opening(recipe(size=Size(size)), 3)
    assert first != opening(recipe(1, Size(size)), 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", model_names())
def test_the_recorded_opening(name):
    """50 steps from the seed end where the shipped run's did."""
    report = json.loads((model_path(name) / "training.json").read_text())
    shipped = report["recipe"]
    again = recipe_for(Size(shipped["size"]), shipped["seed"])
    np.testing.assert_allclose(opening(again), report["opening"], atol=1e-3)


def test_alignment_loss_falls():
    losses = Trainer(recipe()).align(40)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


@pytest.mark.parametrize("task", ["value", "images"])
@pytest.mark.parametrize("size", ["small", "qwen2vl"])
def test_prompts_are_the_stock_models(size, task):
    """Pages and question as the trainer hands them to the language model, against `forward` on processed pixels."""
    torch.manual_seed(0)
    model, architecture, sample = build_model(size).eval(), architecture_of(size), make_sample(0, 0, task, 3)
    inputs = architecture.processor()(images=list(sample.images), text=sample.prompt, return_tensors="pt")
    pages = [np.asarray(i).reshape(24, 8, 24, 8, 3).transpose(0, 2, 1, 3, 4) for i in sample.images]
    ids, count = inputs["input_ids"], len(pages)
    question = ids[:, int((ids[0] == IMAGE).nonzero()[-1]) + 1 :]
    patches = torch.from_numpy(np.concatenate([normalised(page) for page in pages]))[None]
    nothing, block = torch.empty(0), torch.zeros(question.shape[1], dtype=torch.int64)
    batch = Batch(patches, torch.arange(576).repeat(count)[None], count, 24, question, block, (), *[nothing] * 7)
    with torch.no_grad():
        prompts = build_prompts(architecture, model, batch)
        ours = model.model.language_model(
            inputs_embeds=prompts.embeddings, position_ids=prompts.positions, attention_mask=prompts.mask
        ).last_hidden_state
        theirs = model(**inputs).logits
    torch.testing.assert_close(model.lm_head(ours), theirs, rtol=1e-5, atol=1e-5)
    assert (ids[0, prompts.cells] == IMAGE).all()


def test_a_question_sees_the_images_and_itself():
    block = torch.tensor([0, 0, 1, 1, 1])
    seen = question_mask(3, block)[0, 0]
    assert seen[:3, :3].equal(torch.ones(3, 3).tril().bool())
    assert seen[7].tolist() == [True] * 3 + [False] * 2 + [True] * 3
    assert seen[4].tolist() == [True] * 5 + [False] * 3
    assert question_offsets(block).tolist() == [0, 1, 0, 1, 2]


def test_questions_do_not_change_one_another():
    """A question's answer is the same alone and beside others."""
    torch.manual_seed(0)
    trainer = Trainer(recipe())
    batch = make_batch(np.random.default_rng(0), TINY, 4)
    model = trainer.model.eval()

    def hidden(batch):
        prompts = build_prompts(trainer.architecture, model, batch)
        out = model.model.language_model(
            inputs_embeds=prompts.embeddings,
            position_ids=prompts.positions,
            attention_mask=prompts.mask,
            before_questions=prompts.start,
        )
        return out.last_hidden_state[:, prompts.start :]

    last = batch.block == batch.block[-1]
    alone = replace(batch, tokens=batch.tokens[:, last], block=batch.block[last] * 0)
    torch.testing.assert_close(hidden(batch)[:, last], hidden(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "view", [TINY, View(6, 24, 4, 2, 2, (Task.LIST,)), View(6, 8, 4, 4, 2, (Task.VIDEO,), (Arrangement.VERTICAL,))]
)
def test_batch_labels_and_pointers_agree(view):
    """The cell that an answer's token points at shows it, and is where the owner's record has it."""
    batch = make_batch(np.random.default_rng(0), view, 4)
    answers = batch.labels >= 0
    assert (batch.labels[answers] == batch.tokens[answers]).all()
    assert (batch.pointers >= 0).sum() == answers.sum() - view.batch * view.questions  # all but the end tokens
    homes, keys = batch.homes, batch.keys
    for row, column in (batch.pointers >= 0).nonzero().tolist():
        word, cell = WORDS[batch.labels[row, column]], int(batch.pointers[row, column])
        glyph = read_glyph(batch.patches[row, cell])
        place = {f"row{batch.cells[row, cell] // 24}", f"col{batch.cells[row, cell] % 24}"}
        assert word in ({glyph} if len(word) == 1 else place | set(COLOURS))
        owner, rank = int(batch.owners[row, column]), int(batch.ranks[row, column])
        (record,) = ((homes[row, :, rank] == cell) & (keys[row] == owner)).nonzero()
        assert batch.regions[row, column].tolist() == homes[row, record[0]].tolist()


def test_helpers_fail_when_the_evidence_is_elsewhere():
    """The losses are about the cells named in the batch: an untrained model has them wrong."""
    trainer = Trainer(recipe())
    numbers = trainer.learn(STAGE, 0)
    assert max(numbers["pointer"], numbers["named"], numbers["asked"]) < 0.5
    assert all(p.grad is not None for p in trainer.helpers.parameters())


def test_dropped_heads_say_nothing():
    trainer = Trainer(replace(recipe(), head_dropout=0.5))
    states = []
    projection = trainer.model.model.language_model.layers[2].self_attn.o_proj
    projection.register_forward_hook(lambda module, inputs, output: states.append(inputs[0]))
    trainer.learn(STAGE, 0)
    heads = states[0].unflatten(-1, (4, -1))
    silent = (heads == 0).all((1, 3))
    assert 0 < silent.sum() < silent.numel()
    assert ((heads == 0).any((1, 3)) == silent).all(), "all rows of a prompt or none"


def test_a_killed_run_ends_at_the_same_weights(tmp_path):
    stages = (replace(STAGE, steps=3), replace(STAGE, steps=3, decay=True))
    whole = Trainer(recipe(stages=stages))
    whole.run()
    killed, checkpoint = Trainer(recipe(stages=stages)), tmp_path / "checkpoint.pt"
    learn, count = killed.learn, iter(range(4))

    def learn_until_killed(stage, step):
        next(count)
        return learn(stage, step)

    killed.learn = learn_until_killed
    with pytest.raises(StopIteration):
        killed.run(checkpoint, every=0)
    resumed = Trainer(recipe(stages=stages))
    resumed.run(checkpoint)
    assert [row["loss"] for row in resumed.progress.curve] == [row["loss"] for row in whole.progress.curve]
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert ours.equal(theirs)


def test_another_recipes_checkpoint_is_refused(tmp_path):
    Trainer(recipe()).run(tmp_path / "checkpoint.pt", every=0)
    with pytest.raises(ValueError, match="another recipe"):
        Trainer(recipe(1)).run(tmp_path / "checkpoint.pt")


@pytest.mark.parametrize("size", ["small", "qwen2vl"])
def test_saved_models_load(tmp_path, size):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    trainer = Trainer(recipe(size=Size(size)))
    trainer.run()
    save(trainer, tmp_path)
    model, processor = (auto.from_pretrained(tmp_path) for auto in (AutoModelForImageTextToText, AutoProcessor))
    sample = make_sample(0, 0, "value", 0)
    inputs = processor(images=list(sample.images), text=sample.prompt, return_tensors="pt").to(model.dtype)
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 2
    assert json.loads((tmp_path / "training.json").read_text())["recipe"]["size"] == size
