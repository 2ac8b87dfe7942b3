"""Emission for ``compiled``: one attend over whole inputs, its tables in tensors, its code shared by structure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, compiler

from attnplan.backends.base import Program, Schedule
from attnplan.backends.compiled import LATTICES
from attnplan.backends.eager.places import owners, place
from attnplan.errors import SpecError
from attnplan.ir import Attend, Graph, Merge, Mix
from attnplan.ir.slots import slot_condition
from attnplan.runtime.chunk_programs import Sizes
from attnplan.runtime.chunks import ChunkedAttend
from attnplan.runtime.first_order import first_order
from attnplan.runtime.flex import FlexAttend, Options
from attnplan.runtime.lattice_programs import LatticeProgram
from attnplan.runtime.lattices import Part, Recipe
from attnplan.runtime.scores import learned, sink_gradient, sunk
from attnplan.runtime.views import with_features_in_line
from attnplan.spec import AttentionSpec


def emit(graph: Graph, spec: AttentionSpec, schedule: Schedule, device: str) -> Program:
    """Return the program that runs ``graph``, one attend over whole inputs or a lattice, on a torch device."""
    if schedule.name in LATTICES:
        return LatticeProgram(recipe(graph, LATTICES[schedule.name].runs))
    op = graph.of(Attend)[0][1]
    shape = spec.shape
    tile = op.tile or schedule.tile
    assert tile is not None
    lengths = (shape.seq_len, shape.kv_len)
    flex = chunked = None
    if schedule.name in ("flex", "flex-flash"):
        kernel = "FLASH" if schedule.name == "flex-flash" else ""
        options = Options(lengths, tile, op.scale, op.softcap, spec.heads != spec.kv_heads, op.biases, kernel)
        flex = FlexAttend(op.where, shape, op.shift, options, device)
    if not device.startswith("cuda"):
        sizes = Sizes(tile, spec.heads, spec.kv_heads, lengths, op.scale, op.softcap, op.biases)
        chunked = ChunkedAttend(op.where, shape, op.shift, sizes)
    module = flex.condition.module if flex is not None else chunked.condition.module if chunked is not None else None
    assert module is not None
    source = f"# {op}, tiles {tile[0]} x {tile[1]}\n# mask:\n{str(module.code).strip()}\n"
    if chunked is None:
        assert flex is not None
        return FlexProgram(flex, source, spec.sink_logits)
    return TiledProgram(flex, chunked, source, spec.sink_logits, schedule.kernel.keeps)


def recipe(graph: Graph, kernel: str) -> Recipe:
    """Return a lattice as plain numbers: the rows of each part, and how one join weighs it, forward and backward."""
    result = graph[graph.output.args[0]]
    join = result.op
    nodes = graph.args(result) if isinstance(join, Merge | Mix) else [result]
    known, parts = owners(graph), []
    for i, node in enumerate(nodes):
        op, owner = node.op, known[node.id]
        assert isinstance(op, Attend)
        q, k = (n.type.rows for n in graph.args(node)[:2])
        constant = join.weight(join.branches[i]) if isinstance(join, Mix) and join.rule in ("mean", "sum") else None
        parts.append(
            Part(
                place(q),
                place(k),
                slot_condition(op, q, k) == "causal",
                op.scale,
                constant,
                own_out=owner.out != result.id,
                own_lse=owner.lse != result.id,
                flow=owner.weight,
            )
        )
    return Recipe(kernel, tuple(parts))


def _sunk(
    out: Tensor, lse: Tensor | None, operands: Mapping[str, Any], return_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """Return output and LSE with the call's sinks, in the dtype of ``out``."""
    assert lse is not None
    made, total = sunk(out, lse, operands["sink_logits"])
    return made.to(out.dtype), total if return_lse else None


class Inlined:
    """FlexAttention as a traced program takes it up, on CUDA."""

    def __init__(self, flex: FlexAttend, sinks: bool = False) -> None:
        self.flex, self.sinks = flex, sinks

    def takes(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> bool:
        """Return whether this call can be taken up.

        An exported program may run without a compiler, and FlexAttention would then write all scores: there a plan is
        an operator, which compiles.
        """
        if compiler._is_exporting_flag:
            return False
        return not return_lse or self.flex.like.options.kernel != "FLASH"

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and LSE."""
        out, lse = self.flex.traced(q, k, v, operands, return_lse or self.sinks)
        return _sunk(out, lse, operands, return_lse) if self.sinks else (out, lse)


class FlexProgram:
    """FlexAttention with its own backward and LSE, on CUDA."""

    follows_lengths = False

    def __init__(self, flex: FlexAttend, source: str, sinks: bool) -> None:
        self.flex, self.source, self.sinks = flex, source, sinks
        self.differentiable_lse = flex.like.options.kernel != "FLASH"
        self.inlined = Inlined(flex, sinks) if flex.table is None else None

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``.

        Raises
        ------
        SpecError
            If an LSE that would need gradients is asked of a kernel that has none.
        """
        if return_lse and not self.differentiable_lse and torch.is_grad_enabled() and q.requires_grad:
            raise SpecError(
                "FlexAttention's FLASH kernel has no gradient of the LSE: call under torch.no_grad(), or use a plan of "
                "the schedule flex"
            )
        q, k, v = with_features_in_line(q), with_features_in_line(k), with_features_in_line(v)
        out, lse = self.flex(q, k, v, operands, return_lse or self.sinks)
        return _sunk(out, lse, operands, return_lse) if self.sinks else (out, lse)


class TiledProgram:
    """FlexAttention, if it is asked for, where neither gradients nor LSE are; compiled tiles otherwise. On the CPU.

    A trace does not take it up: the CPU template of FlexAttention fails in torch 2.13 on queries that are a view of a
    product, as a projection split into heads is. So it is one operator there.
    """

    differentiable_lse = True
    follows_lengths = False

    def __init__(
        self, flex: FlexAttend | None, chunked: ChunkedAttend, source: str, sinks: bool, keeps: bool = False
    ) -> None:
        self.flex, self.chunked, self.source, self.sinks, self.keeps = flex, chunked, source, sinks, keeps

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``."""
        if self.sinks:
            found = self._without_sinks(q, k, v, operands, True)
            return _sunk(*found, operands, return_lse)
        return self._without_sinks(q, k, v, operands, return_lse)

    def _without_sinks(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        names = tuple(n for n in learned(operands) if n in self.chunked.sizes.biases)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or names):
            own = (operands[n] for n in names)
            out, lse = _Chunked.apply(self, operands, names, q, k, v, *own)  # type: ignore[no-untyped-call]
            return out, lse
        if self.flex is None or return_lse or not q.numel():
            return self.chunked.forward(q, k, v, operands)
        q, k, v = with_features_in_line(q), with_features_in_line(k), with_features_in_line(v)
        return self.flex(q, k, v, operands, False)

    def gradients(
        self,
        flow: Sequence[Tensor | None],
        given: Sequence[Tensor],
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> tuple[Tensor, ...]:
        """Return dq, dk, dv from ``(grad, grad_lse)`` and ``(q, k, v, out, lse)``, then those of the named operands."""
        biases = [n for n in names if n in self.chunked.sizes.biases]
        with torch.no_grad():  # output and LSE include the sinks, as a part of a merge has those of the whole
            found = self.chunked.backward(flow, given, operands, biases)
            by_name = dict(zip(biases, found[3:], strict=True))
            if "sink_logits" in names:
                _, _, _, out, lse = given
                grad = torch.zeros_like(out) if flow[0] is None else flow[0]
                by_name["sink_logits"] = sink_gradient(grad, flow[1], out, lse, operands["sink_logits"])
        return *found[:3], *(by_name[n] for n in names)


class _Chunked(torch.autograd.Function):
    """Compiled tiles with their own backward, which has first-order gradients only."""

    @staticmethod
    def forward(
        ctx: Any, program: TiledProgram, operands: Mapping[str, Any], names: tuple[str, ...], *given: Tensor
    ) -> Any:
        q, k, v, *own = given
        keep: list[Tensor] | None = [] if program.keeps else None
        out, lse = program.chunked.forward(q, k, v, operands, keep)
        ctx.chunked, ctx.names = program.chunked, names
        ctx.operands = {name: x for name, x in operands.items() if name not in names}
        ctx.save_for_backward(q, k, v, out, lse, *own, *(keep or ()))
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        saved = ctx.saved_tensors
        own, kept = saved[5 : 5 + len(ctx.names)], saved[5 + len(ctx.names) :]
        operands = {**ctx.operands, **dict(zip(ctx.names, own, strict=True))}
        with torch.no_grad():
            gradients = ctx.chunked.backward((grad, grad_lse), saved[:5], operands, ctx.names, kept)
        return None, None, None, *first_order(gradients)
