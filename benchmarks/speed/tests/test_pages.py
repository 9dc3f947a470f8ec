"""Pages of made-up rounds: what was measured, missed and not measured."""

import json

import pytest
from mmkv_speed import cpu, cpu_page, gpu_page, growth
from mmkv_speed.gpu_targets import targets
from mmkv_speed.operators import CASES, Shape

FACTS = {
    "machine": "a machine", "note": "", "versions": {"mmkv": {"torch": "2"}}, "seed": 0, "steps": 4, "prompt": 8,
    "wall": 1.0, "command": "command", "code": "0123456789abcdef",
}  # fmt: skip
SHAPE = Shape(1, 8, 4, 64, 1024)
NOTHING = {part: [] for part in cpu.PARTS}


def grown(power=1.0):
    cells = [(side, m, h, n) for side in ("ours", "peer") for m in ("snapkv",) for h in (2, 4) for n in (1024, 4096)]
    return [
        [
            {"side": s, "method": m, "heads": h, "length": n, "seconds": [1e-6 * n**power] * 3, "kept": n, "norm": 1.0}
            for s, m, h, n in cells
        ]
    ]


def everything(made_up):
    limits = {"bandwidth": 1e10, "rate": 1e11, "seconds": {case.name: 1e-3 for case in CASES}}
    imported = {"import mmkv_scores, beyond torch": 0.03, "import kvpress, beyond torch + transformers": 1.4}
    return {"requests": made_up(), "growth": grown(), "limits": [limits], "imports": [imported]}


def test_nothing_measured_is_said_everywhere():
    page = cpu_page.render(NOTHING, FACTS, SHAPE, {})
    assert page.count("\nNot measured.\n") == 4
    assert " 0 hit, 0 miss, " in f" {page.split('## Targets')[1].strip()}"
    assert "**not measured**" in page
    assert "**miss**" not in page


def test_a_whole_page(made_up):
    found = everything(made_up)
    page = cpu_page.render(found, FACTS, SHAPE, {"growth": "g.png"})
    verdicts = [target.verdict for target in cpu_page.all_targets(found)]
    assert f"{verdicts.count('hit')} hit, {verdicts.count('miss')} miss, 0 not measured." in page
    assert page.count("**miss**") == verdicts.count("miss") > 0
    assert "Not measured." not in page
    assert "![Growth](g.png)" in page
    assert "| snapkv | 2 | 1.00 | 1.00 |" in page
    assert "even a cache of nothing gives 3.00 times" in page
    assert page.count("| kvpress | adakv+mixkv+bacon") == 0


def test_pages_and_pictures_are_written(made_up, tmp_path):
    settings = cpu.Settings(None, out=tmp_path)
    page = cpu.finish(settings, everything(made_up), FACTS)
    names = {f"speed-cpu-{part}.png" for part in ("overhead", "decode", "growth", "limits", "imports")}
    assert {path.name for path in tmp_path.iterdir()} == {"speed-cpu.md", "speed-cpu.json", *names}
    assert (tmp_path / "speed-cpu.md").read_text() == page
    assert all(f"({name})" in page for name in names)
    data = json.loads((tmp_path / "speed-cpu.json").read_text())
    assert {target["verdict"] for target in data["targets"]} == {"hit", "miss"}
    assert data["rounds"]["requests"] == everything(made_up)["requests"]


def test_layers_that_kept_different_things_are_refused():
    rounds = grown()
    growth.check(rounds)
    rounds[0][0]["kept"] -= 1
    with pytest.raises(ValueError, match=r"kept 1023 and 1024"):
        growth.check(rounds)
    rounds = grown()
    rounds[0][0]["norm"] = 1.1
    with pytest.raises(ValueError, match="norms apart"):
        growth.check(rounds)


# -- GPU


def cell(operator, seconds, geometry="g", skew=1, impl="triton", bytes_=7.0, flops=0.0):
    return {
        "operator": operator, "geometry": geometry, "entries": 32768, "batch": 8, "skew": skew, "impl": impl,
        "bytes": bytes_, "flops": flops, "seconds": seconds, "why": "" if seconds else "does not fit",
    }  # fmt: skip


def model(**changed):
    keys = ("prefill", "inside", "step", "plain_prefill", "plain_step", "padded_step")
    sizes = ("weights", "plain_bytes", "bytes", "padded_bytes", "plain_peak", "peak")
    return {
        "geometry": "g", "why": "", "prompt": 8, "budget": 4, "pipeline": "p", "allowed": 100, "cache_peak": 90,
        **{key: [1.0] for key in keys}, **dict.fromkeys(sizes, 1), "inside": [0.005], **changed,
    }  # fmt: skip


GPU_FACTS = {
    "device": "a GPU", "host": "a host", "versions": {"torch": "2"}, "dtype": "bfloat16", "wall": 1.0, "tiny": False,
    "command": "command",
}  # fmt: skip


def gpu(cells=(), models=()):
    return {"machine": {"bandwidth": 10.0, "rate": 10.0}, "checks": None, "operators": list(cells), "models": models}


def verdicts(found):
    return {target.name.split()[0].rstrip(","): target for target in targets(found, tiny=False)}


def test_of_two_geometries_the_worse_counts():
    found = verdicts(gpu([cell("gather_kv", [1.0]), cell("gather_kv", [1.0], "h", bytes_=6.0)]))["gather_kv"]
    assert (found.value, found.verdict, found.mine) == (0.6, "miss", "g 70%, h 60%")
    assert verdicts(gpu([cell("gather_kv", [1.0])]))["gather_kv"].verdict == "hit"


def test_the_roofline_is_the_nearer_limit():
    found = verdicts(gpu([cell("window_attention", [1.0], bytes_=1.0, flops=6.5)]))["window_attention"]
    assert (found.value, found.verdict) == (0.65, "hit")


def test_references_reach_no_target():
    found = verdicts(gpu([cell("gather_kv", [1.0], impl="reference")]))["gather_kv"]
    assert (found.verdict, found.why) == ("not measured", "no kernel was run at this size")
    left_out = verdicts(gpu([cell("gather_kv", [])]))["gather_kv"]
    assert (left_out.verdict, left_out.why) == ("not measured", "does not fit")


@pytest.mark.parametrize(("slower", "verdict"), [(1.05, "hit"), (1.2, "miss")])
def test_skewed_heads_beside_equal_ones(slower, verdict):
    found = gpu([cell("ragged_attention", [slower], skew=16), cell("ragged_attention", [1.0])])
    goal = next(t for t in targets(found, tiny=False) if "over equal heads" in t.name)
    assert (goal.value, goal.verdict) == (pytest.approx(slower), verdict)


def test_whole_models():
    hit, miss = gpu(models=[model()]), gpu(models=[model(inside=[0.02], cache_peak=101)])
    assert [t.verdict for t in targets(hit, tiny=False)[-2:]] == ["hit", "hit"]
    assert [t.verdict for t in targets(miss, tiny=False)[-2:]] == ["miss", "miss"]
    none = gpu(models=[{"geometry": "g", "why": "no time left"}])
    assert [(t.verdict, t.why) for t in targets(none, tiny=False)[-2:]] == [("not measured", "no time left")] * 2
    page = gpu_page.render(none, GPU_FACTS, None)
    assert "g: not measured, no time left." in page


def test_a_gpu_page_says_what_was_left_out():
    cells = [cell("gather_kv", [1.0]), cell("key_statistics", []), cell("dense_attention", [1.0], impl="reference")]
    found = gpu(cells, [model()]) | {
        "checks": {
            "checks": [
                {"operator": "gather_kv", "what": "ok", "error": 0.1, "passed": True},
                {"operator": "gather_kv", "what": "float16, 63 entries", "error": None, "passed": False},
            ],
            "skipped": 3, "why": "", "tests": "5 passed",
        },
    }  # fmt: skip
    page = gpu_page.render(found, GPU_FACTS, None)
    assert "Not measured, does not fit: key_statistics (triton, g, 32,768 x 8)." in page
    assert "1 of 2 within tolerance; 3 skipped, no time left." in page
    assert "| gather_kv | float16, 63 entries |" in page
    assert "No kernel besides the reference: dense_attention." in page
    assert "tests on this device: 5 passed." in page


def test_nothing_run_on_a_gpu():
    page = gpu_page.render(gpu(), GPU_FACTS, None)
    assert page.count("\nNot measured.\n") == 3
    assert "0 hit, 0 miss, 7 not measured." in page
