"""Divergences of layers, from the eager model's own weights."""

import json

import pytest
import torch
from mmkv_hf import plot_divergences, profile_layers
from mmkv_hf.calibrate import last_rows
from mmkv_hf.cli import app
from mmkv_layershare import LN2, LazyPlan
from mmkv_testkit.families import pad, unpadded
from PIL import Image
from typer.testing import CliRunner


def eager_rows(model, inputs):
    """Attention of the last token, mean over heads, of all layers, [L][B, N], from stock eager attention."""
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            out = model(**inputs, output_attentions=True, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return [weights[:, :, -1].mean(1) for weights in out.attentions]


def divergence(p, q):
    p, q = (x.double() / x.double().sum(-1, keepdim=True) for x in (p, q))
    middle = (p + q) / 2
    return sum((x * (x / middle).log()).nan_to_num(0).sum(-1) for x in (p, q)) / 2


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "paligemma2"])
def test_rows_and_divergences_are_those_of_the_eager_model(kit, family):
    model, inputs = kit.padded(family) if family != "paligemma2" else (kit.vlm(family).model, kit.vlm(family).inputs)
    wanted = eager_rows(model, inputs)
    real = inputs["attention_mask"].bool()
    found = last_rows(model, inputs)
    full = [i for i, rows in enumerate(found) if not bool(rows.isnan().any())]
    types = getattr(model.config.get_text_config(), "layer_types", None)
    assert full == [i for i in range(len(wanted)) if types is None or types[i] == "full_attention"]
    for layer in full:
        rows = wanted[layer]
        assert (found[layer] - rows).masked_fill(~real, 0).abs().max() < 1e-5
    vision = inputs["input_ids"] == model.config.image_token_id
    for over, chosen in (("all", real), ("vision", vision)):
        matrix = profile_layers(model, [inputs], over=over)
        assert matrix.shape == (len(wanted), len(wanted))
        for a in full:
            for b in full:
                by_hand = divergence(wanted[a] * chosen, wanted[b] * chosen).mean()
                assert abs(matrix[a, b] - by_hand) < 1e-4
        assert matrix.nan_to_num(0).max() > 0.01, "all layers attend alike: the comparison shows nothing"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "paligemma2"])
def test_a_padded_row_counts_as_it_does_alone(kit, family, side):
    tiny = kit.vlm(family, batch=2)
    inputs = pad(tiny.inputs, **{side: [9, 0]})
    found = last_rows(tiny.model, inputs)
    for i in range(2):
        alone = eager_rows(tiny.model, unpadded(inputs, i))
        full = [layer for layer, rows in enumerate(found) if not bool(rows.isnan().any())]
        real = inputs["attention_mask"][i].bool()
        assert len(full) > 1
        assert not found[full, i][:, ~real].any()
        for layer in full:
            assert (found[layer, i, real] - alone[layer][0]).abs().max() < 1e-5
    wanted = sum(profile_layers(tiny.model, [unpadded(inputs, i)]) for i in range(2)) / 2
    assert torch.allclose(profile_layers(tiny.model, [inputs]), wanted, atol=1e-5, equal_nan=True)


def test_prompts_count_by_their_rows(kit):
    one, two = kit.vlm("llava").inputs, kit.vlm("llava", batch=2)
    matrices = [profile_layers(two.model, [x]) for x in (one, two.inputs)]
    joined = profile_layers(two.model, [one, two.inputs])
    assert torch.allclose(joined, (matrices[0] + 2 * matrices[1]) / 3)


def test_layers_without_full_attention_have_no_divergence(kit):
    tiny = kit.vlm("gemma3")
    matrix = profile_layers(tiny.model, [tiny.inputs])
    full = torch.tensor([kind == "full_attention" for kind in tiny.text_config.layer_types])
    assert torch.equal(matrix.isnan(), ~(full[:, None] & full))


def test_what_cannot_be_compared_is_refused(kit):
    model = kit.vlm("llava").model
    with pytest.raises(ValueError, match="no prompts"):
        profile_layers(model, [])
    ids = kit.words(1, 9)
    with pytest.raises(ValueError, match="needs some in every prompt"):
        profile_layers(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], over="vision")


def test_a_picture_is_written(tmp_path):
    path = plot_divergences(torch.rand(6, 6) * LN2, tmp_path / "map.png", LazyPlan(6, ((1, 3),)))
    assert Image.open(path).size[0] > 400
    with pytest.raises(ValueError, match="the suffix is one of"):
        plot_divergences(torch.rand(2, 2), tmp_path / "map.txt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either epsilon or lazy_share"),
        (["--epsilon", "0.1", "--lazy-share", "0.5"], "either epsilon or lazy_share"),
        (["--epsilon", "0.1", "--mode", "both"], "mode is"),
        (["--epsilon", "0.1", "--over", "text"], "over is"),
        (["--epsilon", "0.1", "--out", "no/plan.json"], "there is no folder no"),
        (["--epsilon", "0.1", "--out", "."], "cannot write .: it is a folder"),
        (["--epsilon", "0.1"], "not a model name: nowhere/at/all"),
    ],
)
def test_wrong_input_of_the_command_is_one_clear_line(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pages = tmp_path / "pages.jsonl"
    pages.write_text(json.dumps({"images": ["p.png"]}))
    given = ["--model", "nowhere/at/all", "--pages", str(pages), "--out", str(tmp_path / "plan.json"), *arguments]
    out = CliRunner().invoke(app, ["profile-layers", *given])
    assert out.exit_code == 1
    assert message in " ".join(out.output.split())
    assert "Traceback" not in out.output
