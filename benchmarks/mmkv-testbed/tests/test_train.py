"""The training script: same seed, same losses; its shortcuts agree with the stock model."""

from itertools import islice

import numpy as np
import pytest
import torch
from mmkv_testbed import make_sample
from mmkv_testbed.batches import Stage, make_batch, normalised
from mmkv_testbed.glyphs import GLYPHS, bitmaps
from mmkv_testbed.model import build_model, cell_features
from mmkv_testbed.processor import build_processor
from mmkv_testbed.train import Recipe, Trainer
from mmkv_testbed.vocabulary import COLOURS, WORDS

SMALL = Stage(8, 7, 7, 3, 5, suffix=4, auxiliary=1.0)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def read_glyph(patch):
    """The glyph whose bitmap differs from the dark pixels of a normalised patch `[192]` in the fewest places."""
    dark = patch.view(3, 8, 8).amin(0).numpy() < -0.1
    return GLYPHS[int((bitmaps() != dark).sum((-1, -2)).min((1, 2)).argmin())]


def first_losses(seed):
    trainer = Trainer(Recipe(seed=seed))
    aligned = [numbers["loss"] for numbers in islice(trainer.align(), 3)]
    return aligned + [numbers["loss"] for numbers in islice(trainer.learn(SMALL), 3)]


def test_three_steps_reproduce():
    first = first_losses(0)
    assert first == first_losses(0)
    assert first != first_losses(1)


def test_alignment_loss_falls():
    losses = [numbers["loss"] for numbers in islice(Trainer().align(), 40)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_cell_features_are_the_stock_image_features():
    torch.manual_seed(0)
    model, sample = build_model().eval(), make_sample(0, 0)
    stock = build_processor()(images=sample.image, text=sample.prompt, return_tensors="pt")
    cells = np.asarray(sample.image).reshape(24, 8, 24, 8, 3).transpose(0, 2, 1, 3, 4)
    with torch.no_grad():
        ours = cell_features(model, torch.from_numpy(normalised(cells))[None], torch.arange(576))
        theirs = torch.stack(list(model.get_image_features(stock["pixel_values"]).pooler_output))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_batch_labels_and_pointers_agree():
    """The cell that an answer's token points at shows it; no record is asked about twice."""
    batch = make_batch(np.random.default_rng(0), SMALL)
    assert batch.tokens.shape == batch.labels.shape == batch.pointers.shape
    answers = batch.labels >= 0
    assert (batch.labels[answers] == batch.tokens[answers]).all()
    assert (batch.pointers >= 0).sum() == answers.sum() - SMALL.batch * SMALL.questions  # all but the end tokens
    letters = (batch.tokens >= WORDS.index("A")) & (batch.tokens <= WORDS.index("Z"))
    assert all(len(set(row[mask].tolist())) == SMALL.questions for row, mask in zip(batch.tokens, letters, strict=True))
    for row, column in (batch.pointers >= 0).nonzero().tolist():
        word = WORDS[batch.labels[row, column]]
        cell = batch.pointers[row, column]
        shown = read_glyph(batch.patches[row, cell])
        place = {f"row{batch.cells[row, cell] // 24}", f"col{batch.cells[row, cell] % 24}"}
        assert word in ({shown} if word.isdigit() else place | set(COLOURS))
        assert word.isdigit() or shown.isalpha()


def test_helpers_fail_when_the_evidence_is_elsewhere():
    """The pointer loss is about the cells named in the batch: perfect pointing elsewhere is penalised."""
    trainer = Trainer()
    numbers = next(trainer.learn(SMALL))
    assert numbers["pointer"] < 0.5
    assert numbers["owner"] < 0.5
    assert all(p.grad is not None for p in trainer.helpers.parameters())
