"""The float64 reference of cross-validation: dense, by autograd, straight from the patterns' own definition.

It shares no code with lowering, passes, emission or the kernels: which pairs meet is asked of ``Pattern.pairs``, and
the softmax over a multiset of keys is written out here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnplan.patterns.counts import Table
from attnplan.runtime.dropout import keep_mask
from attnplan.spec import AttentionSpec


def branch_masks(spec: AttentionSpec, operands: Mapping[str, Tensor], rows: Tensor, batch: int) -> list[Tensor]:
    """Return which pairs of each branch meet: booleans ``[B, H, n, K]`` for ``n`` sampled query rows.

    Parameters
    ----------
    spec
        With fixed lengths.
    operands
        Runtime operands by name.
    rows
        Query rows ``[n]``; their device is that of the result.
    """
    shape, device = spec.shape, rows.device
    first = operands["q_offset"].reshape(-1, 1, 1, 1) if spec.q_offset else shape.shift
    head, key = _axis(spec.heads, 1, device), _axis(shape.kv_len, 3, device)
    query = rows.reshape(1, 1, -1, 1) + first
    runtime = _runtime_tables(operands, shape.kv_len)
    masks = []
    for where in spec.branches:
        static = {name: torch.as_tensor(t, device=device) for name, t in where.tables(shape).items()}
        each = [
            where.pairs(_tables(static | runtime, b), head, query[min(b, len(query) - 1)][None], key)
            for b in range(batch)
        ]
        size = (1, spec.heads, len(rows), shape.kv_len)
        masks.append(torch.cat([m.reshape(m.shape[-4:]).expand(size) for m in each]))
    return masks


def _tables(tables: Mapping[str, Tensor], b: int) -> dict[str, Table]:
    """Return the tables of one batch element."""
    return {name: Table(t[min(b, len(t) - 1)][None]) for name, t in tables.items()}


def _runtime_tables(operands: Mapping[str, Tensor], kv_len: int) -> dict[str, Tensor]:
    tables = {}
    if "documents" in operands:
        bounds = operands["documents"]
        position = torch.arange(kv_len, device=bounds.device).reshape(1, -1, 1)
        tables["documents"] = (position >= bounds.reshape(-1, 1, bounds.shape[-1])).sum(-1)
    if "key_padding" in operands:
        tables["key_padding"] = operands["key_padding"].long()
    return tables


def kept_pairs(spec: AttentionSpec, operands: Mapping[str, Tensor], rows: Tensor, batch: int) -> Tensor | None:
    """Return which weights dropout keeps, ``[B, H, n, K]``, or None without dropout."""
    if not spec.dropout:
        return None
    element, head, key = (
        _axis(n, place, rows.device) for place, n in ((0, batch), (1, spec.heads), (3, spec.shape.kv_len))
    )
    return keep_mask(operands["dropout_seed"], element, head, rows.reshape(1, 1, -1, 1), key, spec.dropout)


def added_scores(spec: AttentionSpec, operands: Mapping[str, Tensor], rows: Tensor) -> Tensor | None:
    """Return what is added to the scores of sampled rows, float64 ``[B or 1, H or 1, n, K]``, or None."""
    total: Tensor | None = None
    if spec.bias:
        given = operands["bias"].double()
        given = given if given.dim() == 4 else given[None]
        total = given if given.shape[2] == 1 else given[:, :, rows]
    if spec.alibi_slopes:
        first = operands["q_offset"].reshape(-1, 1, 1, 1) if spec.q_offset else spec.shape.shift
        apart = (rows.reshape(1, 1, -1, 1) + first - _axis(spec.shape.kv_len, 3, rows.device)).abs()
        slopes = operands["alibi_slopes"].double().reshape(-1, spec.heads, 1, 1)
        total = -slopes * apart if total is None else total - slopes * apart
    return total


def _axis(count: int, place: int, device: torch.device) -> Tensor:
    """Return 0 to ``count`` along one of four dimensions."""
    return torch.arange(count, device=device).reshape([-1 if i == place else 1 for i in range(4)])


def dense_attention(
    spec: AttentionSpec,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    masks: Sequence[Tensor],
    keep: Tensor | None,
    added: Tensor | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return output ``[B, H, n, Dv]`` in the dtype of q, and LSE ``[B, H, n]`` where there is one.

    In half precision scores and softmax are float32 and the probabilities are rounded, as in fused kernels.

    Parameters
    ----------
    q
        Sampled query rows ``[B, H, n, D]``.
    k, v
        ``[B, H_kv, K, D]`` and ``[B, H_kv, K, Dv]``.
    masks, keep
        From :func:`branch_masks` and :func:`kept_pairs`.
    added, sinks
        From :func:`added_scores`; sink logits ``[H]``, each the score of one more key of value 0.
    """
    group = spec.heads // spec.kv_heads
    keys, values = (x.repeat_interleave(group, dim=1) for x in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ keys.to(wide).mT * spec.softmax_scale
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if added is not None:
        scores = scores + added.to(wide)
    factor = 1.0 if keep is None else keep.to(wide) / (1 - spec.dropout)

    def mean_of(probabilities: Tensor) -> Tensor:
        return (probabilities * factor).to(v.dtype) @ values

    if not spec.has_lse:
        given = getattr(spec.pattern, "weights", None)
        weights = given or [1 / len(masks) if spec.rule == "mean" else 1.0] * len(masks)
        outs = [w * mean_of(_softmax(scores, m.to(wide))[0]) for w, m in zip(weights, masks, strict=True)]
        return torch.stack(outs).sum(0), None
    times = torch.stack([m.to(wide) for m in masks]).sum(0)  # a key counts once for each branch that sees it
    if sinks is not None:
        own = sinks.to(wide).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        probabilities, lse = _softmax(torch.cat([scores, own], -1), torch.cat([times, torch.ones_like(own)], -1))
        return mean_of(probabilities[..., :-1]), lse
    probabilities, lse = _softmax(scores, times)
    if spec.rule == "lse":
        return mean_of(probabilities), lse
    branches = []
    for mask in masks:
        own, own_lse = _softmax(scores, mask.to(wide))
        weight = torch.exp(own_lse - lse.masked_fill(lse == -torch.inf, 0)).detach()  # the weights are constants
        branches.append(weight.unsqueeze(-1) * mean_of(own))
    return torch.stack(branches).sum(0), lse


def _softmax(scores: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Return probabilities in which a key counts ``times`` times, and LSE; rows without a key give 0 and -inf."""
    absent = times == 0
    top = scores.detach().masked_fill(absent, -torch.inf).amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    terms = times * torch.exp((scores - top).masked_fill(absent, 0))
    total = terms.sum(-1, keepdim=True)
    empty = total == 0
    safe = total.masked_fill(empty, 1)
    return terms / safe, (top + torch.log(safe)).masked_fill(empty, -torch.inf).squeeze(-1)
