"""Lazy layers beside the plain model on the CPU: decode and prefill in one run, and the batch that fits in a memory.

Reads a prompt with the stock model and with lazy layers of both modes, repeats the caches to a batch, and decodes with
all of them in turn, round after round. Random weights: nothing here says anything about accuracy.
"""

from __future__ import annotations

import copy
import gc
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from mmkv_hf import share
from mmkv_layershare import LazyPlan
from mmkv_testbed.model import build_model
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from .held import live_bytes
from .machine import versions, where
from .meter import clock
from .store import check_writable, write_pages

NAME: Final = "lazy-cpu"
IMAGE = 5


@dataclass(frozen=True, slots=True)
class Subject:
    """A model, its prompt and the batches it decodes with."""

    name: str
    what: str
    model: Any
    inputs: dict[str, Tensor]
    vision: int
    blocks: tuple[tuple[int, int], ...]
    batch: int
    larger: int

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return int(self.inputs["input_ids"].shape[1])

    @property
    def layers(self) -> int:
        """Layers of the decoder."""
        return len(self.model.get_decoder().layers)

    def plan(self, mode: Any) -> LazyPlan:
        """The plan in one mode."""
        return LazyPlan(self.layers, self.blocks, mode)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to run a model; `mode` None is stock attention over the named cache."""

    name: str
    mode: str | None = None
    skips: bool = False
    cache: str = "dynamic"

    def open(self, subject: Subject) -> AbstractContextManager[Any]:
        """The session, or nothing."""
        if self.mode is None:
            return nullcontext()
        return share(subject.model, subject.plan(self.mode), skip_projections=self.skips)


PLAIN, STATIC = Arm("plain, DynamicCache"), Arm("plain, StaticCache", cache="static")
GLOBAL, VISUAL = Arm("GLA", "global"), Arm("VLA", "visual")
GLOBAL_SKIPS = Arm("GLA, skip_projections", "global", skips=True)
VISUAL_SKIPS = Arm("VLA, skip_projections", "visual", skips=True)
PREFILL = (PLAIN, GLOBAL, GLOBAL_SKIPS, VISUAL, VISUAL_SKIPS)
DECODE = (PLAIN, STATIC, GLOBAL_SKIPS, VISUAL_SKIPS)


def bundled(quick: bool) -> Subject:
    """The bundled model's architecture, untrained, on several pages of 576 vision tokens."""
    images = 1 if quick else 4
    torch.manual_seed(0)
    model = build_model("small").eval()
    per_image, size = model.config.image_seq_length, model.config.vision_config.image_size
    vision = images * per_image
    ids = prompt(model.config.image_token_id, vision, 64, model.config.text_config.vocab_size)
    inputs = {"input_ids": ids, "pixel_values": torch.randn(images, 3, size, size)}
    return Subject(
        "bundled size", "1 M parameters, 4 layers, 8 heads, 4 KV heads, head size 32, with its vision tower",
        model, inputs, vision, ((0, 3),), 8, 12,
    )  # fmt: skip


def large(quick: bool) -> Subject:
    """A LLaMA of 300 M parameters and the published number of layers; one token id stands for vision tokens."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=1536, num_hidden_layers=32, num_attention_heads=16, vocab_size=8000,
        max_position_embeddings=8192, bos_token_id=1, eos_token_id=2, pad_token_id=2, attn_implementation="sdpa",
    )  # fmt: skip
    config.image_token_id = IMAGE
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    vision = 256 if quick else 2304
    inputs = {"input_ids": prompt(IMAGE, vision, 64, 8000)}
    return Subject(
        "300 M", "301 M parameters, 32 layers, 16 heads, head size 64, no vision tower",
        model, inputs, vision, LazyPlan.preset("llava-1.5-7b").blocks, 4, 6,
    )  # fmt: skip


def prompt(image: int, vision: int, text: int, vocabulary: int) -> Tensor:
    """[1, N] token ids: a few words, the image, the rest of the words."""
    words = torch.randint(image + 1, vocabulary, (1, text))
    return torch.cat([words[:, :8], torch.full((1, vision), image), words[:, 8:]], dim=1)


def prefill(subject: Subject, arm: Arm) -> tuple[float, Any, Tensor]:
    """CPU seconds of reading the prompt, the cache, and the last logits [V]."""
    with arm.open(subject) as session:
        cache = DynamicCache() if session is None else session.cache()
        start = clock()
        logits = subject.model(**subject.inputs, past_key_values=cache, logits_to_keep=1).logits
        return clock() - start, cache, logits[0, -1]


def decode(subject: Subject, arm: Arm, held: Any, batch: int, steps: int) -> float:
    """Tokens per second of CPU time, over `batch` copies of the one row that is held."""
    cache = static(subject, held, batch, steps) if arm.cache == "static" else repeated(held, batch)
    times = []
    with arm.open(subject):
        for step in range(steps + 1):
            place = torch.full((batch, 1), subject.length + step)
            start = clock()
            subject.model(input_ids=torch.full((batch, 1), IMAGE + 2), position_ids=place, past_key_values=cache)
            times.append(clock() - start)
    return batch / statistics.median(times[1:])


def repeated(held: Any, batch: int) -> Any:
    """A cache of `batch` times the row that is held, which stays as it is."""
    shared = {id(x): x for x in tensors_of(held)}  # repeating makes tensors of its own, so one copy is enough
    cache = copy.deepcopy(held, shared)
    cache.batch_repeat_interleave(batch)
    return cache


def static(subject: Subject, held: Any, batch: int, steps: int) -> StaticCache:
    """The same keys and values in a cache that is written in place."""
    config = subject.model.config.get_text_config(decoder=True)
    cache = StaticCache(config=config, max_cache_len=subject.length + steps + 1)
    for index, layer in enumerate(held.layers):
        cache.update(*(x.expand(batch, -1, -1, -1) for x in (layer.keys, layer.values)), index)
    return cache


def tensors_of(cache: Any) -> list[Tensor]:
    """Every tensor of a cache's layers."""
    return [x for layer in cache.layers for x in vars(layer).values() if isinstance(x, Tensor)]


@dataclass(frozen=True, slots=True)
class Found:
    """What was measured on one subject: seconds and tokens per second by arm and batch, a value per round."""

    subject: Subject
    prefill: dict[str, list[float]]
    decode: dict[tuple[str, int], list[float]]
    row_bytes: dict[str, int]


def jobs(subject: Subject) -> list[tuple[Arm, int]]:
    """Every way to decode, with its batch."""
    return [*((arm, subject.batch) for arm in DECODE), *((arm, subject.larger) for arm in DECODE if arm.mode)]


def measure(subject: Subject, rounds: int, prefills: int, steps: int, say: Callable[[str], None]) -> Found:
    """All rounds; every second one goes through the arms in the opposite order."""
    found = Found(subject, {arm.name: [] for arm in PREFILL}, {(a.name, b): [] for a, b in jobs(subject)}, {})
    caches: dict[str, Any] = {}
    for round_ in range(prefills):
        logits = {}
        for arm in turned(PREFILL, round_):
            seconds, caches[arm.name], logits[arm.name] = prefill(subject, arm)
            found.prefill[arm.name].append(seconds)
            say(f"{subject.name}: prefill {round_ + 1}/{prefills}  {arm.name:<22} {seconds:.2f} s")
        check(logits)
    found.row_bytes.update({name: live_bytes(tensors_of(cache)) for name, cache in caches.items()})
    caches = {STATIC.name: caches[PLAIN.name]} | {arm.name: caches[arm.name] for arm in DECODE if arm is not STATIC}
    for round_ in range(rounds):
        for arm, batch in turned(jobs(subject), round_):
            gc.collect()
            speed = decode(subject, arm, caches[arm.name], batch, steps)
            found.decode[arm.name, batch].append(speed)
            say(f"{subject.name}: decode {round_ + 1}/{rounds}  {arm.name:<22} batch {batch}, {speed:.2f} tok/s")
    return found


def turned(items: Any, round_: int) -> Any:
    return items if round_ % 2 == 0 else items[::-1]


def check(logits: dict[str, Tensor]) -> None:
    """Skipping projections must change nothing, and lazy layers something."""
    for mode in ("GLA", "VLA"):
        apart = float((logits[mode] - logits[f"{mode}, skip_projections"]).abs().max())
        moved = float((logits[mode] - logits[PLAIN.name]).abs().max())
        if not apart < 1e-3 < moved:
            raise ValueError(f"{mode}: logits differ by {apart} without projections, by {moved} from the plain model")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure.

    Attributes:
        rounds: of decoding.
        prefills: rounds of prefill.
        steps: decode steps that count, of one more.
        quick: short prompts.
        out: folder of the pages, or None.
        note: what else ran on the machine.
    """

    rounds: int
    prefills: int
    steps: int
    quick: bool
    out: Path | None
    note: str


def run(settings: Settings, say: Callable[[str], None]) -> str:
    """Measures, writes the page if there is a place for it, and gives it.

    Raises:
        OSError: the folder cannot be written to.
        ValueError: lazy layers computed what they should not.
    """
    from . import lazy_page

    if settings.out is not None:
        check_writable(settings.out)
    start = time.monotonic()
    counts = settings.rounds, settings.prefills, settings.steps
    found = [measure(make(settings.quick), *counts, say) for make in (bundled, large)]
    facts = _facts(settings, start)
    page = lazy_page.render(found, facts)
    if settings.out is not None:
        write_pages(settings.out, NAME, page, {"facts": facts, "subjects": [lazy_page.raw(one) for one in found]})
    return page


def _facts(settings: Settings, start: float) -> dict[str, Any]:
    """What has to be said about a run."""
    options = f"--rounds {settings.rounds} --prefills {settings.prefills} --steps {settings.steps}"
    return {
        "machine": where(),
        "note": f", {settings.note}" if settings.note else "",
        **versions(("torch", "transformers")),
        "rounds": settings.rounds, "prefills": settings.prefills, "steps": settings.steps,
        "wall": time.monotonic() - start,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "command": f"python -m mmkv_speed lazy {options}",
    }  # fmt: skip
