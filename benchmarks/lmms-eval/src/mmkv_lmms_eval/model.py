"""The model `mmkv` of lmms-eval: another of its models, which generates inside a compression session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NoReturn

from lmms_eval.api.model import lmms
from lmms_eval.models import get_model, list_available_models
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from mmkv_hf import compress
from transformers import PreTrainedModel

from .meter import Meter, metered
from .settings import Settings, read_settings

_NAME = "mmkv"
_GENERATING = ("generate_until", "generate_until_multi_round")


class Mmkv(lmms):  # type: ignore[misc]
    """Makes the wrapped model; it has no instances of its own.

    lmms-eval makes every model by `create_from_arg_string` and asks the object it gets for all the rest (rank, device,
    chat template, simple or chat form): that object is the wrapped model itself, with `generate_until` in a session.
    """

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> Any:
        """The wrapped model, compressed.

        Args:
            arg_string: `base=...,pipeline=...,budget=...` and, in any order, the arguments of the base.
            additional_config: what lmms-eval gives to every model: batch size, device.

        Raises:
            ValueError: before weights are loaded: our arguments or the name of the base are wrong. After that: the base
                has no transformers model, or one that cannot be compressed.
        """
        settings, rest = read_settings(arg_string)
        base = _base_class(settings.base, force_simple=cls.is_simple)
        return compressed(base.create_from_arg_string(rest, additional_config), settings)


class MmkvChat(Mmkv):
    """The same for models in chat form; a base that has the simple form only keeps it."""

    is_simple = False


def compressed(lm: Any, settings: Settings) -> Any:
    """Lets a model of lmms-eval generate from compressed caches from now on.

    Args:
        lm: the model; it is changed and returned.
        settings: pipeline and budget.

    Raises:
        ValueError: it has no transformers model, or one that cannot be compressed.
    """
    model = getattr(lm, "model", None)
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"base={settings.base} has no transformers model to compress (its `model` is a {type(model).__name__}); "
            "choose one of lmms-eval's models that runs transformers in this process"
        )
    compress(model, settings.pipeline, settings.budget)  # says now what would fail at the first question
    for name in _GENERATING:
        setattr(lm, name, partial(_generated, lm, getattr(lm, name), settings))
    lm.loglikelihood = _refused
    return lm


def _base_class(name: str, *, force_simple: bool) -> Any:
    known = [other for other in list_available_models(include_aliases=True) if other != _NAME]
    if name not in known:
        near = get_close_matches(name, known)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lmms-eval models --aliases` lists them"
        raise ValueError(f"base={name} is no model of lmms-eval that could be wrapped; {hint}")
    return get_model(name, force_simple)


def _generated(lm: Any, answer: Callable[[Any], list[Any]], settings: Settings, requests: Sequence[Any]) -> list[Any]:
    if isinstance(vars(lm.model).get("generate"), Meter):  # a base whose many rounds call its own `generate_until`
        return answer(requests)
    with metered(lm.model, settings.pipeline, settings.budget) as meter:
        answers = answer(requests)
    if meter.error is not None:
        raise RuntimeError(f"{settings.base} could not answer from a compressed cache: {meter.error}") from meter.error
    if requests and not meter.calls:
        raise RuntimeError(f"{settings.base} never called `generate` of its `model`: nothing was compressed")
    if requests:
        _log(meter, settings)
    return answers


def _log(meter: Meter, settings: Settings) -> None:
    count, (held, full) = len(meter.calls), meter.total
    logger.info(
        f"mmkv: {settings.pipeline}, budget {settings.budget}: caches held {held / count:,.0f} of {full / count:,.0f} "
        f"bytes ({held / full:.1%}), mean of {count} calls of generate; first tokens come from the dense prefill"
    )
    # Zeros add nothing to what the base reports of its own speed; the rest goes to `throughput` in the results.
    shares = {"kept_share": held / full, "bytes_held": held / count, "bytes_full": full / count}
    log_metrics(0.0, 0, 0.0, {f"{_NAME}_{name}": value for name, value in shares.items()})


def _refused(requests: Sequence[Any]) -> NoReturn:
    raise NotImplementedError(
        "loglikelihood tasks score a given answer in one dense forward pass, which reads nothing from a compressed "
        "cache; choose a task with output_type generate_until"
    )
