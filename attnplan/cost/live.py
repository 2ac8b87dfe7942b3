"""The forward of one program: which buffers live at once, op by op."""

from __future__ import annotations

from functools import lru_cache
from math import prod

from attnplan.cost.allocated import Memory, larger, rounded
from attnplan.cost.batches import batch_memory, lookup_bytes, table_bytes
from attnplan.cost.buffers import bias_bytes, bias_total, looked_up, mask_elements, mask_spread
from attnplan.cost.chunked import chunk_bytes, runs_chunks
from attnplan.cost.conditions import predicate_bytes
from attnplan.cost.joins import base, pull_of
from attnplan.cost.placed import whole_of
from attnplan.cost.setting import Setting, value_bytes
from attnplan.cost.work import with_tiles
from attnplan.cost.workspaces import block_bytes, forward_workspace, needs
from attnplan.ir import Attend, Graph, Merge, Mix, Node, Output, RowMap, Take
from attnplan.ir.launch import launches
from attnplan.ir.native import lowered
from attnplan.ir.ops import disjoint
from attnplan.ir.slots import mask_rows, slot_condition


@lru_cache(maxsize=256)
def _computed(graph: Graph) -> tuple[tuple[Node, tuple[int, ...]], ...]:
    """Return the attends and joins in order, each with the values that it is the last to use."""
    last_use = {arg: node.id for node in graph for arg in node.args}
    freed: dict[int, list[int]] = {}
    for value, node_id in last_use.items():
        freed.setdefault(node_id, []).append(value)
    return tuple((n, tuple(freed.get(n.id, ()))) for n in graph if isinstance(n.op, Attend | Merge | Mix))


class Live:
    """The buffers of one program, from the functions that emitted code calls: those of its forward."""

    def __init__(self, graph: Graph, setting: Setting, kind: str) -> None:
        self.graph, self.setting, self.kind = graph, setting, kind
        self.item, self.acc = setting.item, setting.accumulator
        self.plain = setting.kernel.materialises and not any(op.loop for _, op in graph.of(Attend))
        self.rows = graph.output.type.rows.elements_count
        rows = self.rows * setting.batch
        self.chunked = runs_chunks(setting, kind)
        self.output_bytes = rows * graph.output.type.features * self.item
        self.gradient_bytes = sum(value_bytes(n, setting) for n in graph.inputs.values())
        self.wide = self.gradient_bytes // self.item * self.acc if self.acc != self.item else 0
        """Copies of q, k and v in the accumulating dtype, which plain torch computes in."""
        self.conditions = {n.id: self._condition(n) for n, _ in graph.of(Attend)}
        self.masks = sum(kept for kept, _ in self.conditions.values())
        self.result = graph[graph.output.args[0]]
        self.launches = {n.id: nodes for nodes in launches(graph).values() for n in nodes}
        self.made_first, self.outputs = whole_of(setting, kind, 0)
        """Whether the output is made before its parts, and the attends whose rows are written into it."""
        self.pull = pull_of(graph) if kind == "cuda" else None
        """The join that writes each row once, by a kernel of our own."""
        self.placed = False
        """Whether the result is a slice of what is there already: that of a piece."""

    # -------------------------------------------------------------------------------------------------- one phase

    def inference(self) -> Memory:
        """Return the peak of a forward that keeps nothing for a backward."""
        sizes: dict[int, int] = {}
        peak = Memory()
        last = max(node.id for node, _ in self.graph.of(Attend))
        whole = live = self.output_bytes if self.made_first else 0
        for node, freed in _computed(self.graph):
            wide = self.wide if self.plain and node.id <= last else 0  # until no attend of plain torch needs them
            if isinstance(node.op, Attend):
                own, now = self._attend(node)
                there = self.masks + self._round(live)
                peak = larger(peak, Memory(there + now.workspace, wide + now.gathered, now.saved))
            else:
                own, extra = self._join(node)
                peak = larger(peak, Memory(self.masks + self._round(live) + own + extra, wide))
            sizes[node.id] = own
            live += own - sum([sizes.pop(value, 0) for value in freed])
        finish = self._round(live) + (self.output_bytes if self._casts() else 0)
        output = self.graph.output
        if isinstance(output.op, Output) and output.op.sinks:
            finish += self.rows * self.setting.batch * (output.type.features + 4) * self.acc
        peak = larger(peak, Memory(workspace=self.masks + finish))
        made = self.output_bytes if whole or not (self.placed and self.pull) else 0
        return peak.beside(made)

    # -------------------------------------------------------------------------------------------------- forward

    def _attend(self, node: Node) -> tuple[int, Memory]:
        """Return the bytes of an attend's result, and what is live while it runs, its result included."""
        op = node.op
        assert isinstance(op, Attend)
        group = self.launches.get(node.id, [node])
        if group[0].id != node.id:
            return 0, Memory()
        own = sum(value_bytes(n, self.setting) for n in group)
        if node.id in self.outputs:
            own -= node.type.rows.elements_count * node.type.features * self.setting.batch * self.item
        own = self._round(own)
        if self.plain:
            own = own // self.item * self.acc
        gathered = self._gathered(group)
        _, extra = self._mask(node) if op.biases else self.conditions[node.id]
        if op.dropout:  # coordinates are hashed in 8 bytes, three at a time; then kept weights are beside all others
            q, k = (self.graph[a].type.rows for a in node.args[:2])
            pairs = q.elements_count * k.length * self.setting.batch
            extra += max(pairs * (1 + self.acc), 25 * pairs - self._workspace(node))
        if self.chunked:
            return own, Memory(workspace=own + extra + chunk_bytes(self.graph, node, self.setting, backward=False))
        if op.tile is not None and not self._skips_tiles(op):
            tiles, copies = batch_memory(self.graph, node, op, self.setting, self.kind, backward=False)
            return own, Memory(workspace=own + tiles, gathered=copies)
        during = own + extra + self._workspace(node, len(group) > 1)
        return own, Memory(max(during, self._building(node)), gathered)

    def _skips_tiles(self, op: Attend) -> bool:
        return "blocks" in self.setting.kernel.native or (self.setting.kernel.skips and self.kind == "cuda")

    def _copies(self, node: Node) -> int:
        """Return the bytes of q, k and v that are copied for an attend."""
        if not self.plain and not self.setting.copied:
            return 0
        takes = [self.graph[a] for a in node.args]
        if self.plain:
            whole = not any(isinstance(t.op, Take) for t in takes)
            return 0 if whole else sum(value_bytes(t, self.setting) for t in takes) // self.item * self.acc
        return sum(self._round(value_bytes(t, self.setting)) for t in takes if t.id in self.setting.copied)

    def _gathered(self, group: list[Node]) -> int:
        """Return the bytes of the copies of a launch's rows: one buffer for each of q, k and v."""
        if len(group) == 1:
            return self._copies(group[0])
        of_group = zip(*(self.graph.args(n) for n in group), strict=True)
        return sum(self._round(sum(value_bytes(t, self.setting) for t in takes)) for takes in of_group)

    def _mask(self, node: Node) -> tuple[int, int]:
        """Return the bytes of a mask that stays with the plan, and of what each call makes of it and of biases."""
        kept, made = self.conditions[node.id]
        op, (q, k) = node.op, (self.graph[a].type.rows for a in node.args[:2])
        assert isinstance(op, Attend)
        if not op.biases:
            return kept, made
        own = bias_bytes(op, q, k, self.setting.spec, whole=self._is_whole(node), plain=self.plain)
        total = 0 if self.plain else self._bias_total(node, op)
        made += self._round(max(total + own, 2 * total))
        return kept, made

    def _is_whole(self, node: Node) -> bool:
        return not any(isinstance(n.op, Take) for n in self.graph.args(node))

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
            kept = table_bytes(op, q, k, self.setting.spec, self.kind)
            return kept + (lookup_bytes(op, q, k) if looked_up_too else 0), 0
        if slot_condition(op, q, k) != "mask":
            causal = self.plain and slot_condition(op, q, k) == "causal"
            return 0, 2 * q.length * k.length if causal else 0
        if self.setting.kernel.skips:
            return table_bytes(with_tiles(op, self.setting.kernel), q, k, self.setting.spec, self.kind), 0
        if lowered(self.graph, node, self.setting.kernel.native) is not None:
            return 0, 0
        pairs = self._round(mask_elements(op, *mask_rows(op, q, k), self.setting.batch, self.setting.spec))
        made = pairs if self.plain else pairs * (1 + self.item)  # its complement, and what is added to scores
        if op.biases or op.loop is not None:  # what is added is the bias, which is counted as such
            made = pairs
        if self.kind == "cuda" and not self.plain and not op.biases and op.loop is None:
            whole = mask_spread(op, q, k, self.setting.spec)
            return pairs, whole * (1 + self.item) if whole else pairs * self.item
        return pairs, max(made, self._asking(op, q, k, pairs) - pairs - self._workspace(node))

    def _asking(self, op: Attend, q: RowMap, k: RowMap, pairs: int) -> int:
        """Return the bytes that are alive while a mask is made, itself included, before its kernel runs."""
        counted = None if op.shift is None else predicate_bytes(op.where, *mask_rows(op, q, k), self.setting.spec.shape)
        if counted is not None:
            return counted
        each = 34 if self.kind == "cpu" and looked_up(op.where) else 2  # two conditions before they are joined
        return (1 + each) * pairs

    def _building(self, node: Node) -> int:
        """Return the bytes beside a mask while it is made, and made into what is added to scores, on CUDA."""
        op = node.op
        assert isinstance(op, Attend)
        kept, made = self.conditions[node.id]
        if self.kind != "cuda" or self.plain or op.biases or op.loop or not made:
            return 0
        q, k = (self.graph[a].type.rows for a in node.args[:2])
        return max(made + max(kept, made // (1 + self.item)), self._asking(op, q, k, kept) - kept)

    def _workspace(self, node: Node, launched: bool = False) -> int:
        """Return the bytes that the kernel allocates in the forward, or the scores of plain torch."""
        op = node.op
        assert isinstance(op, Attend)
        q, k = self.graph[node.args[0]].type, self.graph[node.args[1]].type
        blocks = prod(q.rows.sizes[:-1]) * self.setting.batch
        if op.loop is not None:
            return block_bytes(node, self.setting, backward=False)
        if self.plain:
            scores = self._round(blocks * q.rows.length * k.rows.length * self.acc)
            shown = q.rows.elements_count * k.rows.length > k.rows.elements_count * q.rows.length
            keys = blocks * k.rows.length * k.features * self.acc if shown else 0  # a product repeats what heads share
            return max(3 * scores, scores + keys) + blocks * q.rows.length * 16
        if launched:
            blocks = sum(prod(self.graph[n.args[0]].type.rows.sizes[:-1]) for n in self.launches[node.id])
            blocks *= self.setting.batch
        return forward_workspace(node, self.setting, self.kind, blocks)

    def _join(self, node: Node) -> tuple[int, int]:
        """Return the bytes of a join's result, and of what it needs beside its parts and its result."""
        op, rows = node.op, self.rows * self.setting.batch
        assert isinstance(op, Merge | Mix)
        features, args = node.type.features, self.graph.args(node)
        lse = rows * self.acc
        if self.plain:
            return rows * (features + 1) * self.acc, (4 * features + 4 * len(args)) * rows * self.acc
        if op.pull:
            there = self.made_first or (self.placed and self.pull)
            if not there and self.in_place(0):  # it becomes the result, and is no part any more
                return rows * features * self.item + lse, -rows * features * self.item
            return (0 if there else rows * features * self.item) + lse, 0
        constant = isinstance(op, Mix) and op.rule in ("mean", "sum")
        apart = disjoint([n.type.rows for n in args]) and not constant
        if apart:
            return (0 if self.made_first else rows * features * self.item) + lse, 0
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

    def in_place(self, operand: int) -> bool:
        """Return whether a part that holds every row becomes the result of the join that pulls, or a gradient of it."""
        if self.pull is None or self.placed or self.setting.kernel.writes_into:
            return False
        alike = self.setting.spec.layout == "bshd" or not needs(self.setting).rows_first
        found = base(self.graph, self.pull, operand)
        return alike and found is not None and found.args[operand] not in self.setting.copied

    def _round(self, size: int) -> int:
        return rounded(size, self.kind)
