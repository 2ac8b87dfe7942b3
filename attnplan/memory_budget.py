"""Plans that fit a memory budget: what is looped over, in which sizes, and the smallest budget that works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs

from attnplan.cost import Prediction
from attnplan.cost.memory import floor_of_loop, peak_memory, peak_of_some
from attnplan.cost.setting import KernelModel, Setting
from attnplan.ir import Graph, Output
from attnplan.ir.coverage import Coverage
from attnplan.passes.alike import bodies
from attnplan.passes.base import Pass
from attnplan.passes.chunk import Chunk, kv_heads, unloopable
from attnplan.passes.pipeline import Memo, Pipeline, Step
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
        return all(self.accepts(body) for body, _ in bodies(looped))


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
    for size in _shares(batch):
        yield size, heads, rows
    for size in _shares(heads):
        yield 1, size, rows
    size = 1 << max(0, (rows - 1).bit_length() - 1)
    while size >= LEAST_ROWS and size < rows:
        yield 1, 1, size
        size //= 2


def _shares(count: int) -> Iterator[int]:
    """Iterate over the sizes of two and more equal shares of so many, the last of which may be smaller.

    Half of what a plan needs is rarely half of its heads: what does not depend on them stays.
    """
    yield from dict.fromkeys(-(-count // pieces) for pieces in range(2, count + 1))


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
        if _floor(graph, one, way) > budget:
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
    looped, steps = _proved(graph, best[1].rewrite, expected)
    return Fitted(looped, steps, best[0], best[1].title)


def _proved(graph: Graph, rewrite: Pass, expected: Coverage) -> tuple[Graph, tuple[Step, ...]]:
    """Return a looped graph and its step; schedules of one lowering fit by the same loop, which is proved once."""
    key = graph, rewrite
    known = _PROVED.get(key)
    if known is None or known[0] != expected:
        if len(_PROVED) >= _KEPT:
            _PROVED.pop(next(iter(_PROVED), key), None)
        known = _PROVED[key] = (expected, Pipeline((rewrite,)).run(graph, expected, Memo(proven={graph})))
    return known[1]


_PROVED: dict[tuple[Graph, Pass], tuple[Coverage, tuple[Graph, tuple[Step, ...]]]] = {}
_KEPT = 32


def may_fit(looped: Graph, way: Way, budget: int) -> bool:
    """Return False if a few pieces show already that a variant does not fit."""
    return peak_of_some(looped, Setting.of(looped, way.spec, way.kernel), way.kind) <= budget


def _floor(graph: Graph, one: Variant, way: Way) -> int:
    """Return what a variant needs for sure: most that do not fit are refused by it, before they are cut into pieces."""
    rewrite = one.rewrite
    if not isinstance(rewrite, Chunk) or rewrite.loop is None:
        return 0
    return floor_of_loop(graph, Setting.of(graph, way.spec, way.kernel), rewrite.loop)


@attrs.frozen
class Least:
    """The smallest peak that any variant has."""

    need: int
    """Bytes."""
    index: int
    """Which of the graphs it is a variant of."""
    title: str


def least(options: Sequence[tuple[Graph, Way]], below: int) -> Least | None:
    """Return the smallest peak below so many bytes that any variant of some graphs has; None if there is none.

    The variants are ordered by lower bounds, those of a few of their pieces; all pieces are looked at where the bound
    is below what was found so far.
    """
    bounds: list[tuple[int, int, int, Variant, Graph]] = []
    for index, (graph, way) in enumerate(options):
        for one in _smallest_blocks(graph, way):
            if _floor(graph, one, way) < below:
                looped = one.graph(graph)
                bound = peak_of_some(looped, Setting.of(looped, way.spec, way.kernel), way.kind)
                bounds.append((bound, index, len(bounds), one, looped))
    best: Least | None = None
    for bound, index, _, one, looped in sorted(bounds, key=lambda b: b[:3]):
        if bound >= below:
            break
        way = options[index][1]
        need = peak_memory(looped, Setting.of(looped, way.spec, way.kernel), way.kind).total
        if need < below and way.runs(looped):
            below, best = need, Least(need, index, one.title)
    return best


def _smallest_blocks(graph: Graph, way: Way) -> Iterator[Variant]:
    """Iterate over the variants of a graph that may need least: larger blocks of scores need more."""
    found = list(variants(graph, way.spec, plain=way.kernel.materialises))
    blocks = [one.rewrite.block for one in found if isinstance(one.rewrite, Chunk) and one.rewrite.block is not None]
    for one in reversed(found):
        block = one.rewrite.block if isinstance(one.rewrite, Chunk) else None
        if block is None or block == blocks[-1]:
            yield one
