"""Runs emitted modules; node by node, with a name for each op of the plan, while somebody watches.

Two may watch: torch's profiler, which gets a range for every op, and a :class:`Watch`, which times every op.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import getitem
from threading import Lock
from typing import Any

import torch
from torch import fx
from torch.autograd import profiler

_NAMED = re.compile(r"(out|lse|[qkv]|d[qkv]|where|keep)_(\d+)")
"""Names by which emitted code says which op of the plan a value belongs to."""

Key = tuple[int | None, str]

OTHER: Key = (None, "")
"""The key of what belongs to no op: conversions, views of whole tensors, sums of gradients."""


def run(module: fx.GraphModule, *args: Any) -> Any:
    """Return the result of an emitted module; every op is named while the profiler or a :class:`Watch` is on."""
    if _watch is not None:
        return _Timed(module, _watch).run(*args)
    if profiler._is_profiler_enabled:
        return _Ranges(module).run(*args)
    return module.forward(*args)


def op_of(node: fx.Node) -> Key:
    """Return the op of the plan that a node of emitted code works for, and which of its tensors it takes.

    Returns
    -------
    tuple
        ``(6, "")`` for what op 6 does itself; ``(6, "q")`` for what fetches its rows of q; :data:`OTHER` for what
        belongs to no op.
    """
    own = _NAMED.fullmatch(node.name)
    if own is not None:
        return int(own[2]), own[1] if own[1] in ("q", "k", "v") else ""
    for x in (*node.users, *node.all_input_nodes):
        found = _NAMED.fullmatch(x.name)
        if found is not None and found[1] in ("out", "lse", "dq", "dk", "dv"):
            return int(found[2]), ""
    return OTHER


class _Ranges(fx.Interpreter):
    """Runs a module node by node, each in a range of the profiler named after the plan's op."""

    def run_node(self, n: fx.Node) -> Any:
        if not n.op.startswith("call") or n.target is getitem:
            return super().run_node(n)
        ids = [found[2] for x in (n, *n.users) if (found := _NAMED.fullmatch(x.name))]
        what = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", n.name)
        with profiler.record_function(f"attnplan: %{ids[0]} {what}" if ids else f"attnplan: {what}"):
            return super().run_node(n)


class Watch:
    """Times what emitted modules do, op by op, over any number of calls.

    On CUDA by events on the current stream, on the CPU by the clock. One is on at a time in a process.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._calls: list[dict[Key, list[Any]]] = []
        self.modules = 0
        """How many modules ran in the last call."""

    @contextmanager
    def call(self) -> Iterator[None]:
        """Watch one call of a plan."""
        global _watch
        with _one_at_a_time:
            self._calls.append(defaultdict(list))
            self.modules = 0
            _watch = self
            try:
                yield
            finally:
                _watch = None
                if self._cuda:
                    torch.cuda.synchronize()

    def entered(self) -> None:
        """Count a module that starts."""
        self.modules += 1

    def timed(self, key: Key, function: Callable[[], Any]) -> Any:
        """Return what ``function`` does, and book its time under ``key``."""
        if not self._cuda:
            start = time.perf_counter()
            result = function()
            self._calls[-1][key].append(time.perf_counter() - start)
            return result
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        events[0].record()
        result = function()
        events[1].record()
        self._calls[-1][key].append(events)
        return result

    def seconds(self) -> list[Mapping[Key, float]]:
        """Return for each watched call the seconds of each op."""
        return [{key: sum(map(self._elapsed, spans)) for key, spans in call.items()} for call in self._calls]

    def _elapsed(self, span: Any) -> float:
        return float(span[0].elapsed_time(span[1])) / 1e3 if self._cuda else float(span)


_watch: Watch | None = None
_one_at_a_time = Lock()


class _Timed(fx.Interpreter):
    """Runs a module node by node under a watch; the interpreter's own time is in no op."""

    def __init__(self, module: fx.GraphModule, watch: Watch) -> None:
        super().__init__(module)
        self._watch = watch
        self._key = OTHER
        watch.entered()

    def run_node(self, n: fx.Node) -> Any:
        self._key = op_of(n)
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is getitem:
            return super().call_function(target, args, kwargs)
        base = super().call_function
        return self._watch.timed(self._key, lambda: base(target, args, kwargs))

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        base = super().call_module
        return self._watch.timed(self._key, lambda: base(target, args, kwargs))
