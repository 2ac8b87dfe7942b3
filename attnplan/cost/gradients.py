"""The backward of one program: which buffers live at once, beside what the forward left."""

from __future__ import annotations

from math import prod

from attnplan.cost.allocated import Memory, larger
from attnplan.cost.batches import batch_memory
from attnplan.cost.chunked import chunk_bytes, kept_bytes
from attnplan.cost.live import Live
from attnplan.cost.placed import whole_of
from attnplan.cost.plain import plain_training
from attnplan.cost.setting import Setting, value_bytes
from attnplan.cost.workspaces import backward_workspace, block_bytes, needs
from attnplan.ir import Attend, Graph, Mix, Node
from attnplan.ir.launch import shared_axes


class Program(Live):
    """The buffers of one program, forward and backward."""

    def __init__(self, graph: Graph, setting: Setting, kind: str) -> None:
        super().__init__(graph, setting, kind)
        none = (False, frozenset[int]())
        self.wholes = [whole_of(setting, kind, i) if self.pull else none for i in range(3)]
        """Whether the gradients of q, of k, of v are made before their parts, and the attends that write into them."""
        passing = sum(self._mask(n)[0] for n, op in graph.of(Attend) if op.where.operands or op.shift is None)
        self.all_masks = 2 * self.masks - (passing if kind == "cuda" else 0)
        """Bytes of masks in the backward, which builds its own: beside those of the forward that stay with the plan."""

    def training(self) -> Memory:
        """Return the peak of a forward and the backward after it."""
        if self.plain:
            return self._plain_training()
        saved = self._saved()
        keeps = self.chunked and self.setting.kernel.keeps
        kept = Memory(saved=sum(kept_bytes(self.graph, n, self.setting) for n, _ in self.graph.of(Attend) if keeps))
        forward = self.inference() + kept
        both = kept + Memory(workspace=self.all_masks, saved=saved + self._lse())
        return larger(forward, self._backward() + both).beside(self.gradient_bytes)

    def again(self) -> Memory:
        """Return the peak of a backward that is given q, k, v, output and LSE only."""
        if self.plain:  # what it computes again is beside the output that it was given
            return self._plain_training() + Memory(workspace=self.output_bytes + self._lse())
        saved = self._saved()
        computed = self.inference() + Memory(workspace=self.output_bytes) if saved else Memory()
        backward = self._backward() + Memory(workspace=self.all_masks, saved=saved)
        parts = self.placed and not isinstance(self.result.op, Attend)  # gradients of parts, which a join writes out
        return larger(computed, backward.beside(0 if parts else self.gradient_bytes))

    def of_piece(self) -> Memory:
        """Return the peak of the backward of one attend that is given output and LSE, and returns its own gradients."""
        ((node, op),) = self.graph.of(Attend)
        own = sum(self._gradients_of(node))
        return (self._attend_backward(node, op, [node]) + Memory(workspace=self.all_masks)).beside(own)

    def _lse(self) -> int:
        return self.rows * self.setting.batch * self.acc if self.result.type.lse else 0

    def _saved(self) -> int:
        """Return the bytes of branches' outputs and LSE that the backward needs one by one."""
        op = self.result.op
        if not isinstance(op, Mix) or op.rule == "lse":
            return 0
        found = sum(value_bytes(n, self.setting) for n in self.graph.args(self.result))
        return self._round(found)

    # -------------------------------------------------------------------------------------------------- backward

    def _backward(self) -> Memory:
        """Return the peak of the backward program and its gradients: those of parts live until they are summed."""
        found: dict[int, list[int]] = {}
        peak = Memory()
        for node, op in self.graph.of(Attend):
            group = self.launches.get(node.id, [node])
            if group[0].id != node.id:
                continue
            live = sum(map(sum, found.values())) + self._whole_gradients()
            peak = larger(peak, Memory(workspace=live) + self._attend_backward(node, op, group))
            found[node.id] = [sum(sizes) for sizes in zip(*map(self._gradients_of, group), strict=True)]
        pieces = [sum(sizes) for sizes in zip(*found.values(), strict=True)]
        if self.pull is not None:
            return larger(peak, Memory(workspace=self._whole_gradients() + self._pulled(pieces)))
        inputs = [value_bytes(n, self.setting) for n in self.graph.inputs.values()]
        if len(found) == 1 and self._is_whole(self.graph.of(Attend)[0][0]):
            cast = max(inputs) if sum(pieces) > sum(inputs) else 0
            return larger(peak, Memory(workspace=sum(pieces) + cast))
        total = self.gradient_bytes // self.item * self.acc
        cast = inputs[0] if self.acc != self.item else 0
        wide = max(max(sizes) for sizes in found.values()) // self.item * self.acc
        added = wide if cast and self.kind == "cpu" else 0  # a part in the dtype of the sums
        return larger(peak, Memory(workspace=sum(pieces) + total + added), Memory(workspace=total + cast))

    def _pulled(self, pieces: list[int]) -> int:
        """Return the bytes of parts' gradients and of whole ones, which replace them one after the other."""
        left, made, most = list(pieces), 0, 0
        for i, tensor in enumerate("qkv"):
            size = value_bytes(self.graph.inputs[tensor], self.setting)
            there = self.placed or self.wholes[i][0]
            most = max(most, made + sum(left) + (0 if there or self.in_place(i) else size))
            made += 0 if there else size
            left[i] = 0
        return most

    def _gradients_of(self, node: Node) -> list[int]:
        """Return the bytes of an attend's gradients of q, k and v that are not written into the whole ones."""
        assert isinstance(node.op, Attend)
        sizes = [value_bytes(n, self.setting) for n in self.graph.args(node)]
        if self._is_tiled(node.op) and "tile-masks" not in self.setting.kernel.native:
            return [size // self.item * self.acc for size in sizes]
        return [0 if node.id in self.wholes[i][1] else size for i, size in enumerate(sizes)]

    def _whole_gradients(self) -> int:
        """Return the bytes of the whole gradients that kernels write to."""
        wholes = () if self.placed else zip("qkv", self.wholes, strict=True)
        return sum(value_bytes(self.graph.inputs[t], self.setting) for t, (made, _) in wholes if made)

    def _is_tiled(self, op: Attend) -> bool:
        """Return whether an attend's backward gathers tiles, and sums their gradients in the accumulating dtype."""
        if self.chunked or op.tile is None:
            return False
        return not self._skips_tiles(op) or "tile-masks" in self.setting.kernel.native

    def _attend_backward(self, node: Node, op: Attend, group: list[Node]) -> Memory:
        """Return the bytes that are live while an attend's backward runs, its results included."""
        _, extra = self._mask(node)
        own = sum(map(sum, map(self._gradients_of, group)))
        if self.chunked:
            return Memory(workspace=own + extra + chunk_bytes(self.graph, node, self.setting, backward=True))
        if self._is_tiled(op):
            return self._tiled_backward(node, op, own)
        rows = sum(n.type.rows.elements_count for n in group) * self.setting.batch
        value = rows * node.type.features * self.item
        copied = self._gathered(group)
        folded = value * (1 if self._saved() else 2) + rows * self.acc  # grad, LSE, and the output if it is the whole's
        gathered = copied + (folded if copied else 0)
        part = rows * self.acc * (not self._is_whole(node)) + value * self._copies_of_flow(node, group)
        part += self._laid_out(node)
        during = Memory(workspace=own + extra + part + sum(map(self._backward_workspace, group)), gathered=gathered)
        return larger(during, Memory(workspace=self._building(node), gathered=gathered))

    def _laid_out(self, node: Node) -> int:
        """Return the bytes of q and of a gradient that a backward lays out as the output of its own forward lies."""
        q = self.graph[node.args[0]]
        if not needs(self.setting).alike or not self._saved() or q.id in self.setting.copied or self._is_whole(node):
            return 0
        return 2 * value_bytes(q, self.setting)

    def _copies_of_flow(self, node: Node, group: list[Node]) -> int:
        """Return how many tensors like the output a backward copies: of its gradient, and of the output itself."""
        if self.kind == "cpu":
            return not self._is_whole(node)
        if not needs(self.setting).in_order:
            return 0
        q, k = (self.graph[a].type.rows for a in node.args[:2])
        alone = prod(q.batch[a].size for a in shared_axes(q, k)) == 1 and not self._is_whole(node)
        if alone and node.args[0] in self.setting.copied:  # gathered rows of one head each lie in order
            return 0
        if self._is_whole(node) and q.elements_count == q.length and self.setting.batch == 1:
            return 0
        masked = self.masks > 0 and "mask" in self.setting.kernel.native
        if self._is_whole(node) and self.setting.spec.layout == "bshd":
            return int(masked)
        shared = k.elements_count * q.length < q.elements_count * k.length
        direct = len(self.graph.of(Attend)) == 1 and self._is_whole(node) and not masked and not shared
        return 1 if direct and needs(self.setting).rows_first else 2

    def _tiled_backward(self, node: Node, op: Attend, own: int) -> Memory:
        """Return what batches of tiles need beside the sums that they are added to."""
        tiles, copies = batch_memory(self.graph, node, op, self.setting, self.kind, backward=True)
        totals = [value_bytes(n, self.setting) // self.item * self.acc for n in self.graph.args(node)]
        found = Memory(workspace=tiles + sum(totals), gathered=copies)
        if "tile-masks" not in self.setting.kernel.native:
            return found
        whole = Memory(workspace=own + self._backward_workspace(node))
        added = Memory(
            workspace=2 * own - own // 3 + sum(totals) + 2 * max(totals)
        )  # partial tiles' beside whole ones'
        return larger(whole, found + Memory(workspace=own), added)

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
