"""Graphs: an ordered tuple of frozen nodes. The tuple is the truth and the schedule; networkx is a derived view."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from attnplan.errors import PassError
from attnplan.ir.launch import verify_launches
from attnplan.ir.ops import Input, Merge, Mix, Op, Output, Receive, Take, TensorType

if TYPE_CHECKING:
    import networkx

T = TypeVar("T", bound=Op)


@attrs.frozen(cache_hash=True)
class Node:
    """One operation applied to the results of earlier nodes."""

    id: int
    op: Op
    args: tuple[int, ...]
    type: TensorType


@attrs.frozen(cache_hash=True)
class Graph:
    """An attention program. The last node is the output."""

    nodes: tuple[Node, ...]

    def __getitem__(self, node_id: int) -> Node:
        return self.nodes[node_id]

    def __len__(self) -> int:
        return len(self.nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    @property
    def output(self) -> Node:
        """The output node."""
        return self.nodes[-1]

    @cached_property
    def inputs(self) -> Mapping[str, Node]:
        """The input nodes by operand name."""
        return {op.tensor: node for node, op in self.of(Input)}

    def of(self, kind: type[T]) -> tuple[tuple[Node, T], ...]:
        """Return the nodes of one kind, each with its op."""
        found: tuple[tuple[Node, T], ...] | None = self._found.get(kind)
        if found is None:
            found = self._found[kind] = tuple([(n, n.op) for n in self.nodes if isinstance(n.op, kind)])
        return found

    @cached_property
    def _found(self) -> dict[type[Op], Any]:
        """What was asked for by kind: planning asks each graph dozens of times."""
        return {}

    def args(self, node: Node) -> tuple[Node, ...]:
        """Return the nodes whose results ``node`` takes, in order."""
        return tuple([self.nodes[i] for i in node.args])

    def verify(self) -> None:
        """Check the structure and infer every type again.

        Raises
        ------
        PassError
            If ids or operands are out of order, a type is not what its op infers, a node is unused, or the output, a
            merge or a mix does not hold every row of q once, in order.
        """
        for place, node in enumerate(self.nodes):
            self._verify_node(place, node)
        used = {a for n in self.nodes for a in n.args}
        unused = [f"%{n.id} {n.op.name}" for n in self.nodes[:-1] if n.id not in used and not isinstance(n.op, Input)]
        if unused:
            raise PassError(f"nothing uses {', '.join(unused)}")
        if not self.nodes or [n.id for n in self.nodes if isinstance(n.op, Output)] != [len(self.nodes) - 1]:
            raise PassError("a graph has one output, and it is the last node")
        if sorted(op.tensor for _, op in self.of(Input)) != ["k", "q", "v"]:
            raise PassError("a graph has the inputs q, k and v, once each")
        if self.output.type.rows != self.inputs["q"].type.rows:
            raise PassError("the output does not hold every row of q once, in order")
        verify_launches(self)

    def _verify_node(self, place: int, node: Node) -> None:
        if node.id != place or (node.args and not 0 <= min(node.args) <= max(node.args) < place):
            raise PassError(f"%{node.id} stands at place {place} and takes {list(node.args)}: nodes are out of order")
        if isinstance(node.op, Take) and not all(isinstance(n.op, Input | Receive) for n in self.args(node)):
            raise PassError(f"%{node.id} takes rows of rows: a take reads an input, or what was received")
        if isinstance(node.op, Merge | Mix) and node.op.rows != self.nodes[-1].type.rows:
            raise PassError(f"%{node.id} {node.op.name} does not write every row of q once, in order")
        inferred = _inferred(node.op, tuple([self.nodes[a].type for a in node.args]))
        if inferred is not node.type and inferred != node.type:
            raise PassError(f"%{node.id} {node.op.name} has type {node.type}, its operands make it {inferred}")

    def as_networkx(self) -> networkx.MultiDiGraph:
        """Return a frozen multigraph view: nodes carry ``node``, edges carry ``operand``, the position they feed."""
        import networkx

        view = networkx.MultiDiGraph()
        for node in self.nodes:
            view.add_node(node.id, node=node)
            view.add_edges_from((arg, node.id, {"operand": place}) for place, arg in enumerate(node.args))
        return networkx.freeze(view)

    def __str__(self) -> str:
        from attnplan.ir.text import print_graph

        return print_graph(self)


@lru_cache(maxsize=2048)
def _inferred(op: Op, types: tuple[TensorType, ...]) -> TensorType:
    """Return the type of an op's result: a function of the op and of its operands' types alone."""
    return op.infer(types)


class Builder:
    """Builds a graph node by node; an equal node is built once."""

    def __init__(self) -> None:
        self._nodes: list[Node] = []
        self._known: dict[tuple[Op, tuple[int, ...]], int] = {}

    def add(self, op: Op, *args: int) -> int:
        """Append a node, its type inferred, and return its id."""
        key = (op, args)
        found = self._known.get(key)
        if found is None:
            inferred = _inferred(op, tuple([self._nodes[a].type for a in args]))
            found = self._known[key] = len(self._nodes)
            self._nodes.append(Node(found, op, args, inferred))
        return found

    def type(self, node_id: int) -> TensorType:
        """Return the type of a node built earlier."""
        return self._nodes[node_id].type

    def op(self, node_id: int) -> Op:
        """Return the op of a node built earlier."""
        return self._nodes[node_id].op

    def args(self, node_id: int) -> tuple[int, ...]:
        """Return the operands of a node built earlier."""
        return self._nodes[node_id].args

    def source(self, node_id: int) -> int:
        """Return the input that a node is, or takes rows of."""
        node = self._nodes[node_id]
        return node.id if isinstance(node.op, Input | Receive) else self.source(node.args[0])

    def build(self, output: int) -> Graph:
        """Return the graph that ends in ``output``, without the nodes it does not need (inputs always stay)."""
        live = {output}
        for node in reversed(self._nodes):
            if node.id in live:
                live.update(node.args)
        kept = [n for n in self._nodes if n.id in live or isinstance(n.op, Input)]
        kept.sort(key=lambda n: n.id == output)  # stable: the output goes last
        place = {n.id: i for i, n in enumerate(kept)}
        return Graph(tuple(Node(place[n.id], n.op, tuple([place[a] for a in n.args]), n.type) for n in kept))


def rewrite(graph: Graph, visit: Callable[[Builder, Node, tuple[int, ...]], int | None]) -> Graph:
    """Rebuild ``graph``, letting ``visit`` replace nodes.

    ``visit(builder, node, args)`` gets each node with its operands already rewritten, and returns the id of its
    replacement, or None to keep it. If nothing changes the same object is returned.
    """
    builder = Builder()
    new: dict[int, int] = {}
    for node in graph.nodes:
        args = tuple([new[a] for a in node.args])
        replacement = visit(builder, node, args)
        new[node.id] = builder.add(node.op, *args) if replacement is None else replacement
    result = builder.build(new[graph.output.id])
    return graph if result == graph else result
