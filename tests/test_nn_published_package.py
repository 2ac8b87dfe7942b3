"""Against the published package dilated-attention-pytorch 0.2.0 itself, its kernel call replaced by SDPA.

Equal where its semantics are sound; one test for each fault that we do not reproduce. Install it with
``pip install --no-deps dilated-attention-pytorch==0.2.0 einops``.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from attnplan.nn import DilatedAttention, MultiheadDilatedAttention
from bench.published_package import loaded
from tests import published

_NEEDED = ("dilated_attention_pytorch", "einops")
_MISSING = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(_MISSING), reason=f"not installed: {_MISSING}; pip install --no-deps dilated-attention-pytorch==0.2.0 einops"
)

WS, RS = [8, 16], [1, 2]


@pytest.fixture(scope="module")
def package() -> Iterator[ModuleType]:
    """Import the published module with a stub of xformers, and forget both afterwards."""
    with loaded() as module:
        yield module


def inputs(n: int = 32, heads: int = 4, shift: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v; values are about ``shift``, so that sums over the sequence stay away from 0."""
    source = torch.Generator().manual_seed(heads)
    q, k, v = (torch.randn(2, n, heads, 8, generator=source, dtype=torch.float64) for _ in range(3))
    return q.requires_grad_(), k.requires_grad_(), (v * 0.2 + shift).detach().requires_grad_()


def divided(out: Tensor) -> Tensor:
    """Apply to an undivided output what the published class does at its end."""
    return out / out.sum(1, keepdim=True) / len(WS)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_equal_up_to_its_division(package: ModuleType, causal: bool) -> None:
    """With G | H and every w | n, what it computes before x / x.sum() is ours; forward and gradients."""
    x = inputs()
    theirs = package.DilatedAttention(WS, RS)(*x, is_causal=causal)
    ours = divided(DilatedAttention(WS, RS, mix="none")(*x, is_causal=causal))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    upstream = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(ours, x, upstream), torch.autograd.grad(theirs, x, upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_our_writing_out_of_its_mathematics_is_right(package: ModuleType, causal: bool) -> None:
    """tests/published.py has its faults, too: head ranges that overlap, and the division."""
    for heads in (2, 3, 4, 5):
        x = inputs(heads=heads)
        theirs = package.DilatedAttention(WS, RS)(*x, is_causal=causal)
        torch.testing.assert_close(published.pypi(*x, WS, RS, causal), theirs, rtol=1e-12, atol=1e-14)


def test_multihead_is_equal_around_the_attention(package: ModuleType) -> None:
    """Checkpoints load both ways, and with one attention in both modules everything around it is equal."""
    theirs = package.MultiheadDilatedAttention(32, 4, RS, WS, gamma_init=0.5, dtype=torch.float64)
    ours = MultiheadDilatedAttention(32, 4, RS, WS, gamma_init=0.5, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    theirs.attention.forward = lambda *x, is_causal: published.grouped(*x, WS, RS, is_causal)
    x = torch.randn(1, 32, 32, dtype=torch.float64, requires_grad=True)
    got, wanted = ours(x, x, x, True)[0], theirs(x, x, x, True)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(wanted)
    grads = [torch.autograd.grad(o, [x, *m.parameters()], upstream) for o, m in ((got, ours), (wanted, theirs))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_multihead_starts_from_the_same_weights(package: ModuleType) -> None:
    torch.manual_seed(0)
    theirs = package.MultiheadDilatedAttention(64, 4, RS, WS, gamma_init=0.5)
    torch.manual_seed(0)
    ours = MultiheadDilatedAttention(64, 4, RS, WS, gamma_init=0.5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", ["DilatedAttention", "MultiheadDilatedAttention"])
def test_signatures_begin_with_the_published(package: ModuleType, name: str) -> None:
    ours = {"DilatedAttention": DilatedAttention, "MultiheadDilatedAttention": MultiheadDilatedAttention}[name]
    for mine, its in ((ours, getattr(package, name)), (ours.forward, getattr(package, name).forward)):
        wanted = inspect.signature(its).parameters
        have = inspect.signature(mine).parameters
        assert list(have)[: len(wanted)] == list(wanted)
        same = [n for n in wanted if n not in ("key", "value") or name == "DilatedAttention"]  # ours may be left out
        assert all(have[n].default == wanted[n].default for n in same)


def test_fault_lost_heads(package: ModuleType) -> None:
    """H=3, G=2: it computes head 1 twice and head 2 never."""
    x = inputs(heads=3)
    assert not bool(package.DilatedAttention(WS, RS)(*x)[:, :, 2].any())
    ours = DilatedAttention(WS, RS)(*x)
    assert bool(ours[:, 1::2, 2].all())
    torch.testing.assert_close(ours, published.grouped(*x, WS, RS), rtol=1e-12, atol=1e-14)


def test_fault_division_by_a_signed_sum(package: ModuleType) -> None:
    """Values whose sum over the sequence is nearly 0 make its output explode; ours is an average of values."""
    q, k, v = (x.detach() for x in inputs(shift=0.0))
    q = q * 0
    v[:, :, :2] -= v[:, :, :2].mean(1, keepdim=True) - 1e-9
    theirs, ours = package.DilatedAttention(WS, RS)(q, k, v), DilatedAttention(WS, RS)(q, k, v)
    assert float(theirs.abs().max()) > 1e6
    assert float(ours.abs().max()) <= float(v.abs().max())


def test_fault_causal_leak(package: ModuleType) -> None:
    """The sum over the sequence carries the last token into row 0."""
    q, k, v = (x.detach() for x in inputs())
    changed = v.clone()
    changed[:, -1] += 5
    theirs, ours = package.DilatedAttention(WS, RS), DilatedAttention(WS, RS)
    assert not torch.allclose(theirs(q, k, v, is_causal=True)[:, 0], theirs(q, k, changed, is_causal=True)[:, 0])
    assert torch.equal(ours(q, k, v, is_causal=True)[:, :-1], ours(q, k, changed, is_causal=True)[:, :-1])


def test_fault_ignored_scale(package: ModuleType) -> None:
    x = inputs()
    plain, scaled = (package.DilatedAttention(WS, RS, softmax_scale=s)(*x) for s in (None, 3.0))
    assert torch.equal(plain, scaled)
    ours = DilatedAttention(WS, RS, softmax_scale=3.0)(*x)
    torch.testing.assert_close(ours, published.grouped(*x, WS, RS, scale=3.0), rtol=1e-12, atol=1e-14)


def test_fault_ignored_dropout(package: ModuleType) -> None:
    x = inputs()
    theirs = package.DilatedAttention(WS, RS, attention_dropout=0.9).train()
    assert torch.equal(theirs(*x), theirs(*x))
    ours = DilatedAttention(WS, RS, attention_dropout=0.9).train()
    assert not torch.equal(ours(*x), ours(*x))


def test_fault_ragged_lengths(package: ModuleType) -> None:
    x = inputs(n=27)
    with pytest.raises(Exception, match="divide axis"):
        package.DilatedAttention(WS, RS)(*x)
    torch.testing.assert_close(DilatedAttention(WS, RS)(*x), published.grouped(*x, WS, RS), rtol=1e-12, atol=1e-14)
