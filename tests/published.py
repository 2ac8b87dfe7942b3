"""The published dilated attentions, written out plainly from their mathematics: loops, dense softmax, float64.

Nothing here is theirs or ours: it follows the formulas of the LongNet paper and descriptions of the published codes.
Tensors are ``[B, S, H, D]``; module functions take ``[B, S, E]`` and a state dict with the published names.
``causal`` compares positions, unless a function says that it reproduces a fault. ``keep`` is True for the keys that a
row may see: ``[B, K]`` for padding, or ``[B, S, K]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def softmax_rows(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attend for one head: q [B, S, D], k, v [B, K, D], allowed [(B,) S, K]; a row without keys gives 0 and -inf."""
    scores = q @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    lse = torch.logsumexp(scores.masked_fill(~allowed, -torch.inf), -1)
    some = allowed.any(-1)
    weights = torch.softmax(scores.masked_fill(~allowed & some[..., None], -torch.inf), -1) * some[..., None]
    return weights @ v, lse


def kept(pairs: Tensor, keep: Tensor | None) -> Tensor:
    """Return the pairs [S, K] without the keys that ``keep`` leaves out: [B, S, K]."""
    if keep is None:
        return pairs
    return pairs & (keep if keep.ndim == 3 else keep[:, None])


def meets(n: int, w: int, r: int, offset: int, causal: bool) -> Tensor:
    """Return [n, n]: the pairs of one dilated branch."""
    pairs = torch.zeros(n, n, dtype=torch.bool)
    for start in range(0, n, w):
        for i in range(start + offset, min(start + w, n), r):
            for j in range(start + offset, min(start + w, n), r):
                pairs[i, j] = j <= i or not causal
    return pairs


def fork_groups(heads: int, groups: int) -> list[range]:
    """Contiguous groups; the first ``heads % groups`` have one head more."""
    bounds = [0]
    for i in range(groups):
        bounds.append(bounds[-1] + heads // groups + (i < heads % groups))
    return [range(a, b) for a, b in pairwise(bounds)]


def pypi_groups(heads: int, groups: int) -> list[range]:
    """The PyPI package's ranges, fault included: group i starts at i times its *own* size."""
    sizes = [heads // groups + (i < heads % groups) for i in range(groups)]
    return [range(i * g, (i + 1) * g) for i, g in enumerate(sizes)]


def grouped(
    q: Tensor, k: Tensor, v: Tensor, ws: Sequence[int], rs: Sequence[int], causal: bool = False,
    *, keep: Tensor | None = None, divide: bool = True, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """DilatedAttention as in the fork."""
    b, n, h, _ = q.shape
    out = torch.zeros(b, n, h, v.shape[-1], dtype=q.dtype)
    for i, (heads, w, r) in enumerate(zip(fork_groups(h, len(ws)), ws, rs, strict=True)):
        pairs = kept(meets(n, w, r, i % r, causal), keep)
        for j in heads:
            out[:, :, j] = softmax_rows(q[:, :, j], k[:, :, j], v[:, :, j], pairs, scale)[0]
    return out / len(ws) if divide else out


def pypi(q: Tensor, k: Tensor, v: Tensor, ws: Sequence[int], rs: Sequence[int], causal: bool = False) -> Tensor:
    """DilatedAttention of PyPI 0.2.0 with its faults: head ranges, and division by the sum over the sequence."""
    n, h = q.shape[1:3]
    out = torch.zeros_like(q)
    for i, (heads, w, r) in enumerate(zip(pypi_groups(h, len(ws)), ws, rs, strict=True)):
        for j in heads:
            one = softmax_rows(q[:, :, j], k[:, :, j], v[:, :, j], meets(n, w, r, i % r, causal))[0]
            out[:, :, j] = out[:, :, j] + one / one.sum(1, keepdim=True)
    return out / len(ws)


def over_heads(q: Tensor, k: Tensor, v: Tensor, ws: Sequence[int], rs: Sequence[int]) -> Tensor:
    """The fork's ImprovedDilatedAttention with its fault: each token attends over the heads of its group."""
    n, h = q.shape[1:3]
    out = torch.zeros_like(q)
    for i, (heads, w, r) in enumerate(zip(fork_groups(h, len(ws)), ws, rs, strict=True)):
        for t in range(n):
            if t % w % r == i % r:
                group = slice(heads.start, heads.stop)
                everything = torch.ones(len(heads), len(heads), dtype=torch.bool)
                out[:, t, group] = softmax_rows(q[:, t, group], k[:, t, group], v[:, t, group], everything)[0]
    return out / len(ws)


def longnet(
    q: Tensor, k: Tensor, v: Tensor, ws: Sequence[int], rs: Sequence[int], causal: bool = False,
    *, offset: str = "block", detach: bool = True, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """LongNet: every head in every branch; ``offset="block"`` and ``detach=True`` are torchscale's."""
    n, h = q.shape[1:3]
    columns = []
    for j in range(h):
        parts = []
        for w, r in zip(ws, rs, strict=True):
            start = j // -(-h // r) if offset == "block" else j % r
            pairs = kept(meets(n, w, r, start, causal), keep)
            parts.append(softmax_rows(q[:, :, j], k[:, :, j], v[:, :, j], pairs))
        columns.append(_mixed(parts, detach))
    return torch.stack(columns, 2)


def longnet_zero_keys(
    q: Tensor, k: Tensor, v: Tensor, ws: Sequence[int], rs: Sequence[int], causal: bool = False,
    *, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """torchscale on ragged lengths: every segment is filled up with rows of zeros, which count as keys.

    ``keep`` [B, K] leaves real keys out, never the zeros.
    """
    n, h = q.shape[1:3]
    columns = []
    for j in range(h):
        parts = []
        for w, r in zip(ws, rs, strict=True):
            one = (q[:, :, j], k[:, :, j], v[:, :, j])
            parts.append(_zero_filled_branch(*one, min(w, n), r, j // -(-h // r), causal, keep))
        columns.append(_mixed(parts, True))
    return torch.stack(columns, 2)


def _zero_filled_branch(
    q: Tensor, k: Tensor, v: Tensor, w: int, r: int, offset: int, causal: bool, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    b, n, d = q.shape
    out, lse = torch.zeros_like(v), torch.full((b, n), -torch.inf, dtype=q.dtype)
    for start in range(0, n, w):
        slots = range(offset, -(-w // r) * r, r)
        rows = [start + s if s < w and start + s < n else None for s in slots]
        zero = torch.zeros(b, d, dtype=q.dtype)
        q1, k1, v1 = (torch.stack([zero if t is None else x[:, t] for t in rows], 1) for x in (q, k, v))
        pairs = torch.ones(len(rows), len(rows), dtype=torch.bool)
        pairs = pairs.tril() if causal else pairs
        if keep is not None:
            always = torch.ones(b, dtype=torch.bool)
            pairs = kept(pairs, torch.stack([always if t is None else keep[:, t] for t in rows], 1))
        o1, l1 = softmax_rows(q1, k1, v1, pairs)
        for s, t in enumerate(rows):
            if t is not None:
                out[:, t], lse[:, t] = o1[:, s], l1[:, s]
    return out, lse


def _mixed(parts: Sequence[tuple[Tensor, Tensor]], detach: bool) -> Tensor:
    outs, lses = torch.stack([o for o, _ in parts]), torch.stack([x for _, x in parts])
    lses = lses.detach() if detach else lses
    covered = ~torch.isneginf(lses).all(0)
    weights = torch.softmax(torch.where(covered, lses, torch.zeros_like(lses)), 0) * covered
    return (weights[..., None] * outs).sum(0)


def ring_v2(
    q: Tensor, k: Tensor, v: Tensor, ws: Sequence[int], rs: Sequence[int], causal: bool = False,
    *, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """RingDilatedAttentionV2 on one rank: only keys are dilated and repeated to fill the segment.

    ``causal`` and ``keep`` go by position, where the published class masks slots and ignores padding.
    """
    n, h = q.shape[1:3]
    out, groups, start = torch.zeros_like(q), len(ws), 0
    for i, (w, r) in enumerate(zip(ws, rs, strict=True)):
        stop = start + h // groups + (i >= groups - h % groups)
        dilated = list(range(i % r, w, r))
        for j in range(start, stop):
            for first in range(0, n, w):
                whole = first + w <= n
                rows = [first + dilated[s % len(dilated)] for s in range(w)] if whole else list(range(first, n))
                queries = slice(first, min(first + w, n))
                pairs = torch.tensor([[t <= s or not causal for t in rows] for s in range(first, queries.stop)])
                pairs = kept(pairs, None if keep is None else keep[:, rows])
                out[:, queries, j] = softmax_rows(q[:, queries, j], k[:, rows, j], v[:, rows, j], pairs)[0]
        start = stop
    return out


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, *, keep: Tensor | None = None) -> Tensor:
    """RingAttentionCorrectV2: dense attention."""
    pairs = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    pairs = kept(pairs.tril() if causal else pairs, keep)
    return torch.stack([softmax_rows(q[:, :, j], k[:, :, j], v[:, :, j], pairs)[0] for j in range(q.shape[2])], 2)


def active_blocks(config: Mapping[str, object], rates: Sequence[int], count: int) -> set[tuple[int, int]]:
    """The (query block, key block) pairs of the fork's three patterns."""
    size, window = config["block_size"], config.get("local_window_size", 512)
    radius, kind = window // size // 2, config["pattern_type"]
    pairs = set()
    for i in range(count):
        for j in range(count):
            near = abs(i - j) <= radius
            if kind == "dilated_sparse":
                near = i == j or abs(i - j) in rates[:3]
            if near or (kind == "global_local" and j < config.get("global_tokens", 64) // size):
                pairs.add((i, j))
    return pairs


def block_sparse(
    q: Tensor, k: Tensor, v: Tensor, blocks: set[tuple[int, int]], size: int, causal: bool = False,
    *, summed: bool = False, keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One softmax over the union of the active blocks; ``summed`` adds a softmax per block, the fork's fault."""
    n = q.shape[1]
    position = torch.arange(n)
    masks = []
    for i, j in sorted(blocks):
        pairs = (position[:, None] // size == i) & (position // size == j)
        masks.append(pairs & (position <= position[:, None]) if causal else pairs)
    masks = [kept(m, keep) for m in (masks if summed else [torch.stack(masks).any(0)])]
    heads = range(q.shape[2])
    return torch.stack([sum(softmax_rows(q[:, :, j], k[:, :, j], v[:, :, j], m)[0] for m in masks) for j in heads], 2)


def _linear(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def _norm(state: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    if f"{name}.weight" not in state:
        return x
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def _heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:2], count, -1)


def multihead_pypi(
    state: Mapping[str, Tensor], heads: int, x: tuple[Tensor, ...], attend: Attend, norm: str = "norm"
) -> Tensor:
    """Projections, attention, norm of the merged heads, output; torchscale's is the same with ``inner_attn_ln``."""
    q, k, v = (_heads(_linear(state, f"{n}_proj", t), heads) for n, t in zip("qkv", x, strict=True))
    return _linear(state, "out_proj", _norm(state, norm, attend(q, k, v).flatten(2)))


def multihead_fork(state: Mapping[str, Tensor], heads: int, x: tuple[Tensor, ...], attend: Attend) -> Tensor:
    """Norms on q and k, and q's once more on the merged heads."""
    q, k, v = (_linear(state, f"{n}_proj", t) for n, t in zip("qkv", x, strict=True))
    q, k = _norm(state, "q_ln", q), _norm(state, "k_ln", k)
    merged = attend(_heads(q, heads), _heads(k, heads), _heads(v, heads)).flatten(2)
    return _linear(state, "out_proj", _norm(state, "q_ln", merged))


def multihead_improved(state: Mapping[str, Tensor], heads: int, x: tuple[Tensor, ...], attend: Attend) -> Tensor:
    """One fused projection of which each input takes its third, and ``q_ln`` on the merged heads."""
    e = x[0].shape[-1]
    q, k, v = (_linear(state, "qkv_proj", t)[..., i * e : (i + 1) * e] for i, t in enumerate(x))
    merged = attend(_heads(q, heads), _heads(k, heads), _heads(v, heads)).flatten(2)
    return _linear(state, "out_proj", _norm(state, "q_ln", merged))
