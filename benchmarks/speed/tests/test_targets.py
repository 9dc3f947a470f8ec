import pytest
from mmkv_speed import endtoend, imports
from mmkv_speed.markdown import table
from mmkv_speed.targets import Target, compared, tally


@pytest.mark.parametrize(
    ("value", "at_most", "verdict"),
    [
        (0.5, True, "hit"),
        (0.51, True, "miss"),
        (0.49, True, "hit"),
        (0.5, False, "hit"),
        (0.49, False, "miss"),
        (None, True, "not measured"),
        (None, False, "not measured"),
    ],
)
def test_verdicts_in_both_directions(value, at_most, verdict):
    target = Target("x", 0.5, at_most, value)
    assert target.verdict == verdict
    assert target.to_json()["verdict"] == verdict


def test_a_miss_says_why_and_a_hit_does_not():
    given = {"mine": [3.0, 3.0], "other": [1.0, 2.0], "show": lambda x: x.text()}
    miss = compared("x", 1.0, at_most=True, **given, why=lambda: "because")
    hit = compared("x", 1.0, at_most=False, **given, why=lambda: pytest.fail("asked for nothing"))
    assert (miss.verdict, miss.why, miss.value, miss.spread) == ("miss", "because", 2.0, (1.5, 3.0))
    assert (hit.verdict, hit.why) == ("hit", "")


def test_rows_show_verdicts_alike():
    rows = [Target("a", 1.9, False, 2.0, mine="m"), Target("b", 1.9, False, 1.8, why="w"), Target("c", 1.9, False)]
    assert [row.cells[5] for row in rows] == ["hit", "**miss**", "**not measured**"]
    assert rows[1].cells == ["b", "", "", "1.8", ">= 1.9", "**miss**", "w"]
    assert tally(rows) == "1 hit, 1 miss, 1 not measured"


def test_cells_with_bars_do_not_break_the_table():
    assert table(("a",), [["x | y"]])[2] == r"| x \| y |"


def by_name(targets):
    return {target.name: target for target in targets}


def test_targets_of_requests(made_up):
    found = by_name(endtoend.targets(endtoend.answers(made_up())))
    overhead = found["overhead, snapkv / kvpress snapkv, 0.5 removed"]
    assert (overhead.value, overhead.verdict) == (pytest.approx(0.4), "hit")
    assert found["decode, adakv / kvpress adakv, 0.5 removed"].verdict == "hit"  # twice
    miss = found["decode, adakv / kvpress adakv, 0.9 removed"]
    assert (miss.value, miss.verdict) == (pytest.approx(2.0), "miss")
    assert miss.why == (
        "even a cache of nothing gives 3.00 times (83.3 tok/s): of our 18.0 ms a step, 12.0 ms do not read the cache"
    )
    assert found["bytes, adakv / kvpress adakv, 0.5 removed"].verdict == "hit"
    assert found["bytes, adakv / kvpress adakv, 0.9 removed"].verdict == "miss"


def test_a_slow_side_misses(made_up):
    found = by_name(endtoend.targets(endtoend.answers(made_up(mine=0.08))))
    miss = found["overhead, snapkv / kvpress snapkv, 0.5 removed"]
    assert miss.verdict == "miss"
    assert miss.why.startswith("30.0 ms too much over all layers; our random")


def test_without_kvpress_nothing_beside_it_is_measured(made_up):
    found = by_name(endtoend.targets(endtoend.answers(made_up(sides=("ours",)))))
    lone = found["overhead, snapkv / kvpress snapkv, 0.5 removed"]
    assert (lone.verdict, lone.why) == ("not measured", "kvpress was not run")
    assert found["decode, adakv / our snapkv, 0.5 removed"].verdict == "hit"


def test_overheads_by_hand(made_up):
    rounds = made_up(mine=0.04, rounds=3)
    for round_, first in zip(rounds, (0.020, 0.030, 0.024), strict=True):
        for one in round_:
            if (one["side"], one["method"]) == ("ours", "snapkv"):
                one["run"]["first"] = first
    given, key = endtoend.answers(rounds), ("ours", "snapkv", 0.5)
    assert endtoend.overheads(given, key, "judged") == pytest.approx([0.036, 0.046, 0.040])
    assert endtoend.overheads(given, key, "strict") == pytest.approx([0.040, 0.046, 0.040])
    assert endtoend.overheads(given, key, "total")[0] == pytest.approx(0.04 - 0.04 + 0.0 - 0.004 + 0.04 - 0.04)


def test_sides_that_did_different_work_are_refused(made_up):
    rounds = made_up()
    wanted = ("peer", "snapkv", 0.5)
    next(o for o in rounds[0] if (o["side"], o["method"], o["removed"]) == wanted)["run"]["attended"] = 99
    with pytest.raises(ValueError, match=r"snapkv at 0\.5: 100 and 99 KV pairs are attended to"):
        endtoend.check(endtoend.answers(rounds))
    rounds = made_up()
    next(o for o in rounds[0] if (o["side"], o["method"]) == ("peer", "none"))["run"]["logits"] = [0.6] * 8
    with pytest.raises(ValueError, match=r"uncompressed models differ by 0\.0999"):
        endtoend.check(endtoend.answers(rounds))


def test_import_time():
    label = "import mmkv_scores, beyond torch"
    assert imports.target([{label: 0.03}, {label: 0.04}, {label: 0.2}]).verdict == "hit"
    assert imports.target([{label: 0.06}]).verdict == "miss"
    assert imports.target([]).verdict == "not measured"
