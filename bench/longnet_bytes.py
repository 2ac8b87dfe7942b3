"""Bytes that a plan moves, counted op by op from its graph, beside those that no plan avoids."""

from __future__ import annotations

import torch

from attnplan.backends.eager.launches import base_of, launch_of, sources
from attnplan.backends.eager.places import place
from attnplan.backends.eager.written import destinations
from attnplan.ir import Attend, Graph, Merge, Mix
from attnplan.runtime.attend import WRITES_INTO
from attnplan.runtime.views import indices

_LSE = 4
"""Bytes of a float32."""


def compulsory(graph: Graph, item: int) -> int:
    """Return the bytes of the rows of q, k and v that any attend takes, each once, and of the output."""
    total = graph.output.type.rows.elements_count * graph.output.type.features * item
    for operand, name in enumerate("qkv"):
        whole = graph.inputs[name].type
        taken = torch.zeros((whole.rows.last_head + 1, whole.rows.length), dtype=torch.bool)
        for node, _ in graph.of(Attend):
            taken[indices(*place(graph[node.args[operand]].type.rows), torch.device("cpu"))] = True
        total += int(taken.sum()) * whole.features * item
    return total


def moved(graph: Graph, runs: str, item: int, layout: str = "bshd") -> int | None:
    """Return the bytes that the forward of a plan with a join that pulls reads and writes; None for another plan.

    Attends read their rows and write output and LSE; rows of launches of several are copied before. The join reads and
    writes the rows that are not where they belong yet.
    """
    node = graph[graph.output.args[0]]
    if not isinstance(node.op, Merge | Mix) or not node.op.pull:
        return None
    parts = graph.args(node)
    features, total = node.type.features, 0
    for one, op in graph.of(Attend):
        taken = sum(graph[a].type.rows.elements_count * graph[a].type.features for a in one.args) * item
        total += taken + one.type.rows.elements_count * (features * item + _LSE)
        total += 2 * taken if op.launch is not None else 0
    return total + _joined(graph, runs, item, layout, [p.id for p in parts])


def _joined(graph: Graph, runs: str, item: int, layout: str, parts: list[int]) -> int:
    known = launch_of(graph, layout, 1)
    nodes = [graph[i] for i in parts]
    there = set(destinations(graph, nodes, known, 0)) if runs in WRITES_INTO else set()
    base = base_of(graph, nodes, sources(graph, nodes, known, 0)[1], 0)
    if base is not None:
        there = there or {parts[base]}
    whole = graph.inputs["q"].type.rows
    shape = (whole.last_head + 1, whole.length)
    held, changed = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    read = 0
    row = graph[parts[0]].type.features * item
    for node in nodes:
        at = indices(*place(node.type.rows), torch.device("cpu"))
        (held if node.id in there else changed)[at] = True
        read += node.type.rows.elements_count * (_LSE + (0 if node.id in there else row))
    read += int((held & changed).sum()) * row
    return read + int((changed | ~held).sum()) * row + held.numel() * _LSE
