"""lmms-eval, by its own command, and our own harness give the same answer to every question."""

import pytest
from mmkv_hf import compress
from mmkv_lmms_eval.pages import TASK
from mmkv_testbed import batch_inputs, load, model_path

pytest.importorskip("lmms_eval")

WHOLE, SMALL = ("adakv+mixkv+bacon", "1.0"), ("adakv+bacon+snapkv(window=16,kernel=3)", "40")


@pytest.fixture(scope="module")
def ours(command):
    """Setting -> the answers of our own harness, one prompt at a time, as words."""
    model, processor = load()
    answers = {None: [answer(model, processor, sample) for sample in command.samples]}
    for pipeline, budget in (WHOLE, SMALL):
        with compress(model, pipeline, float(budget) if "." in budget else int(budget)):
            answers[pipeline, budget] = [answer(model, processor, sample) for sample in command.samples]
    return answers


def answer(model, processor, sample):
    inputs = batch_inputs(processor, [sample])
    out = model.generate(**inputs, max_new_tokens=len(sample.answer.split()) + 1, do_sample=False)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split()


def arguments(pipeline, budget):
    return f"base=llava_hf,pipeline={pipeline},budget={budget},pretrained={model_path()},dtype=float32,device_map=cpu"


def test_the_settings_tell_something_apart(ours):
    assert ours[WHOLE] == ours[None]
    changed = sum(a != b for a, b in zip(ours[SMALL], ours[None], strict=True))
    assert 5 <= changed <= len(ours[None]) - 5


@pytest.mark.parametrize(
    ("setting", "flags"), [(WHOLE, []), (SMALL, []), (SMALL, ["--force_simple"])], ids=["whole", "small", "simple"]
)
def test_every_answer_is_the_same(command, ours, setting, flags, request):
    name = request.node.callspec.id
    run = command("mmkv", arguments(*setting), name, *flags)
    assert run.returncode == 0, run.stdout + run.stderr
    texts, results = command.outcome(name)
    answers = [text.split() for text in texts]
    assert answers == ours[setting]
    right = [a == sample.answer.split() for a, sample in zip(answers, command.samples, strict=True)]
    assert results["results"][TASK]["exact_match,none"] == pytest.approx(sum(right) / len(right))


def test_what_was_held_is_in_the_log_and_the_results(command):
    run = command("mmkv", arguments(*SMALL), "held", "--limit", "2")
    _, results = command.outcome("held")
    share = results["throughput"]["avg_mmkv_kept_share"]
    assert 0.06 < share < 0.09  # 40 of 606 tokens, new ones and offsets
    held, full = (results["throughput"][f"avg_mmkv_bytes_{name}"] for name in ("held", "full"))
    assert share == pytest.approx(held / full)
    assert f"{SMALL[0]}, budget 40 tokens: caches held {held:,.0f} of {full:,.0f} bytes ({share:.1%})" in run.stdout


def test_a_wrong_pipeline_is_said_before_weights_are_loaded(command):
    run = command("mmkv", arguments("snappy", "40"), "wrong", "--verbosity", "DEBUG")
    assert run.returncode == 1
    assert "snappy" in run.stderr
    assert "Loading weights" not in run.stdout + run.stderr
