"""Emission for ``reference``: the graph itself is the program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
from torch import Tensor

from attnplan.backends.base import Program, Schedule
from attnplan.ir import Graph
from attnplan.patterns import Shape
from attnplan.runtime.interpreter import interpret
from attnplan.runtime.views import accumulator
from attnplan.spec import AttentionSpec


@attrs.frozen
class ReferenceProgram:
    """Runs the naive graph of a spec in float64 and rounds once, at the end."""

    graph: Graph
    shape: Shape
    source: str
    differentiable_lse: bool = True
    follows_lengths: bool = False

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return output in the dtype of q, and LSE."""
        shape = attrs.evolve(self.shape, batch=q.shape[0])
        out, lse = interpret(self.graph, q, k, v, operands, shape)
        return out.to(q.dtype), None if lse is None else lse.to(accumulator(q.dtype))


def emit(graph: Graph, spec: AttentionSpec, schedule: Schedule, device: str) -> Program:
    """Return the program that interprets ``graph``, which no pass has touched."""
    return ReferenceProgram(graph, spec.shape, f"# float64 interpreter over\n{graph}")
