import subprocess
import sys

import mmkv_kernels


def test_exports():
    assert all(callable(getattr(mmkv_kernels, name)) for name in mmkv_kernels.__all__)


def test_imports_with_torch_alone():
    code = (
        "import sys, torch; before = set(sys.modules); import mmkv_kernels;"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before};"
        "assert new <= {'mmkv_kernels'} | set(sys.stdlib_module_names), new"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
