import pytest
import torch
from mmkv_testkit.decode import greedy
from mmkv_testkit.families import FAMILIES, IMAGE_TOKEN_ID, NAMES, UNSPOKEN, build, pad, row, unpadded

NEW = 6


def test_names():
    assert len(FAMILIES) == 17
    assert set(NAMES) - set(FAMILIES) == {"paligemma2", "llama"}
    with pytest.raises(ValueError, match="known: qwen2_vl"):
        build("bert")


@pytest.mark.parametrize("name", NAMES)
def test_generates_without_end_or_placeholder(name):
    vlm = build(name)
    run = greedy(vlm.model, vlm.inputs, NEW)
    assert run.tokens.shape == (1, NEW)
    assert run.logits.shape == (1, NEW, vlm.text_config.vocab_size)
    assert run.logits.isfinite().all()
    assert not torch.isin(run.tokens, torch.tensor(UNSPOKEN)).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_image_matters(name):
    vlm = build(name)
    other = {**vlm.inputs, "pixel_values": vlm.inputs["pixel_values"].flip(-1)}
    with torch.no_grad():
        change = vlm.model(**vlm.inputs).logits[:, -1] - vlm.model(**other).logits[:, -1]
    assert change.abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("images", [1, 2])
def test_left_padded_row_equals_row_alone(name, images):
    vlm = build(name, batch=3, images=images)
    inputs = pad(vlm.inputs, left=[7, 0, 13])
    together = greedy(vlm.model, inputs, NEW)
    for i in range(3):
        alone = greedy(vlm.model, unpadded(inputs, i), NEW)
        assert torch.equal(together.tokens[i], alone.tokens[0])
        assert torch.allclose(together.logits[i], alone.logits[0], atol=1e-4)
        assert torch.equal(greedy(vlm.model, row(inputs, i), NEW).tokens, alone.tokens)


@pytest.mark.parametrize("name", NAMES)
def test_right_padded_forward_equals_row_alone(name):
    vlm = build(name, batch=2)
    inputs = pad(vlm.inputs, right=[5, 0])
    with torch.no_grad():
        together = vlm.model(**inputs).logits
        for i, last in enumerate((-6, -1)):
            alone = vlm.model(**unpadded(inputs, i)).logits
            assert torch.allclose(together[i, last], alone[0, -1], atol=1e-4)


def test_stock_generate_is_wrong_with_right_padding():
    vlm = build("llava", batch=2)
    inputs = pad(vlm.inputs, right=[5, 0])
    together, alone = (greedy(vlm.model, x, NEW) for x in (inputs, unpadded(inputs, 0)))
    assert not torch.equal(together.tokens[0], alone.tokens[0])


@pytest.mark.parametrize("name", FAMILIES)
def test_row_of_batch_equals_row(name):
    vlm = build(name, batch=2)
    together = greedy(vlm.model, vlm.inputs, NEW)
    assert not torch.equal(*together.tokens)
    assert torch.equal(together.tokens[1:], greedy(vlm.model, row(vlm.inputs, 1), NEW).tokens)


@pytest.mark.parametrize("name", FAMILIES)
def test_two_images_have_twice_the_placeholders(name):
    one, two = (build(name, images=n).inputs["input_ids"] for n in (1, 2))
    expected = {"llava_onevision": 17}.get(name, int((one == IMAGE_TOKEN_ID).sum()))
    assert (two == IMAGE_TOKEN_ID).sum() == 2 * expected


def test_build_is_repeatable_and_leaves_the_generator_alone():
    before = torch.get_rng_state()
    first, second, other = build("llava"), build("llava"), build("llava", seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.inputs["pixel_values"], second.inputs["pixel_values"])
    assert torch.equal(greedy(first.model, first.inputs).logits, greedy(second.model, second.inputs).logits)
    assert not torch.equal(first.inputs["input_ids"], other.inputs["input_ids"])


def test_settings_reach_the_language_model():
    vlm = build("gemma3", num_hidden_layers=4, dtype=torch.bfloat16, text=(3, 9))
    assert vlm.text_config.layer_types == ["sliding_attention"] * 2 + ["full_attention", "sliding_attention"]
    assert vlm.inputs["input_ids"].shape == (1, 3 + 4 + 9)
    assert vlm.inputs["pixel_values"].dtype == vlm.model.dtype == torch.bfloat16
    assert greedy(vlm.model, vlm.inputs, 2).tokens.shape == (1, 2)


def test_forced_tokens_are_followed():
    vlm = build("llama", batch=2)
    free = greedy(vlm.model, vlm.inputs, NEW)
    tokens = free.tokens.roll(1, 0)
    forced = greedy(vlm.model, vlm.inputs, forced=tokens)
    assert torch.equal(forced.tokens, tokens)
    assert torch.equal(forced.logits[:, 0], free.logits[:, 0])


def test_pad_keeps_inputs_consistent():
    inputs = build("mllama", batch=2).inputs
    padded = pad(inputs, left=[3, 0], right=[0, 2])
    assert torch.equal(inputs["attention_mask"], torch.ones_like(inputs["attention_mask"]))
    assert padded["attention_mask"].sum(1).tolist() == [70, 71]
    assert torch.equal(padded["input_ids"] == 0, padded["attention_mask"] == 0)
    assert not padded["cross_attention_mask"][padded["attention_mask"] == 0].any()
    assert torch.equal(padded["input_ids"][1, :-2], inputs["input_ids"][1, :-2])


def test_pad_moves_a_leading_image():
    vlm = build("paligemma", batch=2)
    padded = pad(vlm.inputs, left=[4, 0])
    image = (padded["input_ids"] == IMAGE_TOKEN_ID).nonzero()
    assert image[image[:, 0] == 0, 1].tolist() == list(range(4, 20))
    assert unpadded(padded, 0)["input_ids"].shape == (1, 84)


@pytest.mark.parametrize(
    ("padding", "message"),
    [
        ({"left": [1]}, "one number per row"),
        ({"left": [72, 0]}, "none would stay"),
        ({"left": [50, 0], "right": [22, 0]}, "none"),
    ],
)
def test_pad_refuses(padding, message):
    with pytest.raises(ValueError, match=message):
        pad(build("llava", batch=2).inputs, **padding)


def test_pad_refuses_padded_inputs():
    inputs = pad(build("llama", batch=2).inputs, left=[1, 0])
    with pytest.raises(ValueError, match="padded already"):
        pad(inputs, left=[1, 0])
