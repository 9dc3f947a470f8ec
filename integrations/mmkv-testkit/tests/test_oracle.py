import pytest
import torch
from mmkv_testkit._compat import cross_layers, evictable_layers, shared_from, text_attention
from mmkv_testkit.decode import greedy
from mmkv_testkit.families import NAMES, build, pad
from mmkv_testkit.memory import live_bytes
from mmkv_testkit.oracle import NAME, MaskedDense, Round, random_keep
from transformers import DynamicCache

NEW = 6


def length(vlm):
    return vlm.inputs["input_ids"].shape[1]


def all_kept(vlm, inputs=None):
    """Everything kept, in every layer a round may name."""
    keep = random_keep(vlm.model, inputs or vlm.inputs, 2.0)
    if vlm.name == "mllama":
        keep |= {i: torch.ones(len(vlm.inputs["input_ids"]), 2, 34, dtype=torch.bool) for i in (1, 3)}
    return keep


def change(vlm, keep, inputs=None, **settings):
    """Largest logit difference of each step to the stock model along the stock model's tokens."""
    inputs = inputs or vlm.inputs
    stock = greedy(vlm.model, inputs, NEW)
    with MaskedDense(vlm.model, keep, **settings) as oracle:
        masked = greedy(vlm.model, inputs, forced=stock.tokens)
    assert oracle.masked_calls > 0 or not keep
    return (masked.logits - stock.logits).abs().amax((0, 2))


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_is_the_stock_model(name):
    vlm = build(name, batch=2)
    assert change(vlm, all_kept(vlm), from_query=length(vlm)).max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_keeping_all_of_a_padded_batch_is_the_stock_model(name):
    vlm = build(name, batch=2)
    inputs = pad(vlm.inputs, left=[7, 0])
    assert change(vlm, random_keep(vlm.model, inputs, 2.0), inputs).max() < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_eviction_matters_from_the_second_token_on(name):
    vlm = build(name)
    steps = change(vlm, random_keep(vlm.model, vlm.inputs))
    assert steps[0] < 1e-5  # the prompt itself saw everything
    assert steps[1:].min() > 0.05


@pytest.mark.parametrize(
    "name",
    ["llama", "llava", "mistral3", "qwen2_vl", "qwen3_5", "gemma3", "gemma4", "mllama", "paligemma", "paligemma2"],
)
@torch.no_grad()
def test_masking_equals_removing(name):
    """Equally many columns per head, different ones in each head and layer: the stock cache can be cut for real."""
    vlm = build(name)
    layers = [i for i in evictable_layers(vlm.text_config) if i not in cross_layers(vlm.text_config)]
    n, cache, generator = length(vlm), DynamicCache(config=vlm.text_config), torch.Generator().manual_seed(0)
    first = vlm.model(**vlm.inputs, past_key_values=cache, use_cache=True)
    keep = {}
    for i in layers:
        columns = torch.rand(1, 2, n, generator=generator).topk(n // 2).indices.sort(-1).values
        keep[i] = torch.zeros(1, 2, n, dtype=torch.bool).scatter(2, columns, True)
        for part in ("keys", "values"):
            whole = getattr(cache.layers[i], part)
            setattr(cache.layers[i], part, whole.gather(2, columns[..., None].expand(-1, -1, -1, whole.shape[-1])))
    token, tokens, removed = first.logits[:, -1:].argmax(-1), [], []
    for step in range(4):
        tokens.append(token)
        out = vlm.model(input_ids=token, past_key_values=cache, position_ids=positions(vlm, n + step))
        removed.append(out.logits[:, -1])
        token = torch.full_like(token, 7 + step)
    with MaskedDense(vlm.model, keep):
        masked = greedy(vlm.model, vlm.inputs, forced=torch.cat([*tokens, token], 1)).logits
    assert torch.allclose(masked[:, 1:], torch.stack(removed, 1), atol=2e-5)


def positions(vlm, column):
    """Position of the token at a logical column, M-RoPE included."""
    deltas = getattr(vlm.model.model, "rope_deltas", None)
    if deltas is None:
        return torch.tensor([[column + vlm.name.startswith("paligemma")]])  # which counts from 1
    return (column + deltas).expand(3, 1, 1)


def test_no_round_before_its_query():
    vlm = build("llava")
    steps = change(vlm, [Round(random_keep(vlm.model, vlm.inputs), length(vlm) + 2)])
    assert steps[:3].max() < 1e-5
    assert steps[3:].min() > 0.05


def test_first_token_may_see_less():
    vlm = build("llava")
    assert change(vlm, random_keep(vlm.model, vlm.inputs), from_query=length(vlm) - 1)[0] > 0.05


def test_rounds_add_up():
    vlm = build("llava")
    n, stock = length(vlm), greedy(vlm.model, vlm.inputs, NEW)
    one, two = random_keep(vlm.model, vlm.inputs, 0.7, seed=1), random_keep(vlm.model, vlm.inputs, 0.7, seed=2)
    both = {i: one[i] & two[i] for i in one}

    def logits(keep, **settings):
        with MaskedDense(vlm.model, keep, **settings):
            return greedy(vlm.model, vlm.inputs, forced=stock.tokens).logits

    rounds = logits([Round(one, n), Round(two, n + 3)])
    assert torch.equal(rounds[:, :4], logits(one)[:, :4])
    assert torch.equal(logits([Round(one, n), Round(two, n)]), logits(both))
    assert (rounds[:, 4:] - logits(one)[:, 4:]).abs().amax(-1).min() > 0.05


@torch.no_grad()
def test_second_turn_with_its_own_round():
    """The second round names columns of the first answer and of the second question too."""
    vlm = build("llava")
    n, keep = length(vlm), random_keep(vlm.model, vlm.inputs)
    question = torch.tensor([[5, 6, 7, 8]])

    def second_turn(rounds, last):
        with MaskedDense(vlm.model, rounds):
            cache = DynamicCache(config=vlm.text_config)
            vlm.model(**vlm.inputs, past_key_values=cache)
            vlm.model(input_ids=question, past_key_values=cache)
            return vlm.model(input_ids=torch.tensor([[last]]), past_key_values=cache).logits

    later = {
        i: torch.cat([kept, torch.tensor([True, False, False, True]).expand(1, 2, 4)], 2) for i, kept in keep.items()
    }
    first, both = second_turn([Round(keep, n)], 9), second_turn([Round(keep, n), Round(later, n + 4)], 9)
    assert (first - both).abs().max() > 0.05
    assert torch.equal(first, second_turn([Round(keep, n), Round(later, n + 5)], 9))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "mllama", "gemma4"])
def test_several_query_tokens_at_once(name):
    """A forward pass across the border of a round gives each of its queries its own view."""
    vlm = build(name)
    n, more = length(vlm), torch.tensor([[5, 6, 7, 8]])
    keep = all_kept(vlm)
    keep = {i: k & (torch.rand(k.shape, generator=torch.Generator().manual_seed(i)) < 0.5) for i, k in keep.items()}

    def logits(chunks):
        with MaskedDense(vlm.model, keep, from_query=n + 2):
            cache = DynamicCache(config=vlm.text_config)
            vlm.model(**vlm.inputs, past_key_values=cache)
            outs = [vlm.model(input_ids=x, past_key_values=cache) for x in more.split(chunks, 1)]
        return torch.cat([out.logits for out in outs], 1)

    assert torch.allclose(logits(4), logits(1), atol=1e-5)


def test_chunked_prefill():
    vlm = build("llama")  # chunking the prompt of a model with images came after transformers 5.17
    with MaskedDense(vlm.model, random_keep(vlm.model, vlm.inputs)):
        whole, chunked = (greedy(vlm.model, vlm.inputs, NEW, prefill_chunk_size=size).logits for size in (None, 33))
    assert torch.allclose(whole, chunked, atol=1e-4)


def test_beams_use_their_prompts_columns():
    vlm = build("llava", batch=2)
    keep = random_keep(vlm.model, vlm.inputs)
    with MaskedDense(vlm.model, keep) as oracle, torch.no_grad():
        together = vlm.model.generate(**vlm.inputs, max_new_tokens=NEW, num_beams=3, do_sample=False)
    assert oracle.masked_calls
    alone = {i: kept[1:] for i, kept in keep.items()}
    second = {name: value[1:] for name, value in vlm.inputs.items()}
    with MaskedDense(vlm.model, alone), torch.no_grad():
        expected = vlm.model.generate(**second, max_new_tokens=NEW, num_beams=3, do_sample=False)
    assert torch.equal(together[1:], expected)


def test_lent_keys_are_masked_for_their_borrowers():
    vlm = build("gemma4")
    assert shared_from(vlm.text_config) == {4: 2, 5: 3}
    keep = random_keep(vlm.model, vlm.inputs)
    assert set(keep) == {1, 3}
    with MaskedDense(vlm.model, {3: keep[3]}) as oracle:
        greedy(vlm.model, vlm.inputs, NEW)
    assert oracle.masked_calls == 2 * (NEW - 1)  # layer 3 and its borrower 5


def test_image_columns_of_mllama():
    vlm = build("mllama")
    half = torch.arange(34).expand(1, 2, 34) % 2 == 0
    steps = change(vlm, {1: half, 3: half}, from_query=length(vlm))
    assert steps[0] < 1e-5
    assert steps[1:].min() > 0.05
    with pytest.raises(ValueError, match="from_query is needed"):
        MaskedDense(vlm.model, {1: half})


def test_bytes_of_mllama():
    vlm = build("mllama", batch=2)
    cache = DynamicCache(config=vlm.text_config)
    greedy(vlm.model, vlm.inputs, NEW, past_key_values=cache)
    text = 2 * (length(vlm) + NEW - 1)
    image = 2 * 2 * 17  # two tiles of 4 x 4 patches and a class token
    pair = 2 * 16 * 4
    heads, layers_each = 2, 2
    assert live_bytes(cache) == layers_each * heads * pair * (text + image)
    assert cache.layers[1].keys.shape == (2, 2, 34, 16)


def test_live_bytes_counts_what_a_view_keeps_alive():
    whole = torch.zeros(100, 8)
    assert live_bytes({"a": whole[:1], "b": [whole]}) == live_bytes(whole[:1]) == 100 * 8 * 4
    assert live_bytes(whole[:1].clone()) == 8 * 4
    assert live_bytes([torch.nn.Linear(2, 2), "text", None]) == 0


def test_setting_is_restored_even_after_an_error():
    vlm = build("paligemma2")
    assert text_attention(vlm.model) == "eager"
    with MaskedDense(vlm.model, {}):
        assert text_attention(vlm.model) == NAME
    with pytest.raises(ValueError, match="no input"), MaskedDense(vlm.model, {}):
        raise ValueError("no input")
    assert text_attention(vlm.model) == "eager"
    assert vlm.model.config._attn_implementation == "sdpa"


def test_two_models_at_once_and_not_one_twice():
    one, two = build("llava"), build("llava")
    keep = random_keep(one.model, one.inputs)
    expected = change(one, keep)
    with MaskedDense(two.model, {}), MaskedDense(one.model, keep):
        assert torch.equal(
            greedy(two.model, two.inputs, NEW).tokens, greedy(build("llava").model, two.inputs, NEW).tokens
        )
        with pytest.raises(RuntimeError, match="another function's already"):
            MaskedDense(one.model, {}).__enter__()
    assert torch.equal(change(one, keep), expected)


def test_refuses_what_it_cannot_mask():
    vlm = build("gemma4")
    keep = random_keep(vlm.model, vlm.inputs)
    for wrong, message in [
        ({0: keep[1]}, "layer 0 holds no full cache"),
        ({5: keep[1]}, "layer 5 holds no full cache"),
        ({1: keep[1].float()}, "must be bool"),
        ({1: keep[1][:, :1]}, "1 heads, the model 2"),
        ({1: keep[1], 3: keep[3][..., 1:]}, "from_query is needed"),
    ]:
        with pytest.raises(ValueError, match=message):
            MaskedDense(vlm.model, wrong)
    with pytest.raises(ValueError, match="have their own"):
        MaskedDense(vlm.model, [Round(keep, 3)], from_query=3)
    with pytest.raises(ValueError, match="does not fit"), MaskedDense(vlm.model, keep, from_query=2):
        greedy(
            vlm.model,
            {name: value[:, :9] for name, value in vlm.inputs.items() if name in ("input_ids", "attention_mask")},
        )


def test_outside_of_the_context_the_name_is_refused():
    vlm = build("llama")
    vlm.model.set_attn_implementation(NAME)
    with pytest.raises(RuntimeError, match="only inside"):
        greedy(vlm.model, vlm.inputs, 1)
