"""Emission for ``compiled``: one attend over whole inputs, its tables in tensors, its code shared by structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnplan.backends.base import Program, Schedule
from attnplan.backends.eager.programs import FirstOrder
from attnplan.ir import Attend, Graph
from attnplan.runtime.chunks import ChunkedAttend, Sizes
from attnplan.runtime.flex import FlexAttend, Options
from attnplan.runtime.views import with_features_in_line
from attnplan.spec import AttentionSpec


def emit(graph: Graph, spec: AttentionSpec, schedule: Schedule, device: str) -> Program:
    """Return the program that runs ``graph``, which is one attend over whole inputs, on a torch device."""
    op = graph.of(Attend)[0][1]
    shape = spec.shape
    tile = op.tile or schedule.tile
    assert tile is not None
    lengths = (shape.seq_len, shape.kv_len)
    flex = chunked = None
    if schedule.name == "flex":
        options = Options(lengths, tile, op.scale, op.softcap, spec.heads != spec.kv_heads)
        flex = FlexAttend(op.where, shape, op.shift, options, device)
    if not device.startswith("cuda"):
        sizes = Sizes(tile, spec.heads, spec.kv_heads, lengths, op.scale, op.softcap)
        chunked = ChunkedAttend(op.where, shape, op.shift, sizes)
    module = flex.condition.module if flex is not None else chunked.condition.module if chunked is not None else None
    assert module is not None
    source = f"# {op}, tiles {tile[0]} x {tile[1]}\n# mask:\n{str(module.code).strip()}\n"
    if chunked is None:
        assert flex is not None
        return FlexProgram(flex, source)
    return TiledProgram(flex, chunked, source)


class Inlined:
    """FlexAttention as a traced program takes it up, on CUDA."""

    def __init__(self, flex: FlexAttend) -> None:
        self.flex = flex

    def takes(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> bool:
        """Return whether this call can be taken up."""
        return True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and LSE."""
        return self.flex.traced(q, k, v, return_lse)


class FlexProgram:
    """FlexAttention with its own backward and LSE, on CUDA."""

    differentiable_lse = True
    follows_lengths = False

    def __init__(self, flex: FlexAttend, source: str) -> None:
        self.flex, self.source = flex, source
        self.inlined = Inlined(flex) if flex.table is None else None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``."""
        q, k, v = with_features_in_line(q), with_features_in_line(k), with_features_in_line(v)
        return self.flex(q, k, v, operands, return_lse)


class TiledProgram:
    """FlexAttention, if it is asked for, where neither gradients nor LSE are; compiled tiles otherwise. On the CPU.

    A trace does not take it up: the CPU template of FlexAttention fails in torch 2.13 on queries that are a view of a
    product, as a projection split into heads is. So it is one operator there.
    """

    differentiable_lse = True
    follows_lengths = False

    def __init__(self, flex: FlexAttend | None, chunked: ChunkedAttend, source: str) -> None:
        self.flex, self.chunked, self.source = flex, chunked, source

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``."""
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            out, lse = _Chunked.apply(self.chunked, operands, q, k, v)  # type: ignore[no-untyped-call]
            return out, lse
        if self.flex is None or return_lse or not q.numel():
            return self.chunked.forward(q, k, v, operands)
        q, k, v = with_features_in_line(q), with_features_in_line(k), with_features_in_line(v)
        return self.flex(q, k, v, operands, False)

    def gradients(
        self, flow: Sequence[Tensor | None], given: Sequence[Tensor], operands: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv from ``(grad, grad_lse)`` and ``(q, k, v, out, lse)``."""
        with torch.no_grad():
            return self.chunked.backward(flow, given, operands)


class _Chunked(torch.autograd.Function):
    """Compiled tiles with their own backward, which has first-order gradients only."""

    @staticmethod
    def forward(ctx: Any, chunked: ChunkedAttend, operands: Mapping[str, Any], *given: Tensor) -> Any:
        q, k, v = given
        out, lse = chunked.forward(q, k, v, operands)
        ctx.chunked, ctx.operands = chunked, operands
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        with torch.no_grad():
            gradients = ctx.chunked.backward((grad, grad_lse), ctx.saved_tensors, ctx.operands)
        if torch.is_grad_enabled():  # only under create_graph=True
            gradients = FirstOrder.apply(*(x.detach().requires_grad_() for x in gradients))  # type: ignore[no-untyped-call]
        return None, None, *gradients
