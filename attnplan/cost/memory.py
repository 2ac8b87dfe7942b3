"""Peak memory of a plan: which buffers of the emitted program live at once.

Counted is everything beside q, k, v, the output and, in training, the gradients of these, rounded as the device's
allocator rounds. The emitted program frees a value after its last use, so the peak follows from the order of the nodes;
what an op needs while it runs (copies, masks, workspaces of kernels, tiles) is written down here, op by op.
"""

from __future__ import annotations

from math import prod

import attrs

from attnplan.cost.batches import batch_memory, lookup_bytes, table_bytes
from attnplan.cost.buffers import bias_bytes, bias_total, looked_up, mask_elements
from attnplan.cost.chunked import chunk_bytes, kept_bytes, runs_chunks
from attnplan.cost.placed import is_alone, is_placed, parts_written, pull_of, sums_bytes
from attnplan.cost.plain import plain_training
from attnplan.cost.rules import Setting, value_bytes, with_tiles
from attnplan.cost.workspaces import backward_workspace, block_bytes, forward_workspace
from attnplan.ir import Attend, Graph, Input, Merge, Mix, Node, Output, Take
from attnplan.ir.launch import launches
from attnplan.ir.native import lowered
from attnplan.ir.ops import disjoint
from attnplan.ir.slots import mask_rows, slot_condition
from attnplan.passes.alike import bodies, sampled
from attnplan.passes.chunk import without_loop

BLOCK = {"cpu": 64, "cuda": 512}
"""Bytes to whose multiples an allocator rounds a buffer.

On CUDA the blocks are cut from segments of 2 MiB, or of 20 MiB for buffers above 1 MiB. *Allocated* memory counts the
blocks, and is what a peak means here; *reserved* memory counts the segments.
"""
SMALL = 16 * 2**10
"""Bytes of indices, counts and other small buffers; with 1/64 of the workspace for what each op keeps beside it."""


@attrs.frozen
class Memory:
    """Peak memory beside inputs and output, in bytes, by what it is for.

    Examples
    --------
    >>> Memory(workspace=100, gathered=20, saved=3).total
    123
    """

    workspace: int = 0
    """Partial outputs, accumulators, masks, scores and what kernels allocate."""
    gathered: int = 0
    """Copies of rows of q, k and v."""
    saved: int = 0
    """What the backward is given beside q, k, v and the output: the LSE, outputs of branches, scores of plain torch."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.workspace + self.gathered + self.saved

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.workspace + other.workspace, self.gathered + other.gathered, self.saved + other.saved)


def larger(*found: Memory) -> Memory:
    """Return the largest of some peaks."""
    return max(found, key=lambda m: m.total)


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
    if output.loop is None and not output.recompute:
        model = _Model(graph, setting, kind)
        found = model.training() if setting.spec.training else model.inference()
    else:
        found = _looped(graph, setting, kind, output)
    return _with_small(found)


def _with_small(found: Memory) -> Memory:
    return found + Memory(workspace=SMALL + found.workspace // 64)


def peak_of_some(graph: Graph, setting: Setting, kind: str) -> int:
    """Return a lower bound of a loop's peak, from its first, middle and last piece."""
    output = graph.output.op
    assert isinstance(output, Output)
    if output.loop is None:
        return 0
    return _with_small(_looped(graph, setting, kind, output, tuple(dict.fromkeys(sampled(graph))))).total


def floor_of_loop(graph: Graph, setting: Setting, loop: tuple[int, int, int]) -> int:
    """Return bytes that a loop over pieces of a graph needs for sure, without looking at any piece.

    Those of the output of a whole piece, if no kernel writes that where it belongs; in training those of the LSE of all
    rows and of the sums of the gradients of k and v, too.
    """
    spec, q, k = setting.spec, graph.inputs["q"], graph.inputs["k"]
    assert isinstance(q.op, Input)
    batch, heads = min(spec.batch, loop[0]), min(q.op.heads // q.op.group, loop[1])
    rows = batch * heads * q.op.group * min(loop[2], q.op.length)
    may_be_placed = pull_of(graph) is not None or setting.kernel.writes_into
    found = SMALL + (0 if may_be_placed else rows * graph.output.type.features * setting.item)
    if not spec.training:
        return found
    if loop[2] >= q.op.length:
        return found + (spec.batch * _rows(graph) * setting.accumulator if graph.output.type.lse else 0)
    sums = batch * heads * k.type.rows.length * (k.type.features + graph.inputs["v"].type.features)
    lse = spec.batch * _rows(graph) if graph.output.type.lse else 0
    return SMALL + max(found - SMALL, sums * setting.accumulator) + lse * setting.accumulator


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
    for body in programs:
        model = _Model(body, Setting.of(body, small, setting.kernel), kind)
        model.placed = is_placed(model.setting, kind)
        here = model.inference() + Memory(workspace=0 if model.placed else model.output_bytes)
        if training:
            here = larger(here, model.again() + Memory(workspace=_own_gradients(graph, model, setting)))
        peak = larger(peak, here + learnt + Memory(saved=lse))
    return peak


def _rows(graph: Graph) -> int:
    return graph.output.type.rows.elements_count


def _own_gradients(graph: Graph, model: _Model, setting: Setting) -> int:
    """Return the bytes of a piece's gradients, and of sums over pieces, beside the whole ones."""
    if is_alone(graph):
        return 0 if model.placed else model.gradient_bytes
    of_q = value_bytes(model.graph.inputs["q"], model.setting) if model.placed else 0
    return model.gradient_bytes - of_q + sums_bytes(graph, model.setting.batch, setting)


class _Model:
    """The buffers of one program, from the functions that emitted code calls."""

    def __init__(self, graph: Graph, setting: Setting, kind: str) -> None:
        self.graph, self.setting, self.kind = graph, setting, kind
        self.item, self.acc = setting.item, setting.accumulator
        self.plain = setting.kernel.materialises and not any(op.loop for _, op in graph.of(Attend))
        rows = _rows(graph) * setting.batch
        self.chunked = runs_chunks(setting, kind)
        self.output_bytes = rows * graph.output.type.features * self.item
        self.gradient_bytes = sum(value_bytes(n, setting) for n in graph.inputs.values())
        self.wide = self.gradient_bytes // self.item * self.acc if self.acc != self.item else 0
        """Copies of q, k and v in the accumulating dtype, which plain torch computes in."""
        self.masks = sum(self._mask(n)[0] for n, op in graph.of(Attend))
        self.result = graph[graph.output.args[0]]
        self.launches = {n.id: nodes for nodes in launches(graph).values() for n in nodes}
        self.written = [parts_written(setting, kind, i) for i in range(3)]
        """The attends whose rows of the output and of q, of k, of v are written into the whole."""
        self.pulls = kind == "cuda" and pull_of(graph) is not None
        self.placed = False
        """Whether the result is a slice of what is there already: that of a piece."""

    # -------------------------------------------------------------------------------------------------- one phase

    def inference(self) -> Memory:
        """Return the peak of a forward that keeps nothing for a backward."""
        last_use = {arg: node.id for node in self.graph for arg in node.args}
        live: dict[int, int] = {}
        peak = Memory()
        base = self.wide if self.plain else 0
        whole = self.output_bytes if self.written[0] else 0
        for node in self.graph:
            during = Memory(workspace=self._round(whole + sum(live.values())), gathered=base)
            if isinstance(node.op, Attend):
                own, now = self._attend(node)
                peak = larger(peak, during + now + Memory(workspace=self.masks))
                live[node.id] = own
            elif isinstance(node.op, Merge | Mix):
                own, extra = self._join(node)
                peak = larger(peak, during + Memory(workspace=self.masks + own + extra))
                live[node.id] = own
            else:
                continue
            live = {n: size for n, size in live.items() if last_use.get(n, len(self.graph)) > node.id or n == node.id}
        finish = self._round(whole + sum(live.values())) + (self.output_bytes if self._casts() else 0)
        output = self.graph.output
        if isinstance(output.op, Output) and output.op.sinks:
            finish += _rows(self.graph) * self.setting.batch * (output.type.features + 4) * self.acc
        peak = larger(peak, Memory(workspace=self.masks + finish, gathered=base))
        made = self.output_bytes if whole or not (self.placed and self.pulls) else 0
        return attrs.evolve(peak, workspace=max(0, peak.workspace - made))

    def training(self) -> Memory:
        """Return the peak of a forward and the backward after it."""
        if self.plain:
            return self._plain_training()
        saved = self._saved()
        keeps = self.chunked and self.setting.kernel.keeps
        kept = Memory(saved=sum(kept_bytes(self.graph, n, self.setting) for n, _ in self.graph.of(Attend) if keeps))
        forward = self.inference() + kept
        both = kept + Memory(workspace=2 * self.masks, saved=saved + self._lse())  # the backward builds its own masks
        return larger(forward, self._backward() + both)

    def again(self) -> Memory:
        """Return the peak of a backward that is given q, k, v, output and LSE only."""
        if self.plain:  # what it computes again is beside the output that it was given
            return self._plain_training() + Memory(workspace=self.output_bytes + self._lse())
        saved = self._saved()
        computed = self.inference() + Memory(workspace=self.output_bytes) if saved else Memory()
        return larger(computed, self._backward() + Memory(workspace=2 * self.masks, saved=saved))

    def _lse(self) -> int:
        return _rows(self.graph) * self.setting.batch * self.acc if self.result.type.lse else 0

    def _saved(self) -> int:
        """Return the bytes of branches' outputs and LSE that the backward needs one by one."""
        op = self.result.op
        if not isinstance(op, Mix) or op.rule == "lse":
            return 0
        found = sum(value_bytes(n, self.setting) for n in self.graph.args(self.result))
        return self._round(found)

    # -------------------------------------------------------------------------------------------------- forward

    def _attend(self, node: Node) -> tuple[int, Memory]:
        """Return the bytes of an attend's result, and what is live while it runs, its result included."""
        op = node.op
        assert isinstance(op, Attend)
        group = self.launches.get(node.id, [node])
        if group[0].id != node.id:
            return 0, Memory()
        there = node.type.rows.elements_count * node.type.features * self.setting.batch * self.item
        own = self._round(sum(value_bytes(n, self.setting) for n in group) - there * (node.id in self.written[0]))
        if self.plain:
            own = own // self.item * self.acc
        gathered = sum(self._copies(n) for n in group)
        _, extra = self._mask(node)
        if op.dropout:  # coordinates are hashed in 8 bytes, three at a time; then kept weights are beside all others
            q, k = (self.graph[a].type.rows for a in node.args[:2])
            pairs = q.elements_count * k.length * self.setting.batch
            extra += max(pairs * (1 + self.acc), 25 * pairs - self._workspace(node))
        if self.chunked:
            return own, Memory(workspace=own + extra + chunk_bytes(self.graph, node, self.setting, backward=False))
        if op.tile is not None and not self._skips_tiles(op):
            tiles, copies = batch_memory(self.graph, node, op, self.setting, backward=False)
            return own, Memory(workspace=own + tiles, gathered=copies)
        return own, Memory(workspace=own + extra + self._workspace(node), gathered=gathered)

    def _skips_tiles(self, op: Attend) -> bool:
        return "blocks" in self.setting.kernel.native

    def _copies(self, node: Node) -> int:
        """Return the bytes of q, k and v that are copied for an attend."""
        takes = [self.graph[a] for a in node.args]
        if self.plain:
            whole = not any(isinstance(t.op, Take) for t in takes)
            return 0 if whole else sum(value_bytes(t, self.setting) for t in takes) // self.item * self.acc
        return sum(self._round(value_bytes(t, self.setting)) for t in takes if t.id in self.setting.copied)

    def _mask(self, node: Node) -> tuple[int, int]:
        """Return the bytes of a mask that stays with the plan, and of what each call makes of it and of biases."""
        kept, made = self._condition(node)
        op, (q, k) = node.op, (self.graph[a].type.rows for a in node.args[:2])
        assert isinstance(op, Attend)
        if not op.biases:
            return kept, made
        own = bias_bytes(op, q, k, self.setting.spec, whole=self._is_whole(node), plain=self.plain)
        total = 0 if self.plain else self._bias_total(node, op)
        made += self._round(max(total + own, 2 * total))
        return kept, made

    def _bias_total(self, node: Node, op: Attend) -> int:
        q, k = (self.graph.inputs[name].type.rows for name in "qk")
        inputs, attends = (q.elements_count, k.length), len(self.graph.of(Attend))
        return bias_total(op, self.setting.spec, inputs, attends, whole=self._is_whole(node))

    def _condition(self, node: Node) -> tuple[int, int]:
        """Return the bytes of a mask that stays with the plan, and of what is made of it in each call."""
        op, (q, k) = node.op, (self.graph[a].type.rows for a in node.args[:2])
        assert isinstance(op, Attend)
        if op.tile is not None:
            looked_up_too = "tile-masks" in self.setting.kernel.native
            return table_bytes(op, q, k, self.setting.spec) + (lookup_bytes(op, q, k) if looked_up_too else 0), 0
        if slot_condition(op, q, k) != "mask":
            causal = self.plain and slot_condition(op, q, k) == "causal"
            return 0, 2 * q.length * k.length if causal else 0
        if self.setting.kernel.skips:
            return table_bytes(with_tiles(op, self.setting.kernel), q, k, self.setting.spec), 0
        if lowered(self.graph, node, self.setting.kernel.native) is not None:
            return 0, 0
        pairs = self._round(mask_elements(op, *mask_rows(op, q, k), self.setting.batch, self.setting.spec))
        made = pairs if self.plain else pairs * (1 + self.item)  # its complement, and what is added to scores
        if op.biases or op.loop is not None:  # what is added is the bias, which is counted as such
            made = pairs
        each = 34 if self.kind == "cpu" and looked_up(op.where) else 2  # two conditions before they are joined
        return pairs, max(made, each * pairs - self._workspace(node))

    def _workspace(self, node: Node) -> int:
        """Return the bytes that the kernel allocates in the forward, or the scores of plain torch."""
        op = node.op
        assert isinstance(op, Attend)
        q, k = (self.graph[a].type for a in node.args[:2])
        blocks = prod(q.rows.sizes[:-1]) * self.setting.batch
        if op.loop is not None:
            return block_bytes(node, self.setting, backward=False)
        if self.plain:
            return 3 * self._round(blocks * q.rows.length * k.rows.length * self.acc) + blocks * q.rows.length * 16
        return forward_workspace(node, self.setting, self.kind, self.output_bytes)

    def _join(self, node: Node) -> tuple[int, int]:
        """Return the bytes of a join's result, and of what it needs beside its parts and its result."""
        op, rows = node.op, _rows(self.graph) * self.setting.batch
        assert isinstance(op, Merge | Mix)
        features, args = node.type.features, self.graph.args(node)
        lse = rows * self.acc
        if self.plain:
            return rows * (features + 1) * self.acc, (4 * features + 4 * len(args)) * rows * self.acc
        if op.pull:
            there = self.written[0] or (self.placed and self.pulls)
            return (0 if there else rows * features * self.item) + lse, 0
        constant = isinstance(op, Mix) and op.rule in ("mean", "sum")
        apart = disjoint([n.type.rows for n in args]) and not constant
        if apart:
            return rows * features * self.item + lse, 0
        each = [n.type.rows.elements_count * self.setting.batch for n in args]
        cast = max(each) * features * self.acc if self.acc != self.item or constant else 0
        return rows * features * self.acc + (0 if constant else lse), cast + (
            0 if constant else 2 * lse + max(each) * 4
        )

    def _casts(self) -> bool:
        """Return whether the result is computed in another dtype than that of the output."""
        if self.plain:
            return self.acc != self.item
        op = self.result.op
        if not isinstance(op, Merge | Mix) or op.pull or self.acc == self.item:
            return False
        constant = isinstance(op, Mix) and op.rule in ("mean", "sum")
        return constant or not disjoint([n.type.rows for n in self.graph.args(self.result)])

    # -------------------------------------------------------------------------------------------------- backward

    def _backward(self) -> Memory:
        """Return the peak of the backward program beside what it is given: the parts' gradients live until the end."""
        attends = self.graph.of(Attend)
        single = len(attends) == 1 and not any(isinstance(n.op, Take) for n in self.graph.args(attends[0][0]))
        found: dict[int, int] = {}
        peak = Memory()
        for node, op in attends:
            group = self.launches.get(node.id, [node])
            if group[0].id != node.id:
                continue
            own = sum(self._gradient_bytes(one) for one in group)
            live = sum(found.values()) + self._whole_gradients()
            peak = larger(peak, Memory(workspace=live + own) + self._attend_backward(node, op, group))
            found[node.id] = own
        pieces = sum(found.values())
        if self.pulls:
            peak = larger(peak, Memory(workspace=pieces + (0 if self.placed else self.gradient_bytes)))
            return attrs.evolve(peak, workspace=max(0, peak.workspace - (0 if self.placed else self.gradient_bytes)))
        if single:
            return attrs.evolve(peak, workspace=max(0, peak.workspace - self.gradient_bytes))
        total = self.gradient_bytes // self.item * self.acc
        cast = self.gradient_bytes if self.acc != self.item else 0
        summed = Memory(workspace=pieces + total - (0 if cast else self.gradient_bytes))
        last = Memory(workspace=total + cast - self.gradient_bytes)
        return larger(peak, summed, last)

    def _gradient_bytes(self, node: Node) -> int:
        """Return the bytes of an attend's gradients of q, k and v that are not written into the whole ones."""
        made = enumerate(self.graph.args(node))
        return sum(value_bytes(n, self.setting) for i, n in made if node.id not in self.written[i])

    def _whole_gradients(self) -> int:
        """Return the bytes of the whole gradients that kernels write to."""
        wholes = () if self.placed else zip("qkv", self.written, strict=True)
        return sum(value_bytes(self.graph.inputs[t], self.setting) for t, parts in wholes if parts)

    def _attend_backward(self, node: Node, op: Attend, group: list[Node]) -> Memory:
        _, extra = self._mask(node)
        if self.chunked:
            return Memory(workspace=extra + chunk_bytes(self.graph, node, self.setting, backward=True))
        if op.tile is not None and (not self._skips_tiles(op) or "tile-masks" in self.setting.kernel.native):
            tiles, copies = batch_memory(self.graph, node, op, self.setting, backward=True)
            q, k, v = (self.graph[a].type for a in node.args)
            totals = (q.rows.elements_count * q.features + k.rows.elements_count * (k.features + v.features)) * self.acc
            return Memory(workspace=tiles + totals * self.setting.batch, gathered=copies)
        rows = sum(n.type.rows.elements_count for n in group) * self.setting.batch
        value = rows * node.type.features * self.item
        copied = sum(self._copies(n) for n in group)
        folded = value * (1 if self._saved() else 2) + rows * self.acc  # grad, LSE, and the output if it is the whole's
        gathered = copied + (folded if copied else 0)
        lines = value * (not (self.kind == "cuda" and self.setting.kernel.writes_into)) + rows * self.acc
        part = lines if not self._is_whole(node) else 0  # rows of output and LSE in line
        return Memory(workspace=extra + part + sum(self._backward_workspace(n) for n in group), gathered=gathered)

    def _is_whole(self, node: Node) -> bool:
        return not any(isinstance(n.op, Take) for n in self.graph.args(node))

    def _backward_workspace(self, node: Node) -> int:
        op = node.op
        assert isinstance(op, Attend)
        if op.loop is not None:
            totals = sum(self.graph[a].type.rows.elements_count * self.graph[a].type.features for a in node.args)
            sums = totals * self.setting.batch * self.acc if self.acc != self.item else 0  # else they are the result
            return block_bytes(node, self.setting, backward=True) + sums
        return backward_workspace(node, self.setting, self.kind)

    def _plain_training(self) -> Memory:
        made = {n.id: self._mask(n)[1] for n, _ in self.graph.of(Attend)}
        learnt = max((self._bias_total(n, op) for n, op in self.graph.of(Attend)), default=0)
        saved, workspace = plain_training(
            self.graph, self.setting, made, learnt, self.masks, self.output_bytes, self.gradient_bytes, self.wide
        )
        return Memory(workspace=workspace, saved=saved)

    def _round(self, size: int) -> int:
        block = BLOCK[self.kind]
        return -(-size // block) * block
