"""The text form: parse and str are inverse, and every mistake says what it is."""

import itertools
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmkv_budget import HeadScores, PyramidKV, SparseMM
from mmkv_pipelines import Pipeline, find, methods
from mmkv_pipelines.text import _literal, _value, split
from mmkv_scores import KeyDiff, MixKV, SnapKV
from mmkv_select import Select

TABLE = "[[1.0,2.0],[0.5,0.25]]"
FACTORY = {m.name: m.factory for m in methods()}
BASES = [m.name for m in methods() if m.kind == "score"]
EVIDENCE, ATTENTION = {"snapkv", "tova"}, {"snapkv", "tova", "h2o"}


def named(name):
    return f"{name}(table={TABLE})" if name in ("sparsemm", "headkv") else name


@pytest.mark.parametrize("base", BASES)
def test_every_combination_of_methods(base):
    """Which fit together is said here once more; those that do come back equal from their text, in any order."""
    fitting = 0
    for wraps, layers, heads, select in itertools.product(
        ((), ("bacon",), ("mixkv",), ("mixkv", "bacon")),
        ("uniform", "pyramidkv"),
        ("equal", "adakv", "sparsemm", "headkv"),
        ((), ("select",)),
    ):
        names = [layers, heads, *wraps, base, *select]
        text = "+".join(map(named, names))
        fits = ("bacon" not in wraps or base in EVIDENCE) and ("mixkv" not in wraps or base in ATTENTION)
        if not fits or (layers == "pyramidkv" and heads in ("sparsemm", "headkv")):
            with pytest.raises(ValueError, match=r"has none|not an attention score|would be lost"):
                Pipeline.parse(text)
            continue
        pipeline = Pipeline.parse(text)
        assert Pipeline.parse("+".join(map(named, reversed(names)))) == pipeline
        assert Pipeline.parse(str(pipeline)) == pipeline
        innermost = pipeline.score
        for wrap in wraps:
            assert type(innermost) is FACTORY[wrap]
            innermost = innermost.base
        assert type(innermost) is FACTORY[base]
        assert (type(pipeline.layers), type(pipeline.heads)) == (FACTORY[layers], FACTORY[heads])
        fitting += 1
    assert fitting >= 12


odd = st.integers(0, 8).map(lambda x: 2 * x + 1)
share = st.floats(0, 1)
rows = st.lists(st.lists(share, min_size=2, max_size=2), min_size=1, max_size=3)
tables = rows.filter(lambda table: any(any(row) for row in table)).map(lambda t: tuple(map(tuple, t)))
SETTINGS = {
    "snapkv": {
        "window": st.integers(1, 64), "kernel": odd,
        "pooling": st.sampled_from(["avg", "max"]), "group": st.sampled_from(["mean", "max"]),
    },
    "tova": {"kernel": odd, "across_heads": st.booleans()},
    "h2o": {"corrected": st.booleans()},
    "streamingllm": {"sinks": st.integers(0, 9)},
    "random": {"seed": st.integers(-(2**40), 2**40)},
    "bacon": {
        "preset": st.sampled_from(["release", "paper", "rel"]), "terms": st.sampled_from(["e", "el", "t", "tle"]),
        "reach": odd, "depth": st.integers(0, 9), "gamma": st.floats(0, 1e6), "rho": st.floats(1e-30, 10),
        "gate": st.sampled_from([None, True, False]),
    },
    "mixkv": {"redundancy": st.one_of(st.just("online"), st.integers(0, 1), share, tables)},
    "pyramidkv": {"beta": st.one_of(st.integers(1, 50), st.floats(1, 50)), "exact": st.booleans(), "window": odd},
    "adakv": {"floor": share, "mode": st.sampled_from(["floor", "blend"]), "normalize": st.booleans()},
    "sparsemm": {"table": tables, "ratio": share, "exact": st.booleans()},
    "headkv": {"table": tables, "beta": st.floats(1, 100), "exact": st.booleans()},
    "select": {
        "recent": st.one_of(st.none(), st.integers(0, 64)), "sinks": st.integers(0, 9),
        "protect": st.sampled_from([None, "text", "image", "video"]), "granularity": st.integers(1, 64),
    },
}  # fmt: skip


@st.composite
def pipelines(draw):
    """A pipeline of any methods with some of their settings, built in code."""

    def part(name, *base):
        known = SETTINGS.get(name, {})
        chosen = [key for key in known if key == "table" or draw(st.booleans())]
        return FACTORY[name](*base, **{key: draw(known[key]) for key in chosen})

    base = draw(st.sampled_from(BASES))
    score = part(base)
    if base in EVIDENCE and draw(st.booleans()):
        score = part("bacon", score)
    if base in ATTENTION and draw(st.booleans()):
        score = part("mixkv", score)
    heads = draw(st.sampled_from(["equal", "adakv", "sparsemm", "headkv"]))
    layers = part(draw(st.sampled_from(["uniform", "pyramidkv"])) if heads in ("equal", "adakv") else "uniform")
    select = part("select")
    if isinstance(layers, PyramidKV) and not layers.exact:
        layers = replace(layers, window=(score.window if select.recent is None else select.recent) + select.sinks)
    return Pipeline(score, layers, part(heads), select)


@settings(deadline=None, max_examples=400)
@given(pipelines(), st.randoms())
def test_round_trip(pipeline, random):
    text = str(pipeline)
    assert Pipeline.parse(text) == pipeline
    assert str(Pipeline.parse(text)) == text
    parts = split(text, "+")
    random.shuffle(parts)
    spaced = " + ".join(f" {part} " for part in parts)
    assert Pipeline.parse(spaced) == pipeline
    assert str(Pipeline.parse(spaced.upper() if "(" not in spaced else spaced)) == text


@pytest.mark.parametrize(
    ("source", "canonical"),
    [
        ("snapkv", "snapkv"),
        ("uniform+equal+select", "snapkv"),
        ("bacon+mixkv+adakv", "adakv+mixkv+bacon"),
        ("snapkv( window = 16 , kernel=7 ) + pyramidkv(beta=10)", "pyramidkv(beta=10)+snapkv(window=16,kernel=7)"),
        ("bacon(gate=False,terms=elt)", "bacon(gate=False)"),
        ("bacon(preset='paper')", "bacon(preset=paper)"),
        ("snapkv(16)", "snapkv(window=16)"),
        ("mixkv(redundancy=[[0,1],[0.5,0.5]])", "mixkv(redundancy=((0.0,1.0),(0.5,0.5)))"),
        ("sparsemm([[1,2]])", "sparsemm(table=[[1.0,2.0]])"),
        ("SnapKV+AdaKV", "adakv"),
        ("select(protect=image,sinks=4)+random(seed=-3)", "random(seed=-3)+select(sinks=4,protect=image)"),
    ],
)
def test_canonical_form(source, canonical):
    assert str(Pipeline.parse(source)) == canonical


@pytest.mark.parametrize("name", ["table.json", "with space.json", "a+b(1),[2]=x|y.json", "it's.json", "{.json", "1"])
def test_a_table_is_shown_as_the_path_it_came_from(tmp_path, name):
    path = tmp_path / name
    HeadScores([[1, 2], [3, 4]], model="m", kind="visual").save(path)
    pipeline = Pipeline(heads=SparseMM(str(path), ratio=0.2))
    assert Pipeline.parse(str(pipeline)) == pipeline
    assert "3.0" not in str(pipeline)
    if name == "table.json":
        assert str(pipeline) == f"sparsemm(table={path},ratio=0.2)"
        assert Pipeline.parse(f"sparsemm({path},ratio=0.2)") == pipeline


numbers = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
plain = st.one_of(st.text(max_size=8), numbers, st.booleans(), st.none())


@settings(deadline=None, max_examples=500)
@given(st.recursive(plain, lambda x: st.lists(x, max_size=3) | st.tuples(x), max_leaves=6))
def test_values_survive(value):
    """Also strings of brackets, quotes, separators and backslashes."""
    text = _literal(value)
    assert _value(text) == value
    for separator in ",+|":
        assert split(f"f({text})", separator) == [f"f({text})"]
    assert split(f"{text},{text}", ",") == [text, text]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("snapvk", "unknown method 'snapvk'; did you mean 'snapkv'"),
        ("adakv+bacan", "unknown method 'bacan'; did you mean 'bacon'"),
        ("zzzzzzzz", "known are snapkv, tova"),
        ("snapkv+tova", "names two score methods"),
        ("adakv+headkv([[1]])", "names two heads methods"),
        ("uniform+pyramidkv", "names two layers methods"),
        ("select+select", "names two select methods"),
        (f"pyramidkv+sparsemm({TABLE})", "PyramidKV would be lost"),
        ("mixkv+keydiff", "KeyDiff is not an attention score"),
        ("bacon+keydiff", "KeyDiff has none"),
        ("mixkv+mixkv", "MixKV is not an attention score"),
        ("bacon+bacon", "BACON has none"),
        ("snapkv(windows=4)", "snapkv: .*windows.*; its settings are window, kernel, pooling, group"),
        ("snapkv(1,5,avg,mean,9)", "snapkv: .*its settings are window"),
        ("keydiff(x=1)", "its settings are none"),
        ("snapkv(window=4,window=8)", "snapkv.* window twice"),
        ("snapkv(window=big)", "SnapKV: window must be int, got 'big'; its settings are window, kernel"),
        ("snapkv(window=0)", "at least one query"),
        ("snapkv(window=16.5)", "window must be int, got 16.5"),
        ("snapkv(kernel=5.0)", "kernel must be int, got 5.0"),
        ("select(recent=1.5)", r"recent must be int \| None, got 1.5"),
        ("select(sinks=many)", "sinks must be int, got 'many'"),
        ("streamingllm(sinks=a)", "StreamingLLM: sinks must be int, got 'a'"),
        ("streamingllm(sinks=1.5)", "StreamingLLM: sinks must be int, got 1.5"),
        ("streamingllm(sinks=none)", "StreamingLLM: sinks must be int, got None"),
        ("random(seed=1.5)", "Random: seed must be int, got 1.5"),
        ("mixkv(redundancy=true)", "MixKV: redundancies are"),
        ("snapkv(kernel=4)", "odd and positive"),
        ("adakv(floor=2)", "floor must be"),
        ("adakv(floor=half)", "adakv: .*floor must be a number"),
        ("sparsemm", "sparsemm: .*table"),
        ("mixkv(online)", r"mixkv takes settings by name, as in mixkv\(key=value\)"),
        ("snapkv(window=4", "brackets or quotes do not match"),
        ("snapkv(window='4)", "brackets or quotes do not match"),
        ("snapkv)window(", "cannot read|do not match"),
        ("snapkv(window=4)x", "cannot read"),
        ("", "a name is missing in ''; known are snapkv, tova"),
        ("  ", "a name is missing"),
        ("adakv+", r"a name is missing in 'adakv\+'"),
        ("adakv++bacon", r"a name is missing in 'adakv\+\+bacon'"),
        ("adakv bacon", "cannot read 'adakv bacon'"),
        ("lazy(plan.json) | adakv", r"2 stages, and a Pipeline is the last one; use Stages\.parse"),
        ("adsc+adakv", r"adsc is a stage of its own: write it as in adsc \| snapkv"),
    ],
)
def test_mistakes(source, message):
    with pytest.raises(ValueError, match=message):
        Pipeline.parse(source)


def test_a_table_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        Pipeline.parse("sparsemm(nowhere.json)")


def test_parts_that_are_not_registered_are_shown_by_repr():
    class Mine(KeyDiff):
        pass

    assert str(Pipeline(score=Mine(), select=Select(sinks=1))).endswith("Mine()+select(sinks=1)")
    assert str(Pipeline(score=MixKV(redundancy=0.5))) == "mixkv(redundancy=0.5)"


FIELDS = [(m.name, f) for m in methods() for f in fields(m.factory) if f.compare]
SWITCHES = [(name, f.name, f.default) for name, f in FIELDS if "bool" in str(f.type)]


def test_the_switches_are_found():
    assert {(name, setting) for name, setting, _ in SWITCHES} == {
        ("tova", "across_heads"),
        ("h2o", "corrected"),
        ("bacon", "gate"),
        ("pyramidkv", "exact"),
        ("adakv", "normalize"),
        ("sparsemm", "exact"),
        ("headkv", "exact"),
    }


@pytest.mark.parametrize(("name", "setting", "default"), SWITCHES)
def test_a_switch_in_any_case_is_a_bool(name, setting, default):
    table = f"table={TABLE}," if name in ("sparsemm", "headkv") else ""
    place = {"score": "score", "wrap": "score", "layers": "layers", "heads": "heads"}[find(name).kind]
    for text in ("true", "True", "TRUE", "false", "False", "fAlSe"):
        pipeline = Pipeline.parse(f"{name}({table}{setting}={text})")
        assert getattr(getattr(pipeline, place), setting) is (text.lower() == "true")
        assert Pipeline.parse(str(pipeline)) == pipeline
    for text in ("no", "0", "1", "'false'", *(["none"] if default is not None else [])):
        with pytest.raises(ValueError, match=f"{name}: .* {setting} must be bool"):
            Pipeline.parse(f"{name}({table}{setting}={text})")


@pytest.mark.parametrize("text", ["none", "None", "NONE"])
def test_none_in_any_case(text):
    assert Pipeline.parse(f"bacon(gate={text})+select(recent={text},protect={text})") == Pipeline.parse("bacon")


@pytest.mark.parametrize("source", [SnapKV(), None, ["snapkv"], Pipeline])
def test_parse_takes_text(source):
    with pytest.raises(
        TypeError, match=rf"a text or a Pipeline, not {type(source).__name__}.*Pipeline\(score=\.\.\.\)"
    ):
        Pipeline.parse(source)
