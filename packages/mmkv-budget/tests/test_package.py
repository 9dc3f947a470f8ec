"""The package as its users see it."""

import subprocess
import sys

import mmkv_budget as package
import pytest
from mmkv_budget import AdaKV, Equal, HeadKV, HeadRule, LayerRule, PyramidKV, SparseMM, TableRule, Uniform


def test_protocols():
    assert isinstance(Uniform(), LayerRule)
    assert isinstance(PyramidKV(), LayerRule)
    assert not isinstance(Uniform(), HeadRule | TableRule)
    assert not isinstance(PyramidKV(), HeadRule | TableRule)
    assert isinstance(Equal(), HeadRule)
    assert isinstance(AdaKV(), HeadRule)
    for rule in (SparseMM([[1]]), HeadKV([[1]])):
        assert isinstance(rule, TableRule)
        assert not isinstance(rule, HeadRule | LayerRule)


@pytest.mark.parametrize("name", sorted(package.__all__))
def test_everything_public_exists_and_is_documented(name):
    assert getattr(package, name).__doc__


def test_imports_with_torch_alone():
    code = (
        "import sys, mmkv_budget; loaded = {name.split('.')[0] for name in sys.modules};"
        "bad = loaded & {'transformers', 'vllm', 'sglang', 'matplotlib'};"
        "ours = {name for name in loaded if name.startswith('mmkv_')};"
        "bad |= ours - {'mmkv_budget', 'mmkv_kernels'}; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


@pytest.mark.parametrize(
    ("make", "setting", "value", "type_"),
    [
        (AdaKV, "normalize", "false", "bool"),
        (AdaKV, "normalize", 0, "bool"),
        (PyramidKV, "exact", None, "bool"),
        (PyramidKV, "window", 8.0, "int"),
        (PyramidKV, "window", True, "int"),
        (SparseMM, "exact", 1, "bool"),
        (HeadKV, "exact", "no", "bool"),
    ],
)
def test_settings_of_another_type(make, setting, value, type_):
    table = ([[1]],) if make in (SparseMM, HeadKV) else ()
    with pytest.raises(TypeError, match=f"{make.__name__} {setting} must be {type_}, got {value!r}"):
        make(*table, **{setting: value})
