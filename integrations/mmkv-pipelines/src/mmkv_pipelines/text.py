"""The text form of a pipeline, e.g. "adakv+mixkv+bacon+snapkv(window=16,kernel=7)"."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

from mmkv_budget import HeadScores

from .registry import STAGES, Method, find, methods, named

_PART = re.compile(r"\s*(\w+)\s*(?:\((.*)\))?\s*", re.DOTALL)
_WORDS = {"true": True, "false": False, "none": None}


def parse(source: str) -> dict[str, Any]:
    """The parts named by `source`, as arguments of `Pipeline`; only what is named.

    Raises:
        ValueError: see `Pipeline.parse`.
    """
    stages = split(source, "|")
    if len(stages) > 1:
        raise ValueError(f"{source!r} has {len(stages)} stages, and a Pipeline is the last one; use Stages.parse")
    pieces = split(source, "+")
    if not all(map(str.strip, pieces)):
        raise ValueError(f"a name is missing in {source!r}; known are {', '.join(m.name for m in methods())}")
    parts = [read(piece) for piece in pieces]
    found: dict[str, Any] = {}
    for method, args, settings in parts:
        if method.kind in STAGES:
            raise ValueError(f"{method.name} is a stage of its own: write it as in {method.name} | snapkv")
        if method.kind != "wrap":
            place = method.kind
            if place in found:
                raise ValueError(f"{source!r} names two {place} methods; a pipeline has one")
            found[place] = make(method, args, settings)
    wraps = [part for part in parts if part[0].kind == "wrap"]
    from_outside = sorted(wraps, key=lambda part: part[0].order, reverse=True)
    for method, args, settings in reversed(from_outside):
        base = found["score"] if "score" in found else make(find("snapkv"), (), {})
        if args:
            raise ValueError(f"{method.name} takes settings by name, as in {method.name}(key=value)")
        found["score"] = make(method, (base,), settings)
    return found


def render(score: object, layers: object, heads: object, select: object) -> str:
    """The canonical text: layers, heads, wraps from the outside in, base score, select; defaults are left out."""
    shown = [show(layers), show(heads), *_show_score(score), show(select)]
    return "+".join(text for text in shown if text not in ("uniform", "equal", "snapkv", "select")) or "snapkv"


def split(source: str, separator: str) -> list[str]:
    """`source` cut at `separator` outside brackets and quotes."""
    pieces, depth, quote, start, escaped = [], 0, "", 0, False
    for i, char in enumerate(source):
        if quote:
            quote = "" if char == quote and not escaped else quote
            escaped = char == "\\" and not escaped
        elif char in "'\"":
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        elif char == separator and depth == 0:
            pieces.append(source[start:i])
            start = i + 1
    if depth or quote:
        raise ValueError(f"brackets or quotes do not match in {source!r}")
    return [*pieces, source[start:]]


def read(part: str) -> tuple[Method, list[Any], dict[str, Any]]:
    """The method of `name(setting=value)`, its positional arguments and its settings.

    Raises:
        ValueError: it looks otherwise, names no method, or gives a setting twice.
    """
    match = _PART.fullmatch(part)
    if match is None:
        raise ValueError(f"cannot read {part.strip()!r}; a part looks like name or name(setting=value)")
    args: list[Any] = []
    settings: dict[str, Any] = {}
    for item in split(match[2], ",") if match[2] and match[2].strip() else []:
        key, equals, value = item.partition("=")
        if equals and key.strip().isidentifier():
            if key.strip() in settings:
                raise ValueError(f"{part.strip()!r} gives {key.strip()} twice")
            settings[key.strip()] = _value(value)
        else:
            args.append(_value(item))
    return find(match[1]), args, settings


def _value(text: str) -> Any:
    """A Python literal, true, false and none in any case; anything else is a string (paths need no quotes)."""
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def make(method: Method, args: Any, settings: dict[str, Any]) -> Any:
    """The method with these settings.

    Raises:
        ValueError: it has no such setting, or not with this value.
    """
    try:
        return method.factory(*args, **settings)
    except TypeError as error:
        names = [field.name for field in dataclasses.fields(method.factory)]  # type: ignore[arg-type]
        raise ValueError(f"{method.name}: {error}; its settings are {', '.join(names) or 'none'}") from error


def _show_score(score: object) -> list[str]:
    """The names of wraps and base, or the `repr` of the whole if those would be read as another score."""
    shown = [show(part) for part in _unwrap(score)]
    try:
        is_same = bool(parse("+".join(shown))["score"] == score)
    except Exception:  # whatever a third party's part raises when it is made of text
        is_same = False
    return shown if is_same else [repr(score)]


def _unwrap(score: object) -> list[object]:
    scores = [score]
    while (method := named(scores[-1])) is not None and method.kind == "wrap":
        scores.append(getattr(scores[-1], dataclasses.fields(scores[-1])[0].name))  # type: ignore[arg-type]
    return scores


def show(part: object) -> str:
    """One part with the settings that are not the default; its `repr` if it is not registered."""
    method = named(part)
    if method is None:
        return repr(part)
    fields = dataclasses.fields(part)[1 if method.kind == "wrap" else 0 :]  # type: ignore[arg-type]
    values = [(f, getattr(part, f.name)) for f in fields if f.init and f.compare]
    settings = [f"{f.name}={_literal(value)}" for f, value in values if value != _default(f)]
    return method.name + (f"({','.join(settings)})" if settings else "")


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _literal(value: Any) -> str:
    """What `_value` reads back; a table of head scores is its path, or its numbers if it has none."""
    if isinstance(value, HeadScores):
        value = value.source or [list(layer) for layer in value.scores]
    if isinstance(value, str) and _value(value) == value and not re.search(r"[,()\[\]{}+|'\"=]", value):
        return value
    return _nested(value)


def _nested(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(_nested, value))}]"
    if isinstance(value, tuple):
        return f"({','.join(map(_nested, value))}{',' * (len(value) == 1)})"
    return repr(value) if isinstance(value, str) else str(value)
