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

    rewrite: Pass = attrs.field(repr=False)
    before: int
    """Number of nodes that it got."""
    after: int
    """Number of nodes that it left."""
    seconds: float
    """Time of the pass and of the proof after it."""
    graph: Graph = attrs.field(repr=False)
    """The graph that it left."""

    @property
    def name(self) -> str:
        """Name of the pass."""
        return self.rewrite.name


@attrs.frozen
class Memo:
    """What has run for one spec."""

    steps: dict[tuple[Graph, Pass], Step] = attrs.field(factory=dict)
    """By the graph that a pass got, and the pass."""
    proven: set[Graph] = attrs.field(factory=set)
    """The lowerings that were proved."""


@attrs.frozen
class Pipeline:
    """Passes that run in order. A reviewed tuple: there is no solver that orders them."""

    passes: tuple[Pass, ...]

    def run(self, graph: Graph, expected: Coverage, memo: Memo | None = None) -> tuple[Graph, tuple[Step, ...]]:
        """Rewrite ``graph``, checking after every pass that it is well typed and covers ``expected``.

        Parameters
        ----------
        graph
            The naive graph.
        expected
            The coverage of the spec.
        memo
            What has run for this spec; what runs is added. A pass is a function of its graph, so pipelines share what
            they have in common.

        Raises
        ------
        PassError
            If a pass fails, or builds an ill-typed graph.
        VerifyError
            If a pass changes what is computed.
        """
        memo = Memo() if memo is None else memo
        if graph not in memo.proven:
            _verify(graph, expected, "lowering")
            memo.proven.add(graph)
        steps: list[Step] = []
        for rewrite in self.passes:
            key = (steps[-1].graph if steps else graph, rewrite)
            step = memo.steps.get(key)
            if step is None:
                step = memo.steps[key] = _step(rewrite, key[0], expected)
            steps.append(step)
        return (steps[-1].graph if steps else graph), tuple(steps)


def _step(rewrite: Pass, graph: Graph, expected: Coverage) -> Step:
    start = time.perf_counter()
    try:
        new = rewrite(graph)
    except AttnPlanError as error:
        raise PassError(f"pass {rewrite.name}: {error}") from error
    if new is not graph:
        _verify(new, expected, f"pass {rewrite.name}")
    return Step(rewrite, len(graph), len(new), time.perf_counter() - start, new)


def _verify(graph: Graph, expected: Coverage, who: str) -> None:
    try:
        graph.verify()
        got = coverage(graph)
    except PassError as error:
        raise PassError(f"{who}: {error}") from error
    check_coverage(expected, got, who)
