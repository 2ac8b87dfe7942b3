"""Emission for ``eager``: a graph becomes torch.fx modules whose code is readable Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any

import attrs
import torch
import torch.nn.functional as F
from torch import fx

from attnplan.backends.base import Program, Schedule
from attnplan.backends.eager import written as writes
from attnplan.backends.eager.launches import gather_backward, gather_forward, launch_of, pulls
from attnplan.backends.eager.learned import bias, emit_learned, has_sinks, knows_sinks, native_sinks, sunk
from attnplan.backends.eager.places import Owner, Place, is_whole, keeps_rows, owners, place
from attnplan.backends.eager.programs import DirectProgram, FusedProgram, PlainProgram
from attnplan.ir import Attend, Axis, Graph, Merge, Mix, Node, RowMap
from attnplan.ir.native import EVERYTHING, lowered
from attnplan.ir.ops import disjoint
from attnplan.ir.slots import mask_rows, slot_condition
from attnplan.lower import lower
from attnplan.runtime import attend as attends
from attnplan.runtime import kernels_cudnn, loops, tile_masks, views
from attnplan.runtime import merge as merges
from attnplan.runtime.dropout import DropoutMask
from attnplan.runtime.following import FollowingWindow
from attnplan.runtime.kernels_all import KERNELS
from attnplan.runtime.masks import FollowingCondition, MaskBuilder
from attnplan.runtime.opaque import Opaque
from attnplan.runtime.tiles import TileBuilder
from attnplan.spec import AttentionSpec

Value = tuple[fx.Node, fx.Node | None]


def emit(graph: Graph, spec: AttentionSpec, schedule: Schedule, device: str) -> Program:
    """Return the program that runs ``graph`` on a torch device.

    A graph over whole rows of a spec with open lengths is emitted from its naive form, and decides at each call what
    its conditions mean at that length; a graph that takes rows apart is emitted for its own lengths.
    """
    follow = not spec.is_static and keeps_rows(graph)
    emitter = Emitter(lower(spec) if follow else graph, spec, follow, schedule.native)
    return _emitted(emitter, schedule)


def emit_piece(graph: Graph, spec: AttentionSpec, schedule: Schedule, device: str) -> Program:
    """Return the program that runs a piece of a loop, which may be told where its results go."""
    return _emitted(Emitter(graph, spec, False, schedule.native, piece=True), schedule)


def _emitted(emitter: Emitter, schedule: Schedule) -> Program:
    graph, follow = emitter.graph, emitter.follow
    blocked = any(op.loop is not None for _, op in graph.of(Attend))
    if not schedule.runs and not blocked:
        module = emitter.plain()
        return PlainProgram(module, _source(module), follow)
    kernel = schedule.runs
    forward, backward = emitter.forward(kernel), emitter.backward(kernel)
    source = f"{_source(forward)}\n{_source(backward)}"
    fused = FusedProgram(forward, backward, source, follow, learned=emit_learned(emitter))
    direct = None if blocked or writes.writes_places(emitter, kernel) else emitter.direct(kernel)
    if direct is None:
        return fused
    quick = emitter.direct(kernel, learns=False) if kernel in _TOLD else direct
    assert quick is not None
    return DirectProgram(direct, quick, fused, _source(direct), learns=kernel != "fa4")  # whose own is not replayed


def _source(module: fx.GraphModule) -> str:
    return str(module.code).strip() + "\n"


def _named(code: fx.Graph, function: Callable[..., Any], args: tuple[Any, ...], name: str) -> fx.Node:
    """Append a call whose result has a name that says what it is."""
    return code.create_node("call_function", function, args, name=name)


def _pair(code: fx.Graph, pair: fx.Node, node_id: int) -> tuple[fx.Node, fx.Node]:
    return _named(code, getitem, (pair, 0), f"out_{node_id}"), _named(code, getitem, (pair, 1), f"lse_{node_id}")


def _softcap(op: Attend) -> dict[str, Any]:
    return {} if op.softcap is None else {"softcap": op.softcap}


_OPERATORS = {
    "flash-cuda": torch.ops.aten._scaled_dot_product_flash_attention.default,
    "cudnn": torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    "efficient": torch.ops.aten._scaled_dot_product_efficient_attention.default,
}
"""Operators that are whole plans."""
_TOLD = frozenset({"cudnn", "efficient"})
"""Those that are told, behind a mask, if a backward needs the LSE."""


class Emitter:
    """Emits the forward, backward and plain programs of one graph."""

    def __init__(
        self, graph: Graph, spec: AttentionSpec, follow: bool, native: frozenset[str] = frozenset(), piece: bool = False
    ) -> None:
        self.graph, self.spec, self.follow, self.native, self.piece = graph, spec, follow, native, piece
        self.owners = owners(graph)
        self.launches = launch_of(graph, spec.layout, spec.batch)
        self.pulls = pulls(graph)
        self.result = graph[graph.output.args[0]]
        self.saved = self._saved()
        self.modules: dict[str, Any] = {}

    def _saved(self) -> tuple[tuple[int, str], ...]:
        """Return the (node, "out" or "lse") that the backward needs beside the result's own."""
        pairs = (pair for o in self.owners.values() for pair in ((o.out, "out"), (o.lse, "lse")))
        return tuple(dict.fromkeys((self._holder(i), what) for i, what in pairs if i != self.result.id))

    def _holder(self, node_id: int) -> int:
        """Return the node whose value holds that of an attend: the first of its launch."""
        launch = self.launches.get(node_id)
        return node_id if launch is None else launch.first

    def direct(self, kernel: str, *, learns: bool = True) -> fx.GraphModule | None:
        """Return the bare kernel call for a graph that is one, or None; without ``learns`` it has no backward."""
        op, node = self.result.op, self.result
        if self.follow or not isinstance(op, Attend) or not is_whole(self.graph, node):
            return None
        if op.biases or has_sinks(self.graph):
            return None
        found = lowered(self.graph, node, self.native)
        if found is None or found.documents or op.tile is not None:
            return None
        grouped = self.spec.heads != self.spec.kv_heads
        q_rows, k_rows = (n.type.rows.length for n in self.graph.args(node)[:2])
        causal = found.window == (None, 0) and q_rows == k_rows
        window = {} if causal or found.window == EVERYTHING else {"window": found.window}
        code = fx.Graph()
        q, k, v = (code.placeholder(name) for name in "qkv")
        if isinstance(KERNELS[kernel], Opaque):
            options = window | _softcap(op)
            code.output(code.call_function(attends.call, (q, k, v, kernel, causal, op.scale), options))
        elif kernel == "flash-cpu":
            options = {"is_causal": causal, "scale": op.scale, "enable_gqa": grouped}
            code.output(code.call_function(F.scaled_dot_product_attention, (q, k, v), options))
        elif window or (kernel == "efficient" and grouped):
            return None
        elif kernel == "cudnn" and learns:
            code.output(code.call_function(kernels_cudnn.differentiable, (q, k, v, causal, op.scale)))
        else:
            between = (None, learns) if kernel in _TOLD else ()
            call = code.call_function(_OPERATORS[kernel], (q, k, v, *between, 0.0, causal), {"scale": op.scale})
            code.output(code.call_function(getitem, (call, 0)))
        return fx.GraphModule({}, code, "Direct")

    def forward(self, kernel: str) -> fx.GraphModule:
        """Return ``(q, k, v, operands) -> (out, lse, *saved)``."""
        code = fx.Graph()
        operands, *inputs = self._placeholders(code)

        def one(node: Node, op: Attend) -> Value:
            if self._holder(node.id) != node.id:  # its launch has run
                return values[self._holder(node.id)]
            q, k, v = self._taken(code, node, inputs)
            mask, causal, options = self._lowered(code, node, op, operands, inputs)
            options |= native_sinks(self, code, node, operands)
            if op.loop is not None:
                pair = code.call_function(loops.attend_blocks, (q, k, v, mask, causal, op.scale, op.loop), options)
            else:
                options |= self.written.into(node, (0,))
                pair = code.call_function(attends.attend, (q, k, v, mask, kernel, causal, op.scale), options)
            return _pair(code, pair, node.id)

        values: dict[int, Value] = {}
        self.written = writes.forward_of(self, code, kernel, inputs, operands)
        self._values(code, inputs[0], one, (merges.merge, merges.weighted_sum), values)
        out, lse = self._finished(code, operands, inputs[0], values)
        values[self.result.id] = (out, lse)
        code.output((out, lse, *(values[i][0 if what == "out" else 1] for i, what in self.saved)))
        return fx.GraphModule(self.modules, code, "Forward")

    def plain(self) -> fx.GraphModule:
        """Return ``(q, k, v, operands) -> (out, lse)`` in plain torch, differentiable any number of times.

        Everything is computed in the accumulating dtype, so that gradients of several branches are summed in it too.
        """
        code = fx.Graph()
        operands, q, *others = self._placeholders(code)
        inputs = [_named(code, views.widened, (x,), f"wide_{x}") for x in (q, *others)]

        def one(node: Node, op: Attend) -> Value:
            q, k, v = self._rows(code, node, inputs, views.gather)
            mask, causal = self._condition(code, node, op, operands, inputs, tiled=False)
            options = self._plain_options(code, node, op, operands, inputs)
            pair = code.call_function(attends.attend_plain, (q, k, v, mask, causal, op.scale), options)
            return _pair(code, pair, node.id)

        values = self._values(code, q, one, (merges.merge_plain, merges.weighted_sum_plain), {})
        code.output(self._finished(code, operands, q, values))
        return fx.GraphModule(self.modules, code, "Plain")

    def backward(self, kernel: str) -> fx.GraphModule:
        """Return ``(grad, grad_lse, q, k, v, out, lse, *saved, operands) -> (dq, dk, dv)``."""
        code = fx.Graph()
        grad, grad_lse = code.placeholder("grad"), code.placeholder("grad_lse")
        operands, *inputs = self._placeholders(code, operands_last=False)
        known = self._known(code)
        pieces = []
        written = writes.backward_of(self, code, kernel, inputs, operands)
        for node, op in self.graph.of(Attend):
            if self._holder(node.id) != node.id:
                continue
            mask, causal, options = self._lowered(code, node, op, operands, inputs, back=True)
            given = self._given_back(code, node, known, grad, grad_lse, inputs)
            if op.loop is not None:
                blocks = (*given, mask, causal, op.scale, op.loop)
                triple = code.call_function(loops.attend_blocks_backward, blocks, options)
            else:
                args, options = (*given, mask, kernel, causal, op.scale), options | written.into(node, (0, 1, 2))
                triple = code.call_function(attends.attend_backward, args, options)
            pieces.append((node, [_named(code, getitem, (triple, i), f"d{n}_{node.id}") for i, n in enumerate("qkv")]))
        code.output(self._gradients(code, inputs, pieces, written))
        return fx.GraphModule(self.modules, code, "Backward")

    def _known(self, code: fx.Graph) -> dict[tuple[int, str], fx.Node]:
        """Append the arguments of a backward that the forward returned."""
        known = {(self.result.id, "out"): code.placeholder("out"), (self.result.id, "lse"): code.placeholder("lse")}
        return known | {key: code.placeholder(f"{key[1]}_{key[0]}") for key in self.saved}

    def _placeholders(self, code: fx.Graph, *, operands_last: bool = True) -> list[fx.Node]:
        names = ["q", "k", "v", "operands"] if operands_last else ["operands", "q", "k", "v"]
        made = {name: code.placeholder(name) for name in names}
        return [made["operands"], made["q"], made["k"], made["v"]]

    def _place(self, node: Node) -> Place | None:
        """Return where an attend's or join's rows lie in the whole output; None is everywhere."""
        if not isinstance(node.op, Attend):
            return None
        return None if is_whole(self.graph, node) else place(node.type.rows)

    def _rows(
        self, code: fx.Graph, node: Node, inputs: Sequence[fx.Node], view: Callable[..., Any] = views.rows
    ) -> list[fx.Node]:
        made = []
        for arg, whole in zip(self.graph.args(node), inputs, strict=True):
            # an attend whose k is taken and q is whole would mix ranks: every operand becomes a view then
            viewed = not is_whole(self.graph, node)
            name = f"{arg.type.tensor}_{node.id}"
            made.append(_named(code, view, (whole, *place(arg.type.rows)), name) if viewed else whole)
        return made

    def _lowered(
        self, code: fx.Graph, node: Node, op: Attend, operands: fx.Node, inputs: Sequence[fx.Node], back: bool = False
    ) -> tuple[fx.Node | None, fx.Node | bool, dict[str, Any]]:
        """Return (mask, tiles, lists of tiles or None; causal; what the kernel does by itself) of an attend."""
        options = _softcap(op) | bias(self, code, node, op, operands, inputs)
        found = lowered(self.graph, node, self.native)
        rows_q, rows_k = (n.type.rows for n in self.graph.args(node)[:2])
        name = f"where_{node.id}"
        if op.tile is not None and "blocks" in self.native:
            rest = (self.spec.shape, self.spec.heads // self.spec.kv_heads, self.native)
            self.modules[name] = tile_masks.builder(op, rows_q, rows_k, *rest, backward=back)
            return code.create_node("call_module", name, (operands, *inputs[:2])), False, options
        if found is None or op.tile is not None or (self.follow and "mask" in self.native):
            return *self._condition(code, node, op, operands, inputs), options
        if found.documents:
            options["documents"] = code.call_function(getitem, (operands, "documents"))
        if self.follow:
            self.modules[name] = FollowingWindow(op, self.spec.shape, self.native)
            pair = code.create_node("call_module", name, (operands, *inputs[:2]))
            options["window"] = code.call_function(getitem, (pair, 0))
            return None, code.call_function(getitem, (pair, 1)), options
        causal = found.window == (None, 0) and rows_q.length == rows_k.length and not found.documents
        if not causal and found.window != EVERYTHING:
            options["window"] = found.window
        return None, causal, options

    def _condition(
        self,
        code: fx.Graph,
        node: Node,
        op: Attend,
        operands: fx.Node,
        inputs: Sequence[fx.Node],
        *,
        tiled: bool = True,
    ) -> tuple[fx.Node | None, fx.Node | bool]:
        """Return (mask, tiles or None, causal) of an attend, as nodes where they are found at the call."""
        name = f"where_{node.id}"
        if op.tile is not None and tiled:
            self.modules[name] = self._tiles(node, op)
            return code.create_node("call_module", name, (operands, *inputs[:2])), False
        if self.follow:
            self.modules[name] = FollowingCondition(op, *self._mask_rows(node), self.spec.shape)
            pair = code.create_node("call_module", name, (operands, *inputs[:2]))
            return code.call_function(getitem, (pair, 0)), code.call_function(getitem, (pair, 1))
        condition = slot_condition(op, *(n.type.rows for n in self.graph.args(node)[:2]))
        if condition != "mask":
            return None, condition == "causal"
        partial = op.at is not None
        rows_q, rows_k = mask_rows(attrs.evolve(op, at=None), *self._mask_rows(node))
        self.modules[name] = MaskBuilder(op.where, rows_q, rows_k, op.shift, self.spec.shape, partial=partial)
        return code.create_node("call_module", name, (operands, *inputs[:2])), False

    def _tiles(self, node: Node, op: Attend) -> TileBuilder:
        rows_q, rows_k = (n.type.rows for n in self.graph.args(node)[:2])
        group = self.spec.heads // self.spec.kv_heads if is_whole(self.graph, node) else 0
        return TileBuilder(op, rows_q, rows_k, self.spec.shape, group)

    def _plain_options(
        self, code: fx.Graph, node: Node, op: Attend, operands: fx.Node, inputs: Sequence[fx.Node]
    ) -> dict[str, Any]:
        options = _softcap(op) | bias(self, code, node, op, operands, inputs)
        if op.dropout:
            name = f"keep_{node.id}"
            self.modules[name] = DropoutMask(op.dropout, *self._mask_rows(node), follow=self.follow)
            keep = code.create_node("call_module", name, (operands, *inputs[:2]))
            options |= {"keep": keep, "dropout": op.dropout}
        return options

    def _mask_rows(self, node: Node) -> tuple[RowMap, RowMap]:
        """Return the positions over which masks are built: whole inputs have one dimension for all heads."""
        op, (rows_q, rows_k) = node.op, (n.type.rows for n in self.graph.args(node)[:2])
        assert isinstance(op, Attend)
        at_q, at_k = op.positions(rows_q, rows_k)
        if is_whole(self.graph, node):
            heads = Axis(rows_q.elements_count // rows_q.length, head=1)
            return attrs.evolve(at_q, axes=(heads, at_q.axes[-1])), RowMap(0, at_k.row, (Axis(1), at_k.axes[-1]))
        return at_q, at_k

    def _values(
        self,
        code: fx.Graph,
        q: fx.Node,
        one: Callable[[Node, Attend], Value],
        joins: tuple[Callable[..., Any], Callable[..., Any]],
        values: dict[int, Value],
    ) -> dict[int, Value]:
        merge, weighted_sum = joins
        for node in self.graph:
            op = node.op
            if isinstance(op, Attend):
                values[node.id] = one(node, op)
            if not isinstance(op, Merge | Mix):
                continue
            if op.pull and merge is not merges.merge_plain:
                pair = writes.pulled(self, code, q, (node, op), values, self.written)
                out, lse = _pair(code, pair, node.id)
                values[node.id] = out, lse if node.type.lse else None
                continue
            outs = [values[a][0] for a in node.args]
            places = [self._place(n) for n in self.graph.args(node)]
            if isinstance(op, Mix) and op.rule in ("mean", "sum"):
                weights = [op.weight(b) for b in op.branches]
                values[node.id] = (_named(code, weighted_sum, (q, outs, weights, places), f"out_{node.id}"), None)
                continue
            lses = [values[a][1] for a in node.args]
            options: dict[str, Any] = {}
            join = merge
            if merge is merges.merge_plain:
                options = {"detach": True} if isinstance(op, Mix) and op.rule != "lse" else {}
            elif disjoint([n.type.rows for n in self.graph.args(node)]):
                join = merges.placed
                options = {"whole": self.written.wholes[0]} if self.written.places else {}
            values[node.id] = _pair(code, code.call_function(join, (q, outs, lses, places), options), node.id)
        return values

    def _finished(self, code: fx.Graph, operands: fx.Node, q: fx.Node, values: dict[int, Value]) -> Value:
        """Return the result in the dtype of q and in the shape of the whole output."""
        out, lse = values[self.result.id]
        if self._place(self.result) is not None:  # one cell that is the whole output, its heads spread over axes
            out = code.call_function(attends.whole_output, (out, q))
            lse = None if lse is None else code.call_function(attends.whole_output, (lse, q))
        if has_sinks(self.graph) and not knows_sinks(self, self.result):
            out, lse = sunk(code, operands, out, lse)
        return code.call_function(attends.in_dtype_of, (out, q)), lse

    def _given_back(
        self,
        code: fx.Graph,
        node: Node,
        known: dict[tuple[int, str], fx.Node],
        grad: fx.Node,
        grad_lse: fx.Node,
        inputs: Sequence[fx.Node],
    ) -> list[Any]:
        """Return grad, grad of LSE, q, k, v, output and LSE at the rows of one attend, or of all in its launch."""
        owner, launch = self.owners[node.id], self.launches.get(node.id)
        if launch is None:
            flow = self._flow(code, node, owner, known, grad, grad_lse, inputs[0])
            return [*flow[:2], *self._rows(code, node, inputs), *flow[2:]]
        pairs = ((owner.out, "out"), (owner.lse, "lse"))
        saved = [None if i == self.result.id else known[self._holder(i), what] for i, what in pairs]
        whole = [None if s is not None else known[self.result.id, w] for (_, w), s in zip(pairs, saved, strict=True)]
        flow_lse = grad_lse if self.result.type.lse else None
        given = gather_backward(code, self.modules, launch, [grad, flow_lse, *inputs, *whole])
        return [*given[:5], *(g if s is None else s for g, s in zip(given[5:], saved, strict=True))]

    def _taken(self, code: fx.Graph, node: Node, inputs: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the rows of q, k and v of one attend, or of all in its launch."""
        launch = self.launches.get(node.id)
        if launch is None:
            return self._rows(code, node, inputs)
        return gather_forward(code, self.modules, launch, inputs)

    def _flow(
        self,
        code: fx.Graph,
        node: Node,
        owner: Owner,
        known: dict[tuple[int, str], fx.Node],
        grad: fx.Node,
        grad_lse: fx.Node,
        q: fx.Node,
    ) -> list[fx.Node]:
        """Return grad, grad of LSE, output and LSE at the rows of one attend."""
        where = self._place(node)

        def here(x: fx.Node, view: Callable[..., Any]) -> fx.Node:
            return x if where is None else code.call_function(view, (x, *where))

        own_grad = here(grad, views.rows)
        if owner.weight != 1.0 and self.pulls is None:  # what pulls gradients weighs them
            own_grad = code.call_function(torch.mul, (own_grad, owner.weight))
        has_lse = self.result.type.lse
        own_grad_lse = here(grad_lse, views.rows_if_any) if has_lse else grad_lse
        out, lse = known[owner.out, "out"], known[owner.lse, "lse"]
        if owner.out != node.id or node.id == self.result.id:
            out = code.call_function(attends.in_dtype_of, (here(out, views.rows), q))
        if owner.lse != node.id or node.id == self.result.id:
            lse = here(lse, views.rows_of_one)
        return [own_grad, own_grad_lse, out, lse]

    def _gradients(
        self,
        code: fx.Graph,
        inputs: Sequence[fx.Node],
        pieces: list[tuple[Node, list[fx.Node]]],
        written: writes.Written,
    ) -> tuple[fx.Node, ...]:
        if len(pieces) == 1 and is_whole(self.graph, pieces[0][0]):
            return tuple(pieces[0][1])
        if self.pulls is not None:
            return writes.pulled_gradients(self, code, inputs, {n.id: parts for n, parts in pieces}, written)
        totals = [code.call_function(views.zero_gradient, (x,)) for x in inputs]
        for node, parts in pieces:
            for total, part, arg in zip(totals, parts, self.graph.args(node), strict=True):
                where = () if is_whole(self.graph, node) else place(arg.type.rows)
                code.call_function(views.add_rows, (total, part, *where))
        return tuple(code.call_function(attends.in_dtype_of, pair) for pair in zip(totals, inputs, strict=True))
