"""``torch.compile(model, backend="attnplan")``: which calls become plans, which are left alone and why, and numbers."""

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager

from attnplan.integrations import dynamo

S, W = 96, 10


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    dynamo.clear()


def inputs(seq_len=S, kv_len=S, heads=4, kv_heads=4):
    source = torch.Generator().manual_seed(0)
    sizes = ((2, heads, seq_len, 16), (2, kv_heads, kv_len, 16), (2, kv_heads, kv_len, 16))
    return tuple(torch.randn(s, generator=source).requires_grad_() for s in sizes)


def run(function, *given):
    """Compile with this backend and without Inductor, and compare output and gradients with eager."""
    compiled = torch.compile(function, backend=lambda m, x: dynamo.backend(m, x, inner=aot_eager), fullgraph=True)
    out, expected = compiled(*given), function(*given)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(expected)
    leaves = [x for x in given if x.requires_grad]
    got, wanted = (torch.autograd.grad(x, leaves, grad) for x in (out, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    return dynamo.report()


def by_comparison(q, k, v):
    i, j = torch.arange(S).unsqueeze(1), torch.arange(S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (j >= i - W))


def by_tril(q, k, v):
    mask = torch.ones(S, S, dtype=torch.bool).tril().expand(2, 4, S, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def by_triu(q, k, v):
    mask = torch.full((S, S), float("-inf")).triu(diagonal=1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None])


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def whole(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        (by_comparison, "window(10, 0)"),
        (by_tril, "causal()"),
        (by_triu, "causal()"),
        (causal, "causal()"),
        (whole, "full()"),
    ],
)
def test_masks_built_from_sizes_become_plans(function, pattern):
    found = run(function, *inputs())
    assert len(found.replaced) == 1, str(found)
    assert pattern in found.replaced[0].plan


def test_the_causal_flag_of_sdpa_is_aligned_to_the_first_key():
    found = run(causal, *inputs(seq_len=40, kv_len=70))
    assert "band(None, -30)" in found.replaced[0].plan, str(found)


def test_grouped_heads_become_a_plan():
    def grouped(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    assert len(run(grouped, *inputs(kv_heads=2)).replaced) == 1


def off_by_one_key(q, k, v):
    i, j = torch.arange(S).unsqueeze(1), torch.arange(S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) | (j == 50))


def written_in_place(q, k, v):
    mask = torch.ones(S, S, dtype=torch.bool).tril()
    mask[:, 0:1].fill_(True)
    mask.view(-1)[5:6].logical_not_()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def a_bias(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.arange(S).float().expand(S, S) * 0.01)


def random_mask(q, k, v):
    mask = (torch.rand(S, S) < 2).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def heads_differ(q, k, v):
    mask = torch.ones(4, S, S, dtype=torch.bool).tril() | (torch.arange(4) == 1).view(4, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (off_by_one_key, "no band"),
        (written_in_place, "written in place"),
        (a_bias, "a bias"),
        (random_mask, "built by rand"),
        (heads_differ, "differs between batch elements or heads"),
    ],
)
def test_masks_that_are_no_bands_are_left_alone(function, reason):
    found = run(function, *inputs())
    assert not found.replaced
    assert reason in found.left[0].reason


def test_an_input_mask_is_never_known():
    def masked(q, k, v, mask):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    found = run(masked, *inputs(), torch.ones(S, S, dtype=torch.bool).tril())
    assert "depends on an input tensor" in found.left[0].reason


def test_dropout_is_left_alone():
    compiled = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5),
        backend=lambda m, x: dynamo.backend(m, x, inner=aot_eager),
    )
    compiled(*inputs())
    assert "dropout_p=0.5" in dynamo.report().left[0].reason


def test_the_backend_is_known_by_name():
    assert "attnplan" in torch.compiler.list_backends()


def llama():
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    return LlamaModel(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa"))


def bert():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    return BertModel(BertConfig(**sizes, num_attention_heads=4, attn_implementation="sdpa"))


@pytest.mark.parametrize("make", [llama, bert])
def test_a_hugging_face_model_has_at_least_one_plan_per_layer(make):
    torch.manual_seed(0)
    model = make().eval()
    tokens = torch.arange(32).reshape(1, 32) % 50
    given = {"use_cache": False} if make is llama else {}
    with torch.no_grad():
        expected = model(tokens, **given).last_hidden_state
        compiled = torch.compile(model, backend=lambda m, x: dynamo.backend(m, x, inner=aot_eager))
        got = compiled(tokens, **given).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert len(dynamo.report().replaced) >= 2, str(dynamo.report())


@pytest.mark.slow
def test_inductor_runs_what_is_left():
    given = inputs()
    torch.testing.assert_close(torch.compile(by_comparison, backend="attnplan")(*given), by_comparison(*given))
    assert len(dynamo.report().replaced) == 1
