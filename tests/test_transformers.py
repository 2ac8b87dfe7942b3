"""The bridge to Hugging Face transformers, against stock SDPA on tiny random models."""

import subprocess
import sys

import pytest
import torch

from attnplan import patterns as P
from attnplan.errors import SpecError

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers as hf
from transformers import masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnplan.integrations import transformers as bridge

LAYERS = 2
TOLERANCE = 1e-5
SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    bridge.register()
    bridge.reset_stats()


def encoder(**options):
    return hf.BertModel(hf.BertConfig(**SIZES, **options)).eval()


def llama(**options):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2, eos_token_id=None, **options)).eval()


def mistral(window):
    config = hf.MistralConfig(**SIZES, num_key_value_heads=2, eos_token_id=None, sliding_window=window)
    return hf.MistralForCausalLM(config).eval()


def tokens(batch=3, length=12):
    return torch.randint(1, SIZES["vocab_size"], (batch, length))


def padded(ids, side, counts=(0, 4, 7)):
    mask = torch.ones_like(ids)
    for row, count in zip(mask, counts, strict=False):
        row[slice(0, count) if side == "left" else slice(len(row) - count, None)] = 0
    return mask


def relative(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def both(model, ids, expected="sdpa", **inputs):
    """Return the relative L2 error of attnplan's output at the real tokens, and the counts."""
    outputs = []
    for name in (expected, "attnplan"):
        model.set_attn_implementation(name)
        outputs.append(model(ids, **inputs)[0])
    assert torch.isfinite(outputs[1]).all()
    mask = inputs.get("attention_mask")
    real = mask.bool() if mask is not None and mask.dim() == 2 else torch.ones_like(ids).bool()
    return relative(outputs[1][real], outputs[0][real]), bridge.stats()


def test_import_attnplan_leaves_transformers_alone():
    code = "import sys, attnplan; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_both_registries_hold_the_name():
    # With only one of them transformers passes no mask: causality and padding vanish without a word.
    assert bridge.register() == bridge.register() == "attnplan"
    assert "attnplan" in hf.AttentionInterface().valid_keys()
    assert "attnplan" in hf.AttentionMaskInterface().valid_keys()


@pytest.mark.parametrize("side", ["left", "right"])
def test_encoder(side):
    ids = tokens()
    mask = padded(ids, side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    error, stats = both(encoder(), ids, attention_mask=mask, position_ids=positions)
    assert error <= TOLERANCE
    assert stats == bridge.Stats(plan_calls=LAYERS, fallbacks=0, reasons={})


def test_padding_does_not_leak():
    ids = tokens()
    mask = padded(ids, "right")
    model = encoder()
    model.set_attn_implementation("attnplan")
    real = mask.bool()
    first, second = (model(torch.where(real, ids, noise), attention_mask=mask)[0][real] for noise in (5, 7))
    assert torch.equal(first, second)


def test_one_plan_for_all_batches_and_lengths():
    model = encoder()
    model.set_attn_implementation("attnplan")
    bridge.attend._plan.cache_clear()
    for batch, length in ((3, 12), (2, 9), (3, 30)):
        ids = tokens(batch, length)
        model(ids, attention_mask=padded(ids, "right"))
    assert bridge.attend._plan.cache_info().misses == 1
    assert bridge.stats().plan_calls == 3 * LAYERS
    assert [bridge.attend._bound(n) for n in (1, 1024, 1025, 4096)] == [1024, 1024, 2048, 4096]


def test_gradients():
    ids = tokens()
    model = llama(attention_dropout=0.0).train()
    gradients = []
    for name in ("sdpa", "attnplan"):
        model.set_attn_implementation(name)
        model.zero_grad()
        logits = model(ids, attention_mask=padded(ids, "right")).logits
        torch.manual_seed(1)
        logits.backward(torch.randn_like(logits))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert relative(*gradients) <= TOLERANCE
    assert bridge.stats().fallbacks == 0


@pytest.mark.parametrize("counts", [(0, 0), (0, 5)], ids=["no padding", "left padding"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("make", [llama, lambda: mistral(window=7)], ids=["llama", "sliding window"])
def test_generate(make, cache, counts):
    ids = tokens(batch=2)
    model = make()
    runs = []
    for name in ("sdpa", "attnplan"):
        model.set_attn_implementation(name)
        run = model.generate(
            ids,
            attention_mask=padded(ids, "left", counts),
            max_new_tokens=16,
            do_sample=False,
            cache_implementation=cache,
            return_dict_in_generate=True,
            output_logits=True,
        )
        runs.append(run)
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    assert relative(torch.stack(runs[1].logits), torch.stack(runs[0].logits)) <= TOLERANCE
    assert bridge.stats() == bridge.Stats(plan_calls=16 * LAYERS, fallbacks=0, reasons={})


def test_static_cache_offset_is_read_before_the_cache_moves_it():
    offset = torch.tensor(3)
    mask = bridge.make_mask(1, 2, 8, q_offset=offset)
    dense = mask.dense()
    offset.add_(2)  # what StaticLayer.update does before the layer's attention
    assert mask.request.operands["q_offset"] == 3
    assert torch.equal(mask.dense(), dense)


def test_prefill_and_decoding_share_a_plan():
    ids = tokens(batch=2)
    model = llama()
    model.set_attn_implementation("attnplan")
    bridge.attend._plan.cache_clear()
    model.generate(ids, attention_mask=padded(ids, "left", (0, 5)), max_new_tokens=8, do_sample=False)
    assert bridge.attend._plan.cache_info().misses == 1


def test_packed_positions_become_documents():
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
    error, stats = both(llama(), tokens(batch=2), position_ids=positions)
    assert error <= TOLERANCE
    assert stats.fallbacks == 0
    made = masking_utils.create_causal_mask(
        llama(attn_implementation="attnplan").config, torch.empty(2, 12, 0), None, None, positions
    )
    assert made.request.pattern == P.documents() & P.causal()


def test_packed_mask_that_positions_do_not_imply():
    positions = torch.arange(6)[None] % 3
    other = torch.tensor([[0, 0, 1, 1, 2, 2]])
    rule = masking_utils.packed_sequence_compatibility_function(masking_utils.causal_mask_function, positions, other)
    mask = bridge.make_mask(1, 6, 6, mask_function=rule)
    assert not isinstance(mask, bridge.ProvenMask)
    assert "do not follow from position_ids" in mask._attnplan_reason


def test_packed_mask_of_other_keys():
    positions = torch.arange(6)[None] % 3
    index = masking_utils.find_packed_sequence_indices(positions)
    rule = masking_utils.packed_sequence_compatibility_function(RULES["causal"], positions, index)
    assert isinstance(bridge.make_mask(1, 6, 6, mask_function=rule), bridge.ProvenMask)
    assert not isinstance(bridge.make_mask(1, 4, 4, mask_function=rule), bridge.ProvenMask)


def imitation():
    def causal_mask_function(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx <= q_idx + 1

    return causal_mask_function


RULES = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(3),
    "two-sided": masking_utils.sliding_window_bidirectional_mask_function(2),
}
OTHERS = {
    "imitation": imitation(),
    "union": masking_utils.or_masks(RULES["sliding"], imitation()),
    "chunked": masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 1])),
}


@pytest.mark.parametrize(
    ("q_length", "kv_length", "q_offset", "kv_offset", "seen"),
    [
        (6, 6, 0, 0, 6),
        (2, 9, 7, 0, 9),  # a cache
        (1, 5, 9, 5, 10),  # a sliding cache that has dropped keys
        (4, 10, torch.tensor(0), 0, 4),  # a static cache at prefill
        (1, 10, torch.tensor(6), 0, 7),  # and at decoding
        (3, 10, 2, 0, 5),  # keys after the last query
        (3, 10, 2, 0, 4),  # queries after the last real key
        (2, 7, 0, 0, 7),
    ],
)
@pytest.mark.parametrize("padding", ["none", "all real", "holes"])
@pytest.mark.parametrize("rule", [*RULES, *OTHERS])
def test_masks_mean_what_stock_masks_mean(rule, padding, q_length, kv_length, q_offset, kv_offset, seen):
    function = (RULES | OTHERS)[rule]
    real = torch.ones(2, seen, dtype=torch.bool)
    if padding == "holes":
        real[1] = torch.arange(seen) % 3 > 0
    where = {"batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    where |= {"kv_offset": kv_offset, "mask_function": function, "attention_mask": None if padding == "none" else real}
    stock = masking_utils.sdpa_mask(**where, allow_is_causal_skip=False)
    mask = bridge.make_mask(**where)
    assert isinstance(mask, bridge.ProvenMask) == (rule in RULES)
    q, k, v = torch.randn(2, 4, q_length, 8), torch.randn(2, 2, kv_length, 8), torch.randn(2, 2, kv_length, 8)
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    expected, _ = sdpa_attention_forward(module, q, k, v, stock)
    expected = expected * stock.any(-1).transpose(1, 2)[..., None]  # a row without keys is 0
    got, weights = bridge.attention(module, q, k, v, mask)
    assert relative(got, expected) <= TOLERANCE
    assert got.is_contiguous()
    assert weights is None
    assert bridge.stats().fallbacks == (rule in OTHERS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_length", "kv_length"), [(5, 5), (3, 7), (7, 3), (1, 7)])
def test_no_mask_at_all(causal, q_length, kv_length):
    module = torch.nn.Module()
    module.is_causal = causal
    q, k, v = torch.randn(2, 2, q_length, 8), torch.randn(2, 2, kv_length, 8), torch.randn(2, 2, kv_length, 6)
    expected, _ = sdpa_attention_forward(module, q, k, v, None, scaling=0.3)
    assert relative(bridge.attention(module, q, k, v, None, scaling=0.3)[0], expected) <= TOLERANCE
    flipped, _ = sdpa_attention_forward(module, q, k, v, None, is_causal=not causal)
    assert relative(bridge.attention(module, q, k, v, None, is_causal=not causal)[0], flipped) <= TOLERANCE


def test_sliding_window_without_a_mask():
    q = torch.randn(1, 2, 9, 8)
    window = masking_utils.sdpa_mask(1, 9, 9, mask_function=RULES["sliding"], allow_is_causal_skip=False)
    expected, _ = sdpa_attention_forward(torch.nn.Module(), q, q, q, window)
    assert relative(bridge.attention(torch.nn.Module(), q, q, q, None, sliding_window=3)[0], expected) <= TOLERANCE


def test_custom_mask_function_is_counted_and_right(monkeypatch):
    def first_keys(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx < 4

    stock = masking_utils.create_causal_mask
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.create_causal_mask",
        lambda *args, **kwargs: stock(*args, **kwargs, or_mask_function=first_keys),
    )
    ids = tokens()
    error, stats = both(llama(), ids, attention_mask=padded(ids, "right"))
    assert error <= TOLERANCE
    assert (stats.plan_calls, stats.fallbacks) == (0, LAYERS)
    assert stats.reasons == {"unknown mask function or_masks.<locals>.or_mask": LAYERS}


@pytest.mark.parametrize("additive", [False, True])
def test_dense_mask_of_the_caller(additive):
    keep = torch.rand(3, 1, 12, 12) > 0.5
    keep |= torch.eye(12, dtype=torch.bool)
    mask = torch.where(keep, 0.0, -1e9) if additive else keep
    error, stats = both(llama(), tokens(), attention_mask=mask)
    assert error <= TOLERANCE
    assert stats.reasons == {"a dense mask from the model or its caller": LAYERS}


def test_a_model_that_computes_with_the_mask_gets_the_dense_one():
    mask = bridge.make_mask(2, 4, 6, q_offset=2)
    part = mask[:, :, 1:3, :]
    assert type(part) is torch.Tensor
    assert torch.equal(part, mask.dense()[:, :, 1:3, :])
    assert mask.contiguous() is mask
    assert "ProvenMask([2, 1, 4, 6], causal())" in repr(mask)


def test_mask_of_another_shape_falls_back():
    mask = bridge.make_mask(1, 4, 4)
    q = torch.randn(3, 2, 4, 8)
    expected, _ = sdpa_attention_forward(torch.nn.Module(), q, q, q, mask.dense())
    assert relative(bridge.attention(torch.nn.Module(), q, q, q, mask)[0], expected) <= TOLERANCE
    assert bridge.stats().reasons == {"a mask whose shape differs from the layer's q and k": 1}


def test_softcap():
    config = hf.Gemma2Config(
        **SIZES,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=5,
        attn_logit_softcapping=0.01,
        query_pre_attn_scalar=1,
    )
    ids = tokens()
    error, stats = both(hf.Gemma2ForCausalLM(config).eval(), ids, "eager", attention_mask=padded(ids, "right"))
    assert error <= TOLERANCE
    assert stats == bridge.Stats(plan_calls=LAYERS, fallbacks=0, reasons={})


@pytest.mark.parametrize("option", [{"softcap": 2.0}, {"s_aux": torch.zeros(2)}], ids=str)
def test_what_stock_sdpa_has_not_is_refused_without_a_plan(option):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(SpecError, match=f"{next(iter(option))} needs a plan, but there is none: a dense mask"):
        bridge.attention(torch.nn.Module(), q, q, q, torch.ones(1, 1, 4, 4, dtype=torch.bool), **option)


def gpt_oss():
    sizes = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 5, "eos_token_id": None}
    model = hf.GptOssForCausalLM(hf.GptOssConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def test_sink_logits_of_a_model_and_their_gradients():
    """gpt-oss has a sink logit for each head, and every second layer a window."""
    ids = tokens()
    model = gpt_oss()
    with torch.no_grad():
        error, stats = both(model, ids, "eager", attention_mask=padded(ids, "right"))
    assert error <= TOLERANCE
    assert stats == bridge.Stats(plan_calls=LAYERS, fallbacks=0, reasons={})
    found = []
    for name in ("eager", "attnplan"):
        model.set_attn_implementation(name)
        loss = model(ids).logits.square().mean()
        found.append(torch.autograd.grad(loss, [layer.self_attn.sinks for layer in model.model.layers]))
    for want, got in zip(*found, strict=True):
        assert want.norm() > 0
        assert relative(got, want) <= TOLERANCE


def test_dropout_in_training_is_refused():
    model = encoder(attention_probs_dropout_prob=0.1).train()
    model.set_attn_implementation("attnplan")
    with pytest.raises(SpecError, match=r"dropout=0\.1 on attention weights"):
        model(tokens())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("position_bias", "position bias"),
        ("cache", "paged"),
        ("output_attentions", "weights"),
    ],
)
def test_what_plans_cannot_do_is_refused(option, message):
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(SpecError, match=message):
        bridge.attention(torch.nn.Module(), q, q, q, None, **{option: torch.zeros(2)})
    bridge.attention(torch.nn.Module(), q, q, q, None, **{option: None})


def test_counts():
    model = llama()
    model.set_attn_implementation("attnplan")
    model(tokens())
    model(tokens(), attention_mask=torch.ones(3, 1, 12, 12, dtype=torch.bool))
    assert bridge.stats() == bridge.Stats(LAYERS, LAYERS, {"a dense mask from the model or its caller": LAYERS})
    bridge.reset_stats()
    assert bridge.stats() == bridge.Stats(0, 0, {})


@torch.no_grad()
def test_under_torch_compile():
    ids = tokens()
    mask = padded(ids, "left")
    model = llama()
    model.set_attn_implementation("attnplan")
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    bridge.reset_stats()
    got = torch.compile(model, backend="eager")(ids, attention_mask=mask, use_cache=False).logits
    assert relative(got, expected) <= TOLERANCE
    assert bridge.stats() == bridge.Stats(plan_calls=LAYERS, fallbacks=0, reasons={})
