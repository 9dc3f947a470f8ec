"""`Pipeline`: what fits together."""

import pytest
from mmkv_budget import AdaKV, Equal, PyramidKV, SparseMM, Uniform
from mmkv_pipelines import Pipeline
from mmkv_scores import BACON, MixKV, SnapKV, StreamingLLM
from mmkv_select import Select

TABLE = [[1.0, 2.0]]


def test_defaults():
    assert Pipeline() == Pipeline(SnapKV(), Uniform(), Equal(), Select()) == Pipeline.parse("snapkv")
    assert hash(Pipeline()) == hash(Pipeline.parse("snapkv"))


def test_parse_returns_a_pipeline_as_it_is():
    pipeline = Pipeline(score=MixKV(BACON()))
    assert Pipeline.parse(pipeline) is pipeline


def test_names_read_as_in_the_papers():
    expected = Pipeline(score=MixKV(BACON(SnapKV(window=16))), heads=AdaKV())
    assert Pipeline.parse("adakv+mixkv+bacon+snapkv(window=16)") == expected


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("score", Uniform()),
        ("score", Select()),
        ("score", "snapkv"),
        ("layers", Equal()),
        ("layers", AdaKV()),
        ("layers", SparseMM(TABLE)),
        ("layers", SnapKV()),
        ("layers", Select()),
        ("heads", Uniform()),
        ("heads", PyramidKV()),
        ("heads", SnapKV()),
        ("select", Equal()),
    ],
)
def test_a_part_in_the_wrong_place(name, part):
    with pytest.raises(TypeError, match=rf"Pipeline\({name}=\.\.\.\) does not take a {type(part).__name__}"):
        Pipeline(**{name: part})


def test_a_pyramid_would_be_lost_on_a_table():
    with pytest.raises(ValueError, match="SparseMM plans all layers from its table; PyramidKV would be lost"):
        Pipeline(layers=PyramidKV(), heads=SparseMM(TABLE))


def test_a_function_will_do_for_layers():
    def half(candidates, mean_capacity, layer, num_layers):
        return (mean_capacity // 2).minimum(candidates)

    assert Pipeline(layers=half).counts == "static"


@pytest.mark.parametrize("capacities", ["equal", "static"])
def test_a_layer_rule_says_whether_capacities_differ(capacities):
    class Mine:
        def __call__(self, candidates, mean_capacity, layer, num_layers):
            return mean_capacity.minimum(candidates)

    Mine.capacities = capacities
    assert Pipeline(layers=Mine()).counts == capacities
    assert Pipeline(layers=Mine(), heads=AdaKV()).counts == "dynamic"


@pytest.mark.parametrize(
    ("text", "protected"),
    [
        ("snapkv(window=8)", 8),
        ("snapkv+select(recent=4,sinks=2)", 6),
        ("knorm", 0),
        ("mixkv+bacon+snapkv(window=8)", 8),
    ],
)
def test_the_released_pyramid_knows_the_protected_tokens(text, protected):
    """Its regimes depend on them, so a wrong number would silently be another method."""
    with pytest.raises(
        ValueError, match=rf"PyramidKV\(exact=False, window=32\).*protects {protected}.*window={protected}\b"
    ):
        Pipeline.parse(f"pyramidkv(exact=false)+{text}")
    Pipeline.parse(f"pyramidkv(exact=false,window={protected})+{text}")
    Pipeline.parse(f"pyramidkv+{text}")


@pytest.mark.parametrize(
    ("pipeline", "window", "least"),
    [
        (Pipeline(), 32, 33),
        (Pipeline(score=MixKV(BACON(SnapKV(window=8)))), 8, 9),
        (Pipeline(score=StreamingLLM()), 0, 2),
        (Pipeline(score=SnapKV(window=8), select=Select(recent=4, sinks=2)), 8, 7),
        (Pipeline(select=Select(recent=0)), 32, 2),
    ],
)
def test_window_and_least_budget(pipeline, window, least):
    assert pipeline.window == window
    assert pipeline.least_budget == least
