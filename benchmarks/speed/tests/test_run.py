"""Commands: both end to end in the small, one clear error for each wrong input, interruptions that lose nothing."""

import json
import re
import sys
from pathlib import Path

import mmkv_speed
import pytest
import torch
from mmkv_speed import cpu, endtoend, gpu, growth, imports, limits, sides
from mmkv_speed.cli import app
from mmkv_speed.model import make_layer, make_model, make_prompt
from mmkv_speed.ours import Ours
from mmkv_speed.store import Rounds
from typer.testing import CliRunner


def invoke(*arguments):
    return CliRunner().invoke(app, [str(x) for x in arguments])


def said(result):
    assert result.exit_code == 1, result.output
    return " ".join(result.stderr.split())


@pytest.fixture
def unwritable(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    return file / "results"


@pytest.fixture(autouse=True)
def gradients_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_grad_enabled(True)


def test_an_unknown_part(tmp_path):
    assert (
        said(invoke("cpu", "--parts", "import")) == "error: no part import; parts are requests, growth, limits, imports"
    )
    assert said(invoke("gpu", "--tiny", "--device", "cpu", "--parts", "x")).startswith("error: no part x; parts are")


def test_a_missing_python_of_the_peer():
    error = said(invoke("cpu", "--peer", "/nowhere/python"))
    assert error == "error: --peer /nowhere/python: there is no Python; it is that of an environment with kvpress 0.5.5"


def test_an_environment_without_kvpress():
    error = said(invoke("cpu", "--peer", sys.executable, "--parts", "growth", "--prompt", 1024))
    assert error.endswith("cannot run kvpress's side: No module named 'kvpress'")


@pytest.mark.parametrize("command", [("cpu",), ("gpu", "--tiny", "--device", "cpu"), ("lazy", "--quick")])
def test_a_folder_that_cannot_be_written_to(command, unwritable):
    assert said(invoke(*command, "--out", unwritable)).startswith(f"error: cannot write to {unwritable}: ")


def test_a_work_folder_that_cannot_be_written_to(unwritable):
    assert said(invoke("cpu", "--work", unwritable, "--quick")).startswith(f"error: cannot write to {unwritable}: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    assert said(invoke("gpu")).startswith("error: this machine has no GPU that torch can use; --tiny --device cpu")
    assert said(invoke("gpu", "--device", "cpu")).startswith("error: on a CPU only --tiny runs")
    assert said(invoke("gpu", "--device", "tpu")) == "error: --device is cuda or cpu, got 'tpu'"


def test_the_gpu_script_from_end_to_end(tmp_path):
    result = invoke("gpu", "--tiny", "--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    written = {path.suffix: path for path in (tmp_path / "out").iterdir()}
    assert set(written) == {".md", ".json", ".png"}
    page = written[".md"].read_text()
    assert "**Not a measurement.**" in page
    assert "0 hit, 0 miss, 7 not measured." in page
    assert "fails:" not in page
    models = json.loads(written[".json"].read_text())["models"]
    assert [model["why"] for model in models] == ["", ""]
    assert all(model["cache_peak"] <= model["allowed"] and model["bytes"] < model["plain_bytes"] for model in models)


def test_a_tiny_run_writes_nothing_unasked(tmp_path):
    result = invoke("gpu", "--tiny", "--device", "cpu", "--parts", "checks")
    assert result.exit_code == 0
    assert not list(Path.cwd().iterdir())
    assert result.stdout.count("Not measured.") == 2


def test_a_part_without_time_is_skipped_and_said():
    settings = gpu.Settings("cpu", tiny=True, minutes=0.0)
    page = gpu.run(settings, lambda text: None)
    assert "Not measured, no time left: " in page
    assert "tiny Qwen2: not measured, no time left." in page


def test_a_model_that_fails_is_said_and_the_rest_stays(monkeypatch, tmp_path):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("mmkv_speed.whole._measure", broken)
    page = gpu.run(gpu.Settings("cpu", tiny=True, parts=("checks", "models"), out=tmp_path), lambda text: None)
    assert "tiny Mistral: not measured, fails: no such kernel." in page


def test_padded_and_ragged_caches_answer_alike():
    from mmkv_hf import compress
    from mmkv_speed import whole
    from mmkv_speed.geometry import TINY

    torch.manual_seed(0)
    with torch.no_grad():
        for geometry in TINY:
            model = geometry.model(torch.float32, "cpu", 128)
            ids = torch.randint(3, geometry.vocabulary, (1, 96))
            place = {"input_ids": ids[:, :1], "position_ids": torch.tensor([[96]])}
            with compress(model, whole.PIPELINE, budget=48) as session:
                cache = session.cache(ids)
                model(input_ids=ids, past_key_values=cache)
                stock, masks = whole.pad(cache, 1, 2)
                ragged = model(**place, past_key_values=cache).logits
            assert any(not bool(mask.all()) for mask in masks)
            model.set_attn_implementation(whole.PADDED)
            padded = model(**place, past_key_values=stock, mmkv_padded=masks).logits
            torch.testing.assert_close(padded, ragged, rtol=1e-4, atol=1e-5)


# -- CPU


@pytest.fixture(scope="module")
def side():
    with torch.no_grad():
        return Ours(make_model(0))


def test_a_request_and_a_layer_of_our_side(side):
    with torch.no_grad():
        ids = make_prompt(0, 256)
        job = {"method": "adakv", "ratio": 0.5, "steps": 3}
        plain = sides.measure_request(side, job | {"method": sides.NONE}, ids)
        ours = sides.measure_request(side, job, ids)
        layer = {
            "seed": 0,
            "heads": 2,
            "length": 300,
            "ratio": 0.5,
            "repeats": 2,
            "methods": ["snapkv", "adakv", "knorm"],
        }
        found = sides.measure_layer(side, layer)
    assert plain["inside"] == 0 < ours["inside"] < ours["prefill"]
    assert plain["attended"] == 8 * 4 * 256
    assert ours["attended"] == 8 * 4 * 128
    assert plain["bytes"] == 8 * 2 * 4 * 257 * 64 * 4
    assert 0.5 < ours["bytes"] / plain["bytes"] < 0.52
    assert len(ours["steps"]) == 2
    assert plain["logits"] == ours["logits"]  # a layer is compressed after its attention
    counts = {name: (one["kept"], len(one["seconds"])) for name, one in found.items()}
    assert counts == dict.fromkeys(("snapkv", "adakv", "knorm"), (2 * 150, 2))


def test_both_environments_would_build_the_same_layer():
    with torch.no_grad():
        a, b = make_layer(3, 2, 100), make_layer(3, 2, 100)
    assert all(
        torch.equal(x, y) for x, y in zip((a.hidden, a.queries, a.keys), (b.hidden, b.queries, b.keys), strict=True)
    )


def settings(tmp_path, **changed):
    return cpu.Settings(None, parts=("limits", "imports"), rounds=2, work=tmp_path / "work", out=tmp_path, **changed)


@pytest.fixture
def counted(monkeypatch):
    """Measuring is replaced by counting, and stops at the given call."""
    calls = {"limits": 0, "imports": 0, "stop": None}

    def fake(part, value):
        def measure(*_):
            if calls["stop"] == (part, calls[part]):
                raise KeyboardInterrupt
            calls[part] += 1
            return value(calls[part])

        return measure

    round_ = {"bandwidth": 1e10, "rate": 1e11, "seconds": {"gather_kv": 1e-3}}
    monkeypatch.setattr(limits, "measure", fake("limits", lambda n: round_ | {"bandwidth": n * 1e10}))
    monkeypatch.setattr(imports, "measure", fake("imports", lambda n: {"import mmkv_scores, beyond torch": n / 100}))
    return calls


def test_an_interrupted_run_keeps_finished_rounds(tmp_path, counted):
    counted["stop"] = ("imports", 1)
    with pytest.raises(KeyboardInterrupt):
        cpu.run(settings(tmp_path), lambda text: None)
    assert (counted["limits"], counted["imports"]) == (2, 1)
    counted["stop"] = None
    page = cpu.run(settings(tmp_path), lambda text: None)
    assert (counted["limits"], counted["imports"]) == (2, 2)
    assert "0 of requests, 0 of growth, 2 of limits, 2 of imports" in page
    assert "| `import mmkv_scores, beyond torch` | 15 (10..20) |" in page
    assert not list((tmp_path / "work").iterdir())  # the pages hold everything


def test_rounds_of_other_settings_are_not_mixed(tmp_path, counted):
    counted["stop"] = ("imports", 1)
    with pytest.raises(KeyboardInterrupt):
        cpu.run(settings(tmp_path), lambda text: None)
    counted["stop"] = None
    with pytest.raises(ValueError, match="interrupted run with other prompt: go on with what it was begun with"):
        cpu.run(settings(tmp_path, prompt=2048), lambda text: None)
    page = cpu.run(settings(tmp_path, prompt=2048, fresh=True), lambda text: None)
    assert "2 of limits, 2 of imports" in page
    assert counted["limits"] == 4


def test_no_round_begins_that_would_end_too_late(tmp_path, counted):
    page = cpu.run(settings(tmp_path, minutes=0.0), lambda text: None)
    assert "1 of limits, 1 of imports" in page


def test_a_line_that_was_cut_short_is_no_round(tmp_path):
    rounds = Rounds(tmp_path, {"a": 1})
    rounds.add("x", [1])
    with (tmp_path / "rounds.jsonl").open("a") as file:
        file.write('{"part": "x", "da')
    assert rounds.of("x") == [[1]]
    rounds.add("x", [2])
    assert Rounds(tmp_path, {"a": 1}).of("x") == [[1], [2]]


def test_import_time_of_a_broken_package_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr(imports, "IMPORTS", (imports.Import("mmkv_nothing"),))
    with pytest.raises(ValueError, match="No module named 'mmkv_nothing'"):
        imports.measure({"ours": sys.executable})


def test_what_kvpress_s_worker_imports_needs_nothing_of_ours():
    folder, seen, queue = Path(str(mmkv_speed.__file__)).parent, set(), ["worker", "peer"]
    while queue:
        name = queue.pop()
        seen.add(name)
        source = (folder / f"{name}.py").read_text().replace("        from .ours import Ours\n", "")
        assert not re.search(r"^\s*(from|import) mmkv_", source, re.MULTILINE), name
        queue += [found for found in re.findall(r"^\s*from \.(\w+) import", source, re.MULTILINE) if found not in seen]
    assert {"machine", "model", "sides", "methods"} <= seen


def test_every_round_asks_for_the_same_in_an_order_of_its_own():
    rounds = [list(endtoend.jobs(n, (0.5, 0.9), ("ours", "peer"))) for n in range(3)]
    assert len({tuple(round_) for round_ in rounds}) == 3
    assert set(rounds[0]) == set(rounds[1]) == set(rounds[2])
    assert len(rounds[0]) == len(set(rounds[0])) == 2 * (2 + 2 * 8) + 2 * 3
    assert rounds == [list(endtoend.jobs(n, (0.5, 0.9), ("ours", "peer"))) for n in range(3)]  # a run can go on


def test_growth_covers_what_was_asked():
    lengths, heads = growth.LENGTHS, growth.HEADS
    assert (lengths[0], lengths[-1]) == (1024, 65536)
    wanted = list(growth.jobs(1, ("ours", "peer"), lengths, heads, 0))
    assert [side for side, _ in wanted[:2]] == ["peer", "ours"]
    assert len(wanted) == 2 * len(lengths) * len(heads)
    assert "adakv+mixkv+bacon" not in wanted[0][1]["methods"]
