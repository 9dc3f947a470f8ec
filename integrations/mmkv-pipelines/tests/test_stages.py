"""Stages in text and in code: read, printed, refused."""

import pytest
from mmkv_layershare import LazyPlan
from mmkv_pipelines import Pipeline, Stages, methods
from mmkv_prune import ADSC, FastV, VisionZip

PLAN = LazyPlan(4, ((0, 1), (2, 3)))
METHODS = [(m.kind, m.factory()) for m in methods() if m.kind in ("reduce", "prune")]
CANONICAL = (
    "visionzip(dominant=9) | adsc(layers=(2,),stride=2) | lazy(num_layers=4,blocks=((0,1),(2,3))) | adakv+mixkv+bacon"
)


@pytest.fixture
def plan(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_the_canonical_text_whatever_the_order(plan):
    stages = Stages(VisionZip(dominant=9), ADSC(layers=(2,), stride=2), PLAN, Pipeline.parse("adakv+mixkv+bacon"))
    pieces = ["visionzip(dominant=9)", "adsc(layers=[2],stride=2)", f"lazy({plan})", "bacon+adakv+mixkv"]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)):
        found = Stages.parse(" | ".join(pieces[i] for i in order))
        assert found == stages
        assert str(found) == CANONICAL
    assert Stages.parse(CANONICAL) == stages


@pytest.mark.parametrize(
    "text",
    ["snapkv", "adakv+bacon", "adsc", "fastv | snapkv", "lazy(preset=llava-1.5-7b)", "prumerge", "visionzip | adakv"],
)
def test_stages_may_be_missing(text):
    found = Stages.parse(text)
    assert str(Stages.parse(str(found))) == str(found)
    given = [found.reduce, found.prune, found.share, found.evict]
    assert sum(part is not None for part in given) == text.count("|") + 1


def test_every_method_before_the_pipeline_has_a_name():
    assert [type(method).__name__ for kind, method in METHODS if kind == "reduce"] == [
        "VisionZip",
        "PruMerge",
        "PruMergePlus",
        "KeepUniform",
        "KeepRandom",
    ]


@pytest.mark.parametrize(("kind", "method"), METHODS, ids=lambda x: type(x).__name__)
def test_every_method_before_the_pipeline_is_read_back(kind, method):
    stages = Stages(**{kind: method})
    assert str(stages) == type(method).__name__.lower()
    assert Stages.parse(str(stages)) == stages


def test_what_is_made_already_is_taken_as_it_is():
    pipeline = Pipeline.parse("adakv")
    assert Stages.parse(pipeline) == Stages(evict=pipeline)
    stages = Stages(prune=FastV())
    assert Stages.parse(stages) is stages


def test_a_plan_in_another_mode(plan):
    assert Stages.parse(f"lazy({plan},mode=global)").share == LazyPlan(4, ((0, 1), (2, 3)), "global")
    assert Stages.parse("lazy(preset=llava-1.5-7b,mode=global)").share.mode == "global"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("snapkv | adakv", "two stages that evict"),
        ("adsc | fastv", "two stages that prune"),
        ("visionzip | prumerge | adakv", "two stages that reduce"),
        ("| snapkv", "a stage is missing"),
        ("", "a stage is missing"),
        ("adsk | snapkv", "did you mean 'adsc'"),
        ("visonzip | snapkv", "did you mean 'visionzip'"),
        ("visionzip(tokens=64) | snapkv", "visionzip: .* its settings are dominant, contextual"),
        ("keepuniform(keep=0) | snapkv", "KeepUniform keep"),
        ("visionzip+snapkv", r"visionzip is a stage of its own: write it as in visionzip \| snapkv"),
        ("adsc(strid=3) | snapkv", "adsc: .* its settings are layers, stride"),
        ("adsc(stride=0) | snapkv", "stride"),
        ("adsc+snapkv", r"adsc is a stage of its own: write it as in adsc \| snapkv"),
        ("lazy(a.json,b.json)", "the path of one plan"),
        ("lazy(a.json,preset=llava-1.5-7b)", "a path or a preset, not both"),
        ("lazy(preset=llava-1.5-7b,num_layers=3)", "beside a plan only mode can be given, not num_layers"),
        ("lazy(preset=llava)", "there is no plan 'llava'; known are llava-1.5-7b"),
        ("lazy(blocks=[[0,1]])", "lazy: .* 'num_layers'"),
        ("adsc(layers=[1]) | lazy(num_layers=4,blocks=[[0,1]])", "layer 1, which borrows from layer 0"),
    ],
)
def test_mistakes(text, message):
    with pytest.raises(ValueError, match=message):
        Stages.parse(text)


def test_what_is_no_stage(tmp_path):
    with pytest.raises(FileNotFoundError, match="mmkv profile-layers"):
        Stages.parse(f"lazy({tmp_path / 'none.json'})")
    with pytest.raises(TypeError, match="a text, a Pipeline or Stages, not int"):
        Stages.parse(3)
    with pytest.raises(TypeError, match=r"Stages\(prune=...\) does not take a Pipeline"):
        Stages(prune=Pipeline())
    for name, part in (("reduce", FastV()), ("reduce", PLAN), ("prune", VisionZip()), ("share", VisionZip())):
        with pytest.raises(TypeError, match=rf"Stages\({name}=...\) does not take a {type(part).__name__}"):
            Stages(**{name: part})
    with pytest.raises(ValueError, match="one stage at least"):
        Stages()


def test_a_block_may_begin_where_something_is_dropped():
    assert Stages(prune=ADSC(layers=(1,)), share=LazyPlan(4, ((1, 3),))).share == LazyPlan(4, ((1, 3),))
