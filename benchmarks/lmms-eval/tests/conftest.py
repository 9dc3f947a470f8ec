import json
import os
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SHIM = Path(__file__).parent / "shim"
if find_spec("torchvision") is not None:  # before anything imports transformers
    runpy.run_path(str(SHIM / "sitecustomize.py"))

from mmkv_lmms_eval.pages import TASK, write_task  # noqa: E402
from mmkv_testbed import make_samples  # noqa: E402


class Command:
    """`lmms-eval` on generated pages, offline, one prompt at a time."""

    def __init__(self, work, samples):
        self.work, self.samples = work, samples
        write_task(work / "pages", samples)
        self.env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(SHIM), os.environ.get("PYTHONPATH", "")]),
            "HF_HOME": str(work / "hf"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        }

    def __call__(self, model, arguments, out, *flags):
        """The finished process; what it wrote is read by `outcome(out)`."""
        command = [sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", arguments, "--tasks", TASK]
        command += ["--include_path", str(self.work / "pages"), "--device", "cpu", "--batch_size", "1"]
        command += ["--log_samples", "--output_path", str(self.work / out), *flags]
        return subprocess.run(command, env=self.env, cwd=self.work, capture_output=True, text=True, check=False)

    def outcome(self, out):
        """Every answer in the order of the pages, and the file of results."""
        (log,), (results,) = ((self.work / out).rglob(name) for name in ("*_samples_*.jsonl", "*_results.json"))
        lines = sorted(map(json.loads, log.read_text().splitlines()), key=lambda line: line["doc_id"])
        return [line["filtered_resps"] for line in lines], json.loads(results.read_text())


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    return Command(tmp_path_factory.mktemp("lmms"), make_samples(40, seed=3))
