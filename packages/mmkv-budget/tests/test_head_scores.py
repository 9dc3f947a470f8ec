"""The table format, its checks and its reduction to KV heads."""

import json
import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmkv_budget import HeadScores


def write(path, **changes):
    data = {"format": "mmkv-head-scores/1", "model": "m", "kind": "visual", "scores": [[1, 2], [3, 4]], **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return path


def test_round_trip(tmp_path):
    table = HeadScores([[0.1, 1e-9], [3, 1 / 3]], 'a "quoted" mödel', "retrieval")
    table.save(tmp_path / "t.json")
    loaded = HeadScores.load(tmp_path / "t.json")
    assert loaded == table
    assert hash(loaded) == hash(table)
    assert (loaded.source, table.source) == (str(tmp_path / "t.json"), None)
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["format"] == "mmkv-head-scores/1"
    assert pickle.loads(pickle.dumps(loaded)) == table


def test_other_keys_are_ignored(tmp_path):
    assert HeadScores.load(write(tmp_path / "t.json", note="from 1000 pages")).scores == ((1.0, 2.0), (3.0, 4.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "mmkv-head-scores/2"}, "expected format"),
        ({"format": ...}, "expected format"),
        ({"model": ...}, "lacks model"),
        ({"kind": ..., "scores": ...}, "lacks kind, scores"),
        ({"model": 3}, "strings"),
        ({"scores": []}, "list of layers"),
        ({"scores": "12"}, "list of layers"),
        ({"scores": [[]]}, "layer 0"),
        ({"scores": [1, 2]}, "layer 0"),
        ({"scores": [[1, 2], [3]]}, "as many heads"),
        ({"scores": [[0, 0], [0, 0]]}, "zero"),
        ({"scores": [[1, -2], [0, 0]]}, "layer 0, head 1"),
        ({"scores": [[1, 2], [math.nan, 0]]}, "layer 1, head 0"),
        ({"scores": [[1, 2], [math.inf, 0]]}, "layer 1, head 0"),
        ({"scores": [[1, 2], [None, 0]]}, "layer 1, head 0"),
        ({"scores": [[1, 2], [True, 0]]}, "layer 1, head 0"),
    ],
)
def test_bad_files(tmp_path, changes, message):
    path = write(tmp_path / "t.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        HeadScores.load(path)
    assert "t.json" in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_not_a_table(tmp_path, text):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=r"t\.json"):
        HeadScores.load(tmp_path / "t.json")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="per model"):
        HeadScores.load(tmp_path / "t.json")


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.data())
def test_per_kv_head_sums_each_group(layers, heads, group, data):
    row = st.lists(st.integers(0, 99), min_size=heads * group, max_size=heads * group)
    scores = data.draw(st.lists(row, min_size=layers, max_size=layers).filter(lambda rows: any(map(any, rows))))
    want = [[float(sum(r[h * group + g] for g in range(group))) for h in range(heads)] for r in scores]
    got = HeadScores(scores).per_kv_head(layers, heads)
    assert got.dtype == torch.float64
    assert got.tolist() == want


def test_wrong_model():
    table = HeadScores([[1, 2, 3, 4]], model="Qwen/Qwen2-VL-7B-Instruct")
    with pytest.raises(ValueError, match=r"Qwen2-VL-7B.*1 layers of 4 heads, needed are 2 layers of 4 KV.*per model"):
        table.per_kv_head(2, 4)
    for heads in (3, 8, 0):
        with pytest.raises(ValueError, match=f"{heads} KV heads"):
            table.per_kv_head(1, heads)


def test_of():
    table = HeadScores([[1, 2]])
    assert HeadScores.of(table) is table
    assert HeadScores.of([[1, 2]]) == HeadScores.of(torch.tensor([[1.0, 2.0]])) == table
