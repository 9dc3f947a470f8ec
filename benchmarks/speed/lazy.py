"""Lazy layers beside the plain model on the CPU: decode and prefill in one run, and the batch that fits in a memory.

`python benchmarks/speed/lazy.py` reads a prompt with the stock model and with lazy layers of both modes, repeats the
caches to a batch, and decodes with all of them in turn, round after round. Random weights: nothing here says anything
about accuracy.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from compare import Summary
from mmkv_hf import share
from mmkv_layershare import Geometry, LazyPlan, lazy_cost
from mmkv_testbed.model import build_model
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

RESULTS = Path(__file__).resolve().parent.parent / "results" / "lazy-cpu"
BUDGET = 64 * 2**30
IMAGE = 5
PUBLISHED = """Published, as read in arXiv 2602.01901 (abstract, figure 5): 1.5 times the throughput with VLA and 1.6
times with GLA, on one A100-80GB at input 2048, where the largest batch grows from 21 to 32 (1.52 times)
and KV shrinks by 35 %. It differs in the machine, a GPU that waits for memory, in the model, and in the
batch: each the largest that fits. The rows 'same memory' come nearest to that. The paper's parameter
counts imply 23 lazy layers of 32; which ones is inferred."""
WHY = """What is not laziness: the stock `DynamicCache` copies all keys and values of a layer together in every
step. Layers of a block do not, lazy or anchor: the prompt (GLA) or its vision tokens (VLA) stay where
they are, and only what follows grows. `StaticCache`, which writes in place, shows what the plain model
does without that copy: read the last column. There the ordinary layers outside the blocks, which stay
stock, still copy. Lazy attention reads as many keys as plain attention, its anchor's instead of its
own, so at the same batch a step saves projections and little else; the memory is what a larger batch
can use."""
clock = time.thread_time


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


def bytes_of(cache: Any) -> int:
    """Bytes of the storages behind a cache's keys and values."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors_of(cache)}.values())


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


def measure(subject: Subject, rounds: int, prefills: int, steps: int) -> Found:
    """All rounds; every second one goes through the arms in the opposite order."""
    found = Found(subject, {arm.name: [] for arm in PREFILL}, {(a.name, b): [] for a, b in jobs(subject)}, {})
    caches: dict[str, Any] = {}
    for round_ in range(prefills):
        logits = {}
        for arm in turned(PREFILL, round_):
            seconds, caches[arm.name], logits[arm.name] = prefill(subject, arm)
            found.prefill[arm.name].append(seconds)
            progress(subject, f"prefill {round_ + 1}/{prefills}", arm, f"{seconds:.2f} s")
        check(logits)
    found.row_bytes.update({name: bytes_of(cache) for name, cache in caches.items()})
    caches = {STATIC.name: caches[PLAIN.name]} | {arm.name: caches[arm.name] for arm in DECODE if arm is not STATIC}
    for round_ in range(rounds):
        for arm, batch in turned(jobs(subject), round_):
            gc.collect()
            speed = decode(subject, arm, caches[arm.name], batch, steps)
            found.decode[arm.name, batch].append(speed)
            progress(subject, f"decode {round_ + 1}/{rounds}", arm, f"batch {batch}, {speed:.2f} tok/s")
    return found


def turned(items: Any, round_: int) -> Any:
    return items if round_ % 2 == 0 else items[::-1]


def check(logits: dict[str, Tensor]) -> None:
    """Skipping projections must change nothing, and lazy layers something."""
    for mode in ("GLA", "VLA"):
        apart = float((logits[mode] - logits[f"{mode}, skip_projections"]).abs().max())
        moved = float((logits[mode] - logits[PLAIN.name]).abs().max())
        if not apart < 1e-3 < moved:
            raise SystemExit(f"{mode}: logits differ by {apart} without projections, by {moved} from the plain model")


def progress(subject: Subject, when: str, arm: Arm, what: str) -> None:
    print(f"{subject.name}: {when}  {arm.name:<22} {what}", flush=True)


def ratio(mine: list[float], other: list[float], digits: int = 2) -> str:
    """The ratio of two medians and, in brackets, the range of the rounds' own ratios."""
    each = Summary.of([a / b for a, b in zip(mine, other, strict=True)])
    whole = statistics.median(mine) / statistics.median(other)
    return f"{whole:.{digits}f} ({each.low:.{digits}f}..{each.high:.{digits}f})"


def table(head: tuple[str, ...], rows: Iterator[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def decode_rows(found: Found) -> Iterator[list[str]]:
    batch, larger = found.subject.batch, found.subject.larger
    plain, static_ = found.decode[PLAIN.name, batch], found.decode[STATIC.name, batch]
    budget = batch * found.row_bytes[PLAIN.name] / 2**20
    for arm, size in jobs(found.subject):
        speed = found.decode[arm.name, size]
        bytes_ = size * found.row_bytes[PLAIN.name if arm is STATIC else arm.name] / 2**20
        label = f"{arm.name}{' (same memory)' if size == larger and bytes_ <= budget else ''}"
        yield [
            label,
            str(size),
            f"{bytes_:.0f}",
            Summary.of(speed).text(digits=2),
            ratio(speed, plain),
            ratio(speed, static_),
        ]


def prefill_rows(found: Found) -> Iterator[list[str]]:
    for name, seconds in found.prefill.items():
        yield [name, Summary.of(seconds).text(digits=2), ratio(seconds, found.prefill[PLAIN.name], 3)]


def memory_rows(found: Found) -> Iterator[list[str]]:
    subject = found.subject
    fits = {name: BUDGET // found.row_bytes[name] for name in (PLAIN.name, GLOBAL.name, VISUAL.name)}
    for arm in (PLAIN, GLOBAL, VISUAL):
        row = found.row_bytes[arm.name]
        live = found.row_bytes[PLAIN.name] / row
        cells = [arm.name, f"{row:,}", str(fits[arm.name]), f"{fits[arm.name] / fits[PLAIN.name]:.3f}", f"{live:.4f}"]
        yield [*cells, f"{expected(subject, arm.mode):.4f}"]


def expected(subject: Subject, mode: str | None) -> float:
    """How much larger a batch fits, by formula: 2N / (2N - n), with n times the share of vision tokens for VLA."""
    config = subject.model.config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = Geometry(
        subject.layers, config.hidden_size, config.intermediate_size, config.num_attention_heads,
        config.num_key_value_heads, width, itemsize=4,
    )  # fmt: skip
    plans = (LazyPlan(subject.layers), subject.plan(mode) if mode else LazyPlan(subject.layers))
    plain, lazy = (lazy_cost(p, shape, vision=subject.vision, text=subject.length - subject.vision) for p in plans)
    return plain.kv_bytes / lazy.kv_bytes


def section(found: Found) -> list[str]:
    """One subject as markdown."""
    s = found.subject
    lazy = len(s.plan("visual").lazy)
    return [
        f"## {s.name}",
        "",
        f"{s.what}; float32, random weights; {lazy} of {s.layers} layers lazy; prompt of {s.vision} vision and "
        f"{s.length - s.vision} text tokens.",
        "",
        *table(("decode", "batch", "KV MiB", "tok/s", "beside plain", "beside StaticCache"), decode_rows(found)),
        *table(("prefill, batch 1", "s", "beside plain"), prefill_rows(found)),
        *table(
            ("memory", "bytes per row, live", f"rows in {BUDGET >> 30} GiB", "rows beside plain",
             "bytes beside plain", "formula"), memory_rows(found),
        ),
    ]  # fmt: skip


def render(all_found: list[Found], facts: dict[str, Any]) -> str:
    """The page as markdown."""
    return "\n".join([
        "# Lazy layers on the CPU beside the plain model",
        "",
        f"{facts['machine']}{facts['note']}. torch {facts['torch']}, transformers {facts['transformers']}; one thread, "
        f"CPU seconds of that thread; {facts['rounds']} interleaved rounds of {facts['steps']} decode steps, "
        f"{facts['prefills']} of prefill; {facts['wall']:.0f} s of wall time, {facts['peak']:.1f} GiB at most. "
        f"`{facts['command']}`.",
        "",
        "Medians over rounds, lowest and highest in brackets; the spread of a ratio is that of the rounds' own ratios. "
        "Decode is tokens per second over all rows of the batch, from the median step after the first; lazy arms skip "
        "projections they do not use. 'Same memory': the batch of lazy rows that fits where the plain batch does.",
        "",
        PUBLISHED,
        "",
        WHY,
        "",
        *(line for found in all_found for line in section(found)),
    ])  # fmt: skip


def raw(found: Found) -> dict[str, Any]:
    """Everything measured, for JSON."""
    decoded = [{"arm": name, "batch": batch, "tokens_per_s": x} for (name, batch), x in found.decode.items()]
    return {"subject": found.subject.name, "prefill_s": found.prefill, "decode": decoded, "row_bytes": found.row_bytes}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def gather_facts(arguments: argparse.Namespace, start: float) -> dict[str, Any]:
    """What has to be said about a run."""
    load = "/".join(f"{x:.1f}" for x in os.getloadavg())
    options = f"--rounds {arguments.rounds} --prefills {arguments.prefills} --steps {arguments.steps}"
    return {
        "machine": f"{processor()}, {os.cpu_count()} cores, load {load}",
        "note": f", {arguments.note}" if arguments.note else "",
        "torch": torch.__version__, "transformers": transformers.__version__,
        "rounds": arguments.rounds, "prefills": arguments.prefills, "steps": arguments.steps,
        "wall": time.monotonic() - start,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "command": f"python benchmarks/speed/lazy.py {options}",
    }  # fmt: skip


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of decoding")
    parser.add_argument("--prefills", type=int, default=2, help="rounds of prefill")
    parser.add_argument("--steps", type=int, default=6, help="decode steps that count, of one more")
    parser.add_argument("--note", default="", help="what else ran on the machine, for the page")
    parser.add_argument("--quick", action="store_true", help="one round, short prompts; prints only")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rounds = arguments.prefills = 1
    return arguments


def main() -> None:
    """Measures, prints, writes."""
    arguments, start = parse(), time.monotonic()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    counts = arguments.rounds, arguments.prefills, arguments.steps
    all_found = [measure(make(arguments.quick), *counts) for make in (bundled, large)]
    facts = gather_facts(arguments, start)
    page = render(all_found, facts)
    print(page)
    if not arguments.quick:
        RESULTS.with_suffix(".md").write_text(page)
        RESULTS.with_suffix(".json").write_text(
            json.dumps({"facts": facts, "subjects": [raw(found) for found in all_found]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
