"""The command line: clear errors before anything runs, and interruptions that lose nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mmkv_quality import worlds
from mmkv_quality.cells import Setting
from mmkv_quality.cli import SEED, app
from mmkv_quality.grid import make_plan
from mmkv_quality.measure import measure
from mmkv_quality.worlds import make_block
from typer.testing import CliRunner

SMALL = "small-seed0"
COUNT = 8
SETTING = Setting(SMALL)
FILE = f"{SMALL}_value_horizontal_suffix8_normal_after.000.jsonl"


def invoke(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments])


def said(result):
    assert result.exit_code == 1
    return " ".join(result.stderr.split())


@pytest.fixture
def copied(tmp_path):
    folder = tmp_path / "copied"
    shutil.copytree(worlds.find(SMALL), folder)
    return folder


def test_an_unknown_model(tmp_path):
    error = said(invoke("run", "--out", tmp_path, "--models", "smal-seed0"))
    assert error.startswith("error: no model 'smal-seed0': did you mean 'small-seed0'?")


def test_missing_weights(tmp_path, copied):
    (copied / "model.safetensors").unlink()
    assert "has no weights: there is no *.safetensors in" in said(
        invoke("run", "--out", tmp_path / "o", "--models", copied)
    )


def test_broken_weights(tmp_path, copied):
    (copied / "model.safetensors").write_bytes(b"nonsense")
    assert "cannot be loaded" in said(invoke("run", "--out", tmp_path / "o", "--models", copied))
    assert not (tmp_path / "o" / "made.json").exists()  # else the mended weights would be other ones


def test_a_processor_of_another_model(tmp_path, copied):
    config = json.loads((copied / "config.json").read_text())
    config["image_token_id"] = config["image_token_index"] = 7
    (copied / "config.json").write_text(json.dumps(config))
    error = said(invoke("run", "--out", tmp_path / "o", "--models", copied))
    assert "the processor does not belong to the model" in error


def test_weights_are_told_apart_by_what_answers(copied):
    digest = worlds.weights_digest(copied)
    for name in ("training.json", "accuracy.json", worlds.TABLE):
        (copied / name).write_text("{}")
    assert worlds.weights_digest(copied) == digest
    (copied / "generation_config.json").write_text("{}")
    assert worlds.weights_digest(copied) != digest


def test_a_quick_run_has_a_model_of_its_own(tmp_path):
    for name, quick in ((SMALL, ("--quick",)), ("base-seed0", ())):
        result = invoke("run", "--dry-run", *quick, "--samples", 2, "--out", tmp_path, "--pipelines", "snapkv")
        assert result.exit_code == 0
        assert name in result.stdout
        assert (SMALL in result.stdout) == bool(quick)


def test_unknown_tasks_and_pipelines(tmp_path):
    assert "did you mean 'describe'?" in said(invoke("run", "--out", tmp_path, "--tasks", "descibe"))
    assert "did you mean 'adakv+bacon'?" in said(invoke("run", "--out", tmp_path, "--pipelines", "adakv+beacon"))


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    error = said(invoke("run", "--quick", "--out", tmp_path / "file", "--models", SMALL))
    assert "cannot write to the results folder" in error


def test_head_scores_that_are_not_there(tmp_path):
    for bad in (f"{SMALL}=nowhere.json", "nothing", f"other={__file__}"):
        assert "--head-scores is MODEL=PATH" in said(
            invoke("run", "--out", tmp_path, "--models", SMALL, "--head-scores", bad)
        )


def test_no_results(tmp_path):
    assert "holds no results" in said(invoke("report", tmp_path))


def test_dry_run_measures_nothing(tmp_path):
    result = invoke(
        "run", "--dry-run", "--quick", "--out", tmp_path / "work", "--models", SMALL, "--pipelines", "snapkv"
    )
    assert result.exit_code == 0
    assert "CPU hours" in result.stdout
    assert "not an attention score" in result.stdout
    assert not (tmp_path / "work").exists()


def command(out):
    arguments = ("--quick", "--models", SMALL, "--samples", str(COUNT), "--workers", "1", "--out", str(out))
    return [sys.executable, "-m", "mmkv_quality", "run", *arguments]


def children(pid):
    return [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]


def wait_for(condition, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
def test_a_killed_run_goes_on_and_loses_no_finished_cell(tmp_path, checkpoint):
    file = tmp_path / "cells" / FILE
    with subprocess.Popen(command(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_for(lambda: file.is_file() and file.read_text().count("\n") >= 3)
        below = children(process.pid)
        process.send_signal(signal.SIGKILL)
    assert below
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below), 30)
    killed = file.read_text()
    finished = killed[: killed.rfind("\n") + 1]
    subprocess.run(command(tmp_path), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    assert file.read_text().startswith(finished)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    plan = make_plan([SMALL], {SMALL: checkpoint.table}, {SMALL: checkpoint.plan}, quick=True)
    cells = [c for c in plan.cells if c.setting == SETTING]
    assert finished.count("\n") < len(cells)
    assert sorted(line["cell"] for line in lines) == sorted(cell.key for cell in cells)
    again = {block.cell: block for block in measure(checkpoint, make_block(SETTING, SEED, 0, COUNT), cells)}
    for line in lines:
        expected = again[line["cell"]].to_json()
        assert {k: v for k, v in line.items() if k != "seconds"} == {
            k: v for k, v in expected.items() if k != "seconds"
        }
    took = json.loads((tmp_path / "took.json").read_text())
    assert took["command"] == f"python -m mmkv_quality run --quick --models {SMALL} --samples {COUNT} --workers 1"
    assert {"quality.json", "quality.md", "quality-guide.md"} <= {path.name for path in tmp_path.iterdir()}
    other = subprocess.run([*command(tmp_path), "--samples", "9"], check=False, capture_output=True, text=True)
    assert other.returncode == 1
    assert "samples: 8 then, 9 now" in " ".join(other.stderr.split())
