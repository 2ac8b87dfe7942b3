"""The modules with projections: published parameters, parity with tests/published.py, initialisation, refusals."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from attnplan.errors import SpecError
from attnplan.nn import (
    BlockSparseRingMultiheadDilatedAttention,
    ImprovedMultiheadDilatedAttention,
    MultiheadDilatedAttention,
    MultiheadLongNetAttention,
)
from tests import published
from tests.test_nn_dilated import assert_causal

E, H = 24, 4
WS, RS = [8, 16], [1, 2]


def pypi(**options: object) -> MultiheadDilatedAttention:
    return MultiheadDilatedAttention(E, H, RS, WS, **options)


def fork(**options: object) -> MultiheadDilatedAttention:
    return MultiheadDilatedAttention(E, H, RS, WS, variant="fork", **options)


def improved(**options: object) -> ImprovedMultiheadDilatedAttention:
    return ImprovedMultiheadDilatedAttention(E, H, RS, WS, **options)


def torchscale(**options: object) -> MultiheadLongNetAttention:
    return MultiheadLongNetAttention(E, H, WS, RS, subln=True, **options)


def block_sparse(**options: object) -> BlockSparseRingMultiheadDilatedAttention:
    return BlockSparseRingMultiheadDilatedAttention(E, H, WS, RS, sparse_config={"block_size": 4}, **options)


Reference = Callable[[Mapping[str, Tensor], tuple[Tensor, ...], bool], Tensor]


def _reference(form: Callable[..., Tensor], attend: Callable[..., Tensor], **options: object) -> Reference:
    def run(state: Mapping[str, Tensor], x: tuple[Tensor, ...], causal: bool) -> Tensor:
        return form(state, H, x, lambda q, k, v: attend(q, k, v, WS, RS, causal), **options)

    return run


MODULES: dict[str, tuple[Callable[..., nn.Module], Reference]] = {
    "pypi": (pypi, _reference(published.multihead_pypi, published.grouped)),
    "fork": (fork, _reference(published.multihead_fork, published.grouped)),
    "improved": (improved, _reference(published.multihead_improved, published.grouped)),
    "torchscale": (torchscale, _reference(published.multihead_pypi, published.longnet, norm="inner_attn_ln")),
}
every_module = pytest.mark.parametrize("name", MODULES)


def tensor_of(result: object) -> Tensor:
    out = result[0] if isinstance(result, tuple) else result
    assert isinstance(out, Tensor)
    return out


def randomised(module: nn.Module) -> nn.Module:
    """Fill every parameter with noise, so that norms and biases are not at their special values."""
    source = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=source, dtype=parameter.dtype)
    return module


def inputs(n: int, count: int = 3) -> tuple[Tensor, ...]:
    source = torch.Generator().manual_seed(n)
    return tuple(torch.randn(2, n, E, generator=source, dtype=torch.float64).requires_grad_() for _ in range(count))


@every_module
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["cross", "self"])
def test_parity_forward_and_gradients(name: str, causal: bool, shared: bool) -> None:
    build, reference = MODULES[name]
    module = randomised(build(dtype=torch.float64))
    x = inputs(27, 1) * 3 if shared else inputs(27)
    state = {n: p for n, p in module.named_parameters() if p.requires_grad}
    leaves = [*dict.fromkeys(x), *state.values()]
    got = tensor_of(module(*x, is_causal=causal))
    wanted = reference(state, x, causal)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(o, leaves, upstream) for o in (got, wanted))
    largest = max(float(b.abs().max()) for b in theirs)  # the bias of k has no gradient: what is there is rounding
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * largest)


@pytest.mark.parametrize("name", ["pypi", "fork", "improved"])
def test_without_norms_and_biases(name: str) -> None:
    build, reference = MODULES[name]
    module, x = randomised(build(dtype=torch.float64, layer_norm=False, bias=False)), inputs(16)
    assert not [n for n, _ in module.named_parameters() if "bias" in n or "ln" in n or "norm" in n]
    wanted = reference(dict(module.named_parameters()), x, False)
    torch.testing.assert_close(tensor_of(module(*x)), wanted, rtol=1e-12, atol=1e-11)


def test_pypi_order_of_the_call() -> None:
    module, (x,) = pypi(dtype=torch.float64), inputs(16, 1)
    assert torch.equal(module(x, x, x, True)[0], module(x, x, x, is_causal=True)[0])
    with pytest.raises(SpecError, match="is_causal must be True or False, got Tensor; masks go by name"):
        module(x, x, x, torch.zeros(2, 16, dtype=torch.bool))


def test_what_is_returned() -> None:
    x = torch.randn(1, 16, E)
    assert pypi()(x, x, x)[1] is None
    assert improved()(x)[1] is None
    assert isinstance(fork()(x), Tensor)
    assert isinstance(block_sparse()(x), Tensor)


@pytest.mark.parametrize("build", [pypi, fork, improved])
def test_magneto_initialisation(build: Callable[..., nn.Module]) -> None:
    torch.manual_seed(0)
    kind, options = type(build()), {"variant": "fork"} if build is fork else {}
    module = kind(256, 8, RS, WS, gamma_init=0.25, **options)
    weights = (
        module.qkv_proj.weight.chunk(3)
        if build is improved
        else (module.q_proj.weight, module.k_proj.weight, module.v_proj.weight)
    )
    for weight, gain in zip((*weights, module.out_proj.weight), (1, 1, 0.25, 0.25), strict=True):
        expected = gain * (2 / (256 + 256)) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    assert all(not bool(p.any()) for n, p in module.named_parameters() if "proj.bias" in n)


def test_torchscale_initialisation() -> None:
    module = MultiheadLongNetAttention(256, 8, WS, RS)
    bound = (6 / 512) ** 0.5
    assert module.out_proj.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert module.q_proj.weight.abs().max().item() == pytest.approx(bound / 2**0.5, rel=0.01)


@every_module
def test_key_padding_mask_leaves_keys_out(name: str) -> None:
    module, (x,) = randomised(MODULES[name][0](dtype=torch.float64)), inputs(27, 1)
    mask = torch.arange(27) >= torch.tensor([[27], [19]])
    padded = tensor_of(module(x, x, x, key_padding_mask=mask))
    alone = tensor_of(module(x[1:, :19]))
    torch.testing.assert_close(padded[1:, :19], alone, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(padded[:1], tensor_of(module(x[:1])), rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("build", [pypi, fork, improved, torchscale])
def test_dropout_acts_in_training_only(build: Callable[..., nn.Module]) -> None:
    module, x = build(dropout=0.5), torch.randn(1, 32, E)
    assert not torch.equal(tensor_of(module(x)), tensor_of(module(x)))
    module.eval()
    assert torch.equal(tensor_of(module(x)), tensor_of(module(x)))


@pytest.mark.parametrize("build", [pypi, fork, improved, torchscale, block_sparse])
def test_the_future_changes_nothing(build: Callable[..., nn.Module]) -> None:
    """Row by row outside the projections, whose matrix products may round by position."""
    module = build(dtype=torch.float64)
    assert_causal(lambda q, k, v, is_causal: module.attention(q, k, v, is_causal=is_causal), torch.float64, 21)


@every_module
def test_under_autocast(name: str) -> None:
    module, x = MODULES[name][0](), torch.randn(1, 16, E)
    with torch.autocast("cpu", torch.bfloat16):
        out = tensor_of(module(x))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), tensor_of(module(x)), rtol=0.1, atol=0.1)


@every_module
def test_copies_and_pickles(name: str) -> None:
    module, x = MODULES[name][0](), torch.randn(1, 16, E)
    out = tensor_of(module(x))
    assert torch.equal(tensor_of(pickle.loads(pickle.dumps(module))(x)), out)
    assert torch.equal(tensor_of(copy.deepcopy(module)(x)), out)


def test_improved_frozen_norm_gets_no_gradient() -> None:
    module = improved()
    module(torch.randn(1, 16, E))[0].square().sum().backward()
    assert {n for n, p in module.named_parameters() if p.grad is None} == {"k_ln.weight", "k_ln.bias"}
    assert not module.k_ln.weight.requires_grad


def test_explain_and_repr() -> None:
    module = pypi()
    assert "4096" in module.explain(4096)
    with pytest.raises(SpecError, match="call the module first"):
        module.explain()
    module(torch.randn(1, 32, E))
    plan = module.plan(32)
    assert plan.strategy in module.explain()
    assert f"plan at 32: {plan.strategy}" in repr(module)
    assert f"embed_dim={E}, num_heads={H}" in repr(module)


@pytest.mark.parametrize("build", [pypi, fork, improved, block_sparse])
def test_what_cannot_work_raises(build: Callable[..., nn.Module]) -> None:
    module, x = build(), torch.randn(1, 16, E)
    with pytest.raises(SpecError, match="need_weights=True: attention weights are never formed"):
        module(x, x, x, need_weights=True)
    with pytest.raises(SpecError, match=r"attn_mask=<tensor \[16, 16\]>: an arbitrary mask has no dilated form"):
        module(x, x, x, attn_mask=torch.zeros(16, 16))
    with pytest.raises(SpecError, match="key_padding_mask must be a bool tensor"):
        module(x, x, x, key_padding_mask=torch.zeros(1, 16))
    with pytest.raises(SpecError, match=rf"query must be a tensor \[B, S, {E}\], got shape \[1, 16, 7\]"):
        module(x[..., :7])
    with pytest.raises(SpecError, match=r"key must be a tensor .*got shape \[16, 24\]"):
        module(x, x[0])


@pytest.mark.parametrize("kind", [MultiheadDilatedAttention, ImprovedMultiheadDilatedAttention])
def test_lists_swapped_by_position_are_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(SpecError, match="are the two swapped"):
        kind(768, 12, [2048, 4096, 8192], [1, 2, 4])  # published order: rates first


def test_lists_swapped_by_position_are_refused_where_segments_come_first() -> None:
    for kind in (BlockSparseRingMultiheadDilatedAttention, MultiheadLongNetAttention):
        with pytest.raises(SpecError, match="are the two swapped"):
            kind(768, 12, [1, 2, 4], [2048, 4096, 8192])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"embed_dim": 25}, "num_heads=4 does not divide embed_dim=25"),
        ({"num_heads": 0}, "num_heads must be a positive int, got 0"),
        ({"embed_dim": 24.0}, "embed_dim must be a positive int, got 24.0"),
        ({"variant": "forks"}, "unknown variant 'forks'; did you mean 'fork'"),
        ({"op": "flash"}, "op='flash': it chose an xformers kernel"),
        ({"dropout": -0.1}, "dropout must be a probability"),
        ({"segment_lengths": 8}, "segment_lengths must be a list of ints"),
    ],
)
def test_bad_constructions(options: dict[str, object], match: str) -> None:
    good = {"embed_dim": E, "num_heads": H, "dilation_rates": RS, "segment_lengths": WS}
    with pytest.raises(SpecError, match=match):
        MultiheadDilatedAttention(**{**good, **options})


def test_block_sparse_dropout_is_on_the_output() -> None:
    module, x = block_sparse(dropout=0.5), torch.randn(1, 32, E)
    dropped = module(x) == 0
    assert 0.4 < float(dropped.float().mean()) < 0.6
    assert not bool((module.eval()(x) == 0).any())
    with pytest.raises(SpecError, match="ring_size must be a positive int or None, got 0"):
        block_sparse(ring_size=0)
