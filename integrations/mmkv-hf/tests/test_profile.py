"""Visual-head scores, against attention weights of the eager model and boxes counted pixel by pixel."""

import json
import random
from fractions import Fraction

import pytest
import torch
from mmkv_budget import HeadScores
from mmkv_hf import LabelledPage, TextBox, profile_heads, read_pages
from mmkv_hf.cli import app
from mmkv_hf.profile import _read_aloud, box_columns, head_hits
from PIL import Image
from typer.testing import CliRunner

STEPS = 4
run = CliRunner().invoke


@pytest.mark.parametrize("family", ["qwen2_vl", "llava", "qwen3_vl", "gemma3", "paligemma2"])
def test_the_column_looked_at_is_the_largest_eager_weight(kit, family):
    tiny = kit.vlm(family)
    model, inputs = tiny.model, tiny.inputs
    tokens, looked = _read_aloud(model, inputs, STEPS)
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model.generate(
            **inputs,
            max_new_tokens=STEPS,
            do_sample=False,
            output_attentions=True,
            return_dict_in_generate=True,
        )
    finally:
        model.set_attn_implementation(before)
    assert tokens.tolist() == out.sequences[0, -STEPS:].tolist()
    types = getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"] * 99
    for step, layers in enumerate(out.attentions):
        full = [weights for weights, kind in zip(layers, types, strict=False) if kind == "full_attention"]
        wanted = torch.stack([weights[0, :, -1].argmax(-1) for weights in full])
        assert torch.equal(looked[step], wanted)
    assert looked.unique().numel() > 3, "every head looks at the same place: the comparison shows nothing"


def test_hits_count_words_of_one_box_by_its_size():
    boxes = [TextBox("total 42", (0, 0, 1, 1)), TextBox("42 cents", (0, 0, 1, 1)), TextBox("tax 7", (0, 0, 1, 1))]
    columns = [[3, 4], [5], [8, 9, 10]]
    words = [" total", "42", "7 ", " ", "nothing"]  # "42" stands in two boxes
    looked = torch.tensor([[[3, 5]], [[5, 5]], [[10, 3]], [[3, 3]], [[3, 3]]])
    assert head_hits(words, looked, boxes, columns).tolist() == [[1 / 2 + 1 / 3, 0]]


def overlap(low, high, index, count, size):
    """Whether [low, high) meets cell `index` of `count` over `size` pixels."""
    return max(low, Fraction(index * size, count)) < min(high, Fraction((index + 1) * size, count))


def test_columns_of_a_box_are_the_cells_it_overlaps():
    rng = random.Random(0)
    for _ in range(200):
        images = [Image.new("RGB", (rng.randint(20, 60), rng.randint(20, 60))) for _ in range(2)]
        grids = [(rng.randint(1, 7), rng.randint(1, 7)) for _ in range(2)]
        vision = [5 + 2 * i for i in range(sum(a * b for a, b in grids))]
        which = rng.randrange(2)
        (width, height), (rows, columns) = images[which].size, grids[which]
        left, top = rng.randrange(width), rng.randrange(height)
        right, bottom = rng.randint(left + 1, width), rng.randint(top + 1, height)
        start = grids[0][0] * grids[0][1] if which else 0
        wanted = [
            vision[start + row * columns + column]
            for row in range(rows)
            for column in range(columns)
            if overlap(top, bottom, row, rows, height) and overlap(left, right, column, columns, width)
        ]
        assert box_columns(TextBox("x", (left, top, right, bottom), which), images, grids, vision) == wanted


def pages_file(folder, lines):
    path = folder / "pages.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


BOX = {"text": "a", "box": [0, 0, 8, 8]}


def test_pages_are_read_with_paths_beside_the_file(tmp_path):
    path = pages_file(tmp_path, [{"images": ["p.png"], "boxes": [BOX]}, "", {"images": [], "prompt": "q", "boxes": []}])
    first, second = read_pages(path)
    assert first == LabelledPage((tmp_path / "p.png",), (TextBox("a", (0, 0, 8, 8)),))
    assert second.prompt == "q"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ({"boxes": []}, "images"),
        ({"images": "p.png", "boxes": []}, "list of paths"),
        ({"images": ["p.png"], "boxes": [{"text": " ", "box": [0, 0, 8, 8]}]}, "needs text"),
        ({"images": ["p.png"], "boxes": [{"text": "a", "box": [8, 0, 8, 8]}]}, "left < right"),
        ({"images": ["p.png"], "boxes": [{"text": "a", "box": [0, 0, 8]}]}, "line 1"),
        ("", "holds no pages"),
    ],
)
def test_a_wrong_page_is_named(tmp_path, line, message):
    path = pages_file(tmp_path, [line])
    with pytest.raises(ValueError, match=message):
        read_pages(path)
    out = run(app, ["profile-heads", "--model", "nowhere", "--pages", str(path), "--out", str(tmp_path / "h.json")])
    assert out.exit_code == 1
    assert "Traceback" not in out.output


def test_a_folder_is_no_place_for_a_table(tmp_path):
    path = pages_file(tmp_path, [{"images": ["p.png"], "boxes": [BOX]}])
    out = run(app, ["profile-heads", "--model", "nowhere", "--pages", str(path), "--out", "."])
    assert out.exit_code == 1
    assert "cannot write .: it is a folder" in out.output


def prepared(tiny):
    return lambda prompt, images: tiny.inputs


def page(*boxes):
    return LabelledPage((Image.new("RGB", (64, 64)),), boxes)


def test_scores_are_means_over_pages_and_round_trip(kit, tmp_path):
    tiny = kit.vlm("llava")
    tokens, looked = _read_aloud(tiny.model, tiny.inputs, STEPS)
    everywhere = TextBox(" ".join(f"<{int(token)}>" for token in tokens), (0, 0, 64, 64))
    scores = profile_heads(
        tiny.model, prepared(tiny), lambda token: f"<{token}>", [page(everywhere), page()], max_new_tokens=STEPS
    )
    vision = (tiny.inputs["input_ids"][0] == tiny.model.config.image_token_id).nonzero()[:, 0]
    wanted = torch.isin(looked, vision).double().sum(0) / len(vision) / 2
    assert torch.allclose(torch.tensor(scores.scores, dtype=torch.float64), wanted)
    assert wanted.unique().numel() > 1
    scores.save(tmp_path / "heads.json")
    assert HeadScores.load(tmp_path / "heads.json") == scores
    assert scores.kind == "visual"


@pytest.mark.parametrize(
    ("family", "pages", "message"),
    [
        ("llava", [], "no pages"),
        ("llava", [page(TextBox("never generated", (0, 0, 64, 64)))], "no head looked at a word"),
        ("llava", [page(TextBox("a", (0, 0, 65, 64)))], "outside its image"),
        ("llava", [page(TextBox("a", (0, 0, 8, 8), image=1))], "image 1 of 1"),
        ("llava_next", [page(TextBox("a", (0, 0, 8, 8)))], "no plain grid"),
    ],
)
def test_what_cannot_be_profiled_is_refused_and_the_model_is_as_before(kit, family, pages, message):
    tiny = kit.vlm(family)
    before = tiny.model.config.get_text_config()._attn_implementation
    with pytest.raises(ValueError, match=message):
        profile_heads(tiny.model, prepared(tiny), lambda token: f"<{token}>", pages, max_new_tokens=2)
    assert tiny.model.config.get_text_config()._attn_implementation == before
