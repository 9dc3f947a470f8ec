import pytest
from mmkv_lmms_eval import read_settings
from mmkv_pipelines import Budget, Pipeline


def test_ours_are_taken_and_the_rest_is_left():
    settings, rest = read_settings("pretrained=a/b,base=qwen2_vl,pipeline=adakv+mixkv+bacon,budget=256,max_pixels=9")
    assert settings.base == "qwen2_vl"
    assert settings.pipeline == Pipeline.parse("adakv+mixkv+bacon")
    assert settings.budget == Budget.of(256)
    assert rest == "pretrained=a/b,max_pixels=9"


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_commas_in_parentheses_belong_to_the_pipeline(quote):
    pipeline = "adakv+snapkv(window=8,kernel=5)"
    settings, rest = read_settings(f"base=b,pipeline={quote}{pipeline}{quote},budget=64,dtype=float32")
    assert settings.pipeline == Pipeline.parse(pipeline)
    assert rest == "dtype=float32"


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("budget=64", Budget.of(64)),
        ("budget=0.5", Budget.of(0.5)),
        ("budget=1.0", Budget.of(1.0)),
        ("budget_bytes=4096", Budget(bytes=4096)),
    ],
)
def test_budgets(text, budget):
    assert read_settings(f"base=b,pipeline=snapkv,{text}")[0].budget == budget


def test_json_of_the_base_stays_whole():
    rest = 'kwargs={"a":1,"b":[2,3]},name="x,y"'
    assert read_settings(f"base=b,pipeline=snapkv,{rest},budget=64")[1] == rest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipeline=snapkv,budget=64", "base is missing"),
        ("base=b,budget=64", "pipeline is missing"),
        ("base=b,pipeline,budget=64", "pipeline is missing"),
        ("base=b,pipeline=snapkv", "give either budget"),
        ("base=b,pipeline=snapkv,budget=64,budget_bytes=9", "give either budget"),
        ("base=b,pipeline=snapkv,budget=64,budget=65", "budget is given twice"),
        ("base=b,pipeline=snapkv,budget=many", "a budget is a number of tokens"),
        ("base=b,pipeline=snapkv,budget=2.5", "2.5"),
        ("base=b,pipeline=snapkv,budget=32", "the least that works is 33"),
        ("base=b,pipeline=snappy,budget=64", "snappy"),
        ("base=b,pipeline=snapkv(window=8,budget=64", "do not match"),
    ],
)
def test_what_is_wrong_is_said(text, message):
    with pytest.raises(ValueError, match=message):
        read_settings(text)
