"""Plans that fit a memory budget: what is looped over, in which sizes, and the smallest budget that works."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs

from attnplan.cost import Prediction
from attnplan.cost.memory import peak_memory, peak_of_some
from attnplan.cost.rules import KernelModel, Setting
from attnplan.ir import Graph, Output
from attnplan.ir.coverage import Coverage
from attnplan.passes.base import Pass
from attnplan.passes.chunk import Chunk, kv_heads, normal, parts, unloopable
from attnplan.passes.pipeline import Pipeline, Step
from attnplan.passes.recompute import Recompute, saves_more
from attnplan.spec import AttentionSpec

LEAST_ROWS = 128
"""Query rows of the smallest piece: those of one tile of a kernel."""
BLOCKS = ((2048, 2048), (1024, 1024), (512, 1024), (256, 512), (128, 256), (64, 128))
"""(queries, keys) of the blocks of scores that plain torch may compute at a time."""


@attrs.frozen
class Way:
    """How a graph would be run: what prices and refuses its variants."""

    spec: AttentionSpec
    kernel: KernelModel
    kind: str
    """``"cpu"`` or ``"cuda"``."""
    price: Callable[[Graph], Prediction]
    accepts: Callable[[Graph], bool]
    """Whether the backend runs a graph."""

    def runs(self, looped: Graph) -> bool:
        """Return whether the backend runs every piece of a graph."""
        output = looped.output.op
        if not isinstance(output, Output) or output.loop is None:
            return self.accepts(looped)
        return all(self.accepts(body) for body in {normal(p.graph) for p in parts(looped) if p.graph is not None})


@attrs.frozen
class Variant:
    """One way to loop over a graph, or to save less of it."""

    rewrite: Pass
    title: str

    def graph(self, graph: Graph) -> Graph:
        """Return the graph with its options set, without the proof."""
        if isinstance(self.rewrite, Chunk):
            return attrs.evolve(self.rewrite, prove=False)(graph)
        return self.rewrite(graph)


@attrs.frozen
class Fitted:
    """A variant that fits, proved."""

    graph: Graph
    steps: tuple[Step, ...]
    prediction: Prediction
    title: str


def variants(graph: Graph, spec: AttentionSpec, *, plain: bool) -> Iterator[Variant]:
    """Iterate over the legal ways to need less memory, those with the larger pieces first.

    Batch elements are looped over before heads, and heads before query rows: the pieces of the former run the same
    program. ``plain`` says whether scores are materialised, so that blocks of them can be looped over, too.
    """
    if spec.training and saves_more(graph, plain=plain):
        yield Variant(Recompute(), "recompute")
    blocks = [None, *(b for b in BLOCKS if _is_smaller(b, spec))] if plain else [None]
    for block in blocks:
        if block is not None and unloopable(graph, None, block):
            break
        for loop in (None, *_loops(graph, spec)):
            if (loop is None and block is None) or unloopable(graph, loop, block):
                continue
            yield Variant(Chunk(loop, block), title(loop, block))


def title(loop: tuple[int, int, int] | None, block: tuple[int, int] | None) -> str:
    """Return a loop in words.

    Examples
    --------
    >>> title((1, 2, 4096), (512, 1024))
    'pieces of 1 x 2 x 4096, scores in 512 x 1024'
    """
    found = [] if loop is None else [f"pieces of {loop[0]} x {loop[1]} x {loop[2]}"]
    return ", ".join(found + ([] if block is None else [f"scores in {block[0]} x {block[1]}"]))


def _is_smaller(block: tuple[int, int], spec: AttentionSpec) -> bool:
    return block[0] < spec.shape.seq_len or block[1] < spec.shape.kv_len


def _loops(graph: Graph, spec: AttentionSpec) -> Iterator[tuple[int, int, int]]:
    batch, heads, rows = spec.batch, kv_heads(graph), graph.inputs["q"].type.rows.length
    for size in _halves(batch):
        yield size, heads, rows
    for size in _halves(heads):
        yield 1, size, rows
    size = 1 << max(0, (rows - 1).bit_length() - 1)
    while size >= LEAST_ROWS and size < rows:
        yield 1, 1, size
        size //= 2


def _halves(count: int) -> Iterator[int]:
    while count > 1:
        count = -(-count // 2)
        yield count


def fit(graph: Graph, way: Way, budget: int, expected: Coverage) -> Fitted | None:
    """Return the fastest variant of a graph whose predicted peak is within a budget, proved; None if there is none.

    For each size of blocks the largest pieces that fit are priced.
    """
    best: tuple[Prediction, Variant] | None = None
    done: set[tuple[int, int] | None] = set()
    for one in variants(graph, way.spec, plain=way.kernel.materialises):
        block = one.rewrite.block if isinstance(one.rewrite, Chunk) else None
        if block in done:
            continue
        looped = one.graph(graph)
        if not may_fit(looped, way, budget):
            continue
        found = way.price(looped)
        if found.peak_bytes > budget or not way.runs(looped):
            continue
        if isinstance(one.rewrite, Chunk):
            done.add(block)
        if best is None or found.seconds < best[0].seconds:
            best = found, one
    if best is None:
        return None
    looped, steps = Pipeline((best[1].rewrite,)).run(graph, expected, {(graph, Nothing()): _NOTHING})
    return Fitted(looped, steps, best[0], best[1].title)


class Nothing(Pass):
    """Stands for the passes that led to a graph, which were proved with it."""

    name = "nothing"


_NOTHING = Step(Nothing(), 0, 0, 0.0, Graph(()))


def may_fit(looped: Graph, way: Way, budget: int) -> bool:
    """Return False if a few pieces show already that a variant does not fit."""
    return peak_of_some(looped, Setting.of(looped, way.spec, way.kernel), way.kind) <= budget


def least(graph: Graph, way: Way) -> tuple[int, str] | None:
    """Return the smallest peak that any variant of a graph has, and which one; None if it cannot be looped over."""
    best: tuple[int, str] | None = None
    blocks: dict[tuple[int, int], None] = {}
    for one in reversed(list(variants(graph, way.spec, plain=way.kernel.materialises))):
        block = one.rewrite.block if isinstance(one.rewrite, Chunk) else None
        if block is not None:
            blocks.setdefault(block)
            if block != next(iter(blocks)):  # larger blocks of scores need more
                continue
        looped = one.graph(graph)
        if best is not None and not may_fit(looped, way, best[0] - 1):
            continue
        need = peak_memory(looped, Setting.of(looped, way.spec, way.kernel), way.kind).total
        if (best is None or need < best[0]) and way.runs(looped):
            best = need, one.title
    return best
