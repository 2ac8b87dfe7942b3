"""Joins that write each row once, and attends whose kernel writes rows where they belong, so that the join need not."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import getitem
from typing import TYPE_CHECKING, Any

from torch import fx

from attnplan.backends.eager.launches import Launch, pull_gradients, pull_values
from attnplan.ir import Graph, Merge, Mix, Node
from attnplan.ir.apart import apart
from attnplan.runtime import attend as attends
from attnplan.runtime import views
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
    """

    def __init__(
        self, code: fx.Graph, modules: dict[str, Any], graph: Graph, launches: Mapping[int, Launch], kernel: str
    ) -> None:
        self.code, self.modules, self.graph, self.launches = code, modules, graph, launches
        self.takes = kernel in attends.WRITES_INTO
        self.wholes: Wholes = {}
        self.nodes: dict[int, tuple[int, ...]] = {}

    def plan(self, parts: Sequence[Node], operand: int, like: fx.Node, features: fx.Node) -> None:
        """Choose which parts are written into a new whole of one operand, and append its making if there are any."""
        chosen = destinations(self.graph, parts, self.launches, min(operand, 1)) if self.takes else ()
        self.nodes[operand] = chosen
        if chosen:
            self.wholes[operand] = self.code.call_function(views.empty_whole, (like, features))

    def into(self, node: Node, operands: Sequence[int]) -> dict[str, Any]:
        """Append the views that the kernel of an attend writes into, and return them as its option."""
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


def forward_of(emitter: Emitter, code: fx.Graph, kernel: str, inputs: Sequence[fx.Node]) -> Written:
    """Return what the kernels of a forward write: rows of branches that are mixed by their LSEs, and not saved."""
    made = Written(code, emitter.modules, emitter.graph, emitter.launches, kernel)
    join = emitter.pulls
    if join is None or (isinstance(join.op, Mix) and join.op.rule in ("mean", "sum")):
        return made
    parts = [n for n in emitter.graph.args(join) if (n.id, "out") not in emitter.saved]
    made.plan(parts, 0, inputs[0], inputs[2])
    return made


def backward_of(emitter: Emitter, code: fx.Graph, kernel: str, inputs: Sequence[fx.Node]) -> Written:
    """Return what the kernels of a backward write: gradients that no constant weighs."""
    made = Written(code, emitter.modules, emitter.graph, emitter.launches, kernel)
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
