"""Launches of several attends, and joins that pull: which tensors they read, and where the parts lie in them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import getitem
from typing import Any

import attrs
from torch import fx

from attnplan.backends.eager.places import is_whole, place
from attnplan.ir import Attend, Graph, Merge, Mix, Node, RowMap
from attnplan.ir.launch import fold, launch_key, launches, shared_axes, strides_in_rows
from attnplan.ir.ops import disjoint
from attnplan.runtime.fused.gather import Gather
from attnplan.runtime.fused.maps import Packing, Source
from attnplan.runtime.fused.pull import PullMerge, PullSum
from attnplan.runtime.fused.strided import Strided


@attrs.frozen
class Launch:
    """Attends that are one kernel call on four dimensions."""

    nodes: tuple[Node, ...]
    q: Packing
    """Where the rows of q, of the output and of their gradients lie."""
    k: Packing
    """Where those of k and v lie."""
    views: bool = False
    """Whether its rows, those of one attend, are views of the inputs instead of copies."""

    @property
    def first(self) -> int:
        """Id of the node that stands for all."""
        return self.nodes[0].id


def launch_of(graph: Graph, layout: str = "bhsd", batch: int = 1) -> dict[int, Launch]:
    """Return the launch of each attend that shares one, or that is one on views of its rows.

    ``layout`` and ``batch`` say which dimensions of views fold into one; others are copied.
    """
    found: dict[int, Launch] = {}
    if pulls(graph) is not None:
        found = {n.id: _on_views(graph, n, layout, batch) for n, op in graph.of(Attend) if _is_plain(graph, n, op)}
    for nodes in launches(graph).values():
        q, k = ([graph[n.args[i]].type.rows for n in nodes] for i in (0, 1))
        shared = tuple(shared_axes(a, b) for a, b in zip(q, k, strict=True))
        own = tuple(_own(rows, axes) for rows, axes in zip(q, shared, strict=True))
        of_q, of_k = (Packing(tuple(map(place, maps)), own, shared) for maps in (q, k))
        launch = Launch(tuple(nodes), of_q, of_k)
        found |= {n.id: launch for n in nodes}
    return found


def _is_plain(graph: Graph, node: Node, op: Attend) -> bool:
    """Return whether an attend is a call of a kernel on taken rows, without a mask."""
    return op.launch is None and not is_whole(graph, node) and launch_key(graph, node) is not None


def _on_views(graph: Graph, node: Node, layout: str, batch: int) -> Launch:
    maps = [n.type.rows for n in graph.args(node)]
    inner = shared_axes(*maps[:2])
    own = tuple(i for i in range(len(maps[0].batch)) if i not in inner)
    if not inner:
        strides = [strides_in_rows(m, graph.inputs[t].type.rows, layout) for m, t in zip(maps, "qkv", strict=True)]
        # a view for more batch elements than the plan was priced for is a view for fewer
        folds = [fold((b, *(a.size for a in maps[0].batch)), strides) for b in (max(batch, 2), batch)]
        groups = [f.groups for f in folds if not f.copies]
        if groups:
            second, first = sorted(groups[0], key=lambda g: 0 in g)
            inner = tuple(a - 1 for a in second)
            outer = tuple(a - 1 for a in first if a)
            own = (*(a for a in own if a not in inner + outer), *outer)  # axes of size 1 are in neither
    q, k = (Packing((place(m),), (own,), (inner,)) for m in maps[:2])
    return Launch((node,), q, k, views=True)


def _own(rows: RowMap, shared: tuple[int, ...]) -> tuple[int, ...]:
    """Return the batch axes that make cells: those over rows, then those over heads.

    Neighbouring cells are then neighbouring heads, whose rows lie side by side in ``[B, S, H, D]``.
    """
    own = [i for i in range(len(rows.batch)) if i not in shared]
    return tuple(sorted(own, key=lambda i: rows.axes[i].head != 0))


def gather_forward(code: fx.Graph, modules: dict[str, Any], launch: Launch, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """Append the call that takes the rows of q, k and v, and return them."""
    return _gathered(code, modules, "gather", launch, (launch.q, launch.k, launch.k), inputs, "q k v")


def gather_backward(
    code: fx.Graph, modules: dict[str, Any], launch: Launch, given: Sequence[fx.Node | None]
) -> list[fx.Node]:
    """Append the call that takes the rows of grad, its LSE's, q, k, v, output and LSE, and return them."""
    q, k = launch.q, launch.k
    names = "grad grad_lse q k v out lse"
    return _gathered(code, modules, "gather_back", launch, (q, q, q, k, k, q, q), given, names)


def _gathered(
    code: fx.Graph,
    modules: dict[str, Any],
    name: str,
    launch: Launch,
    packings: tuple[Packing, ...],
    given: Sequence[fx.Node | None],
    names: str,
) -> list[fx.Node]:
    name, of = f"{'rows' if launch.views else 'gather'}{name.removeprefix('gather')}_{launch.first}", launch.first
    modules[name] = Strided(packings) if launch.views else Gather(packings)
    taken = code.create_node("call_module", name, tuple(given))
    return [
        code.create_node("call_function", getitem, (taken, i), name=f"{n}_{of}") for i, n in enumerate(names.split())
    ]


def pull_values(
    graph: Graph,
    modules: dict[str, Any],
    node: Node,
    op: Merge | Mix,
    known: dict[int, Launch],
    saved: Collection[int] = (),
    there: Collection[int] = (),
) -> list[int]:
    """Make the module of a join that writes each row once; return the nodes whose values it is called with.

    ``saved`` are nodes whose outputs the backward needs as they are, ``there`` those that kernels write to their
    places.
    """
    parts = graph.args(node)
    holders, found = sources(graph, parts, known, 0)
    weights = [op.weight(b) for b in op.branches] if isinstance(op, Mix) and op.rule in ("mean", "sum") else None
    base = base_of(graph, parts, found, 0)
    if base is not None and holders[found[base].tensor] in saved:
        base = None
    apart = disjoint([n.type.rows for n in parts])
    modules[f"pull_{node.id}"] = PullMerge(
        found, disjoint=apart, weights=weights, base=base, there=[i for i, h in enumerate(holders) if h in there]
    )
    return holders


def base_of(graph: Graph, parts: Sequence[Node], found: Sequence[Source], operand: int) -> int | None:
    """Return the first part that holds every row, alone in its tensor; the others may be added to it in place.

    Parameters
    ----------
    parts, found
        Attends, and where each lies.
    operand
        0 for rows of q and of the output, 1 for rows of k and v.
    """
    whole = graph.inputs["qk"[operand]].type.rows
    tensors = [s.tensor for s in found]
    for i, node in enumerate(parts):
        rows = graph[node.args[operand]].type.rows
        if rows.shows_rows_once and rows.elements_count == whole.elements_count and tensors.count(tensors[i]) == 1:
            return i
    return None


def pull_gradients(
    graph: Graph,
    modules: dict[str, Any],
    name: str,
    join: Node,
    weights: Mapping[int, float],
    known: dict[int, Launch],
    operand: int,
    there: Collection[int] = (),
) -> list[int]:
    """Make the module of a sum of gradients that writes each row once; return the nodes whose gradients it takes.

    ``weights`` are the constants by which branches are weighed, by attend; ``operand`` is 0 for q, 1 for k and v;
    ``there`` are the attends whose gradients kernels write to their places.
    """
    parts = graph.args(join)
    holders, found = sources(graph, parts, known, operand)
    modules[name] = PullSum(
        found,
        [weights[n.id] for n in parts],
        base_of(graph, parts, found, operand),
        [i for i, h in enumerate(holders) if h in there],
    )
    return holders


def pulls(graph: Graph) -> Node | None:
    """Return the join that pulls, None if there is none."""
    found = [n for n in graph if isinstance(n.op, Merge | Mix) and n.op.pull]
    return found[0] if found else None


def sources(
    graph: Graph, parts: Sequence[Node], known: dict[int, Launch], operand: int
) -> tuple[list[int], list[Source]]:
    """Return the nodes whose tensors hold some parts, and where each part lies in them.

    Parameters
    ----------
    parts
        Attends.
    operand
        0 for rows of q and of the output, 1 for rows of k and v.
    """
    holders: list[int] = []
    found = []
    for node in parts:
        launch = known.get(node.id)
        holder = node.id if launch is None else launch.first
        if holder not in holders:
            holders.append(holder)
        index = holders.index(holder)
        rows = graph[node.args[operand]].type.rows
        if launch is not None:
            packing = launch.k if operand else launch.q
            found.append(Source(index, place(rows), packing, launch.nodes.index(node)))
        elif is_whole(graph, node):
            found.append(Source(index, place(RowMap.whole(rows.last_head + 1, rows.length))))
        else:
            found.append(Source(index, place(rows)))
    return holders, found
