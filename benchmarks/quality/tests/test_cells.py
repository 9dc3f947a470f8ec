"""Names are stable, texts say what the rule says."""

import pytest
from mmkv_budget import AdaKV, SparseMM
from mmkv_hf import Pipeline
from mmkv_quality import rule
from mmkv_quality.cells import Cell, Method, Setting, by_setting


def test_the_rule():
    assert rule.scaled_window(2880) == 32
    assert rule.scaled_window(576) == rule.WINDOW == 8  # 6.4, up to a power of two
    assert rule.scaled_window(2881) == 64
    assert rule.budgets(32) == (64, 128, 256, 512)
    assert rule.BUDGETS == (16, 32, 64, 128)


@pytest.mark.parametrize(
    ("published", "layers", "found"),
    [
        ((4, 20), 32, (4, 20)),
        ((4, 20), 6, (1, 4)),
        ((3, 7, 16), 6, (1, 2, 3)),
        ((8, 16, 24), 4, (1, 2, 3)),
        ((2,), 4, (1,)),
    ],
)
def test_layers_are_scaled(published, layers, found):
    assert rule.scaled_layers(published, layers) == found


def test_a_setting_is_its_key():
    setting = Setting("base-seed0", "pair", "vertical", 24, "dense", "before")
    assert setting.key == "base-seed0/pair/vertical/suffix24/dense/before"
    assert Setting.of(setting.key) == setting
    for bad in ("", "a/b/c/d/e/f", "base/pair/vertical/suffix24/dense"):
        with pytest.raises(ValueError, match="is not the key of a setting"):
            Setting.of(bad)


@pytest.mark.parametrize(
    ("method", "name", "text"),
    [
        (Method(), "snapkv", "snapkv(window=8)"),
        (Method(share="adakv", wraps=("mixkv", "bacon")), "adakv+mixkv+bacon", "adakv+mixkv+bacon+snapkv(window=8)"),
        (Method("h2o", "pyramidkv", ("mixkv",)), "pyramidkv+mixkv+h2o", "pyramidkv+mixkv+h2o+select(recent=8)"),
        (Method("keydiff", "adakv"), "adakv+keydiff", "adakv(normalize=false)+keydiff+select(recent=8)"),
        (Method(wraps=("bacon(depth=2)",)), "bacon(depth=2)", "bacon(depth=2)+snapkv(window=8)"),
        (Method(stages=("fastv", "vla")), "fastv | vla | snapkv", "snapkv(window=8)"),
    ],
)
def test_names_and_texts(method, name, text):
    assert method.name == name
    assert method.text(8) == text
    assert Pipeline.parse(text).select.protected is not None
    cell = Cell(Setting("m"), method, 64)
    assert cell.key == f"m/value/horizontal/suffix8/normal/after|{name}|64|w8"


def test_every_method_protects_as_many_tokens():
    for method in (Method(), Method("tova"), Method("random", "adakv"), Method("knorm", "pyramidkv")):
        pipeline = Pipeline.parse(method.text(8))
        recent = pipeline.window if pipeline.select.recent is None else pipeline.select.recent
        assert recent == 8
        assert pipeline.least_budget == 9


def test_adakv_normalises_everywhere_but_with_negative_scores():
    shown = {score: Pipeline.parse(Method(score, "adakv").text(8)).heads for score in ("snapkv", "h2o", "knorm")}
    assert shown == {"snapkv": AdaKV(), "h2o": AdaKV(), "knorm": AdaKV(normalize=False)}


def test_a_table_with_any_path(tmp_path):
    table = tmp_path / "a, (b)='c' + d" / "head scores.json"
    table.parent.mkdir()
    table.write_text('{"format": "mmkv-head-scores/1", "model": "m", "kind": "visual", "scores": [[1, 2]]}')
    heads = Pipeline.parse(Method(share="sparsemm").text(8, table)).heads
    assert isinstance(heads, SparseMM)
    assert heads.table.scores == ((1.0, 2.0),)


def test_cells_of_a_setting_keep_their_order():
    one, other = Setting("a"), Setting("b")
    cells = [Cell(one), Cell(other), Cell(one, Method(), 16)]
    assert by_setting(cells) == {one: (cells[0], cells[2]), other: (cells[1],)}
