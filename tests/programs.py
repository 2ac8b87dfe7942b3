"""Graphs for tests: every stage of the pipeline of a spec, and graphs with one thing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attnplan.ir import Builder, Graph, Node, Op, rewrite
from attnplan.ir.coverage import check_coverage, coverage, spec_coverage
from attnplan.lower import lower
from attnplan.passes import Canonicalize, FuseMerge, Lattice, Pass, Pipeline, SplitHeads
from attnplan.spec import AttentionSpec

PASSES: tuple[Pass, ...] = (Canonicalize(), SplitHeads(), Lattice(), FuseMerge())


def stages(spec: AttentionSpec, passes: tuple[Pass, ...] = PASSES) -> Iterator[tuple[str, Graph]]:
    """Iterate over (name, graph) after lowering and after every pass, each proved."""
    graph = lower(spec)
    yield "lower", graph
    _, steps = Pipeline(passes).run(graph, spec_coverage(spec))
    for step in steps:
        yield step.name, step.graph


def planned(spec: AttentionSpec) -> Graph:
    """Return the graph after the whole pipeline."""
    return Pipeline(PASSES).run(lower(spec), spec_coverage(spec))[0]


def replaced(graph: Graph, change: Callable[[Builder, Node, tuple[int, ...]], int | None]) -> Graph:
    """Return ``graph`` with what ``change`` replaces; it must replace something."""
    result = rewrite(graph, change)
    assert result is not graph, "the mutation changed nothing"
    return result


def with_op(graph: Graph, old: Op, new: Op) -> Graph:
    """Return ``graph`` with one op replaced wherever it stands."""
    return replaced(graph, lambda builder, node, args: builder.add(new, *args) if node.op == old else None)


def prove(spec: AttentionSpec, graph: Graph) -> None:
    """Check structure and coverage, as a pipeline does after every pass."""
    graph.verify()
    check_coverage(spec_coverage(spec), coverage(graph), "the test")
