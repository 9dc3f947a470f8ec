"""Shared by all tests: tiny models, decoding with the model's own logits, and the oracle's answer."""

import math
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
import transformers
from mmkv_hf import compress, reduce_images
from mmkv_prune import KeepRandom, KeepUniform, PruMergePlus, TowerEvidence, VisionZip
from mmkv_prune.random_drop import hashed_uniform
from mmkv_testkit.families import build, pad, unpadded
from mmkv_testkit.oracle import MaskedDense, attending, visible_to, weighed, weights
from torch import nn
from transformers import DynamicCache

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
PIPELINE = "adakv+mixkv+bacon+snapkv(window=8)"
BUDGET = 30
STEPS = 6


@lru_cache(maxsize=8)
def vlm(name, batch=1, dtype=torch.float32, **settings):
    """A tiny model and its inputs; tests do not change them."""
    tiny = build(name, batch=batch, dtype=dtype, **settings)
    if dtype == torch.float64 and name == "qwen3_vl_moe":
        tiny.model.set_experts_implementation("eager")  # torch's grouped matrix product knows no float64
    return tiny


@lru_cache(maxsize=8)
def padded(name, dtype=torch.float32):
    """Two rows, the first with 9 padding columns on its left."""
    tiny = vlm(name, batch=2, dtype=dtype)
    return tiny.model, pad(tiny.inputs, left=[9, 0])


def decode(model, inputs, tokens=STEPS, **settings):
    """Greedy `generate`: new tokens [B, n] and logits [B, n, V] in the model's own dtype (`generate` narrows them).

    Args:
        model: The model.
        inputs: Of `generate`.
        tokens: How many to generate, or tokens [B, n] to feed whatever the model says.
        **settings: Handed to `generate`.
    """
    steps = tokens if isinstance(tokens, int) else tokens.shape[1]
    if not isinstance(tokens, int):
        settings["logits_processor"] = [_Force(tokens)]
    logits = []
    hook = model.register_forward_hook(lambda module, args, output: logits.append(output.logits[:, -1]))
    try:
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=steps, do_sample=False, **settings)
    finally:
        hook.remove()
    return SimpleNamespace(tokens=out[:, -steps:], sequences=out, logits=torch.stack(logits[-steps:], 1))


class _Force:
    """Logits processor that leaves one token to choose per row."""

    def __init__(self, tokens):
        self.tokens, self.step = tokens, 0

    def __call__(self, input_ids, scores):
        chosen = self.tokens[:, self.step, None]
        self.step += 1
        return torch.full_like(scores, float("-inf")).scatter(1, chosen, 0.0)


def compressed(model, inputs, tokens=STEPS, pipeline=PIPELINE, budget=BUDGET, **settings):
    """`decode` inside a session: what it gave, and the cache it left."""
    with compress(model, pipeline, budget) as session:
        out = decode(model, inputs, tokens, **settings)
    return out, session.last


def masked(model, inputs, tokens, keep, from_query=None, **settings):
    """`decode` on the stock cache with the evicted columns forbidden."""
    with MaskedDense(model, keep, from_query=from_query) as oracle:
        out = decode(model, inputs, tokens, **settings)
    assert oracle.masked_calls
    return out


def sharing(model, plan, inputs, rounds=()):
    """A context: full caches, and lazy layers by hand.

    A block has its anchor's masks, and its probabilities (global mode) or its queries and keys of vision tokens
    (visual mode).
    """
    vision, lent = inputs["input_ids"] == model.config.image_token_id, {}

    def attend(layer, query, key, value, mask, scaling, softcap):
        anchor, columns = plan.anchor(layer), key.shape[2]
        rows = torch.arange(columns - query.shape[2], columns)
        visible = visible_to(rows, columns, mask)
        for round_ in rounds:
            if anchor in round_.keep:
                kept = wide(round_.keep[anchor], len(query), columns, value=True)[:, :, None]
                visible = visible & (kept | (rows[:, None] < round_.from_query))
        if plan.mode == "visual" and anchor != layer:
            image = wide(vision, len(query), columns)[:, None, :, None]
            query = torch.where(image[:, :, rows], lent[anchor][0], query)
            key = torch.where(image, lent[anchor][1], key)
        borrows = plan.mode == "global" and anchor != layer
        found = lent[anchor] if borrows else weights(query, key, visible, scaling, softcap)
        if anchor == layer:
            lent[layer] = found if plan.mode == "global" else (query, key)
        return weighed(found, value)

    return attending(model, attend)


def wide(x, batch, columns, value=False):
    """x [P, ..., N] for `batch` rows, of which P / batch came from each prompt, and so many columns."""
    return nn.functional.pad(x, (0, columns), value=value)[..., :columns].repeat_interleave(batch // len(x), 0)


def stock_or_skip(run):
    """What `run` gives, which is a test's generation on stock transformers; skips the test where that raises.

    For what some supported version of transformers cannot do with its own cache and sdpa. Say with an `assert` in `run`
    where stock answers wrongly instead.
    """
    try:
        return run()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return pytest.skip(f"stock transformers {transformers.__version__}: {reason}")


def conversation(inputs, answer, new):
    """Inputs of a second turn: the first one, the answer [B, n] and new tokens [B, m]; the cache holds the images."""
    ids = torch.cat([inputs["input_ids"], answer, new], 1)
    added = ids.shape[1] - inputs["input_ids"].shape[1]
    longer = {
        "input_ids": ids,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, added), value=1),
    }
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            longer[name] = torch.nn.functional.pad(inputs[name], (0, added))
    return longer


def without_image(inputs, row):
    """Two rows of llava, of which this one has words where its image was."""
    ids = inputs["input_ids"].clone()
    ids[row] = words(1, ids.shape[1])[0]
    return inputs | {"input_ids": ids, "pixel_values": inputs["pixel_values"][[1 - row]]}


def words(batch, count, seed=7):
    """Text tokens [B, n]."""
    return torch.randint(3, 400, (batch, count), generator=torch.Generator().manual_seed(seed))


def difference(a, b):
    """Largest difference of two tensors."""
    assert a.shape == b.shape
    return float((a - b).abs().max())


def state(model):
    """Hooks, attributes and settings of a model, which a session has to leave as they were."""
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    names = [{name: x for name, x in vars(m).items() if "hook" not in name} for m in model.modules()]
    return (
        hooks,
        names,
        model.config.to_dict(),
        [m.config._attn_implementation for m in model.modules() if hasattr(m, "config")],
    )


# -- what the language model should be given of prompts whose images are reduced

IMAGE, VIDEO = 500, 501
ROUNDED = {"rtol": 2e-5, "atol": 2e-6}  # methods compute in float32
BY_PLACE = {"llava_next", "qwen2_vl"}
PROJECTOR = {"idefics3": "connector.modality_projection", "qwen2_vl": "visual.merger.mlp"}
PROJECTOR["smolvlm"] = PROJECTOR["idefics3"]


def projector(model):
    return model.base_model.get_submodule(PROJECTOR.get(model.config.model_type, "multi_modal_projector"))


def encode(model, inputs):
    """The image features of the stock model, or of a session."""
    if "pixel_values_videos" in inputs:
        return model.base_model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    names = ("pixel_values", "image_sizes", "image_grid_thw", "pixel_attention_mask")
    return model.base_model.get_image_features(**{name: inputs[name] for name in names if name in inputs})


# -- what the vision tower does, from its projections


class Heard:
    """Outputs of a layer's projections [T, width], the positions it was given, and what enters the projector."""

    def __init__(self, model, inputs, layer):
        tower = next(m for m in model.base_model.children() if m is not model.get_decoder())
        block = next(m for m in tower.modules() if isinstance(m, nn.ModuleList))[layer]
        attention = next(m for name, m in block.named_modules() if name in ("self_attn", "attn", "attention"))
        self.heads, self.outputs = attention.num_heads, {}
        hooks = [attention.register_forward_pre_hook(self.called, with_kwargs=True)]
        hooks += [
            m.register_forward_hook(lambda m, a, out, name=name: self.outputs.update({name: out}))
            for name, m in attention.named_children()
            if name in ("q_proj", "k_proj", "qkv")
        ]
        hooks.append(projector(model).register_forward_pre_hook(self.projected))
        hooks.append(tower.register_forward_hook(self.ran))
        try:
            with torch.no_grad():
                encode(model, inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def called(self, module, args, kwargs):
        self.rotation, self.mask = kwargs.get("position_embeddings"), kwargs.get("attention_mask")

    def projected(self, module, args):
        self.features = args[0]

    def ran(self, module, args, output):
        self.hidden = getattr(output, "hidden_states", None)

    def images(self, sizes):
        """Queries and keys [T, width] of each image."""
        if "qkv" not in self.outputs:
            return list(zip(self.outputs["q_proj"], self.outputs["k_proj"], strict=True))
        query, key, _ = self.outputs["qkv"].unflatten(1, (3, self.heads, -1)).unbind(1)
        return list(zip(*(self.rotated(x).flatten(1).split(sizes) for x in (query, key)), strict=True))

    def rotated(self, x):
        cos, sin = (y[:, None] for y in self.rotation)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


def attention_received(query, key, heads, real):
    total = 0
    for q, k in zip(query.unflatten(1, (heads, -1)).unbind(1), key.unflatten(1, (heads, -1)).unbind(1), strict=True):
        total = total + ((q @ k.T) / math.sqrt(q.shape[1])).masked_fill(~real, -torch.inf).softmax(-1)
    return total


def patches_of(model, count, tokens):
    """The patches of each token: four in a row, a square of two by two, or one."""
    if count == tokens:
        return [[i] for i in range(tokens)]
    if model.config.model_type == "qwen2_vl":
        return [range(4 * i, 4 * i + 4) for i in range(tokens)]
    side = math.isqrt(count)
    corners = [side * row + column for row in range(0, side, 2) for column in range(0, side, 2)]
    return [[c, c + 1, c + side, c + side + 1] for c in corners]


def encoded(model, inputs, method):
    """Per image: features [V, C], attention [V], keys [V, D], feature of the CLS token or None."""
    how = method.evidence or TowerEvidence(-1, "apart")
    layer, apart = how.layer, how.heads == "apart"
    heard = Heard(model, inputs, layer)
    grids = inputs.get("image_grid_thw", inputs.get("video_grid_thw"))
    sizes = None if grids is None else [int(h * w) for t, h, w in grids for _ in range(t)]
    kind = model.config.model_type
    cls = kind in ("llava", "llava_next", "internvl") and model.config.vision_config.model_type != "siglip_vision_model"
    pairs, out = heard.images(sizes), []
    features = heard.features if sizes is None else heard.features.split([size // 4 for size in sizes])
    for i, (query, key) in enumerate(pairs):
        real = torch.ones(len(key), dtype=torch.bool) if heard.mask is None else heard.mask[i, 0, 0]
        attention = attention_received(query, key, heard.heads if apart else 1, real)
        received = attention[0, 1:] if cls else attention[real].mean(0)
        compared = (key.unflatten(1, (heard.heads, -1)).mean(1) if apart else key)[1 if cls else 0 :]
        members = patches_of(model, len(compared), len(features[i]))
        summed = torch.stack([sum(received[p] for p in group) for group in members])
        mean = torch.stack([sum(compared[p] for p in group) / len(group) for group in members])
        first = heard.hidden[-1][i, 0] if cls and kind == "llava" else None
        out.append((features[i], summed, mean, first))
    return out


# -- what a method makes of an image, by loops


def cosine(keys):
    keys = keys / keys.norm(dim=-1, keepdim=True)
    return keys @ keys.T


def chosen_by(method, x, a, keys, cls):
    """Tokens in the method's order: features and places, None for a token without one."""
    if isinstance(method, VisionZip):
        return zipped(x, a, keys, cls, method.dominant, method.contextual)
    if isinstance(method, KeepUniform):
        number = round(len(a) * method.keep)
        return [(x[i], i) for i in (int((k + 0.5) * len(a) / number) for k in range(number))]
    if isinstance(method, KeepRandom):
        scores = hashed_uniform(method.seed, 0, torch.arange(1, len(a) + 1)).tolist()
        best = sorted(range(len(a)), key=lambda i: -scores[i])[: round(len(a) * method.keep)]
        return [(x[i], i) for i in sorted(best)]
    quartiles = torch.quantile(a, torch.tensor([0.25, 0.75], dtype=a.dtype))
    kept = [i for i in range(len(a)) if a[i] > quartiles[1] + 1.5 * (quartiles[1] - quartiles[0])]
    if isinstance(method, PruMergePlus):
        step = max(1, len(a) // len(kept) // 3) if kept else len(a)
        kept = sorted({*kept, *range(0, len(a) - 1, step)})
    alike, out = cosine(keys), []
    for i in kept:
        near = sorted((j for j in range(len(a)) if j != i), key=lambda j: (-float(alike[i, j]), j))
        out.append((x[i] + sum(a[j] * x[j] for j in near[: method.neighbours]), i))
    dropped = [j for j in range(len(a)) if j not in kept]
    return out + ([(sum(a[j] * x[j] for j in dropped), None)] if dropped else [])


def zipped(x, a, keys, cls, dominant, contextual):
    best = sorted(sorted(range(len(a)), key=lambda i: (-float(a[i]), i))[: dominant - (cls is not None)])
    others = [i for i in range(len(a)) if i not in best]
    targets = others[:: max(1, len(others) // contextual)][:contextual]
    alike, gone = cosine(keys), {t: [] for t in targets}
    for i in others:
        if i not in targets:
            gone[max(targets, key=lambda t: (float(alike[i, t]), -t))].append(i)
    out = [] if cls is None else [(cls, None)]
    out += [(x[i], i) for i in best]
    return out + [(x[t] + (sum(x[i] for i in gone[t]) / len(gone[t]) if gone[t] else 0), t) for t in targets]


def slots_of(tokens, count, by_place):
    """Where each token stands among the `count` that an image has."""
    if not by_place:
        return list(range(len(tokens)))
    free = [i for i in range(count) if i not in {place for _, place in tokens}]
    homeless = iter(free[len(free) - sum(place is None for _, place in tokens) :])
    return [next(homeless) if place is None else place for _, place in tokens]


# -- the prompt by hand, one row without padding


def grid_positions(start, frames, rows, columns):
    return [(start + t, start + r, start + c) for t in range(frames) for r in range(rows) for c in range(columns)]


def positions_of(model, ids, grids):
    """Position of each column, (T, H, W) with M-RoPE; None elsewhere, where they are counted anew."""
    if model.config.model_type != "qwen2_vl":
        return None
    out, nxt, at = [], 0, 0
    grids = iter(grids)
    while at < len(ids):
        if ids[at] in (IMAGE, VIDEO):
            t, h, w = (int(n) for n in next(grids))
            out += grid_positions(nxt, t, h // 2, w // 2)
            at, nxt = at + t * h * w // 4, nxt + max(h, w) // 2
        else:
            out.append((nxt, nxt, nxt))
            at, nxt = at + 1, nxt + 1
    return out


def features_by_column(model, inputs, tokens):
    """`tokens` of the images in the order of the placeholders, None where nothing stands.

    LLaVA-NeXT: the overview, then four tiles row by row as far as the picture goes, with a line end after each row.
    """
    if model.config.model_type != "llava_next":
        return [x for image in tokens for x in image]
    out, newline = [], model.base_model.image_newline
    for i, (height, _) in enumerate(inputs["image_sizes"].tolist()):
        overview, *tiles = tokens[5 * i : 5 * i + 5]
        out += overview
        above = (8 - 8 * height // 112) // 2
        for row in range(above, 8 - above):
            places = [(tiles[2 * (row // 4) + column // 4], 4 * (row % 4) + column % 4) for column in range(8)]
            out += [tile[place] for tile, place in places] + [newline]
    return out


def placed(model, inputs, method):
    """Per image, what stands at each place by the loops above; None where nothing does."""
    out = []
    for x, a, keys, cls in encoded(model, inputs, method):
        tokens = chosen_by(method, x, a, keys, cls)
        image = [None] * len(x)
        for slot, (feature, _) in zip(
            slots_of(tokens, len(x), model.config.model_type in BY_PLACE), tokens, strict=True
        ):
            image[slot] = feature
        out.append(image)
    return out


def entering(model, inputs, method):
    """Per image, what enters the projector [V, C] in a session; must be what the loops say, or 0."""
    seen = []
    with reduce_images(model, method), torch.no_grad():
        hook = projector(model).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        encode(model, inputs)
        hook.remove()
    wanted = placed(model, inputs, method)
    found = list(seen[0]) if seen[0].ndim == 3 else list(seen[0].split([len(image) for image in wanted]))
    for x, image in zip(found, wanted, strict=True):
        stands = [torch.zeros_like(x[0]) if y is None else y for y in image]
        torch.testing.assert_close(x, torch.stack(stands), **ROUNDED)
    return [
        [x if y is not None else None for x, y in zip(*image, strict=True)] for image in zip(found, wanted, strict=True)
    ]


def by_hand(model, inputs, images):
    """Embeddings [1, K, D] and positions [1, K] or [3, 1, K] of one row, and its columns that stay."""
    ids = inputs["input_ids"][0].tolist()
    grids = inputs.get("image_grid_thw", inputs.get("video_grid_thw"))
    positions = positions_of(model, ids, [] if grids is None else grids)
    embed = model.get_input_embeddings()
    tokens = [[x if x is None else projector(model)(x) for x in image] for image in images]
    columns = iter(features_by_column(model, inputs, tokens))
    row = [next(columns) if i in (IMAGE, VIDEO) else embed(torch.tensor(i)) for i in ids]
    stays = [i for i, x in enumerate(row) if x is not None]
    where = torch.arange(len(stays))[None]
    if positions is not None:
        where = torch.tensor([positions[i] for i in stays]).T[:, None]
    return torch.stack([row[i] for i in stays])[None], where, stays


@torch.no_grad()
def dense(model, embeds, where, tokens):
    """Logits [1, n, V] of the stock language model, which is fed the prompt and then `tokens` [1, n]."""
    cache, logits = DynamicCache(config=model.config.get_text_config(decoder=True)), []
    for step in range(tokens.shape[1]):
        out = model.get_decoder()(inputs_embeds=embeds, position_ids=where, past_key_values=cache)
        logits.append(model.get_output_embeddings()(out.last_hidden_state[:, -1]))
        embeds = model.get_input_embeddings()(tokens[:, step : step + 1])
        where = torch.full_like(where[..., :1], int(where.max()) + 1)
    return torch.stack(logits, 1)


@torch.no_grad()
def rows_by_hand(model, inputs, method):
    """`by_hand` of each row of a batch, without its padding."""
    images = entering(model, inputs, method)
    batch = len(inputs["input_ids"])
    each = len(images) // batch
    return [by_hand(model, unpadded(inputs, i), images[i * each : (i + 1) * each]) for i in range(batch)]


@pytest.fixture(scope="session")
def kit():
    return SimpleNamespace(
        PIPELINE=PIPELINE,
        BUDGET=BUDGET,
        STEPS=STEPS,
        vlm=vlm,
        padded=padded,
        decode=decode,
        compressed=compressed,
        masked=masked,
        sharing=sharing,
        wide=wide,
        stock_or_skip=stock_or_skip,
        conversation=conversation,
        words=words,
        without_image=without_image,
        difference=difference,
        projector=projector,
        positions_of=positions_of,
        rows_by_hand=rows_by_hand,
        dense=dense,
        state=state,
    )
