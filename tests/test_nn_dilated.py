"""The modules without projections: parity with tests/published.py, causality, masks, dropout, and what they refuse."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnplan.errors import SpecError
from attnplan.nn import DilatedAttention, ImprovedDilatedAttention, LongNetAttention
from tests import published

DILATED = (DilatedAttention, ImprovedDilatedAttention)
LADDER = ([8, 16], [1, 2])


def inputs(n: int, heads: int = 4, dim: int = 8, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch, n, heads, dim, generator=source, dtype=torch.float64).requires_grad_() for _ in range(3)
    )
    return q, k, v


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *tensors: Tensor) -> None:
    """Compare outputs and the gradients of all tensors, under one random upstream gradient."""
    got, wanted = ours(*tensors), theirs(*tensors)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=wanted.dtype)
    for a, b in zip(
        torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(wanted, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@st.composite
def ladders(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Segments and rates that need not divide each other, nor the length."""
    count = draw(st.integers(1, 3))
    rates = [draw(st.integers(1, 4)) for _ in range(count)]
    return [r * draw(st.integers(1, 5)) + draw(st.integers(0, r - 1)) for r in rates], rates


grid = given(ladder=ladders(), n=st.integers(1, 29), heads=st.integers(1, 5), causal=st.booleans())


@grid
@settings(max_examples=20)
def test_dilated_has_the_forks_mathematics(
    ladder: tuple[list[int], list[int]], n: int, heads: int, causal: bool
) -> None:
    for kind in DILATED:
        module = kind(*ladder)
        assert_same(
            lambda *x, module=module: module(*x, is_causal=causal),
            lambda *x: published.grouped(*x, *ladder, causal),
            *inputs(n, heads, 4, 1),
        )


@pytest.mark.parametrize("kind", DILATED)
def test_softmax_scale_works(kind: type[DilatedAttention]) -> None:
    module = kind(*LADDER, softmax_scale=0.7)
    assert_same(module, lambda *x: published.grouped(*x, *LADDER, scale=0.7), *inputs(32))


def test_mix_none_does_not_divide() -> None:
    module = DilatedAttention(*LADDER, mix="none")
    assert_same(module, lambda *x: published.grouped(*x, *LADDER, divide=False), *inputs(32))


def test_rows_that_no_branch_covers_are_zero() -> None:
    out = DilatedAttention([8, 8], [1, 2])(*inputs(16))
    assert torch.equal(out[:, ::2, 2:], torch.zeros(2, 8, 2, 8, dtype=torch.float64))
    assert bool((out[:, 1::2] != 0).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "module",
    [
        DilatedAttention([8, 16, 24], [1, 2, 3]),
        ImprovedDilatedAttention([8, 16, 24], [1, 2, 3]),
        LongNetAttention([8, 16, 24], [1, 2, 3]),
        LongNetAttention([8, 16, 24], [1, 2, 3], offset="interleave", mix="lse"),
        LongNetAttention([8, 16, 24], [1, 2, 3], zero_key_padding=True),
    ],
    ids=["dilated", "improved", "torchscale", "paper", "zeros"],
)
def test_the_future_changes_nothing_bit_for_bit(module: torch.nn.Module, dtype: torch.dtype) -> None:
    assert_causal(module, dtype)


def assert_causal(module: Callable[..., Tensor], dtype: torch.dtype, n: int = 29) -> None:
    """Change each token in turn; every earlier row of the output must be the same bits, and a later one must differ."""
    q, k, v = (x.detach().to(dtype) for x in inputs(n, 5))
    before = module(q, k, v, is_causal=True)
    for j in range(n):
        q2, k2, v2 = q.clone(), k.clone(), v.clone()
        for x in (q2, k2, v2):
            x[:, j] = 3 - 2 * x[:, j]
        after = module(q2, k2, v2, is_causal=True)
        assert torch.equal(before[:, :j], after[:, :j]), f"token {j} changed an earlier row"
        assert not torch.equal(before[:, j:], after[:, j:])


@pytest.mark.parametrize(
    "module", [DilatedAttention(*LADDER, attention_dropout=0.5), LongNetAttention(*LADDER, None, 0.5)]
)
def test_dropout_drops_in_training_only_and_follows_torchs_seed(module: torch.nn.Module) -> None:
    q, k, v = (x.detach() for x in inputs(32))
    kept = module.eval()(q, k, v)
    assert torch.equal(kept, module(q, k, v))
    module.train()
    torch.manual_seed(3)
    first, second = module(q, k, v), module(q, k, v)
    torch.manual_seed(3)
    assert torch.equal(first, module(q, k, v))
    assert not torch.allclose(first, second)
    torch.manual_seed(3)
    torch.testing.assert_close(module(q, k, 2 * v), 2 * first)  # linear in v at a fixed seed: weights are dropped


def test_dropout_keeps_the_mean() -> None:
    module = DilatedAttention([8], [1], attention_dropout=0.25)
    q, k, v = (x.detach() for x in inputs(8))
    torch.manual_seed(0)
    mean = torch.stack([module(q, k, v) for _ in range(200)]).mean(0)
    torch.testing.assert_close(mean, module.eval()(q, k, v), rtol=0, atol=0.2)


def test_grouped_query_heads() -> None:
    q, k, v = inputs(24)
    ours = DilatedAttention(*LADDER)(q, k[:, :, :2], v[:, :, :2])
    repeated = (x[:, :, :2].repeat_interleave(2, 2) for x in (k, v))
    torch.testing.assert_close(ours, published.grouped(q, *repeated, *LADDER), rtol=1e-12, atol=1e-12)


def test_repr_and_explain_show_the_choice() -> None:
    module = DilatedAttention(*LADDER)
    assert repr(module) == 'DilatedAttention(grouped(segment_lengths=[8, 16], dilation_rates=[1, 2], mix="mean"))'
    with pytest.raises(SpecError, match="call the module first, or give a length"):
        module.explain()
    assert "4096" in module.explain(4096, heads=4, head_dim=8)
    q, k, v = inputs(32)
    module(q, k, v, is_causal=True)
    plan = module.plan(32, 4, 8, causal=True, batch=2, dtype="float64")
    assert f"plan at 32: {plan.strategy} > {plan.backend}" in repr(module)
    assert plan.strategy in module.explain()
    before = repr(module)
    with pytest.raises(SpecError, match="batch sizes differ"):
        module(q, k[:1], v[:1])
    assert repr(module) == before  # a call that failed has no plan


def test_dropout_is_repeated_under_checkpointing() -> None:
    module, x = DilatedAttention(*LADDER, attention_dropout=0.5), inputs(32)
    torch.manual_seed(1)
    plain = torch.autograd.grad(module(*x).square().sum(), x)
    torch.manual_seed(1)
    again = torch.autograd.grad(checkpoint(module, *x, use_reentrant=False).square().sum(), x)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# The constructors and calls as published: names in order, and defaults.
SIGNATURES = {
    "pypi 0.2.0": (
        DilatedAttention,
        {"softmax_scale": None, "attention_dropout": 0.0, "op": None},
        ["query", "key", "value", "is_causal"],
    ),
    "fork f6094f7": (
        DilatedAttention,
        {
            "softmax_scale": None, "attention_dropout": 0.0, "op": None, "enable_memory_pool": False,
            "enable_profiling": False, "lightweight_pool": True,
        },
        ["query", "key", "value", "is_causal", "attention_mask"],
    ),
    "fork f6094f7, improved": (
        ImprovedDilatedAttention,
        {
            "dropout": 0.0, "use_tf32": False, "enable_memory_pool": False, "enable_profiling": False,
            "lightweight_pool": True,
        },  # use_tf32 was True: see the class
        ["query", "key", "value", "is_causal", "attention_mask"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_published_signatures(name: str) -> None:
    kind, defaults, call = SIGNATURES[name]
    parameters = inspect.signature(kind).parameters
    assert list(parameters)[: 2 + len(defaults)] == ["segment_lengths", "dilation_rates", *defaults]
    assert {n: parameters[n].default for n in defaults} == defaults
    assert list(inspect.signature(kind.forward).parameters)[1 : 1 + len(call)] == call


@pytest.mark.parametrize("kind", [*DILATED, LongNetAttention])
def test_swapped_lists_are_refused(kind: type[torch.nn.Module]) -> None:
    with pytest.raises(SpecError, match="are the two swapped"):
        kind([1, 2, 4], [2048, 4096, 8192])
    with pytest.raises(SpecError, match="must pair up"):
        kind([8, 16], [1])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"op": object()}, "op=.*the planner chooses"),
        ({"enable_memory_pool": True}, "enable_memory_pool=True: there is no pool"),
        ({"enable_profiling": True}, r"enable_profiling=True: use \.explain\(\)"),
        ({"attention_dropout": 1.0}, r"dropout must be a probability in \[0, 1\), got 1.0"),
        ({"attention_dropout": "0.1"}, "dropout must be a probability"),
        ({"mix": "lse"}, "unknown grouped mix 'lse'"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        DilatedAttention(*LADDER, **options)


def test_tf32_is_refused() -> None:
    with pytest.raises(SpecError, match=r"use_tf32=True: .*global TF32 flag"):
        ImprovedDilatedAttention(*LADDER, use_tf32=True)


def test_scale_is_checked_at_the_call() -> None:
    with pytest.raises(SpecError, match="scale must be a positive finite number"):
        DilatedAttention(*LADDER, softmax_scale=-1.0)(*inputs(16))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"attention_mask": torch.ones(16, 16)}, r"attention_mask=<tensor \[16, 16\]>: an arbitrary mask"),
        ({"key_padding_mask": torch.ones(2, 16)}, "key_padding_mask must be a bool tensor .*; got torch.float32"),
        ({"key_padding_mask": torch.ones(16, dtype=torch.bool)}, r"key_padding_mask must be .*got torch.bool \[16\]"),
        ({"key_padding_mask": torch.ones(2, 9, dtype=torch.bool)}, "key_padding"),
        ({"key_padding_mask": [True]}, "key_padding_mask must be a bool tensor .*got list"),
        ({"key": torch.ones(2, 16, 32)}, r"key must be a tensor \[B, S, H, D\], got shape \[2, 16, 32\]"),
        ({"value": None}, r"value must be a tensor \[B, S, H, D\], got NoneType"),
        ({"is_causal": 1}, "causal must be True or False, got 1"),
    ],
)
def test_bad_calls(arguments: dict[str, object], match: str) -> None:
    q, k, v = inputs(16)
    with pytest.raises(SpecError, match=match):
        DilatedAttention(*LADDER)(**{"query": q, "key": k, "value": v, **arguments})
