"""The part of lmms-eval's `--model_args` that is mmkv's; the rest is the wrapped model's."""

from __future__ import annotations

from dataclasses import dataclass

from mmkv_hf.cache import checked_budget
from mmkv_pipelines import Budget, Pipeline
from mmkv_pipelines.text import split

_OURS = ("base", "pipeline", "budget", "budget_bytes")
_EXAMPLE = "base=qwen2_vl,pipeline=adakv+mixkv+bacon,budget=256,pretrained=Qwen/Qwen2-VL-7B-Instruct"


@dataclass(frozen=True, slots=True)
class Settings:
    """What mmkv does around a model of lmms-eval.

    Attributes:
        base: lmms-eval's name of the wrapped model.
        pipeline: the method.
        budget: checked against the pipeline.
    """

    base: str
    pipeline: Pipeline
    budget: Budget


def read_settings(arguments: str) -> tuple[Settings, str]:
    """Our settings, and what is left of the argument string for the wrapped model.

    lmms-eval cuts arguments at every comma outside quotes, braces and brackets; a pipeline has commas in parentheses
    too, so ours are cut here, and the remaining ones stay a string for lmms-eval to read in its own way.

    Example:
        >>> read_settings("base=llava_hf,pipeline=snapkv(window=8,kernel=5),budget=64,pretrained=folder")[1]
        'pretrained=folder'

    Args:
        arguments: `key=value` joined by commas; a value may stand in quotes.

    Raises:
        ValueError: an argument is missing, given twice or makes no pipeline or budget.
    """
    given: dict[str, str] = {}
    others = []
    for piece in split(arguments, ","):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if key not in _OURS or not equals:
            others.append(piece)
        elif key in given:
            raise ValueError(f"{key} is given twice in {arguments!r}")
        else:
            given[key] = _unquoted(value)
    for key in ("base", "pipeline"):
        if not given.get(key):
            raise ValueError(f"{key} is missing in {arguments!r}; for example --model_args '{_EXAMPLE}'")
    pipeline = Pipeline.parse(given["pipeline"])
    return Settings(given["base"], pipeline, checked_budget(pipeline, _budget(given))), ",".join(others)


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _budget(given: dict[str, str]) -> int | float | Budget:
    if ("budget" in given) == ("budget_bytes" in given):
        raise ValueError("give either budget (256 tokens, or 0.1 of the prompt) or budget_bytes (per request)")
    text = given.get("budget") or given.get("budget_bytes", "")
    try:
        if "budget_bytes" in given:
            return Budget(bytes=int(text))
        return int(text) if text.isdigit() else float(text)
    except ValueError as error:
        raise ValueError(
            f"a budget is a number of tokens (256), a share of the prompt (0.1) or budget_bytes, not {text!r}: {error}"
        ) from None
