"""What the program of a hop's graph allocates while it runs, as a part of a softmax."""

from __future__ import annotations

import attrs

from attnplan.cost.allocated import SMALL, Memory, with_small
from attnplan.cost.gradients import Program
from attnplan.cost.setting import KernelModel, Setting
from attnplan.ir import Attend, Graph, Merge
from attnplan.ir.graph import rewrite
from attnplan.spec import AttentionSpec


@attrs.frozen
class Room:
    """Bytes that a part's program allocates at its worst moment beside what it is given and returns, with its masks."""

    forward: int
    backward: int
    """0 if nothing is trained."""
    masks: tuple[int, int]
    """Of these, masks that stay with the plan, forward and backward: beside what other parts need."""
    plain: bool
    """Whether it is plain torch, which autograd differentiates; no piece is cut out of that."""


def room_of(graph: Graph, spec: AttentionSpec, kernel: KernelModel, kind: str) -> Room:
    """Return what a hop's graph allocates.

    A join of one part is none: the part is returned as it is, for the merge of all hops.
    """
    bare = without_join(graph)
    inference = Program(bare, _setting(bare, spec, kernel, training=False), kind)
    forward, masks = _bytes(inference.inference(), kind), inference.masks
    if not spec.training:
        return Room(forward, 0, (masks, 0), inference.plain)
    program = Program(bare, _setting(bare, spec, kernel, training=True), kind)
    if program.plain:  # of output and LSE, whose gradients are made of those of the whole softmax
        rows = bare.output.type.rows.elements_count * spec.batch
        weighed = 4 * rows * (bare.output.type.features + 1) * program.acc
        return Room(forward, _bytes(program.training(), kind) + weighed - masks, (masks, 0), plain=True)
    found = program.of_piece() if len(bare.of(Attend)) == 1 else program.again()
    return Room(forward, _bytes(found, kind) - masks, (masks, max(0, program.all_masks - masks)), plain=False)


def without_join(graph: Graph) -> Graph:
    """Return a graph without a join of one part."""
    join = graph[graph.output.args[0]]
    if not isinstance(join.op, Merge) or len(join.args) != 1:
        return graph
    return rewrite(graph, lambda builder, node, args: args[0] if node.id == join.id else None)


def _setting(graph: Graph, spec: AttentionSpec, kernel: KernelModel, *, training: bool) -> Setting:
    return Setting.of(graph, attrs.evolve(spec, training=training), kernel)


def _bytes(found: Memory, kind: str) -> int:
    return with_small(found, kind).total - SMALL
