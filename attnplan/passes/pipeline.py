"""Pipelines: a tuple of passes, with types and coverage verified and a record kept after every one."""

from __future__ import annotations

import time

import attrs

from attnplan.errors import AttnPlanError, PassError
from attnplan.ir import Graph
from attnplan.ir.coverage import Coverage, check_coverage, coverage
from attnplan.passes.base import Pass


@attrs.frozen
class Step:
    """One pass that ran."""

    name: str
    before: int
    """Number of nodes that it got."""
    after: int
    """Number of nodes that it left."""
    seconds: float
    """Time of the pass and of the proof after it."""
    graph: Graph = attrs.field(repr=False)
    """The graph that it left."""


@attrs.frozen
class Pipeline:
    """Passes that run in order. A reviewed tuple: there is no solver that orders them."""

    passes: tuple[Pass, ...]

    def run(self, graph: Graph, expected: Coverage) -> tuple[Graph, tuple[Step, ...]]:
        """Rewrite ``graph``, checking after every pass that it is well typed and covers ``expected``.

        Raises
        ------
        PassError
            If a pass fails, or builds an ill-typed graph.
        VerifyError
            If a pass changes what is computed.
        """
        graph = _verified(graph, expected, "lowering", graph)
        steps = []
        for rewrite in self.passes:
            start = time.perf_counter()
            try:
                new = rewrite(graph)
            except AttnPlanError as error:
                raise PassError(f"pass {rewrite.name}: {error}") from error
            _verified(new, expected, f"pass {rewrite.name}", graph)
            steps.append(Step(rewrite.name, len(graph), len(new), time.perf_counter() - start, new))
            graph = new
        return graph, tuple(steps)


def _verified(graph: Graph, expected: Coverage, who: str, before: Graph) -> Graph:
    if graph is before and who != "lowering":
        return graph
    try:
        graph.verify()
        if [n.op for n in graph.inputs.values()] != [n.op for n in before.inputs.values()]:
            raise PassError("the inputs are not those of the spec")
        got = coverage(graph)
    except PassError as error:
        raise PassError(f"{who}: {error}") from error
    check_coverage(expected, got, who)
    return graph
