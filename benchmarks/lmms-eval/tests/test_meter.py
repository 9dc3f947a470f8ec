import pytest
import torch
from mmkv_lmms_eval import metered
from mmkv_pipelines import Budget, Pipeline
from mmkv_testbed import batch_inputs, load, make_samples

SNAPKV = Pipeline.parse("snapkv")


@pytest.fixture(scope="module")
def model():
    return load()[0]


@pytest.fixture(scope="module")
def inputs():
    return batch_inputs(load()[1], make_samples(1))


def test_it_adds_up_what_the_caches_held(model, inputs):
    stock = model.generate
    with metered(model, SNAPKV, Budget.of(64)) as meter:
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
            last = meter.session.report()
    assert meter.calls == [(last.bytes_held, last.bytes_full)] * 2
    assert meter.total == (2 * last.bytes_held, 2 * last.bytes_full)
    assert 0 < last.bytes_held < last.bytes_full
    assert model.generate == stock


def test_the_first_error_is_kept_and_raised_again(model, inputs):
    with metered(model, SNAPKV, Budget.of(0.01)) as meter:  # 6 tokens of the prompt, fewer than the window
        with pytest.raises(ValueError, match="least") as first:
            model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(ValueError, match="least") as second:
            model.generate(input_ids=torch.ones(1, 64, dtype=torch.long), max_new_tokens=2)
    assert meter.error is first.value is second.value
    assert not meter.calls
