"""What PyTorch compiles for a backward of cuDNN fits every later backward of ours that finds it."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from attnplan.runtime import kernels_cudnn
from attnplan.runtime.kernels import Request
from attnplan.runtime.kernels_cudnn import CuDNN, differentiable, laid_out_alike

SIZES = (2, 4, 6, 8)


def _layouts(features=8):
    """Return tensors of the same numbers in several layouts: dense ones, and rows of larger tensors."""
    n, m, r, _ = SIZES
    plain = torch.randn(n, m, r, features)
    yield plain
    yield plain.transpose(1, 2).contiguous().transpose(1, 2)
    yield plain.transpose(0, 1).contiguous().transpose(0, 1)
    apart = torch.empty(n, m, 2 * r, features)[:, :, ::2]
    yield apart.copy_(plain)
    packed = torch.empty(n, r, 3, m, features)[:, :, 1].transpose(1, 2)
    yield packed.copy_(plain)


class Cache:
    """Keeps by what PyTorch keeps: sizes and strides of q, k and v, and the bits of the dropout."""

    def __init__(self):
        self.known = {}

    def key(self, q, k, v, out, dropout):
        given = tuple((x.shape, x.stride()) for x in (q, k, v))
        return (*given, out.shape[-1], math.copysign(1.0, dropout))

    def backward(self, grad, q, k, v, out, stats, seed, offset, bias, *rest, scale):
        steps = [tuple(s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1) for x in (out, grad)]
        first = self.known.setdefault(self.key(q, k, v, out, rest[4]), steps)
        assert first == steps, "read with the strides of an earlier output"
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


@pytest.fixture
def cache(monkeypatch):
    found = Cache()
    aten = SimpleNamespace(_scaled_dot_product_cudnn_attention_backward=found.backward)
    monkeypatch.setattr(kernels_cudnn, "_aten", aten)
    return found


@pytest.mark.parametrize("features", [8, 16])
def test_outputs_and_gradients_lie_as_what_is_kept_for_their_q_says(cache, features):
    lse = torch.zeros(SIZES[:3])
    for q, out, grad in itertools.product(_layouts(), _layouts(features), _layouts(features)):
        k, v = torch.zeros(SIZES), torch.zeros(*SIZES[:3], features)
        CuDNN().backward(grad, q, k, v, out, lse, Request(1.0))
    assert len(cache.known) >= 3
    assert {key[-1] for key in cache.known} == {-1.0}, "apart from what others compile"


def test_the_fake_would_notice(cache, monkeypatch):
    monkeypatch.setattr(kernels_cudnn, "laid_out_alike", lambda q, out, grad: (q, out, grad))
    with pytest.raises(AssertionError, match="strides of an earlier output"):
        test_outputs_and_gradients_lie_as_what_is_kept_for_their_q_says(cache, 8)


def test_what_lies_alike_is_not_copied():
    for x in _layouts():
        q, out, grad = laid_out_alike(x, x, x)
        assert q is out is grad is x
    q = next(_layouts())
    other = list(_layouts())[1]
    found = laid_out_alike(q, q, other)
    assert found[0] is found[1] is q
    assert torch.equal(found[2], other)
    assert found[2].stride() == q.stride()


def test_a_gradient_that_torch_brings_is_laid_out_as_the_output(monkeypatch):
    seen, dropouts = [], []

    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            return torch.empty_like(q).copy_(q)

        @staticmethod
        def backward(ctx, grad):
            seen.append(grad.stride())
            return grad, None, None

    def forward(q, k, v, bias, keeps, dropout, causal, scale):
        dropouts.append(math.copysign(1.0, dropout))
        return (Op.apply(q, k, v),)

    monkeypatch.setattr(kernels_cudnn, "_aten", SimpleNamespace(_scaled_dot_product_cudnn_attention=forward))
    for q in _layouts():
        x = q.detach().requires_grad_()
        out = differentiable(x, q, q, False, 1.0)
        for grad in _layouts():
            seen.clear()
            (found,) = torch.autograd.grad(out, x, grad, retain_graph=True)
            assert torch.equal(found, grad)
            assert seen == [out.stride()]
    assert set(dropouts) == {-1.0}
