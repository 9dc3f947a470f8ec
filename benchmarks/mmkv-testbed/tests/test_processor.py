"""Tokenizers and processors, both as built and as shipped."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from mmkv_testbed import batch_inputs, make_sample, make_samples, model_names, model_path
from mmkv_testbed.processor import build_llava_processor, build_qwen2vl_processor
from mmkv_testbed.vocabulary import TOKEN_ID, WORDS
from transformers import AutoProcessor, AutoTokenizer

BUILT = {"llava": build_llava_processor, "qwen2vl": build_qwen2vl_processor}


@pytest.fixture(scope="module", params=[*BUILT, *model_names()])
def processor(request):
    return (
        BUILT[request.param]() if request.param in BUILT else AutoProcessor.from_pretrained(model_path(request.param))
    )


def test_ids_of_the_words(processor):
    tokenizer = processor.tokenizer
    assert tokenizer.get_vocab() == TOKEN_ID
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<bos>", "<eos>", "<image>", "<unk>"]) == [0, 1, 2, 3, 4]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


def test_round_trip(processor):
    tokenizer, text = processor.tokenizer, " ".join(WORDS[5:])
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert tokenizer("value of K ?").input_ids == [1, *(TOKEN_ID[w] for w in ("value", "of", "K", "?"))]
    assert tokenizer("a word it never saw", add_special_tokens=False).input_ids.count(4) == 5


@pytest.mark.parametrize("task", ["value", "images", "video"])
def test_one_placeholder_per_cell(processor, task):
    sample = make_sample(0, 0, task, suffix=3)
    inputs = batch_inputs(processor, [sample])
    words = sample.prompt.replace("<image>", " ".join(["<image>"] * 576)).split()
    assert inputs["input_ids"][0].tolist() == [TOKEN_ID["<bos>"], *(TOKEN_ID[word] for word in words)]


def test_pixels_are_not_resampled(processor):
    sample = make_sample(0, 0)
    inputs = batch_inputs(processor, [sample])
    images = processor.image_processor
    wanted = np.asarray(sample.images[0]).transpose(2, 0, 1) / 255
    wanted = torch.from_numpy((wanted - images.image_mean[0]) / images.image_std[0]).float()
    if "image_grid_thw" in inputs:
        assert inputs["image_grid_thw"].tolist() == [[1, 48, 48]]
        patches = wanted.view(3, 24, 2, 4, 24, 2, 4).permute(1, 4, 2, 5, 0, 3, 6).unsqueeze(5)
        wanted = patches.expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(48 * 48, -1)
    torch.testing.assert_close(inputs["pixel_values"].view_as(wanted), wanted, rtol=0, atol=1e-5)


def test_padding_is_on_the_left(processor):
    short, long = make_sample(0, 0, suffix=0), make_sample(0, 1, suffix=24)
    inputs = batch_inputs(processor, [short, long])
    assert inputs["attention_mask"].sum(1).tolist() == [583, 607]
    assert inputs["input_ids"][0, :24].tolist() == [0] * 24
    assert inputs["input_ids"][:, -1].tolist() == [TOKEN_ID[":"]] * 2


def test_images_belong_to_their_prompts(processor):
    samples = make_samples(2, task="images", suffix=0)
    both = batch_inputs(processor, samples)["pixel_values"]
    alone = torch.cat([batch_inputs(processor, [sample])["pixel_values"] for sample in samples])
    assert both.equal(alone)


def test_chat_template_writes_the_training_prompt(processor):
    sample = make_sample(0, 0, suffix=2)
    question = sample.prompt.removeprefix("<image> ").removesuffix(" answer :")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == sample.prompt


@pytest.mark.parametrize("name", model_names())
def test_the_shipped_tokenizer_loads_alone(name):
    assert AutoTokenizer.from_pretrained(model_path(name))("value").input_ids == [1, TOKEN_ID["value"]]


@pytest.mark.parametrize("name", model_names())
def test_no_remote_code_and_small(name):
    files = [path for path in model_path(name).iterdir() if path.is_file()]
    assert not [path for path in files if path.suffix == ".py"]
    assert "auto_map" not in json.loads((model_path(name) / "config.json").read_text())
    assert sum(path.stat().st_size for path in files) < 8_000_000


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="no model 'huge'"):
        model_path("huge")


def test_models_load_without_torchvision():
    code = """
        import sys
        sys.modules["torchvision"] = None  # importing it now fails, and it counts as not installed
        from mmkv_testbed import batch_inputs, make_sample, model_names, model_path
        from transformers import AutoModelForImageTextToText, AutoProcessor
        for name in model_names():
            model = AutoModelForImageTextToText.from_pretrained(model_path(name))
            processor = AutoProcessor.from_pretrained(model_path(name))
            inputs = batch_inputs(processor, [make_sample(0, 0)]).to(model.dtype)
            out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
            assert out.shape[1] == inputs["input_ids"].shape[1] + 2
            print(type(model).__name__, type(processor).__name__, type(processor.image_processor).__name__)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds = {
        "LlavaForConditionalGeneration LlavaProcessor LlavaImageProcessorPil",
        "Qwen2VLForConditionalGeneration PaddleOCRVLProcessor Qwen2VLImageProcessorPil",
    }
    assert set(done.stdout.splitlines()) <= kinds
    assert len(done.stdout.splitlines()) == len(model_names())
