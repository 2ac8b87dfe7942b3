"""What stand-ins share: attention and its gradients in float64, windows, packed documents, and strict checks."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

calls: Counter = Counter()
broken: set[str] = set()
"""Names of functions that raise when they are called."""


def called(name: str) -> None:
    calls[name] += 1
    if name in broken:
        raise AssertionError(f"head_dim is not supported by {name}")


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def rows_mask(rows: int, columns: int, causal: bool, left: int | None, right: int | None) -> Tensor:
    """Return the window ``[R, C]``, aligned to the last query and the last key."""
    ahead = torch.arange(columns) - torch.arange(rows)[:, None] - (columns - rows)
    right = 0 if causal else right
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mask = mask & (ahead >= -left) if left is not None else mask
    return mask & (ahead <= right) if right is not None else mask


def scores_of(q: Tensor, k: Tensor, mask: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Return masked scores ``[B, H, R, C]`` in float64, and the derivative of the softcap."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    s = torch.einsum("brhd,bchd->bhrc", q.double(), k.double()) * scale
    slope = torch.ones_like(s)
    if softcap:
        slope = 1 - torch.tanh(s / softcap) ** 2
        s = softcap * torch.tanh(s / softcap)
    return s.masked_fill(~mask, -torch.inf), slope


def forward(q, k, v, mask, scale, softcap=0.0, empty=-torch.inf):
    """Return output ``[B, R, H, Dv]`` and LSE ``[B, H, R]``, which is ``empty`` for rows without a key."""
    s, _ = scores_of(q, k, mask, scale, softcap)
    lse = torch.logsumexp(s, -1)
    p = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1))
    out = torch.einsum("bhrc,bchd->brhd", p, v.double().repeat_interleave(q.shape[2] // v.shape[2], 2))
    if empty != empty:  # a kernel that leaves garbage in rows without a key
        out = out.masked_fill((lse == -torch.inf).transpose(1, 2).unsqueeze(-1), torch.nan)
    return out.to(q.dtype), lse.masked_fill(lse == -torch.inf, empty).to(lse_dtype(q))


def backward(grad, q, k, v, out, lse, mask, scale, softcap=0.0):
    """Return the gradients from any output and LSE; rows whose LSE is +inf get none."""
    assert not (lse == -torch.inf).any(), "the backward wants +inf for rows without a key"
    delta = (grad.double() * out.double()).sum(-1).transpose(1, 2)
    return gradients(grad, q, k, v, lse.double(), delta, mask, scale, softcap)


def gradients(grad, q, k, v, lse, delta, mask, scale, softcap=0.0):
    """Return the gradients from the LSE, and from the sums ``[B, H, R]`` of each row's output times its gradient."""
    s, slope = scores_of(q, k, mask, scale, softcap)
    p = torch.exp(s - lse.double().unsqueeze(-1))
    group = q.shape[2] // k.shape[2]
    dp = torch.einsum("brhd,bchd->bhrc", grad.double(), v.double().repeat_interleave(group, 2))
    ds = p * (dp - delta.double().unsqueeze(-1)) * slope * scale
    dq = torch.einsum("bhrc,bchd->brhd", ds, k.double().repeat_interleave(group, 2))
    dk = torch.einsum("bhrc,brhd->bchd", ds, q.double())
    dv = torch.einsum("bhrc,brhd->bchd", p, grad.double())
    dk, dv = (x.unflatten(2, (k.shape[2], group)).sum(3) for x in (dk, dv))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def documents_mask(cu: Tensor, left: int | None, right: int | None) -> Tensor:
    assert cu.dtype == torch.int32
    assert cu.dim() == 1
    assert cu.is_contiguous()
    lengths = cu.diff()
    assert (lengths >= 0).all()
    which = torch.repeat_interleave(torch.arange(len(lengths)), lengths.long())
    return (which[:, None] == which) & rows_mask(len(which), len(which), False, left, right)


def check(q, k, v, *more):
    for x in (q, k, v, *more):
        assert x.stride(-1) == 1, "features must lie side by side"
        assert x.dtype == q.dtype
        assert x.dim() == q.dim()
    assert q.shape[-2] % k.shape[-2] == 0
    assert k.shape[:-1] == v.shape[:-1]


def run(q, k, v, cu, window, causal, scale, softcap, empty, backward_of=None, lse=None):
    """Run forward, or backward if ``backward_of`` = (grad, out) is given, packed if ``cu`` is."""
    if cu is None:
        assert q.dim() == 4
        mask = rows_mask(q.shape[1], k.shape[1], causal, *window)
    else:
        assert q.dim() == 3, "packed inputs are [T, H, D]"
        mask = documents_mask(cu, window[0], 0 if causal else window[1])
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    if backward_of is None:
        out, found = forward(q, k, v, mask, scale, softcap, empty)
        return (out, found) if cu is None else (out[0], found[0])
    grad, out = backward_of
    if cu is not None:
        assert lse.shape == (q.shape[2], q.shape[1]), "packed LSE is [H, T]"
        grad, out, lse = grad.unsqueeze(0), out.unsqueeze(0), lse.unsqueeze(0)
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert lse.is_contiguous()
    assert lse.dtype == lse_dtype(q)
    found = backward(grad, q, k, v, out, lse, mask, scale, softcap)
    return found if cu is None else tuple(x[0] for x in found)


def unsigned(left: int, right: int) -> tuple[int | None, int | None]:
    return None if left < 0 else left, None if right < 0 else right
