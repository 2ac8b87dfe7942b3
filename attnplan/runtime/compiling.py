"""Programs that Inductor compiles for attnplan itself: each once for each structure and shape, and counted."""

from __future__ import annotations

import sys
import threading
import types
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

_KEPT = 64
_lock = threading.Lock()
COMPILED: Counter[str] = Counter()
"""Number of programs that were compiled, by what they are."""


class PerShape:
    """A function that is compiled anew for each layout of its tensors, with static sizes.

    Each gets a code object of its own: Dynamo counts recompilations by code object, and gives up after eight.

    Parameters
    ----------
    function
        A top-level function of tensors, and of lists of tensors and constants that are the same in every call.
    title
        What reports call it.
    """

    def __init__(self, function: Callable[..., Any], title: str) -> None:
        self.function, self.title = function, title
        self._kept: OrderedDict[Any, Callable[..., Any]] = OrderedDict()

    def __call__(self, key: Any, *args: Any) -> Any:
        """Return the result of the compiled function; ``key`` is whatever beside the tensors makes a difference."""
        key = (key, torch.is_grad_enabled(), *(layout(x) for x in args if isinstance(x, Tensor)))
        found = self._kept.get(key)
        if found is None:
            found = self._compile(key)
        return found(*args)

    def _compile(self, key: Any) -> Callable[..., Any]:
        with _lock:
            if key not in self._kept:
                COMPILED[self.title] += 1
                self._kept[key] = compiled(_copied(self.function))
                if len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return self._kept[key]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of static shapes compiled by Inductor, or an error where it cannot be one graph."""
    made: Callable[..., Any] = torch.compile(function, dynamic=False, fullgraph=True)
    return made


@attrs.frozen
class CompileReport:
    """What this process compiled, and why.

    Attributes
    ----------
    programs
        Programs of the ``compiled`` backend, by what they are.
    graphs
        Graphs that ``torch.compile`` captured in this process, those programs included.
    breaks
        Why it broke graphs, and how often.
    recompiles
        Functions that were compiled more than once: how often, and the guard that failed last.
    lattices
        Lattices of the ``compiled`` backend that traces take up; a few may be, others are one operator.
    """

    programs: dict[str, int]
    graphs: int
    breaks: dict[str, int]
    recompiles: dict[str, tuple[int, str]]
    lattices: int = 0

    def __str__(self) -> str:
        lines = [f"{self.graphs} graphs compiled, {sum(self.programs.values())} of them programs of plans"]
        lines += [f"  {count} x {title}" for title, count in self.programs.items()]
        lines += [f"  {self.lattices} lattices are taken up by traces"] if self.lattices else []
        lines += [f"  compiled {n} times: {where}; last because {why}" for where, (n, why) in self.recompiles.items()]
        lines += [f"  {count} graph breaks: {reason}" for reason, count in self.breaks.items()]
        return "\n".join(lines)


def report() -> CompileReport:
    """Return what was compiled so far. Counts of Dynamo begin anew with ``torch._dynamo.reset``.

    Examples
    --------
    >>> report().programs == dict(COMPILED)
    True
    """
    from torch._dynamo import utils

    counters = utils.counters
    recompiles: dict[str, tuple[int, str]] = {}
    for one in utils.get_compilation_metrics():
        why = getattr(one, "recompile_reason", None)
        if why:
            where = f"{one.co_name} ({one.co_filename}:{one.co_firstlineno})"
            recompiles[where] = (recompiles.get(where, (1, ""))[0] + 1, str(why))
    counts = (counters["stats"]["unique_graphs"], dict(counters["graph_break"]))
    lattices = sys.modules.get("attnplan.runtime.lattice_programs")  # which imports this module
    return CompileReport(dict(COMPILED), *counts, recompiles, 0 if lattices is None else lattices.count_taken_up())


def layout(x: Tensor) -> tuple[Any, ...]:
    """Return what a compiled function of static shapes assumes of a tensor."""
    return x.shape, x.stride(), x.dtype, x.device, x.requires_grad


def _copied(function: Any) -> Callable[..., Any]:
    made = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made
