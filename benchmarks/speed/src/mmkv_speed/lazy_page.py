"""The page about lazy layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from mmkv_layershare import Geometry, LazyPlan, lazy_cost

from .lazy import GLOBAL, PLAIN, STATIC, VISUAL, Found, Subject, jobs
from .markdown import table
from .summary import Ratio, Summary

BUDGET: Final = 64 * 2**30
_PUBLISHED: Final = """Published, as read in arXiv 2602.01901 (abstract, figure 5): 1.5 times the throughput with VLA
and 1.6 times with GLA, on one A100-80GB at input 2048, where the largest batch grows from 21 to 32 (1.52 times)
and KV shrinks by 35 %. It differs in the machine, a GPU that waits for memory, in the model, and in the
batch: each the largest that fits. The rows 'same memory' come nearest to that. The paper's parameter
counts imply 23 lazy layers of 32; which ones is inferred."""
_WHY: Final = """What is not laziness: the stock `DynamicCache` copies all keys and values of a layer together in every
step. Layers of a block do not, lazy or anchor: the prompt (GLA) or its vision tokens (VLA) stay where
they are, and only what follows grows. `StaticCache`, which writes in place, shows what the plain model
does without that copy: read the last column. There the ordinary layers outside the blocks, which stay
stock, still copy. Lazy attention reads as many keys as plain attention, its anchor's instead of its
own, so at the same batch a step saves projections and little else; the memory is what a larger batch
can use."""


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
            Ratio.of(speed, plain).text(),
            Ratio.of(speed, static_).text(),
        ]


def prefill_rows(found: Found) -> Iterator[list[str]]:
    for name, seconds in found.prefill.items():
        yield [name, Summary.of(seconds).text(digits=2), Ratio.of(seconds, found.prefill[PLAIN.name]).text(3)]


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
        _PUBLISHED,
        "",
        _WHY,
        "",
        *(line for found in all_found for line in section(found)),
    ])  # fmt: skip


def raw(found: Found) -> dict[str, Any]:
    """Everything measured, for JSON."""
    decoded = [{"arm": name, "batch": batch, "tokens_per_s": x} for (name, batch), x in found.decode.items()]
    return {"subject": found.subject.name, "prefill_s": found.prefill, "decode": decoded, "row_bytes": found.row_bytes}
