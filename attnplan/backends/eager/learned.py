"""Emission of the gradients of learned operands: biases on scores and sink logits."""

from __future__ import annotations

from collections.abc import Sequence
from operator import getitem
from typing import TYPE_CHECKING

from torch import fx

from attnplan.backends.eager.places import is_whole
from attnplan.ir import Attend, Graph, Node, Output
from attnplan.runtime import scores
from attnplan.spec import LEARNED

if TYPE_CHECKING:
    from attnplan.backends.eager.emit import Emitter


def has_sinks(graph: Graph) -> bool:
    """Return whether the softmax of every row has one more key."""
    op = graph.output.op
    return isinstance(op, Output) and op.sinks


def native_sinks(emitter: Emitter, code: fx.Graph, node: Node, operands: fx.Node) -> dict[str, fx.Node]:
    """Append the sinks that the kernel of an attend joins by itself, and return them as an option; or nothing."""
    return {"sinks": code.call_function(getitem, (operands, "sink_logits"))} if knows_sinks(emitter, node) else {}


def knows_sinks(emitter: Emitter, node: Node) -> bool:
    """Return whether the kernel joins the sinks by itself: one call of it is the whole plan.

    A sink is one key of a row, wherever its other keys are. The backward is that of any part, given the output and LSE
    that count the sinks.
    """
    op = node.op
    if not isinstance(op, Attend) or node.id != emitter.result.id or not is_whole(emitter.graph, node):
        return False
    return has_sinks(emitter.graph) and "sinks" in emitter.native and not (op.tile or op.loop or op.biases)


def sunk(code: fx.Graph, operands: fx.Node, out: fx.Node, lse: fx.Node | None) -> tuple[fx.Node, fx.Node]:
    """Append the merge of output and LSE with the call's sinks."""
    logits = code.call_function(getitem, (operands, "sink_logits"))
    pair = code.call_function(scores.sunk, (out, lse, logits))
    return code.call_function(getitem, (pair, 0)), code.call_function(getitem, (pair, 1))


def bias(
    emitter: Emitter, code: fx.Graph, node: Node, op: Attend, operands: fx.Node, inputs: Sequence[fx.Node]
) -> dict[str, fx.Node]:
    """Append what is added to the scores of an attend, and return it as an option; nothing if there is none."""
    if not op.biases:
        return {}
    name, whole = f"bias_{node.id}", is_whole(emitter.graph, node)
    maps = emitter._mask_rows(node)
    rows_q, rows_k = (n.type.rows for n in emitter.graph.args(node)[:2])
    emitter.modules[name] = scores.BiasBuilder(
        op.biases, *maps, op.shift, whole=whole, follow=emitter.follow, local=(rows_q, rows_k)
    )
    return {"bias": code.create_node("call_module", name, (operands, *inputs[:2]), name=name)}


def emit_learned(emitter: Emitter) -> fx.GraphModule | None:
    """Return ``(grad, grad_lse, operands, q, k, v, out, lse, *saved) -> {name: gradient}``, None if nothing is learned.

    The arguments are those of the plan's backward. Kernels give no gradient of what is added to scores: they are
    computed again in plain torch, one attend at a time.
    """
    spec, graph = emitter.spec, emitter.graph
    names = [name for name in LEARNED if getattr(spec, name)]
    if not names:
        return None
    code = fx.Graph()
    grad, grad_lse = code.placeholder("grad"), code.placeholder("grad_lse")
    operands, *inputs = emitter._placeholders(code, operands_last=False)
    known = emitter._known(code)
    totals: dict[str, fx.Node] = {}
    for node, op in graph.of(Attend) if spec.biases else ():
        assert op.softcap is None, "no kernel that takes a bias has a softcap"
        assert op.launch is None, "attends of one launch have no bias"
        rows = emitter._rows(code, node, inputs)
        mask, causal = emitter._condition(code, node, op, operands, inputs)
        flow = emitter._flow(code, node, emitter.owners[node.id], known, grad, grad_lse, inputs[0])
        added = bias(emitter, code, node, op, operands, inputs)["bias"]
        args = (*flow[:2], *rows, *flow[2:], mask, causal, op.scale, added)
        slope = code.create_node("call_function", scores.score_gradient, args, name=f"slope_{node.id}")
        name = f"slopes_{node.id}"
        emitter.modules[name] = scores.BiasGradients(emitter.modules[f"bias_{node.id}"])
        found = code.create_node("call_module", name, (operands, *inputs[:2], slope))
        for one in spec.biases:
            part = code.call_function(getitem, (found, one))
            totals[one] = part if one not in totals else code.call_function(scores.added, (totals[one], part))
    if has_sinks(graph):
        logits = code.call_function(getitem, (operands, "sink_logits"))
        out, lse = known[emitter.result.id, "out"], known[emitter.result.id, "lse"]
        totals["sink_logits"] = code.call_function(scores.sink_gradient, (grad, grad_lse, out, lse, logits))
    code.output({name: totals[name] for name in names})
    return fx.GraphModule(emitter.modules, code, "Learned")
