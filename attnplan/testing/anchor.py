"""The anchor of cross-validation: dense attention by torch itself, in the dtype of the spec, on the same tensors.

What torch loses in a dtype is the fair price of computing the same numbers in it; a backend may lose little more.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnplan.testing.reference import dense_attention

if TYPE_CHECKING:
    from attnplan.testing.numbers import Call, Numbers

_ON_CUDA = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def anchored(call: Call, through_lse: bool) -> tuple[str, Numbers]:
    """Return what torch computes for a call, and by which kernel.

    On CUDA it is SDPA by cuDNN, or by the first other kernel that takes the call where cuDNN does not; the name says
    which one it was. Softcaps, dropout, biases and sinks are nothing that SDPA differentiates: there it is plain torch.
    """
    spec = call.spec
    if spec.softcap is not None or spec.dropout or spec.biases or spec.sink_logits:
        return "plain torch", _plain(call, through_lse)
    if call.inputs[0].device.type != "cuda":
        return "SDPA", _by_sdpa(call, through_lse)
    return _by_first_kernel(call, through_lse)


def _by_first_kernel(call: Call, through_lse: bool) -> tuple[str, Numbers]:
    refused = ""
    for name, kernel in _ON_CUDA.items():
        try:
            with warnings.catch_warnings(), sdpa_kernel(kernel):
                warnings.simplefilter("ignore")  # SDPA warns of its reasons before it raises
                numbers = _by_sdpa(call, through_lse)
        except RuntimeError as error:
            refused += f", {name} raised {str(error).splitlines()[0]}"
            continue
        if all(bool(x.isfinite().all()) for x in (numbers.out, numbers.dq, numbers.dk, numbers.dv)):
            return f"SDPA ({name}{refused})", numbers
        refused += f", {name} gave NaN"
    return f"plain torch (SDPA{refused})", _plain(call, through_lse)


def _plain(call: Call, through_lse: bool) -> Numbers:
    return call.by_autograd(call.spec.dtype, through_lse, dense_attention)


def _by_sdpa(call: Call, through_lse: bool) -> Numbers:
    """Return the numbers of SDPA with boolean masks.

    Under the rule ``lse`` a key counts once for each branch that sees it: SDPA gets one copy of the keys per branch.
    Under other rules it runs each branch with the branch's constant weight. Sums over copies and branches are free:
    they are taken in float64.
    """
    every = torch.cat(list(call.masks), dim=-1)
    if call.spec.rule == "lse":
        parts = [_attention(call, every, torch.ones_like(call.grad[..., :1]))]
    else:
        weights = _weights(call)
        parts = [_attention(call, mask, w) for mask, w in zip(call.masks, weights, strict=True)]
    out, dq, dk, dv = (torch.stack(each).sum(0) for each in zip(*parts, strict=True))
    if through_lse and call.grad_lse is not None:
        more_q, more_k = _through_lse(call, every, call.grad_lse)
        dq, dk = dq + more_q, dk + more_k
    return call.numbers(out, None, dq, dk, dv)


def _attention(call: Call, mask: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in call.copies(mask.shape[-1]))
    out, seen = _sdpa(call, q, k, v, mask)
    upstream = (call.grad * weight * seen).to(out.dtype)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), upstream)
    return out.detach().double() * weight * seen, dq.double(), _joined(call, dk), _joined(call, dv)


def _through_lse(call: Call, mask: Tensor, grad_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of q and k through the LSE, which SDPA does not give, by SDPA.

    The derivative of LSE_i by q_i is the attention of row i over the keys themselves, times the scale; and as for k,
    it is the gradient of values whose upstream gradient is q_i.
    """
    q, k, _ = (x.detach() for x in call.copies(mask.shape[-1]))
    values = k.clone().requires_grad_()
    out, seen = _sdpa(call, q, k, values, mask)
    factor = grad_lse.unsqueeze(-1) * call.spec.softmax_scale * seen
    (dk,) = torch.autograd.grad(out, values, (factor * q.double()).to(out.dtype))
    return out.detach().double() * factor, _joined(call, dk)


def _sdpa(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output, and which rows see a key; the others see the first one here, and count for nothing."""
    seen = mask.any(-1, keepdim=True)
    first = torch.arange(mask.shape[-1], device=mask.device) == 0
    grouped = call.spec.heads != call.spec.kv_heads
    scale = call.spec.softmax_scale
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | (~seen & first), scale=scale, enable_gqa=grouped)
    return out, seen.double()


def _joined(call: Call, grad: Tensor) -> Tensor:
    """Return the sum of the gradients of the copies of the keys."""
    b, h, _, features = grad.shape
    return grad.double().reshape(b, h, -1, call.inputs[1].shape[2], features).sum(2)


def _weights(call: Call) -> Iterator[Tensor]:
    """Iterate over the constant weight ``[B, H, n, 1]`` of each branch, exact."""
    spec, count = call.spec, len(call.masks)
    if spec.rule != "lse-detached":
        constants = getattr(spec.pattern, "weights", None) or [1 / count if spec.rule == "mean" else 1.0] * count
        yield from (torch.full_like(call.grad[..., :1], w) for w in constants)
        return
    q, k = (x.double() for x in call.inputs[:2])
    keys = k.repeat_interleave(spec.heads // spec.kv_heads, 1)
    scores = q[:, :, call.rows] @ keys.mT * spec.softmax_scale
    lses = torch.stack([scores.masked_fill(~m, -torch.inf).logsumexp(-1, keepdim=True) for m in call.masks])
    yield from (lses - lses.logsumexp(0)).exp().nan_to_num(0.0)
