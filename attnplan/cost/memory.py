"""Peak memory of a plan: which buffers of the emitted program live at once.

Counted is everything beside q, k, v, the output and, in training, the gradients of these, rounded as the device's
allocator rounds. What is live before the output or the gradients are made has their room. The emitted program frees a
value after its last use, so the peak follows from the order of the nodes; what an op needs while it runs (copies,
masks, workspaces of kernels, tiles) is written down op by op: :mod:`attnplan.cost.live`,
:mod:`attnplan.cost.gradients`.
"""

from __future__ import annotations

import attrs

from attnplan.cost.allocated import SMALL, Memory, larger, with_small
from attnplan.cost.fused_lattices import lattice_memory
from attnplan.cost.gradients import Program
from attnplan.cost.joins import pull_of
from attnplan.cost.live import Live
from attnplan.cost.placed import is_alone, is_placed, sums_bytes
from attnplan.cost.setting import Setting, value_bytes
from attnplan.ir import Graph, Input, Output
from attnplan.passes.alike import bodies, sampled
from attnplan.passes.chunk import without_loop


def peak_bytes(graph: Graph, setting: Setting, kind: str = "cpu") -> int:
    """Return the most memory that is live at one moment, inputs and the output itself left out."""
    return peak_memory(graph, setting, kind).total


def peak_memory(graph: Graph, setting: Setting, kind: str = "cpu") -> Memory:
    """Return the peak of one call: of the forward, or of forward and backward if the spec says ``training``.

    Parameters
    ----------
    graph
        The program.
    setting
        The spec and the kernel.
    kind
        ``"cpu"`` or ``"cuda"``.
    """
    output = graph.output.op
    assert isinstance(output, Output)
    if setting.kernel.fuses and kind == "cuda":
        found = lattice_memory(graph, setting)
    elif output.loop is None and not output.recompute:
        training = setting.spec.training
        found = Program(graph, setting, kind).training() if training else Live(graph, setting, kind).inference()
    else:
        found = _looped(graph, setting, kind, output)
    return with_small(found, kind)


def peak_of_some(graph: Graph, setting: Setting, kind: str) -> int:
    """Return a lower bound of a loop's peak, from its first, middle and last piece."""
    output = graph.output.op
    assert isinstance(output, Output)
    if output.loop is None:
        return 0
    return with_small(_looped(graph, setting, kind, output, tuple(dict.fromkeys(sampled(graph)))), kind).total


def floor_of_loop(graph: Graph, setting: Setting, loop: tuple[int, int, int]) -> int:
    """Return bytes that a loop over pieces of a graph needs for sure, without looking at any piece.

    Those of the output of a whole piece, if no kernel writes that where it belongs; in training, where gradients that
    are not made yet have their room, those of the LSE of all rows and of the sums of the gradients of k and v.
    """
    spec, q, k = setting.spec, graph.inputs["q"], graph.inputs["k"]
    assert isinstance(q.op, Input)
    batch, heads = min(spec.batch, loop[0]), min(q.op.heads // q.op.group, loop[1])
    rows = batch * heads * q.op.group * min(loop[2], q.op.length)
    may_be_placed = pull_of(graph) is not None or setting.kernel.writes_into
    found = SMALL + (0 if may_be_placed else rows * graph.output.type.features * setting.item)
    if not spec.training:
        return found
    lse = spec.batch * _rows(graph) if graph.output.type.lse else 0
    sums = batch * heads * k.type.rows.length * (k.type.features + graph.inputs["v"].type.features)
    return SMALL + (lse + (0 if loop[2] >= q.op.length else sums)) * setting.accumulator


def _looped(graph: Graph, setting: Setting, kind: str, output: Output, some: tuple[Graph, ...] | None = None) -> Memory:
    """Return the peak of a loop: its largest piece, whose own output and gradients are beside the whole ones."""
    spec = setting.spec
    batch = spec.batch if output.loop is None else min(spec.batch, output.loop[0])
    small = attrs.evolve(spec, batch=batch)
    programs = some
    if programs is None:
        programs = (without_loop(graph),) if output.loop is None else tuple(body for body, _ in bodies(graph))
    training = spec.training
    lse = spec.batch * _rows(graph) * setting.accumulator if training and graph.output.type.lse else 0
    peak = Memory(saved=lse)
    own = 0
    if training and spec.bias:  # the gradient of a piece's part of a bias, and its sum with another
        own = 2 * max(b.inputs["q"].type.rows.elements_count * b.inputs["k"].type.rows.length for b in programs)
    learnt = Memory(workspace=own * batch * setting.accumulator)
    gradients = sum(value_bytes(n, setting) for n in graph.inputs.values()) if training else 0
    for body in programs:
        model = Program(body, Setting.of(body, small, setting.kernel), kind)
        model.placed = is_placed(model.setting, kind)
        here = model.inference() + Memory(workspace=0 if model.placed else model.output_bytes)
        here = (here + learnt + Memory(saved=lse)).beside(gradients)
        if training:
            again = model.again() + Memory(workspace=_own_gradients(graph, model, setting))
            here = larger(here, again + learnt + Memory(saved=lse))
        peak = larger(peak, here)
    return peak


def _rows(graph: Graph) -> int:
    return graph.output.type.rows.elements_count


def _own_gradients(graph: Graph, model: Program, setting: Setting) -> int:
    """Return the bytes of a piece's gradients, and of sums over pieces, beside the whole ones."""
    if is_alone(graph):
        return 0 if model.placed else model.gradient_bytes
    of_q = value_bytes(model.graph.inputs["q"], model.setting) if model.placed else 0
    return model.gradient_bytes - of_q + sums_bytes(graph, model.setting.batch, setting)
