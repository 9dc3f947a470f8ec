"""Tokenizer and processor, both as built and as shipped."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from mmkv_testbed import batch_inputs, make_sample, make_samples, model_path
from mmkv_testbed.processor import build_processor
from mmkv_testbed.vocabulary import TOKEN_ID, WORDS
from transformers import AutoProcessor, AutoTokenizer


@pytest.fixture(scope="module", params=["built", "shipped"])
def processor(request):
    return build_processor() if request.param == "built" else AutoProcessor.from_pretrained(model_path())


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


def test_one_placeholder_per_cell(processor):
    sample = make_sample(0, 0, suffix=3)
    inputs = processor(images=sample.image, text=sample.prompt, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    assert ids[:1] == [TOKEN_ID["<bos>"]]
    assert ids[1:577] == [TOKEN_ID["<image>"]] * 576
    assert processor.tokenizer.decode(ids[577:]) == sample.prompt.removeprefix("<image> ")
    assert inputs["pixel_values"].shape == (1, 3, 192, 192)


def test_pixels_are_not_resampled(processor):
    sample = make_sample(0, 0)
    pixels = processor(images=sample.image, text=sample.prompt, return_tensors="pt")["pixel_values"][0]
    wanted = torch.from_numpy(np.asarray(sample.image).transpose(2, 0, 1) / 127.5 - 1).float()
    torch.testing.assert_close(pixels, wanted, rtol=0, atol=1e-6)


def test_padding_is_on_the_left(processor):
    short, long = make_sample(0, 0, suffix=0), make_sample(0, 1, suffix=24)
    inputs = batch_inputs(processor, [short, long])
    assert inputs["attention_mask"].sum(1).tolist() == [583, 607]
    assert inputs["input_ids"][0, :24].tolist() == [0] * 24
    assert inputs["input_ids"][:, -1].tolist() == [TOKEN_ID[":"]] * 2


def test_several_images_per_prompt(processor):
    first, second = make_samples(2)
    inputs = processor(images=[[first.image, second.image]], text=[f"<image> {first.prompt}"], return_tensors="pt")
    assert (inputs["input_ids"] == TOKEN_ID["<image>"]).sum() == 2 * 576
    assert inputs["pixel_values"].shape[0] == 2


def test_chat_template_writes_the_training_prompt(processor):
    sample = make_sample(0, 0, suffix=2)
    question = sample.prompt.removeprefix("<image> ").removesuffix(" answer :")
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == sample.prompt


def test_the_shipped_tokenizer_loads_alone():
    assert AutoTokenizer.from_pretrained(model_path())("value").input_ids == [1, TOKEN_ID["value"]]


def test_no_remote_code_and_small():
    files = [path for path in model_path().iterdir() if path.is_file()]
    assert not [path for path in files if path.suffix == ".py"]
    assert "auto_map" not in json.loads((model_path() / "config.json").read_text())
    assert sum(path.stat().st_size for path in files) < 3_000_000


def test_loads_without_torchvision():
    code = """
        import sys
        sys.modules["torchvision"] = None  # importing it now fails, and it counts as not installed
        from mmkv_testbed import make_sample, model_path
        from transformers import AutoModelForImageTextToText, AutoProcessor
        model = AutoModelForImageTextToText.from_pretrained(model_path())
        processor = AutoProcessor.from_pretrained(model_path())
        sample = make_sample(0, 0)
        inputs = processor(images=sample.image, text=sample.prompt, return_tensors="pt").to(model.dtype)
        out = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 2
        print(type(model).__name__, type(processor).__name__, type(processor.image_processor).__name__)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LlavaForConditionalGeneration", "LlavaProcessor", "LlavaImageProcessorPil"]
