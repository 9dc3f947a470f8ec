"""Third parties' methods."""

from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
from mmkv_budget import AdaKV
from mmkv_pipelines import Method, Pipeline, find, methods, register, registry
from mmkv_scores import BACON, MixKV, Scores, SnapKV


@dataclass(frozen=True)
class Oldest:
    """Keeps the oldest."""

    weight: float = 1.0
    window: ClassVar[int] = 0
    needs: ClassVar[frozenset[str]] = frozenset()
    is_attention: ClassVar[bool] = True

    def __call__(self, seen, capacity, trace):
        rank = (-self.weight * seen.slots.float()).expand(seen.keys.shape[:3])
        return Scores(rank, rank)


@dataclass(frozen=True)
class Reversed:
    """Turns any score around."""

    inner: object = field(default_factory=SnapKV)
    scale: float = 1.0
    window = property(lambda self: self.inner.window)
    needs = property(lambda self: self.inner.needs)
    is_attention: ClassVar[bool] = True

    def __call__(self, seen, capacity, trace):
        scores = self.inner(seen, capacity, trace)
        return Scores(-self.scale * scores.rank, scores.backbone)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))


def test_a_score_and_a_wrap(request_of, decide):
    register("oldest", "score", Oldest)
    register("reversed", "wrap", Reversed)
    pipeline = Pipeline.parse("reversed(scale=2.0)+oldest(weight=3.0)")
    assert pipeline == Pipeline(score=Reversed(Oldest(3.0), 2.0))
    assert str(pipeline) == "reversed(scale=2.0)+oldest(weight=3.0)"
    assert Pipeline.parse(str(pipeline)) == pipeline
    oldest, _ = decide("oldest", 5, request_of(20))
    newest, _ = decide("reversed+oldest", 5, request_of(20))
    assert bool(oldest[0][:, :, :5].all())
    assert bool(newest[0][:, :, -5:].all())


def test_wraps_are_applied_in_their_order():
    register("reversed", "wrap", Reversed)
    assert Pipeline.parse("bacon+reversed+mixkv").score == Reversed(MixKV(BACON()))
    register("oldest", "score", Oldest)
    assert Pipeline.parse("mixkv+oldest").score == MixKV(Oldest())
    registry._METHODS.pop("reversed")
    register("reversed", "wrap", Reversed, order=-1)
    with pytest.raises(ValueError, match="Reversed has none"):
        Pipeline.parse("bacon+reversed")


def test_names():
    register("oldest", "score", Oldest)
    register("oldest", "score", Oldest)
    with pytest.raises(ValueError, match=r"'oldest' is taken by .*Oldest"):
        register("oldest", "wrap", Reversed)
    for name in ("Oldest", "ol-dest", "", "1st", "a b"):
        with pytest.raises(ValueError, match="lower-case letters"):
            register(name, "score", Reversed)


def test_find_and_methods():
    assert find("BACON") == Method("bacon", "wrap", BACON, 0)
    assert (
        find("bacon").summary == "Adds to the window score what the last query alone saw: S = B + lambda (E + L + T)."
    )
    assert [m.name for m in methods()][:2] == ["snapkv", "tova"]
    assert all(m.summary for m in methods())


@dataclass(frozen=True)
class Doubled(Reversed):
    """Another wrap, which must be told what to wrap."""

    inner: object


def test_nested_in_another_order_than_parsed_is_shown_by_repr():
    register("reversed", "wrap", Reversed)
    canonical, other = Pipeline(score=Reversed(MixKV())), Pipeline(score=MixKV(Reversed(SnapKV())))
    assert str(canonical) == "reversed+mixkv"
    assert Pipeline.parse(str(canonical)) == canonical
    assert str(other) == repr(other.score)
    assert str(replace(other, heads=AdaKV())) == f"adakv+{other.score!r}"


def test_wraps_of_one_order_read_from_the_outside_in():
    register("reversed", "wrap", Reversed)
    register("doubled", "wrap", Doubled)
    for score, text in ((Reversed(Doubled(SnapKV())), "reversed+doubled"), (Doubled(Reversed()), "doubled+reversed")):
        assert str(Pipeline(score=score)) == text
        assert Pipeline.parse(text).score == score


def test_a_setting_without_a_text_is_shown_by_repr():
    register("oldest", "score", Oldest)
    for weight in (float("inf"), object()):
        assert str(Pipeline(score=Oldest(weight))) == repr(Oldest(weight))


@pytest.mark.parametrize("kind", ["scores", "", None, "Score"])
def test_a_bad_kind(kind):
    kinds = "score, wrap, layers, heads, select, reduce, prune, share"
    with pytest.raises(ValueError, match=rf"'oldest': kind is one of {kinds}, got {kind!r}"):
        register("oldest", kind, Oldest)


@pytest.mark.parametrize("factory", [Oldest(), lambda: Oldest(), dict, None, "Oldest"])
def test_a_factory_that_is_no_dataclass(factory):
    with pytest.raises(TypeError, match=r"'oldest': .* a dataclass, whose fields are its settings"):
        register("oldest", "score", factory)
