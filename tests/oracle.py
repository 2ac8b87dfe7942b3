"""An oracle for attention that shares no code with attnplan.

It reads the fields of patterns, mixtures and specs, and nothing else: membership is written out again from the
docstrings, with plain comparisons and loops over positions, and attention is dense, in float64, under autograd.

The three entry points:

``member(pattern, heads=, positions=, kv_len=, operands=)``
    booleans ``[B, H, S, K]``: which pairs of one pattern meet.
``branch_masks(spec, operands=, batch=)``
    the same for every branch of a spec, causality and query positions included.
``dense(spec, q, k, v, operands=)``
    ``(out [B, H, S, Dv], lse [B, H, S] or None)``, differentiable.

Operands are a mapping of names to arrays or tensors, as a plan takes them: ``documents`` are cumulative lengths
``[n + 1]`` or ``[B, n + 1]``, ``key_padding`` is ``[B or 1, kv_len]`` and True for real keys, ``q_offset`` is an int
or ``[B]``, the position of query row 0. Tensors are always in the order ``[B, H, S, D]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import oracle_atoms

NO_OPERANDS: Mapping[str, Any] = {}


def positions_of(spec: Any, batch: int = 1, operands: Mapping[str, Any] = NO_OPERANDS) -> np.ndarray:
    """Return the position ``[B, S]`` of every query row."""
    if spec.q_offset:
        first = np.broadcast_to(np.asarray(operands["q_offset"]).reshape(-1), (batch,))
    else:
        first = np.full(batch, spec.kv_len - spec.seq_len)
    return first[:, None] + np.arange(spec.seq_len)


def member(
    pattern: Any, *, heads: int, positions: np.ndarray, kv_len: int, operands: Mapping[str, Any] = NO_OPERANDS
) -> np.ndarray:
    """Return booleans ``[B, H, S, K]``: whether head h lets the query at ``positions[b, i]`` meet key k."""
    size = (len(positions), heads, positions.shape[1], kv_len)
    rule = _RULES[type(pattern).__name__]
    return np.broadcast_to(rule(pattern, _Grid(positions, heads, kv_len, operands)), size)


class _Grid:
    """Heads, query positions and key positions as arrays that broadcast to ``[B, H, S, K]``."""

    def __init__(self, positions: np.ndarray, heads: int, kv_len: int, operands: Mapping[str, Any]) -> None:
        self.batch, self.heads, self.kv_len, self.operands = len(positions), heads, kv_len, operands
        self.h = np.arange(heads).reshape(1, -1, 1, 1)
        self.q = positions.reshape(len(positions), 1, -1, 1)
        self.k = np.arange(kv_len).reshape(1, 1, 1, -1)


def _everything(pattern: Any, grid: _Grid) -> np.ndarray:
    return np.ones((1, 1, 1, 1), dtype=bool)


def _band(pattern: Any, grid: _Grid) -> np.ndarray:
    ahead = grid.k - grid.q
    left = -np.inf if pattern.left is None else -pattern.left
    right = np.inf if pattern.right is None else pattern.right
    return (left <= ahead) & (ahead <= right)


def _dilated(pattern: Any, grid: _Grid) -> np.ndarray:
    """Mark the rows of one segment after the other."""
    end = max(grid.kv_len, int(grid.q.max()) + 1)
    result = np.zeros((grid.batch, grid.heads, grid.q.shape[2], grid.kv_len), dtype=bool)
    for head in range(grid.heads):
        offset = _offset(pattern.offset, pattern.rate, head, grid.heads)
        for start in range(0, end, pattern.length):
            rows = range(start + offset, start + pattern.length, pattern.rate)
            result[:, head] |= np.isin(grid.q[:, 0], rows) & np.isin(grid.k[0], rows)
    return result


def _offset(offset: int | str, rate: int, head: int, heads: int) -> int:
    if offset == "interleave":
        return head % rate
    if offset == "block":
        per_offset = -(-heads // rate)
        return head // per_offset
    assert isinstance(offset, int)
    return offset


def _heads(pattern: Any, grid: _Grid) -> np.ndarray:
    return np.isin(grid.h, range(pattern.start, pattern.stop))


def _sinks(pattern: Any, grid: _Grid) -> np.ndarray:
    return np.isin(grid.k, range(pattern.count))


def _global_tokens(pattern: Any, grid: _Grid) -> np.ndarray:
    return np.isin(grid.q, pattern.indices) | np.isin(grid.k, pattern.indices)


def _documents(pattern: Any, grid: _Grid) -> np.ndarray:
    if pattern.lengths is None:
        bounds = np.asarray(grid.operands["documents"])
        bounds = np.broadcast_to(bounds.reshape(-1, bounds.shape[-1]), (grid.batch, bounds.shape[-1]))
    else:
        ends = [sum(pattern.lengths[:n]) for n in range(len(pattern.lengths) + 1)]
        bounds = np.broadcast_to(np.array(ends), (grid.batch, len(ends)))
    result = np.zeros((grid.batch, 1, grid.q.shape[2], grid.kv_len), dtype=bool)
    for b in range(grid.batch):
        for low, high in zip(bounds[b, :-1], bounds[b, 1:], strict=True):
            result[b, 0] |= np.isin(grid.q[b, 0], range(low, high)) & np.isin(grid.k[0, 0], range(low, high))
    return result


def _padding(pattern: Any, grid: _Grid) -> np.ndarray:
    if pattern.lengths is None:
        return np.asarray(grid.operands["key_padding"])[:, None, None, :]
    return np.stack([np.isin(grid.k[0], range(n)) for n in pattern.lengths])


def _mask(pattern: Any, grid: _Grid) -> np.ndarray:
    return np.asarray(pattern.fn(grid.h, grid.q, grid.k))


def _all_of(pattern: Any, grid: _Grid) -> np.ndarray:
    return np.all(np.stack([_evaluated(t, grid) for t in pattern.terms]), axis=0)


def _any_of(pattern: Any, grid: _Grid) -> np.ndarray:
    return np.any(np.stack([_evaluated(t, grid) for t in pattern.terms]), axis=0)


def _none_of(pattern: Any, grid: _Grid) -> np.ndarray:
    return np.logical_not(_evaluated(pattern.term, grid))


def _evaluated(pattern: Any, grid: _Grid) -> np.ndarray:
    positions = grid.q[:, 0, :, 0]
    return member(pattern, heads=grid.heads, positions=positions, kv_len=grid.kv_len, operands=grid.operands)


_RULES = {
    "Full": _everything, "Band": _band, "Dilated": _dilated, "Heads": _heads, "Sinks": _sinks,
    "GlobalTokens": _global_tokens, "Documents": _documents, "Padding": _padding, "Mask": _mask,
    "And": _all_of, "Or": _any_of, "Not": _none_of, **oracle_atoms.RULES,
}  # fmt: skip


class _Dilation:
    """The fields of a dilated pattern, for the branches of mixtures."""

    def __init__(self, length: int, rate: int, offset: int | str) -> None:
        self.length, self.rate, self.offset = length, rate, offset


def branch_masks(spec: Any, operands: Mapping[str, Any] = NO_OPERANDS, batch: int = 1) -> list[np.ndarray]:
    """Return, for each branch of a spec, booleans ``[B, H, S, K]``: which pairs meet in that branch's softmax."""
    grid = _Grid(positions_of(spec, batch, operands), spec.heads, spec.kv_len, operands)
    masks = _bare_branches(spec.pattern, grid)
    if hasattr(spec.pattern, "where"):
        masks = [m & _evaluated(spec.pattern.where, grid) for m in masks]
    if spec.causal:
        masks = [m & (grid.k <= grid.q) for m in masks]
    return [np.broadcast_to(m, (batch, spec.heads, spec.seq_len, spec.kv_len)) for m in masks]


def _bare_branches(pattern: Any, grid: _Grid) -> list[np.ndarray]:
    kind = type(pattern).__name__
    if kind == "LongNet":
        pairs = zip(pattern.segment_lengths, pattern.dilation_rates, strict=True)
        return [_dilated(_Dilation(w, r, pattern.offset), grid) for w, r in pairs]
    if kind == "Grouped":
        groups = np.array_split(np.arange(grid.heads), len(pattern.segment_lengths))  # the first H % G get one more
        triples = zip(pattern.segment_lengths, pattern.dilation_rates, groups, strict=True)
        return [
            _dilated(_Dilation(w, r, j % r), grid) & np.isin(grid.h, group) for j, (w, r, group) in enumerate(triples)
        ]
    if kind == "Mix":
        return [_evaluated(p, grid) for p in pattern.patterns]
    return [_evaluated(pattern, grid)]


def dense(
    spec: Any, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any] = NO_OPERANDS
) -> tuple[Tensor, Tensor | None]:
    """Return (output ``[B, H, S, Dv]``, LSE ``[B, H, S]`` or None for ``mean`` and ``sum``), both float64.

    Parameters
    ----------
    spec
        Any spec with fixed lengths; dropout and dtype are ignored.
    q, k, v
        ``[B, H, S, D]``, ``[B, H_kv, C, D]``, ``[B, H_kv, C, Dv]`` of any dtype, whatever the spec's layout.
    operands
        Runtime operands by name.
    """
    scores = _scores(spec, q.double(), k.double())
    values = v.double().repeat_interleave(spec.heads // spec.kv_heads, dim=1)
    masks = [torch.tensor(m, device=q.device) for m in branch_masks(spec, operands, q.shape[0])]
    rule = _mix_rule(spec.pattern)
    if rule == "lse":  # one softmax in which a key counts once for each branch that sees it
        return _softmax(scores, torch.stack(masks).sum(0).double(), values)
    outs, lses = zip(*(_softmax(scores, m.double(), values) for m in masks), strict=True)
    if rule == "lse-detached":
        whole = _softmax(scores, torch.stack(masks).sum(0).double(), values)
        return _mix_detached(torch.stack(outs), torch.stack(lses), whole[1])
    weights = [1 / len(masks)] * len(masks) if rule == "mean" else _sum_weights(spec.pattern, len(masks))
    return torch.stack([w * o for w, o in zip(weights, outs, strict=True)]).sum(0), None


def _scores(spec: Any, q: Tensor, k: Tensor) -> Tensor:
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    shared = k.repeat_interleave(spec.heads // spec.kv_heads, dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", q, shared) * scale
    return scores if spec.softcap is None else spec.softcap * torch.tanh(scores / spec.softcap)


def _softmax(scores: Tensor, multiplicity: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and LSE where each key counts ``multiplicity`` times; rows without keys give 0 and -inf."""
    top = scores.detach().masked_fill(multiplicity == 0, -torch.inf).amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    terms = multiplicity * torch.exp((scores - top).masked_fill(multiplicity == 0, 0))
    total = terms.sum(-1, keepdim=True)
    none = total == 0
    safe = total.masked_fill(none, 1)
    lse = (top + torch.log(safe)).masked_fill(none, -torch.inf)
    return (terms / safe) @ values, lse.squeeze(-1)


def _mix_detached(outs: Tensor, lses: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """Weigh branch outputs by constants exp(L_j - L), L being the LSE of the whole multiset of keys."""
    weights = torch.exp(lses - total.masked_fill(total == -torch.inf, 0)).detach()
    return (weights.unsqueeze(-1) * outs).sum(0), total


def _mix_rule(pattern: Any) -> str:
    kind = type(pattern).__name__
    if kind in ("LongNet", "Grouped"):
        return {"none": "lse"}.get(pattern.mix, pattern.mix)
    return pattern.rule if kind == "Mix" else "lse"


def _sum_weights(pattern: Any, count: int) -> tuple[float, ...]:
    weights = pattern.weights
    return (1.0,) * count if weights is None else weights


def sample_inputs(spec: Any, batch: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Return random leaves q ``[B, H, S, D]``, k, v of a spec that require gradients, scores of moderate size."""
    source = torch.Generator().manual_seed(seed)
    sizes = (
        (batch, spec.heads, spec.seq_len, spec.head_dim),
        (batch, spec.kv_heads, spec.kv_len, spec.head_dim),
        (batch, spec.kv_heads, spec.kv_len, spec.value_dim),
    )
    return tuple(torch.randn(size, generator=source, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes)
