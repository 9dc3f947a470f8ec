"""Fewer vision tokens before the language model, on stock models (mmkv-prune's `Reducer`s).

The vision tower runs as ever, its projector is handed the method's tokens in the place of all, and what it makes of the
places left over is marked. `generate` and the model see a prompt of the full length; the language model is given it
without the marked columns. What it returns has a row for every column again, zeros where there was none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from mmkv_prune import Encoded, Reduced, Reducer, TowerEvidence
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ._compat import arguments, modalities
from .cache import CompressedCache
from .layers import CompressedLayer
from .lazy_cache import LazyCache
from .opened import Context
from .shortened import Length, Shortened, Stage, forget, length_of
from .tower import Heard, evidence_of, has_cls, listening, site_of

_IMAGES = ("pixel_values", "pixel_values_videos", "mm_encoder_outputs", "image_hidden_states")
_UNREAD = TowerEvidence(layer=-1, heads="apart")
"""What is handed to methods that look at neither attention nor keys; the sizes of images are taken from it as well."""
_LEFT_OUT = float("-inf")
"""What the embedding of a column without a token is filled with. Stock models copy and rearrange image features on
their way to the prompt, and repeat them for beams; a mark in the values goes all of these ways."""


def reduce_images(model: PreTrainedModel, method: Reducer) -> ReduceSession:
    """A session in which the language model is given fewer tokens of each image.

    Example:
        >>> with reduce_images(model, VisionZip(dominant=54, contextual=10)):
        ...     out = model.generate(**inputs)

    Inputs and outputs are those of the whole prompt, so processors and loops around the model stay as they are. Methods
    see the features that enter the projector; a token made of several patches has their attention in all and the mean
    of their keys. LLaVA, InternVL, Idefics3 and SmolVLM are given the method's tokens in its order, with positions
    counted anew, as the methods' releases do. LLaVA-NeXT and Qwen2-VL have each token at its place, tokens without one
    at the last that is free; LLaVA-NeXT's line ends stay, Qwen2-VL's positions are kept. In LLaVA-NeXT a place that is
    cut off as padding takes its token with it, and no CLS token goes on.

    Embeddings given in the place of ids are taken as they are: images whose features are in them already are not
    reduced, and refused where `mm_token_type_ids` beside them tell of vision tokens.

    Args:
        model: LLaVA, LLaVA-NeXT, InternVL, Idefics3, SmolVLM or Qwen2-VL.
        method: of mmkv-prune, or your own.

    Raises:
        TypeError: not a method.
        ValueError: a model that is not known, or a vision tower without the layer that the method looks at.
    """
    return ReduceSession(model, method)


class ReduceSession(Context):
    """What `reduce_images` returns; enter it with `with`. Puts hooks on this one instance, and takes them off again.

    Attributes:
        model: the model.
        method: the method.
        last: the columns that the language model was given of the latest prompt with images.

    Args:
        model: the model.
        method: the method.
        stages: what works on the prompt behind this session and has to be told of what it is given; None: this session
            stands alone, and nothing else of mmkv may be at work in the language model.
    """

    def __init__(self, model: PreTrainedModel, method: Reducer, *, stages: Sequence[Stage] | None = None) -> None:
        is_class = isinstance(method, type)  # which has all that its methods have
        if is_class or not isinstance(method, Reducer) or hasattr(method, "layers"):
            raise TypeError(
                f"{method!r} does not reduce images; a method such as KeepUniform(0.25) does, and methods between "
                "layers are for `prune`"
            )
        self.model, self.method = model, method
        self.last: Shortened | None = None
        self._stages = stages
        self._site = site_of(model)
        self._tower: Any = model.base_model.get_submodule(self._site.tower)
        self._cls = has_cls(self._tower)
        self._heard: list[Heard] = []
        self._hidden: Any = None
        self._free: Tensor | None = None
        self._given: Shortened | None = None
        self._has_images = False
        self._evidence = method.evidence or _UNREAD
        with listening(self._tower, self._evidence.layer):
            pass  # says now what would fail later

    def _enter(self, stack: ExitStack) -> None:
        projector = self.model.base_model.get_submodule(self._site.projector)
        decoder = self.model.get_decoder()
        self._heard = stack.enter_context(listening(self._tower, self._evidence.layer))
        hooks = [
            self.model.register_forward_pre_hook(self._check_images, with_kwargs=True),
            self._tower.register_forward_pre_hook(self._forget),
            self._tower.register_forward_hook(self._look_at),
            projector.register_forward_pre_hook(self._shorten),
            projector.register_forward_hook(self._mark),
            decoder.register_forward_pre_hook(self._give, with_kwargs=True, prepend=True),
            decoder.register_forward_hook(self._restore, with_kwargs=True, always_call=True),
        ]
        for hook in hooks:
            stack.callback(hook.remove)
        stack.callback(self._forget)
        stack.callback(setattr, self, "_given", None)

    # -- hooks, in the order of a forward pass

    def _check_images(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Older versions of transformers read a prompt in chunks without its images, and say nothing."""
        given = arguments(model, args, kwargs)
        cache, ids = given.get("past_key_values"), given.get("input_ids")
        self._has_images = False
        if cache is not None and cache.get_seq_length():
            return  # what a model says, and drafts of it, may hold placeholders
        kinds = modalities(model.config, ids, given.get("mm_token_type_ids"))
        self._has_images = kinds is not None and bool((kinds > 0).any())
        if not self._has_images or any(given.get(name) is not None for name in _IMAGES):
            return
        if ids is None:
            raise ValueError(
                "embeddings are taken as they are, so the images in these cannot be reduced any more: give input_ids "
                "and the images"
            )
        raise ValueError(
            "placeholders of images without the images: give the images beside them, and leave prefill_chunk_size out"
        )

    def _forget(self, *ignored: Any) -> None:
        self._heard.clear()
        self._hidden = self._free = None

    def _look_at(self, tower: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._hidden = getattr(output, "hidden_states", None)

    def _shorten(self, projector: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen = self._seen(args[0])
        reduced = self.method(seen)
        slots = _slots(reduced, seen.real, self._site.by_place)
        features, self._free = _placed(reduced, slots, seen.real)
        if args[0].ndim == 2:
            features, self._free = features[seen.real], self._free[seen.real]
        return (features, *args[1:])

    def _mark(self, projector: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        assert self._free is not None
        marked = output.masked_fill(self._free[..., None], _LEFT_OUT)
        self._forget()
        return marked

    def _give(
        self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        cache, embeds = kwargs.get("past_key_values"), kwargs["inputs_embeds"]
        length = length_of(cache)
        if length is not None:
            length.inside = True
        filled = cache is not None and cache.get_seq_length() > 0
        free = None if filled and embeds.shape[1] == 1 else embeds.isneginf().all(-1)
        if filled and free is not None and bool(free.any()):
            raise ValueError(
                "images behind a filled cache cannot be reduced: leave prefill_chunk_size out, and give images in the "
                "first turn"
            )
        if filled:
            return None if length is None else (args, length.shortened.later(kwargs))
        forget(cache)
        assert free is not None
        if not (self._has_images or bool(free.any())):
            return None
        self._check_known(decoder, cache)
        self.last = self._given = given = Shortened.without(free, kwargs.get("attention_mask"))
        for stage in self._stages or ():
            stage.shorten(given, cache)
        return args, given.first(kwargs)

    def _restore(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given, self._given = self._given, None
        length = length_of(kwargs.get("past_key_values"))
        if length is not None:
            length.inside = False
        if given is None or output is None:  # None: the language model has failed
            return output
        output.last_hidden_state = given.restored(output.last_hidden_state)
        if output.past_key_values is not None:
            Length(output.past_key_values, given).put()
        return output

    # --

    def _seen(self, features: Tensor) -> Encoded:
        """What the method sees of features [B, V, C], or [T, C] of images one after another."""
        if not self._heard:
            raise RuntimeError(f"the attention of {type(self._tower).__name__} never went through mmkv")
        if not bool(features.isfinite().all()):
            raise ValueError(
                f"{type(self._tower).__name__} makes features of these images that are NaN or infinite; look at the "
                "pixels, and at the dtype of the tower"
            )
        runs = features.ndim == 2
        heard = self._heard if runs else self._heard[-1:]
        patches = sum(len(x.keys) * (x.keys.shape[1] - self._cls) for x in heard)
        group = patches // features[..., 0].numel()
        found = [evidence_of(x, self._evidence, group=group, cls=self._cls, runs=runs) for x in heard]
        if not runs:
            return Encoded(features, *found[0], cls=self._cls_feature(features))
        sizes = torch.tensor([attention.shape[1] for attention, _ in found], device=features.device)
        return Encoded(
            pad_sequence(list(torch.split(features, sizes.tolist())), batch_first=True),
            pad_sequence([attention[0] for attention, _ in found], batch_first=True),
            pad_sequence([keys[0] for _, keys in found], batch_first=True),
            valid=torch.arange(int(sizes.max()), device=features.device) < sizes[:, None],
        )

    def _cls_feature(self, features: Tensor) -> Tensor | None:
        if not (self._cls and self._site.hands_on_cls) or self._hidden is None:
            return None
        layers = self.model.config.vision_feature_layer
        chosen = [self._hidden[i] for i in ([layers] if isinstance(layers, int) else layers)]
        taken = None if any(x is None for x in chosen) else torch.cat(chosen, -1)
        if taken is None or not torch.equal(taken[:, 1:], features):
            raise ValueError("vision_feature_layer and vision_feature_select_strategy are the config's, not the call's")
        return taken[:, 0]

    def _check_known(self, decoder: Any, cache: Any) -> None:
        """Refuses what works on the prompt and would not be told."""
        ours = isinstance(cache, LazyCache) or any(isinstance(x, CompressedLayer) for x in getattr(cache, "layers", ()))
        is_told = self._stages is not None and isinstance(cache, CompressedCache)
        owners = [getattr(hook, "__self__", None) for hook in decoder._forward_pre_hooks.values()]
        strangers = [x for x in owners if isinstance(x, Stage) and x not in (self._stages or ())]
        if strangers or (ours and not is_told):
            raise ValueError(
                "images are reduced beside a session that does not know of it; name everything in one text, as in "
                "compress(model, 'visionzip | adsc | lazy(plan.json) | adakv', budget=64)"
            )


def _slots(reduced: Reduced, real: Tensor, by_place: bool) -> Tensor:
    """Where each of a method's tokens stands among the [B, V] that the image had, [B, K] int64; V for fillers.

    Raises:
        ValueError: more tokens than the image had, or two at one place.
    """
    if bool((reduced.valid.sum(-1) > real.sum(-1)).any()):
        most, room = int(reduced.valid.sum(-1).max()), int(real.sum(-1).min())
        raise ValueError(f"the method makes {most} tokens of an image of {room}; there is no room for more than it had")
    end = real.shape[1]
    if not by_place:
        return (reduced.valid.cumsum(-1) - 1).masked_fill(~reduced.valid, end)
    placed = reduced.valid & (reduced.source >= 0)
    slots = reduced.source.masked_fill(~placed, end)
    taken = torch.cat([~real, real.new_zeros(len(real), 1)], 1).scatter(1, slots, True)[:, :-1]
    if bool((taken.sum(-1) != (~real).sum(-1) + placed.sum(-1)).any()):
        raise ValueError("the method puts two tokens at one place")
    homeless = reduced.valid & ~placed
    number, count = homeless.cumsum(-1) - 1, homeless.sum(-1, keepdim=True)
    unused = taken.byte().sort(dim=-1, stable=True).indices  # the free ones first, ascending
    last = (~taken).sum(-1, keepdim=True) - count + number
    return torch.where(homeless, unused.gather(1, last.clamp(0, end - 1)), slots)


def _placed(reduced: Reduced, slots: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Features [B, V, C] with each token at its slot, and the [B, V] bool that are left over."""
    batch, tokens = real.shape
    width = reduced.features.shape[-1]
    features = reduced.features.new_zeros(batch, tokens + 1, width)
    features = features.scatter(1, slots[..., None].expand(-1, -1, width), reduced.features)
    free = real.new_ones(batch, tokens + 1).scatter(1, slots, False)
    return features[:, :-1], free[:, :-1]
