"""The float64 interpreter: runs any graph node by node, by index and with dense masks. The meaning of the IR.

It shares no code with emission: rows are gathered by index instead of viewed by strides, masks are evaluated pair by
pair, and joins are written as the softmax over the stacked log-sum-exps that they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnplan.ir import Attend, Graph, Input, Merge, Mix, Node, Output, RowMap, Take
from attnplan.patterns import Shape
from attnplan.runtime.dropout import DropoutMask
from attnplan.runtime.kernels import softmax_attention
from attnplan.runtime.masks import MaskBuilder
from attnplan.runtime.scores import BiasBuilder, sunk

Value = tuple[Tensor, Tensor | None]


def interpret(
    graph: Graph, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any] | None = None, shape: Shape | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return (output ``[B, H, S, Dv]``, LSE ``[B, H, S]`` or None) of a graph, computed in float64.

    Parameters
    ----------
    graph
        Any graph; every pass must leave its meaning as it is.
    q, k, v
        ``[B, H, S, D]``, ``[B, H_kv, C, D]``, ``[B, H_kv, C, Dv]`` of any dtype. Gradients flow back to them.
    operands
        Runtime operands by name.
    shape
        Sizes for static tables; the default is read off the tensors.
    """
    tensors = {"q": q.double(), "k": k.double(), "v": v.double()}
    shape = shape or Shape(q.shape[2], k.shape[2], q.shape[1], q.shape[0])
    values: dict[int, Value] = {}
    for node in graph:
        args = [values[a] for a in node.args]
        values[node.id] = _run(graph, node, args, tensors, operands or {}, shape)
    return values[graph.output.id]


def _run(
    graph: Graph, node: Node, args: list[Value], tensors: dict[str, Tensor], operands: Mapping[str, Any], shape: Shape
) -> Value:
    op = node.op
    if isinstance(op, Input):
        return _gather(tensors[op.tensor], op.rows), None
    if isinstance(op, Take):
        source = graph.args(node)[0].op
        assert isinstance(source, Input)
        return _gather(tensors[source.tensor], op.rows), None
    if isinstance(op, Attend):
        (q, _), (k, _), (v, _) = args
        runs_q, runs_k = op.runs(*(n.type.rows for n in graph.args(node)[:2]))
        mask = torch.cat([
            torch.cat([_mask(op, one_q, one_k, tensors, operands, shape) for one_k in runs_k], -1) for one_q in runs_q
        ], -2)  # fmt: skip
        if op.dropout or op.biases:
            rows_q, rows_k = op.positions(*(n.type.rows for n in graph.args(node)[:2]))
        keep = None
        if op.dropout:
            keep = DropoutMask(op.dropout, rows_q, rows_k)(operands, tensors["q"], tensors["k"])
        bias = None
        if op.biases:
            bias = BiasBuilder(op.biases, rows_q, rows_k, op.shift, whole=False)(operands, tensors["q"], tensors["k"])
        return softmax_attention(
            q, k, v, mask=mask, scale=op.scale, softcap=op.softcap, keep=keep, dropout=op.dropout, bias=bias
        )
    if isinstance(op, Merge | Mix):
        parts = [
            (*_dense(part, arg.type.rows, tensors["q"]), branch)
            for part, arg, branch in zip(args, graph.args(node), _labels(op, len(args)), strict=True)
        ]
        return _join(op, parts)
    assert isinstance(op, Output)
    out, lse = args[0]
    b, h, s = tensors["q"].shape[:3]
    out, lse = out.reshape(b, h, s, out.shape[-1]), None if lse is None else lse.reshape(b, h, s)
    return sunk(out, lse, operands["sink_logits"]) if op.sinks and lse is not None else (out, lse)


def _mask(
    op: Attend, q: RowMap, k: RowMap, tensors: dict[str, Tensor], operands: Mapping[str, Any], shape: Shape
) -> Tensor:
    mask: Tensor = MaskBuilder(op.where, q, k, op.shift, shape, partial=op.at is not None)(
        operands, tensors["q"], tensors["k"]
    )
    return mask.broadcast_to((*mask.shape[:-2], q.length, k.length))


def _labels(op: Merge | Mix, count: int) -> tuple[int, ...]:
    return op.branches if isinstance(op, Mix) else (0,) * count


def _index(rows: RowMap, device: torch.device) -> tuple[Tensor, Tensor]:
    elements = torch.tensor(list(rows.elements()), device=device).reshape(*rows.sizes, 2)
    return elements[..., 0], elements[..., 1]


def _gather(x: Tensor, rows: RowMap) -> Tensor:
    heads, positions = _index(rows, x.device)
    return x[:, heads, positions]


def _dense(part: Value, rows: RowMap, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return a part written into whole output ``[B, H, S, Dv]`` and LSE ``[B, H, S]``, 0 and -inf elsewhere."""
    out, lse = part
    assert lse is not None
    out, lse = (x.reshape(q.shape[0], *rows.sizes, *tail) for x, tail in ((out, (out.shape[-1],)), (lse, ())))
    heads, positions = _index(rows, q.device)
    base = torch.zeros((*q.shape[:3], out.shape[-1]), dtype=out.dtype, device=q.device)
    none = torch.full(q.shape[:3], -torch.inf, dtype=out.dtype, device=q.device)
    every = torch.arange(q.shape[0], device=q.device).reshape(-1, *(1,) * heads.dim())
    return base.index_put((every, heads, positions), out), none.index_put((every, heads, positions), lse)


def _join(op: Merge | Mix, parts: list[tuple[Tensor, Tensor, int]]) -> Value:
    if isinstance(op, Mix) and op.rule in ("mean", "sum"):
        total = sum(op.weight(branch) * out for out, _, branch in parts)
        assert isinstance(total, Tensor)
        return total, None
    lses = torch.stack([lse for _, lse, _ in parts])
    covered = (lses > -torch.inf).any(0)
    total = torch.logsumexp(lses.masked_fill(~covered, 0), 0)
    weights = torch.exp(lses - total).masked_fill(~covered, 0)
    if isinstance(op, Mix) and op.rule == "lse-detached":
        weights = weights.detach()
    out = (weights.unsqueeze(-1) * torch.stack([out for out, _, _ in parts])).sum(0)
    return out, total.masked_fill(~covered, -torch.inf)
