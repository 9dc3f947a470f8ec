from types import SimpleNamespace

import pytest
from mmkv_testbed import batch_inputs, load, make_samples

pytest.importorskip("lmms_eval")

from lmms_eval.api.model import lmms
from lmms_eval.models import get_model
from mmkv_lmms_eval.model import Mmkv, MmkvChat, compressed
from mmkv_lmms_eval.settings import read_settings


class Base(lmms):
    """A model of lmms-eval that answers with the number of new tokens."""

    def __init__(self, model=None, inputs=None):
        super().__init__()
        self.model, self.inputs = model, inputs

    def generate_until(self, requests):
        return [self.model.generate(**self.inputs, max_new_tokens=2).shape[1] for _ in requests]

    def generate_until_multi_round(self, requests):
        return self.generate_until(requests)

    def loglikelihood(self, requests):
        return [(0.0, True)] * len(requests)


class Quiet(Base):
    """As several of lmms-eval's own: an error becomes an empty answer."""

    def generate_until(self, requests):
        answers = []
        for request in requests:
            try:
                answers += super().generate_until([request])
            except Exception:
                answers.append("")
        return answers


class Idle(Base):
    def generate_until(self, requests):
        return ["made up"] * len(requests)


@pytest.fixture(scope="module")
def model():
    return load()[0]


@pytest.fixture(scope="module")
def inputs():
    return batch_inputs(load()[1], make_samples(1))


def settings(budget="64"):
    return read_settings(f"base=fake,pipeline=snapkv,budget={budget}")[0]


def test_lmms_eval_finds_both_forms():
    assert get_model("mmkv") is MmkvChat
    assert get_model("mmkv", force_simple=True) is Mmkv


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("base=qwen2vl,pipeline=snapkv,budget=64", "did you mean .*qwen2_vl"),
        ("base=xyzzy,pipeline=snapkv,budget=64", "lmms-eval models --aliases"),
        ("base=mmkv,pipeline=snapkv,budget=64", "no model of lmms-eval that could be wrapped"),
        ("base=llava_hf,pipeline=snappy,budget=64", "snappy"),
    ],
)
def test_wrong_arguments_are_refused_before_any_model_is_made(arguments, message, monkeypatch):
    monkeypatch.setattr("mmkv_lmms_eval.model.get_model", lambda *_: pytest.fail("a model was looked up"))
    with pytest.raises(ValueError, match=message):
        MmkvChat.create_from_arg_string(f"{arguments},pretrained=nowhere", {"device": "cpu"})


def test_the_base_gets_its_own_arguments(model, monkeypatch):
    made = []

    class Recorded(Base):
        def __init__(self, **given):
            super().__init__(model)
            made.append(given)

    monkeypatch.setattr("mmkv_lmms_eval.model._base_class", lambda name, force_simple: Recorded)
    arguments = "base=fake,pretrained=folder,pipeline=snapkv(window=8,kernel=5),use_cache=true,budget=64"
    lm = MmkvChat.create_from_arg_string(arguments, {"batch_size": 1, "device": None})
    assert type(lm) is Recorded
    assert made == [{"pretrained": "folder", "use_cache": True, "batch_size": 1}]


def test_answers_come_from_a_session_that_ends(model, inputs):
    stock = model.generate
    lm = compressed(Base(model, inputs), settings())
    assert lm.generate_until([1, 2]) == lm.generate_until_multi_round([1, 2]) == [inputs["input_ids"].shape[1] + 2] * 2
    assert model.generate == stock
    assert lm.generate_until([]) == []


def test_an_error_that_the_base_swallows_ends_the_run(model, inputs):
    lm = compressed(Quiet(model, inputs), settings("0.01"))
    with pytest.raises(RuntimeError, match=r"fake could not answer from a compressed cache: .*least"):
        lm.generate_until([1, 2])


def test_a_base_that_does_not_generate(model, inputs):
    with pytest.raises(RuntimeError, match="nothing was compressed"):
        compressed(Idle(model, inputs), settings()).generate_until([1])


@pytest.mark.parametrize("other", [None, SimpleNamespace(generate=print)])
def test_a_base_without_a_transformers_model(other):
    with pytest.raises(ValueError, match="base=fake has no transformers model"):
        compressed(Base(other), settings())


def test_loglikelihood_is_refused(model):
    with pytest.raises(NotImplementedError, match="generate_until"):
        compressed(Base(model), settings()).loglikelihood([])
