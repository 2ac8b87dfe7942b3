"""Joins that write each row once, and attends whose kernel writes rows where they belong, so that the join need not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import getitem
from typing import TYPE_CHECKING, Any

from torch import fx

from attnplan.backends.eager.launches import Launch, pull_gradients, pull_values
from attnplan.backends.eager.places import is_whole, place
from attnplan.ir import Attend, Graph, Merge, Mix, Node
from attnplan.ir.apart import apart
from attnplan.ir.native import lowered
from attnplan.ir.ops import disjoint
from attnplan.runtime import attend as attends
from attnplan.runtime import views
from attnplan.runtime.destinations import given, given_or_new
from attnplan.runtime.fused.strided import Strided

if TYPE_CHECKING:
    from attnplan.backends.eager.emit import Emitter

Wholes = dict[int, fx.Node]
"""The new whole tensor of each operand that kernels write rows of: 0 is q or the output, 1 is k, 2 is v."""


class Written:
    """What the kernels of one program write themselves.

    Parameters
    ----------
    code, modules
        The program.
    graph, launches
        What it runs.
    kernel
        Kernels that cannot be told where to write get nothing to write.
    operands
        Those of a piece, which may say where its results go; None for what is no piece.
    """

    def __init__(
        self,
        code: fx.Graph,
        modules: dict[str, Any],
        graph: Graph,
        launches: Mapping[int, Launch],
        kernel: str,
        operands: fx.Node | None,
    ) -> None:
        self.code, self.modules, self.graph, self.launches = code, modules, graph, launches
        self.takes, self.operands = kernel in attends.WRITES_INTO, operands
        self.wholes: Wholes = {}
        self.nodes: dict[int, tuple[int, ...]] = {}
        self.single: int | None = None
        """The attend that is a whole piece, and writes where that goes."""
        self.places: tuple[int, ...] = ()
        """Attends that write neighbouring rows of the output, which no other attend has."""

    def plan(self, parts: Sequence[Node], operand: int, like: fx.Node, features: fx.Node) -> None:
        """Choose which parts are written into a new whole of one operand, and append its making if there are any."""
        chosen = destinations(self.graph, parts, self.launches, min(operand, 1)) if self.takes else ()
        self.nodes[operand] = chosen
        if chosen:
            self.make_whole(operand, like, features)
        elif self.operands is not None:
            self.wholes[operand] = self.code.call_function(given, (self.operands, operand))

    def make_whole(self, operand: int, like: fx.Node, features: fx.Node) -> None:
        """Append the making of the whole of one operand: new, or where the results of a piece go."""
        if self.operands is None:
            self.wholes[operand] = self.code.call_function(views.empty_whole, (like, features))
        else:
            self.wholes[operand] = self.code.call_function(given_or_new, (self.operands, operand, like, features))

    def into(self, node: Node, operands: Sequence[int]) -> dict[str, Any]:
        """Append the views that the kernel of an attend writes into, and return them as its option."""
        if node.id == self.single:
            return {"into": tuple(self.code.call_function(given, (self.operands, i)) for i in operands)}
        if node.id in self.places:
            return {"into": (self.code.call_function(views.rows, (self.wholes[0], *place(node.type.rows))),)}
        if not any(node.id in self.nodes.get(i, ()) for i in operands):
            return {}
        return {"into": tuple(self._view(node, i) if node.id in self.nodes[i] else None for i in operands)}

    def _view(self, node: Node, operand: int) -> fx.Node:
        launch, name = self.launches[node.id], f"into_{'qkv'[operand]}_{node.id}"
        self.modules[name] = Strided((launch.k if operand else launch.q,), copies=False)
        taken = self.code.create_node("call_module", name, (self.wholes[operand],))
        return self.code.call_function(getitem, (taken, 0))


def destinations(graph: Graph, parts: Sequence[Node], launches: Mapping[int, Launch], operand: int) -> tuple[int, ...]:
    """Return the parts that kernels can write to their places: they share no row, and the largest come first.

    Parameters
    ----------
    parts
        The attends of a join that does not weigh them by constants.
    launches
        A part on views of its own can be written; one of a launch of several lies in their buffer.
    operand
        0 for rows of q and of the output, 1 for rows of k and v.
    """
    rows = {n.id: graph[n.args[operand]].type.rows for n in parts}
    able = [i for i, r in rows.items() if i in launches and launches[i].views and r.shows_rows_once]
    return tuple(able[i] for i in apart(tuple(rows[j] for j in able)))


def forward_of(emitter: Emitter, code: fx.Graph, kernel: str, inputs: Sequence[fx.Node], operands: fx.Node) -> Written:
    """Return what the kernels of a forward write: rows of branches that are mixed by their LSEs, and not saved."""
    made = _of(emitter, code, kernel, operands)
    join = emitter.pulls
    if join is None:
        made.places = places(emitter) if made.takes else ()
        if made.places:
            made.make_whole(0, inputs[0], inputs[2])
        return made
    constant = isinstance(join.op, Mix) and join.op.rule in ("mean", "sum")
    if constant and not emitter.piece:
        return made
    parts = [n for n in emitter.graph.args(join) if (n.id, "out") not in emitter.saved]
    made.plan(parts, 0, inputs[0], inputs[2])
    return made


def places(emitter: Emitter) -> tuple[int, ...]:
    """Return the attends that may write their rows of the output: parts that share none, and leave none out."""
    graph, result = emitter.graph, emitter.result
    parts = graph.args(result)
    if not isinstance(result.op, Merge) or not all(isinstance(n.op, Attend) for n in parts):
        return ()
    rows = [n.type.rows for n in parts]
    whole = graph.inputs["q"].type.rows.elements_count
    if not disjoint(rows) or sum(r.elements_count for r in rows) < whole:
        return ()
    return tuple(n.id for n in parts if n.type.rows.contiguous and len(n.type.rows.batch) == 1)


def writes_places(emitter: Emitter, kernel: str) -> bool:
    """Return whether this is one call of a kernel on a whole piece, which writes its results where they belong."""
    result = emitter.result
    if not emitter.piece or kernel not in attends.WRITES_INTO or not isinstance(result.op, Attend):
        return False
    found = lowered(emitter.graph, result, emitter.native)
    plain = result.op.tile is None and result.op.loop is None and not result.op.biases
    return plain and is_whole(emitter.graph, result) and found is not None and not found.documents


def _of(emitter: Emitter, code: fx.Graph, kernel: str, operands: fx.Node) -> Written:
    own = operands if emitter.piece else None
    made = Written(code, emitter.modules, emitter.graph, emitter.launches, kernel, own)
    made.single = emitter.result.id if writes_places(emitter, kernel) else None
    return made


def backward_of(emitter: Emitter, code: fx.Graph, kernel: str, inputs: Sequence[fx.Node], operands: fx.Node) -> Written:
    """Return what the kernels of a backward write: gradients that no constant weighs."""
    made = _of(emitter, code, kernel, operands)
    if emitter.pulls is None:
        return made
    parts = [n for n in emitter.graph.args(emitter.pulls) if emitter.owners[n.id].weight == 1.0]
    for operand, x in enumerate(inputs):
        made.plan(parts, operand, x, x)
    return made


def pulled(
    emitter: Emitter,
    code: fx.Graph,
    q: fx.Node,
    join: tuple[Node, Merge | Mix],
    values: Mapping[int, tuple[fx.Node, fx.Node | None]],
    written: Written,
) -> fx.Node:
    """Append a join that writes each row once; return the pair of output and LSE."""
    node, op = join
    saved: Collection[int] = {i for i, what in emitter.saved if what == "out"}
    name, there = f"pull_{node.id}", written.nodes.get(0, ())
    holders = pull_values(emitter.graph, emitter.modules, node, op, emitter.launches, saved, there)
    outs, lses = [values[i][0] for i in holders], [values[i][1] for i in holders]
    return code.create_node("call_module", name, (q, outs, lses, *_whole(written, 0)))


def pulled_gradients(
    emitter: Emitter,
    code: fx.Graph,
    inputs: Sequence[fx.Node],
    pieces: Mapping[int, Sequence[fx.Node]],
    written: Written,
) -> tuple[fx.Node, ...]:
    """Append the sums of gradients that write each row once."""
    assert emitter.pulls is not None
    weights = {i: owner.weight for i, owner in emitter.owners.items()}
    made = []
    for i, x in enumerate(inputs):
        name, rest = f"pull_d{x}", (weights, emitter.launches, min(i, 1), written.nodes.get(i, ()))
        holders = pull_gradients(emitter.graph, emitter.modules, name, emitter.pulls, *rest)
        args: tuple[Any, ...] = (x, [pieces[h][i] for h in holders], *_whole(written, i))
        made.append(code.create_node("call_module", name, args, name=f"d{x}"))
    return tuple(made)


def _whole(written: Written, operand: int) -> tuple[fx.Node, ...]:
    return (written.wholes[operand],) if operand in written.wholes else ()
