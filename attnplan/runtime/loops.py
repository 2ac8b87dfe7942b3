"""Loops: a graph run piece by piece, and an attend whose scores are computed block by block.

Both save q, k, v, output and LSE only, and compute everything else again in the backward: a piece's backward is called
with the merged output and LSE of its rows, as every backward is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from attnplan.errors import SpecError
from attnplan.ir import Graph, Output
from attnplan.passes.chunk import Part, Piece, kv_heads, normal, origin, parts, without_loop
from attnplan.runtime.destinations import INTO, put
from attnplan.runtime.first_order import first_order
from attnplan.runtime.masks import ORIGIN, MaskBuilder
from attnplan.runtime.scores import learned
from attnplan.runtime.views import accumulator, empty_like_rows

Triple = tuple[Tensor, Tensor, Tensor]
Place = tuple[slice, slice, slice]
"""Batch elements, heads and rows of a piece."""


class Body(Protocol):
    """What a piece is run by: an emitted program."""

    source: str

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``."""
        ...


class LoopedProgram:
    """A graph whose output op says that it is run piece by piece.

    Parameters
    ----------
    graph
        The graph, with its loop, or with ``recompute`` and no loop: then it is one piece.
    emit
        Returns the program of one piece's graph. Pieces that are alike share one; they are emitted when they first run.
    """

    differentiable_lse = True
    follows_lengths = False

    def __init__(self, graph: Graph, emit: Callable[[Graph], Any]) -> None:
        output = graph.output.op
        assert isinstance(output, Output)
        self.has_lse, self.batch = graph.output.type.lse, None if output.loop is None else output.loop[0]
        self.heads = kv_heads(graph)
        whole = Piece(0, self.heads, 0, graph.inputs["q"].type.rows.length)
        keys = (0, graph.inputs["k"].type.rows.length)
        self.parts = [Part(whole, keys, without_loop(graph))] if output.loop is None else list(parts(graph))
        self.sinks = output.sinks
        self.origins = {part.piece: origin(part) for part in self.parts}
        same: dict[Graph, Graph] = {}  # equal graphs become one object, which a lookup knows without comparing
        self.bodies = [None if p.graph is None else same.setdefault(b := normal(p.graph), b) for p in self.parts]
        self.alike = len(same) == 1
        self.programs: dict[Graph, Body] = {}
        self.emit = emit

    @property
    def source(self) -> str:
        """The loop, and the program of its first piece."""
        distinct = len({b for b in self.bodies if b is not None})
        first = next((b for b in self.bodies if b is not None), None)
        head = f"# {len(self.parts)} pieces, {distinct} programs; the first:\n"
        return head + ("" if first is None else self._program(first).source)

    def _program(self, body: Graph) -> Body:
        found = self.programs.get(body)
        if found is None:
            found = self.programs.setdefault(body, self.emit(body))
            if not self.alike:
                _forget_masks(found)
        return found

    def _pieces(self, batch: int) -> Iterator[tuple[slice, Part, Graph | None]]:
        step = self.batch or max(batch, 1)
        for start in range(0, batch, step):
            for part, body in zip(self.parts, self.bodies, strict=True):
                yield slice(start, min(start + step, batch)), part, body

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``."""
        names = learned(operands)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or names):
            given = (operands[name] for name in names)
            out, lse = _Looped.apply(self, operands, names, q, k, v, *given)  # type: ignore[no-untyped-call]
            return out, lse
        return self.forward(q, k, v, operands, return_lse)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], need_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and, if it is asked for and there is one, LSE."""
        out = empty_like_rows(q, v.shape[-1], q.dtype)
        lse = q.new_empty(q.shape[:3], dtype=accumulator(q.dtype)) if need_lse and self.has_lse else None
        for batch, part, body in self._pieces(q.shape[0]):
            queries, keys = self._slices(q, batch, part)
            own = piece_operands(operands, queries, keys, self.origins[part.piece])
            target = out[queries]
            if body is None:
                target.zero_()
                if lse is not None:
                    lse[queries] = own["sink_logits"].to(lse.dtype).reshape(-1, 1) if self.sinks else -torch.inf
                continue
            with torch.no_grad():
                found = self._program(body)(q[queries], k[keys], v[keys], {**own, INTO: (target,)}, lse is not None)
            put(target, found[0])
            if lse is not None:
                assert found[1] is not None
                lse[queries].copy_(found[1])
            del found  # before the next piece is computed
        return out, lse

    def gradients(
        self,
        flow: Sequence[Tensor | None],
        given: Sequence[Tensor],
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> tuple[Tensor, ...]:
        """Return dq, dk, dv from ``(grad, grad_lse)`` and ``(q, k, v, out, lse)``, then those of the named operands."""
        q, k, v, out, lse = given
        dq, dk, dv = (empty_like_rows(x, x.shape[-1], x.dtype) for x in (q, k, v))
        totals: tuple[Tensor, ...] | None = None
        learnt = {n: torch.zeros_like(operands[n], dtype=accumulator(operands[n].dtype)) for n in names}
        found = list(self._pieces(q.shape[0]))
        for place, (batch, part, body) in enumerate(found):
            queries, keys = self._slices(q, batch, part)
            heads = (batch, keys[1])
            own = piece_operands(operands, queries, keys, self.origins[part.piece])
            following = found[place + 1] if place + 1 < len(found) else None
            last = following is None or (following[0], following[1].piece.head) != (batch, part.piece.head)
            alone = totals is None and last  # no other piece has gradients for these keys
            if totals is None and not alone:
                totals = tuple(x[heads].new_zeros(x[heads].shape, dtype=accumulator(x.dtype)) for x in (k, v))
            mine = [None if x is None else x[queries] for x in (*flow, out, lse)]
            if alone:
                for x in (dk[heads], dv[heads]):
                    _clear_beside(x, part.keys)
            if body is None:
                dq[queries] = 0
                rest = self._without_keys(mine, own, names)
            else:
                into = (dq[queries], dk[keys], dv[keys]) if alone else (dq[queries], None, None)
                tensors = (q[queries], k[keys], v[keys], mine[2], mine[3])
                some = piece_gradients(self._program(body), mine[:2], tensors, {**own, INTO: into}, names)
                _spread(some[:3], into, totals or (), part.keys)
                rest = dict(zip(names, some[3:], strict=True))
                del some  # it would stay until the next piece has its own
            for name, x in rest.items():
                learnt[name][piece_slice(name, operands[name], queries, keys)].add_(x)
            if last and totals is not None:
                dk[heads], dv[heads] = totals
                totals = None
        return dq, dk, dv, *(learnt[n].to(operands[n].dtype) for n in names)

    def _without_keys(
        self, mine: Sequence[Tensor | None], own: Mapping[str, Any], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """Return the gradients of operands from rows that see no key: sinks have one, of the LSE."""
        if "sink_logits" not in names or mine[1] is None:
            return {}
        covered = own["sink_logits"] > -torch.inf
        return {"sink_logits": mine[1].sum((0, 2)).where(covered, 0)}

    def _slices(self, q: Tensor, batch: slice, part: Part) -> tuple[Place, Place]:
        """Return where a piece lies in q, and its keys in k and v."""
        piece, group = part.piece, q.shape[1] // self.heads
        heads = slice(piece.head, piece.head + piece.heads)
        queries = slice(heads.start * group, heads.stop * group), slice(piece.row, piece.row + piece.rows)
        return (batch, *queries), (batch, heads, slice(*part.keys))


def _spread(
    some: Sequence[Tensor], into: Sequence[Tensor | None], totals: Sequence[Tensor], keys: tuple[int, int]
) -> None:
    """Bring the gradients of a piece to where they belong, or add those of k and v to the sums of several pieces."""
    for target, one in zip(into, some, strict=True):
        if target is not None:
            put(target, one)
    for total, one in zip(totals, some[1:], strict=False):
        total[:, :, keys[0] : keys[1]].add_(one)


def _clear_beside(x: Tensor, keys: tuple[int, int]) -> None:
    """Write zeros to the rows that no query of a piece sees."""
    x[:, :, : keys[0]].zero_()
    x[:, :, keys[1] :].zero_()


def piece_gradients(
    program: Any,
    flow: Sequence[Tensor | None],
    given: Sequence[Tensor | None],
    operands: Mapping[str, Any],
    names: Sequence[str] = (),
) -> tuple[Tensor, ...]:
    """Return dq, dk, dv of one piece, then those of the named operands.

    They come from the program's own backward, or from computing the piece again under autograd.
    """
    q, k, v, out, lse = given
    assert q is not None
    assert k is not None
    assert v is not None
    if hasattr(program, "gradients"):
        found: tuple[Tensor, ...] = program.gradients(flow, (q, k, v, out, lse), operands, names)
        return found
    leaves = [x.detach().requires_grad_() for x in (q, k, v, *(operands[n] for n in names))]
    with torch.enable_grad():
        again = program(*leaves[:3], {**operands, **dict(zip(names, leaves[3:], strict=True))}, flow[1] is not None)
        pairs = [(y, g) for y, g in zip(again, flow, strict=True) if y is not None and g is not None]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in leaves)
    outputs, grads = zip(*pairs, strict=True)
    return torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True)


class _Looped(torch.autograd.Function):
    """Runs a :class:`LoopedProgram`, whose backward computes every piece again."""

    @staticmethod
    def forward(
        ctx: Any, program: LoopedProgram, operands: Mapping[str, Any], names: tuple[str, ...], *given: Tensor
    ) -> Any:
        q, k, v, *own = given
        out, lse = program.forward(q, k, v, operands, True)
        ctx.program, ctx.names = program, names
        ctx.operands = {name: x for name, x in operands.items() if name not in names}
        ctx.save_for_backward(q, k, v, out, lse, *own)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        given, own = saved[:5], saved[5:]
        grad = torch.zeros_like(given[3]) if grad is None else grad
        operands = {**ctx.operands, **dict(zip(ctx.names, own, strict=True))}
        with torch.no_grad():
            gradients = ctx.program.gradients((grad, grad_lse), given, operands, ctx.names)
        return None, None, None, *first_order(gradients)


_AXES = {
    "q_offset": "b",
    "key_padding": "b.",
    "documents": "b.",
    "bias": "bhqk",
    "alibi_slopes": "b.",
    "sink_logits": "h",
}
"""Dimensions of operands that pieces have some of: batch elements, query heads, query rows, keys.

Padding, documents and slopes are read at positions and heads of the whole sequence.
"""


def piece_slice(name: str, x: Tensor, queries: Place, keys: Place) -> tuple[slice, ...]:
    """Return which part of an operand a piece reads: those of the whole, where it broadcasts or has no such dimension.

    Examples
    --------
    >>> rows = (slice(0, 1), slice(2, 4), slice(8, 16))
    >>> piece_slice("bias", torch.zeros(4, 32, 1), rows, (slice(0, 1), slice(1, 2), slice(0, 16)))
    (slice(2, 4, None), slice(8, 16, None), slice(None, None, None))
    """
    ranges = dict(zip("bhqk", (*queries, keys[2]), strict=True))
    axes = _AXES.get(name, "")
    axes = axes[len(axes) - x.dim() :] if x.dim() <= len(axes) else ""
    return tuple(
        ranges[axis] if axis in ranges and size > 1 else slice(None) for axis, size in zip(axes, x.shape, strict=False)
    )


def piece_operands(operands: Mapping[str, Any], queries: Place, keys: Place, place: tuple[int, int]) -> dict[str, Any]:
    """Return the operands of a piece, and where its rows stand: the batch element, and a query head and a row."""
    made = {
        name: x[piece_slice(name, x, queries, keys)] if isinstance(x, Tensor) and x.dim() else x
        for name, x in operands.items()
    }
    return {**made, ORIGIN: (queries[0].start, *place)}


def _forget_masks(program: Any) -> None:
    """Let the masks of a piece go after each call: kept for every piece they would be the mask of the whole."""
    fused = getattr(program, "fused", program)
    for module in (getattr(fused, name, None) for name in ("forward", "backward", "module", "learned")):
        if isinstance(module, torch.nn.Module):
            for one in module.modules():
                if isinstance(one, MaskBuilder):
                    one._constant = False


# ------------------------------------------------------------------------------------------------- blocks of scores


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    block: tuple[int, int],
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (output, LSE) of attention in plain torch, one block of scores at a time, by an online softmax.

    Parameters
    ----------
    q, k, v
        ``[B, *axes, R, D]``, ``[B, *axes, C, D]``, ``[B, *axes, C, Dv]``; axes of size 1 in k and v broadcast, or
        ``[B, H, ...]`` with fewer heads in k and v.
    mask
        Booleans that broadcast to ``[B, *axes, R, C]``, or None.
    causal
        Whether row i sees key j only for j <= i.
    block
        (queries, keys) of a block.

    References
    ----------
    Milakov and Gimelshein, arXiv 1805.02867.
    """
    q, k, v, mask, group = _grouped(q, k, v, mask)
    out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(q.shape[:-1], dtype=accumulator(q.dtype))
    for rows in _steps(q.shape[-2], block[0]):
        some = q[..., rows, :].to(lse.dtype) * scale
        top = lse.new_full(some.shape[:-1], -torch.inf)
        total, value = torch.zeros_like(top), lse.new_zeros((*some.shape[:-1], v.shape[-1]))
        for keys in _steps(min(k.shape[-2], rows.stop) if causal else k.shape[-2], block[1]):
            scores = _scores(some, k, softcap, _allowed(mask, causal, rows, keys, q.device), keys)
            old, top = top, torch.maximum(top, scores.amax(-1))
            finite = top.masked_fill(top == -torch.inf, 0)  # -inf minus -inf would be NaN
            weights = scores.sub_(finite.unsqueeze(-1)).exp_()
            shrunk = torch.exp(old - finite)
            total = total * shrunk + weights.sum(-1)
            value = value.mul_(shrunk.unsqueeze(-1)).add_(weights @ v[..., keys, :].to(lse.dtype))
            del scores, weights
        out[..., rows, :] = value.div_(total.masked_fill(total == 0, 1).unsqueeze(-1))
        lse[..., rows] = top.masked_fill(top == -torch.inf, 0) + torch.log(total)
    return (out.flatten(1, 2), lse.flatten(1, 2)) if group > 1 else (out, lse)


def attend_blocks_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    block: tuple[int, int],
    softcap: float | None = None,
) -> Triple:
    """Return the gradients of q, k and v from the merged output and LSE of the rows, one block at a time."""
    given, acc = (q, k, v), accumulator(q.dtype)
    q, k, v, mask, group = _grouped(q, k, v, mask)
    if group > 1:
        grad, out, lse = (_split(x, group) for x in (grad, out, lse))
        grad_lse = None if grad_lse is None else _split(grad_lse, group)
    totals = [x.new_zeros(x.shape, dtype=acc) for x in (q, k, v)]
    for rows in _steps(q.shape[-2], block[0]):
        some, upstream = q[..., rows, :].to(acc) * scale, grad[..., rows, :].to(acc)
        shift = (upstream * out[..., rows, :].to(acc)).sum(-1)
        shift = shift if grad_lse is None else shift - grad_lse[..., rows].to(acc)
        own = lse[..., rows]
        above = own.masked_fill(own == -torch.inf, torch.inf).unsqueeze(-1)  # rows without a key: weights of 0
        for keys in _steps(min(k.shape[-2], rows.stop) if causal else k.shape[-2], block[1]):
            capped = _scores(some, k, softcap, None, keys)
            weights = torch.exp(capped - above)
            allowed = _allowed(mask, causal, rows, keys, q.device)
            weights = weights if allowed is None else weights.masked_fill_(~allowed, 0)
            _add(totals[2][..., keys, :], weights.transpose(-1, -2) @ upstream)
            slope = (upstream @ v[..., keys, :].to(acc).transpose(-1, -2)).sub_(shift.unsqueeze(-1)).mul_(weights)
            if softcap is not None:
                slope.mul_(1 - (capped / softcap) ** 2)
            del weights, capped
            _add(totals[1][..., keys, :], slope.transpose(-1, -2) @ some)
            totals[0][..., rows, :].add_(slope @ k[..., keys, :].to(acc), alpha=scale)
            del slope
    dq, dk, dv = (t.reshape(x.shape).to(x.dtype) for t, x in zip(totals, given, strict=True))
    return dq, dk, dv


def _scores(some: Tensor, k: Tensor, softcap: float | None, allowed: Tensor | None, keys: slice) -> Tensor:
    scores = some @ k[..., keys, :].to(some.dtype).transpose(-1, -2)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    return scores if allowed is None else scores.masked_fill_(~allowed, -torch.inf)


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None, int]:
    """Return the operands with an axis of their own for the heads that share one of k, and how many those are."""
    if q.is_cuda and q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        raise SpecError(
            "this process lets float32 products use TF32, the spec says precision='ieee', and a plan changes no "
            "global flag: call torch.set_float32_matmul_precision('highest')"
        )
    group = q.shape[1] // k.shape[1] if q.dim() == 4 else 1
    if group == 1:
        return q, k, v, mask, 1
    if mask is not None and mask.dim() >= 4:
        mask = _split(mask, group) if mask.shape[1] > 1 else mask.unsqueeze(1)
    return _split(q, group), k.unsqueeze(2), v.unsqueeze(2), mask, group


def _split(x: Tensor, group: int) -> Tensor:
    return x.reshape(x.shape[0], x.shape[1] // group, group, *x.shape[2:])


def _steps(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _allowed(mask: Tensor | None, causal: bool, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
    """Return which pairs of a block meet; None if all do."""
    if causal:
        if keys.stop - 1 <= rows.start:
            return None
        queries = torch.arange(rows.start, rows.stop, device=device)
        return queries.unsqueeze(1) >= torch.arange(keys.start, keys.stop, device=device)
    if mask is None:
        return None
    wide = mask if mask.shape[-1] == 1 else mask[..., keys]
    return wide if mask.shape[-2] == 1 else wide[..., rows, :]


def _add(total: Tensor, part: Tensor) -> None:
    """Add a gradient, summed over the axes along which its tensor broadcasts."""
    total.add_(part.sum_to_size(total.shape))
