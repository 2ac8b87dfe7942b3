"""Times contestants in turns, and writes each row as it comes, for ``bench.longnet`` and ``bench.longnet_lengths``."""

from __future__ import annotations

import json
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnplan.backends import registry
from attnplan.cost import Target, resolve
from attnplan.packages import installed
from bench.deadline import deadline
from bench.longnet_peers import Case

Call = Callable[[], Any]
_PACKAGES = ("torch", "triton", "flash-attn-4", "xformers", "dilated-attention-pytorch")
_IN_A_ROW = 5  # calls that are started without waiting for one another, as in a model; the first is not counted
_SLOW = 0.02  # seconds of a call, beyond which fewer are
_FEWEST = 3  # turns of each contestant, however long they take


class Bench:
    """What runs, on what, and the rows so far.

    Parameters
    ----------
    path
        Where rows are written; None writes none.
    budget
        Seconds after which no contestant begins.
    kernels
        What plans and kernels alone run on, separated by commas.
    rounds, seconds
        Turns of each contestant: at most so many, and in about so many seconds for all contestants of a race.
    """

    def __init__(
        self, path: Path | None, budget: float, kernels: str, *, gpu: bool, rounds: int, seconds: float = 6.0
    ) -> None:
        self.kernels = kernels.split(",") if gpu else ["flash-cpu"]
        self.path, self.end, self.gpu = path, time.monotonic() + budget, gpu
        self.rounds, self.seconds = rounds, seconds
        self.names: tuple[str, ...] = ()
        """Contestants that take part in contests begin so; all do without."""
        self.target: Target = resolve("cuda" if gpu else "cpu")
        self.device = torch.device("cuda" if gpu else "cpu")
        self.dtype = "bfloat16" if gpu else "float32"
        self.rows: list[dict[str, Any]] = []
        self.schedules = list(self._schedules())

    def _schedules(self) -> Iterator[tuple[Any, Any]]:
        for name in ("eager", "flash"):
            backend = registry().get(name)
            for schedule in backend.schedules(self.target.device):
                masks = "tile-masks" in schedule.priced.native  # for tiles, which LongNet has none of
                if schedule.runs in self.kernels and not masks and not backend.missing(schedule, self.target):
                    yield backend, schedule

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return self.end - time.monotonic()

    def write(self, row: dict[str, Any]) -> None:
        """Add a row, and write all of them."""
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        if self.path is not None:
            here = {"device": torch.cuda.get_device_name() if self.gpu else platform.processor(), "rows": self.rows}
            self.path.write_text(json.dumps({**here, "versions": installed(_PACKAGES)}, indent=1) + "\n")

    def step(self, where: dict[str, Any], run: Call, seconds: float = 60.0) -> Any:
        """Return what ``run`` does in some seconds at most; what it raises becomes a row, and None is returned."""
        if self.left < 0:
            self.write({**where, "failed": "no time left"})
            return None
        try:
            with deadline(min(seconds, self.left + 10.0)):
                return run()
        except Exception as error:  # one failing row must not lose the others
            traceback.print_exc()
            self.write({**where, "failed": f"{type(error).__name__}: {error}"[:300]})
            return None

    def race(self, where: dict[str, Any], contestants: dict[str, Callable[[], Call]], *, replay: bool = True) -> None:
        """Warm contestants up, time them in turns, and write a row for each.

        ``replay`` also captures each in a CUDA graph, for the time of its kernels alone.
        """
        ready = {}
        for name, make in contestants.items():
            start = time.perf_counter()

            def prepare(make: Callable[[], Call] = make, start: float = start) -> tuple[Call, dict[str, Any], float]:
                run = make()
                run()
                self.wait()
                extra = {"first_call_s": round(time.perf_counter() - start, 2), **self._peak(run)}
                start = time.perf_counter()
                run()
                self.wait()
                seconds = time.perf_counter() - start
                return run, extra | (self._replayed(run) if replay else {}), seconds

            found = self.step({**where, "name": name}, prepare)
            if found is not None:
                ready[name] = found
        device: dict[str, list[float]] = {name: [] for name in ready}
        host: dict[str, list[float]] = {name: [] for name in ready}
        turn = sum(seconds * (_in_a_row(seconds) + 1) for _, _, seconds in ready.values())
        for done in range(max(_FEWEST, min(self.rounds, int(self.seconds / max(turn, 1e-9))))):
            if done and self.left < 0:  # what was measured so far is written
                break
            for name in list(ready):
                run, _, seconds = ready[name]
                found = self.step({**where, "name": name}, partial(self._once, run, _in_a_row(seconds)), 20.0)
                if found is not None:
                    device[name].append(found[0])
                    host[name].append(found[1])
                elif not device[name]:
                    del ready[name]
        for name, (_, extra, _) in ready.items():
            times = sorted(device[name])
            row = {"ms": round(statistics.median(times) * 1e3, 4), "fastest_ms": round(times[0] * 1e3, 4)}
            row |= {"slowest_ms": round(times[-1] * 1e3, 4), "turns": len(times)}
            self.write(
                {**where, "name": name, **row, "host_ms": round(statistics.median(host[name]) * 1e3, 4), **extra}
            )

    def wait(self) -> None:
        """Wait for the device."""
        if self.gpu:
            torch.cuda.synchronize()

    def _peak(self, run: Call) -> dict[str, Any]:
        if not self.gpu:
            return {}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return {"peak_mib": round((torch.cuda.max_memory_allocated() - before) / 2**20)}

    def _replayed(self, run: Call) -> dict[str, Any]:
        """Return the time of a call replayed from a CUDA graph: what the device needs, whatever the host does."""
        if not self.gpu:
            return {}
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                kept = run()
            times = sorted(self._once(graph.replay, _IN_A_ROW)[0] for _ in range(3))
            del kept
        except Exception as error:  # what cannot be captured has no such time
            torch.cuda.synchronize()
            return {"graph_failed": f"{type(error).__name__}: {error}"[:200]}
        return {"graph_ms": round(times[1] * 1e3, 4)}

    def _once(self, run: Call, calls: int) -> tuple[float, float]:
        """Return the seconds of a call on the device and on the host: the median of some in a row."""
        if not self.gpu:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start,) * 2
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        torch.cuda.synchronize()
        start = time.perf_counter()
        for mark in marks[:-1]:
            mark.record()
            run()
        host = (time.perf_counter() - start) / calls
        marks[-1].record()
        torch.cuda.synchronize()
        times = sorted(a.elapsed_time(b) for a, b in pairwise(marks[1:]))
        return times[len(times) // 2] / 1e3, host

    def tensors(self, case: Case, count: int = 3) -> list[Tensor]:
        """Return q, k, v, ... ``[1, S, H, D]``."""
        torch.manual_seed(0)
        sizes = (1, case.tokens, case.heads, case.head_dim)
        return [torch.randn(sizes, device=self.device, dtype=getattr(torch, self.dtype)) for _ in range(count)]


def _in_a_row(seconds: float) -> int:
    return _IN_A_ROW if seconds < _SLOW else 2
