"""Padding and packed documents in modules: float64, forward and gradients, against tests/published.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnplan.nn import PlannedAttention
from tests import published
from tests.modules import ATTENTIONS, PROJECTED, RS, WS, E, H, noise, nudged, tensor_of

N = 29
REAL = torch.stack([
    torch.ones(N, dtype=torch.bool),
    torch.arange(N) < 17,  # padding behind
    torch.arange(N) >= 5,  # padding in front: causal rows without a key
    noise((N,), 9) > 0,  # holes
    torch.zeros(N, dtype=torch.bool),  # nothing real
])  # fmt: skip
causal_or_not = pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])


def assert_same(got: Tensor, wanted: Tensor, leaves: list[Tensor]) -> None:
    """Compare outputs and gradients under one random upstream gradient."""
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    upstream = noise(tuple(wanted.shape), 1)
    ours, theirs = (torch.autograd.grad(o, leaves, upstream, materialize_grads=True) for o in (got, wanted))
    largest = max(float(b.abs().max()) for b in theirs)  # the bias of k has no gradient: what is there is rounding
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12 * max(1.0, largest))


def qkv(kv_heads: int = H, value_dim: int = 8) -> list[Tensor]:
    sizes = ((H, 8), (kv_heads, 8), (kv_heads, value_dim))
    return [noise((len(REAL), N, *size), i).requires_grad_() for i, size in enumerate(sizes)]


@causal_or_not
@pytest.mark.parametrize("kv_heads", [H, 1])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_padded_keys_are_left_out(name: str, kv_heads: int, causal: bool) -> None:
    case, x = ATTENTIONS[name], qkv(kv_heads)
    got = case.build()(*x, is_causal=causal, key_padding_mask=~REAL)
    assert_same(got, case.expected({}, tuple(x), causal, REAL), x)
    if name != "torchscale with its zeros":
        assert not bool(got[-1].any())  # no real key: exactly 0


@causal_or_not
@pytest.mark.parametrize("name", PROJECTED)
def test_padded_keys_are_left_out_with_projections(name: str, causal: bool) -> None:
    case, x = PROJECTED[name], tuple(noise((len(REAL), N, E), i).requires_grad_() for i in range(3))
    module = nudged(case.build())
    state = {n: p for n, p in module.named_parameters() if p.requires_grad}
    got = tensor_of(module(*x, is_causal=causal, key_padding_mask=~REAL))
    assert_same(got, case.expected(state, x, causal, REAL), [*x, *state.values()])


LENGTHS = torch.tensor([[0, 7, 20, N], [0, 11, 11, N]])  # the second element has an empty document


@causal_or_not
@pytest.mark.parametrize("padded", [False, True], ids=["packed", "packed and padded"])
@pytest.mark.parametrize(
    ("pattern", "reference"),
    [
        (f"grouped({WS}, {RS}, 'none')", lambda *x, **o: published.grouped(*x, WS, RS, divide=False, **o)),
        (f"grouped({WS}, {RS}, 'mean')", lambda *x, **o: published.grouped(*x, WS, RS, **o)),
        (
            f"longnet({WS}, {RS})",
            lambda *x, **o: published.longnet(*x, WS, RS, offset="interleave", detach=False, **o),
        ),
        (f"longnet({WS}, {RS}, 'block', 'lse-detached')", lambda *x, **o: published.longnet(*x, WS, RS, **o)),
        (
            "heads(0, 3) | (heads(3, 5) & dilated(9, 2, offset=1))",
            lambda *x, **o: published.grouped(*x, [99, 9], [1, 2], divide=False, **o),
        ),
    ],
    ids=["grouped", "mean", "paper", "torchscale", "dilated"],
)
def test_documents_and_padding_join_dilation(pattern: str, reference: object, padded: bool, causal: bool) -> None:
    """Segments and rates count from the start of the sequence, not of the document."""
    x = [noise((2, N, H, 8), i).requires_grad_() for i in range(3)]
    rows = torch.arange(N)
    owner = torch.stack([torch.searchsorted(ends, rows, right=True) for ends in LENGTHS])
    keep = owner[:, :, None] == owner[:, None]
    operands = {"documents": LENGTHS.int()}
    if padded:
        operands["key_padding"] = REAL[2:4]
        keep = keep & REAL[2:4, None]
    got = PlannedAttention(pattern, causal=causal, layout="bshd")(*x, **operands)
    assert_same(got, reference(*x, causal=causal, keep=keep), x)
