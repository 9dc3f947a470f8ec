"""lmms-eval's own Qwen2-VL model as base, on a tiny checkpoint with random weights."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

pytest.importorskip("lmms_eval")

from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

END, START_VISION, END_VISION, IMAGE, VIDEO = SPECIAL = (
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    f"{START_VISION}{IMAGE}{END_VISION}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant: "
)


def processor():
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = {"image_token": IMAGE, "video_token": VIDEO}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, eos_token=END, pad_token=END, extra_special_tokens=named
    )
    return Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=TEMPLATE)


def config(vocabulary):
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 2, "rope_parameters": rope, "vocab_size": vocabulary, "initializer_range": 0.3}
    ends = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0}
    return Qwen2VLConfig(
        text_config=text | ends,
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=SPECIAL.index(IMAGE),
        video_token_id=SPECIAL.index(VIDEO),
        vision_start_token_id=SPECIAL.index(START_VISION),
        vision_end_token_id=SPECIAL.index(END_VISION),
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen2_vl")
    reader = processor()
    torch.manual_seed(0)
    Qwen2VLForConditionalGeneration(config(len(reader.tokenizer))).save_pretrained(folder)
    reader.save_pretrained(folder)
    return f"pretrained={folder},device_map=cpu"


@pytest.fixture(scope="module")
def stock(command, checkpoint):
    run = command("qwen2_vl", checkpoint, "stock", "--limit", "6")
    assert run.returncode == 0, run.stdout + run.stderr
    return command.outcome("stock")[0]


@pytest.mark.parametrize(("budget", "evicts"), [("1.0", False), ("40", True)])
def test_answers_change_only_where_something_is_evicted(command, checkpoint, stock, budget, evicts):
    name = f"qwen2_vl-{budget}"
    command("mmkv", f"base=qwen2_vl,pipeline=adakv+mixkv+bacon,budget={budget},{checkpoint}", name, "--limit", "6")
    answers, results = command.outcome(name)
    assert (answers != stock) == evicts
    assert (results["throughput"]["avg_mmkv_kept_share"] < 0.2) == evicts
