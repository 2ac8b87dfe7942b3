"""What every rule of the cost model may look at: the spec, the kernel, the graph, and which rows are copied."""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import attrs

from attnplan.ir import Attend, Graph, Node, RowMap, Take
from attnplan.ir.launch import fold, launches
from attnplan.spec import AttentionSpec

if TYPE_CHECKING:
    from attnplan.cost.work import Work

ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


@attrs.frozen
class KernelModel:
    """What the cost model knows about the attention kernel of a schedule."""

    efficiency: float
    """Fraction of the device's peak that the kernel reaches on long rows."""
    skips_causal: bool = True
    """Whether tiles above the diagonal are skipped."""
    materialises: bool = False
    """Whether scores are written to memory."""
    tile: int = 128
    """Rows and columns of a tile: what is not a multiple of it is computed in vain."""
    causal_tile: int = 128
    """Columns of the tiles that are computed whole along the causal diagonal."""
    masks: bool = True
    """Whether the kernel takes an arbitrary mask."""
    native: frozenset[str] = frozenset()
    """What the kernel does by itself, in the words of :mod:`attnplan.ir.native`."""
    skips: bool = False
    """Whether it skips the tiles without a pair by itself, whatever says which pairs meet."""
    keeps: bool = False
    """Whether a forward that is trained keeps the weights of all its tiles, which the backward then has not to make."""
    key: str = ""
    """Its name in the table of :mod:`attnplan.cost.parameters`; a kernel without one runs at :attr:`efficiency`."""
    writes_into: bool = False
    """Whether it writes its results to where it is told, in whatever strides."""
    turned: bool = False
    """Whether a call over a window is another one, for which tensors are turned."""
    fuses: bool = False
    """Whether a compiler fuses what takes rows before it and joins parts after it."""


@attrs.frozen
class Setting:
    """What every rule may look at."""

    spec: AttentionSpec
    kernel: KernelModel
    graph: Graph
    copied: frozenset[int]
    """The takes that are copies."""
    together: frozenset[int] = frozenset()
    """The nodes that start no kernel of their own, because an earlier one of their launch has started it."""

    gathered: frozenset[int] = frozenset()
    """The takes whose rows one kernel of our own gathers for a launch."""
    works: dict[int, Work] = attrs.field(factory=dict, init=False, eq=False, repr=False)
    """What kernels compute for attends, by id, as far as somebody asked."""

    @classmethod
    def of(cls, graph: Graph, spec: AttentionSpec, kernel: KernelModel) -> Setting:
        """Return the setting in which ``graph`` is priced."""
        return cls(spec, kernel, graph, *_shared(graph, spec))

    @cached_property
    def batch(self) -> int:
        """Batch size that is priced."""
        return self.spec.batch

    @cached_property
    def item(self) -> int:
        """Bytes of one element."""
        return ITEM_BYTES[self.spec.dtype]

    @cached_property
    def accumulator(self) -> int:
        """Bytes of one element of an accumulator."""
        return max(4, self.item)


def value_bytes(node: Node, setting: Setting) -> int:
    """Return the bytes of a node's result, its LSE included."""
    rows = node.type.rows.elements_count * setting.batch
    return rows * node.type.features * setting.item + (rows * setting.accumulator if node.type.lse else 0)


@lru_cache(maxsize=256)
def _shared(graph: Graph, spec: AttentionSpec) -> tuple[frozenset[int], frozenset[int], frozenset[int]]:
    """Return what is the same for all kernels: the takes that are copies, what starts no kernel, what is gathered."""
    return copied_takes(graph, spec), _together(graph), _gathered(graph)


def copied_takes(graph: Graph, spec: AttentionSpec) -> frozenset[int]:
    """Return the takes that have to be copied, because a kernel's four dimensions cannot express them by strides."""
    copied: set[int] = set()
    for node, op in graph.of(Attend):
        takes = [a for a in node.args if isinstance(graph[a].op, Take)]
        if not takes:
            continue
        if op.launch is not None:
            copied.update(takes)
            continue
        sizes = (spec.batch, *(a.size for a in graph[node.args[0]].type.rows.batch))
        strides = [_strides(graph[a].type.rows, graph[a].type.tensor, spec) for a in node.args]
        if op.launch is not None or fold(sizes, strides).copies:
            copied.update(takes)
    return frozenset(copied)


def _together(graph: Graph) -> frozenset[int]:
    """Return the attends of each launch but its first, and the takes of each but one: one kernel gathers them all."""
    found: set[int] = set()
    for nodes in launches(graph).values():
        found.update(n.id for n in nodes[1:])
        found.update([a for n in nodes for a in n.args][1:])
    return frozenset(found)


def _gathered(graph: Graph) -> frozenset[int]:
    """Return the takes whose rows are gathered for a launch."""
    return frozenset(a for nodes in launches(graph).values() for n in nodes for a in n.args)


def _strides(rows: RowMap, tensor: str, spec: AttentionSpec) -> list[int]:
    """Return the strides of batch and batch axes, in elements, for contiguous inputs in the spec's layout."""
    shape = spec.shape
    heads = spec.heads if tensor == "q" else spec.kv_heads
    length = shape.seq_len if tensor == "q" else shape.kv_len
    features = spec.value_dim if tensor == "v" else spec.head_dim
    by_head, by_row = (length * features, features) if spec.layout == "bhsd" else (features, heads * features)
    return [heads * length * features, *(a.head * by_head + a.row * by_row if a.size > 1 else 0 for a in rows.batch)]
