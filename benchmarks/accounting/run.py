"""What lazy layers and pruning save on real geometries: counted, and by closed form.

`python benchmarks/accounting/run.py` builds the published models on torch's meta device (shapes without numbers), lets
torch's FlopCounterMode count their prefill, and compares with the closed forms of mmkv-layershare and mmkv-prune; KV
bytes come from live caches of tiny models with the same code. It stops where two ways to count disagree.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from mmkv_hf import LazyCache, prune, share
from mmkv_layershare import Geometry, LazyPlan, lazy_cost
from mmkv_prune import ADSC, FastV, PyramidDrop, kv_entries, tokens_per_layer
from mmkv_prune import Geometry as Decoder
from mmkv_testkit.families import build
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

RESULTS = Path(__file__).resolve().parent.parent / "results" / "accounting"
QWEN2_VL_7B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Subject:
    """A published model and a prompt for it."""

    name: str
    make: Callable[[], Any]
    vision: int
    text: int
    lazy: LazyPlan


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one model; multiply-adds of the prefill in 1e12, shares in percent of the plain model."""

    model: str
    method: str
    kv_saved: float
    llm_macs: float
    llm_saved: float
    whole_saved: float | None
    published: str


def subjects() -> Iterator[Subject]:
    """LLaVA-1.5-7B with the text length that ADSC's figures imply, LLaVA-NeXT-7B, Qwen2-VL-7B."""
    preset = LazyPlan.preset("llava-1.5-7b")
    blocks28 = ((2, 6), (7, 11), (12, 16), (17, 21), (22, 26))
    yield Subject("LLaVA-1.5-7B", lambda: LlavaForConditionalGeneration(LlavaConfig()), 576, 101, preset)
    yield Subject("LLaVA-NeXT-7B", lambda: LlavaNextForConditionalGeneration(LlavaNextConfig()), 2004, 60, preset)
    qwen = Qwen2VLConfig(text_config=QWEN2_VL_7B)
    yield Subject("Qwen2-VL-7B", lambda: Qwen2VLForConditionalGeneration(qwen), 1024, 60, LazyPlan(28, blocks28))


def counted(run: Callable[[], Any]) -> int:
    """Multiply-adds that torch counts."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return int(counter.get_total_flops()) // 2


def prefill(model: Any, tokens: int, cache: Any) -> Callable[[], Any]:
    """The decoder on a prompt of this many tokens; a cache keeps transformers from looking at values."""
    decoder = model.get_decoder()
    hidden = torch.empty(1, tokens, decoder.config.hidden_size, device="meta")
    positions = torch.arange(tokens, device="meta")[None]
    return lambda: decoder(inputs_embeds=hidden, position_ids=positions, use_cache=True, past_key_values=cache)


def geometry(model: Any) -> Geometry:
    """Of the model's decoder."""
    text = model.config.get_text_config()
    heads, hidden = text.num_attention_heads, text.hidden_size
    kv = text.num_key_value_heads
    return Geometry(text.num_hidden_layers, hidden, text.intermediate_size, heads, kv, hidden // heads)


def agree(what: str, count: float, formula: float) -> None:
    """Stops where a count and a closed form differ."""
    if abs(count - formula) > 1e-9 * max(abs(count), 1):
        raise SystemExit(f"{what}: counted {count}, by formula {formula}")


def tower(model: Any) -> int | None:
    """Multiply-adds of LLaVA-1.5's vision tower and projector; None for the others, whose inputs vary."""
    if type(model) is not LlavaForConditionalGeneration:
        return None
    pixels, features = (torch.empty(shape, device="meta") for shape in ((1, 3, 336, 336), (1, 576, 1024)))
    return counted(lambda: model.model.vision_tower(pixels)) + counted(
        lambda: model.model.multi_modal_projector(features)
    )


def rows(subject: Subject) -> Iterator[Row]:
    """All methods on one model."""
    with torch.device("meta"):
        model = subject.make().eval()
    shape, extra = geometry(model), tower(model)
    form = Decoder(shape.hidden, shape.intermediate, shape.kv_heads * shape.head_dim)
    vision, text, layers = subject.vision, subject.text, shape.num_layers
    macs = {n: counted(prefill(model, n, DynamicCache())) for n in {vision + text}}
    plain = macs[vision + text]
    agree(f"{subject.name}, plain", plain, form.macs([vision] * layers, text))

    def row(method: str, kv: float, llm: int, published: str = "") -> Row:
        whole = None if extra is None else 100 * (plain - llm) / (plain + extra)
        return Row(subject.name, method, 100 * kv, llm / 1e12, 100 * (1 - llm / plain), whole, published)

    yield row("plain", 0, plain)
    for name, method, published in (
        ("ADSC(4, 20; stride 3), reconstructed", ADSC(), "KV 56.7, FLOPs 53.7 (arXiv 2602.12618, abstract)"),
        ("FastV(2, 50 %)", FastV(), ""),
        ("PyramidDrop(8/16/24, halves)", PyramidDrop(), ""),
    ):
        left = tokens_per_layer(method, layers, vision)
        for n in {n + text for n in left} - macs.keys():
            macs[n] = counted(prefill(model, n, DynamicCache()))
        llm = sum(macs[n + text] // layers for n in left)
        agree(f"{subject.name}, {name}", llm, form.macs(left, text))
        is_theirs = subject.name == "LLaVA-1.5-7B"  # the only model with published figures
        saved = 1 - kv_entries(left, text) / (layers * (vision + text))
        yield row(name, saved, llm, published if is_theirs else "")
    for mode in ("global", "visual"):
        plan = LazyPlan(layers, subject.lazy.blocks, mode)
        cost, full = (lazy_cost(p, shape, vision=vision, text=text) for p in (plan, LazyPlan(layers)))
        agree(f"{subject.name}, plain by layers", full.macs, plain)
        if mode == "global":
            with share(model, plan, skip_projections=True):
                agree(f"{subject.name}, GLA", counted(prefill(model, vision + text, LazyCache(model, plan))), cost.macs)
        name = f"{'GLA' if mode == 'global' else 'VLA'}, {len(plan.lazy)} of {layers} lazy, inferred"
        published = "KV 35 (arXiv 2602.01901, abstract)" if "LLaVA" in subject.name else ""
        yield row(name, 1 - cost.kv_bytes / full.kv_bytes, cost.macs, published)


def check_live_bytes() -> None:
    """KV bytes of a tiny twin's live caches equal the closed forms that the table uses."""
    tiny = build("llava", batch=1)
    vision = int((tiny.inputs["input_ids"] == tiny.model.config.image_token_id).sum())
    text = tiny.inputs["input_ids"].shape[1] - vision
    first = DynamicCache(config=tiny.text_config)
    with prune(tiny.model, ADSC(layers=(1, 3), stride=2)), torch.no_grad():
        tiny.model(**tiny.inputs, past_key_values=first)
    held = [layer.keys[0, 0, :, 0].numel() for layer in first.layers]
    agree("live KV pairs, ADSC", sum(held), kv_entries(tokens_per_layer(ADSC((1, 3), 2), len(held), vision), text))
    config = tiny.text_config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = Geometry(
        len(held), config.hidden_size, config.intermediate_size, config.num_attention_heads,
        config.num_key_value_heads, width, itemsize=4,
    )  # fmt: skip
    for mode in ("global", "visual"):
        plan = LazyPlan(len(held), ((0, 3),), mode)
        with share(tiny.model, plan) as session, torch.no_grad():
            cache = session.cache()
            tiny.model(**tiny.inputs, past_key_values=cache)
        live = sum(tensor.untyped_storage().nbytes() for tensor in cache.tensors())
        agree(f"live bytes, {mode}", live, lazy_cost(plan, shape, vision=vision, text=text).kv_bytes)


def render(found: list[Row], facts: dict[str, str]) -> str:
    """The table as markdown."""
    lines = [
        "# What lazy layers and pruning save, counted",
        "",
        f"`python benchmarks/accounting/run.py`; torch {facts['torch']}, transformers {facts['transformers']}. "
        "Multiply-adds of the prefill as FlopCounterMode counts them on the meta device (matrix products and attention "
        "over the full square), equal to the closed forms of mmkv-layershare and mmkv-prune wherever both exist; "
        "visual mode by closed form. Prompts: "
        + "; ".join(f"{s.name} {s.vision} vision and {s.text} text tokens" for s in subjects())
        + ". KV by closed form, which live caches of a tiny model meet to the byte. 'With tower' counts LLaVA-1.5's "
        "vision tower and projector too. Nothing here says anything about accuracy.",
        "",
        "| model | method | KV saved % | LLM 1e12 MACs | LLM saved % | saved with tower % | published, % |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in found:
        whole = "" if r.whole_saved is None else f"{r.whole_saved:.1f}"
        cells = [r.model, r.method, f"{r.kv_saved:.1f}", f"{r.llm_macs:.3f}", f"{r.llm_saved:.1f}", whole, r.published]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Counts, compares, writes."""
    check_live_bytes()
    found = [row for subject in subjects() for row in rows(subject)]
    facts = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    report = render(found, facts)
    print(report)
    RESULTS.with_suffix(".md").write_text(report)
    RESULTS.with_suffix(".json").write_text(
        json.dumps({"facts": facts, "rows": [asdict(r) for r in found]}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
