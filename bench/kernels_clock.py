"""Clocks and budgets of the kernel benches: medians of contestants in turns, and rows that cannot lose one another."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from attnplan.packages import PACKAGES, installed
from attnplan.runtime.clock import uncollected
from bench.cores import on_the_fastest
from bench.deadline import deadline

Call = Callable[[], Any]
Row = dict[str, Any]
WARM_UPS = 4
HEAD_START = 8_000_000
"""Cycles for which the device is kept busy first, about four milliseconds: no kernel waits for its host then."""


def race(contestants: dict[str, Call], rounds: int, *, on_gpu: bool) -> dict[str, dict[str, float]]:
    """Return medians of device time, and the spread of each contestant, all of them taking turns."""
    for _ in range(WARM_UPS):
        for run in contestants.values():
            run()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            found[name].append(_on_gpu(run) if on_gpu else _on_cpu(run))
    return {name: _summary(times) for name, times in found.items()}


def _summary(times: list[float]) -> dict[str, float]:
    return {"seconds": statistics.median(times), "fastest": min(times), "slowest": max(times)}


def _on_gpu(run: Call) -> float:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3


def _on_cpu(run: Call) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def host(contestants: dict[str, Call], rounds: int, calls: int, *, on_gpu: bool) -> dict[str, list[float]]:
    """Return the host time of a call in each round, several of them one after the other without waiting for the device.

    All contestants of a round run within milliseconds, on the cores that were fastest before: a host whose pace changes
    by half from one to the next is compared with itself.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    with on_the_fastest(), uncollected():
        for _ in range(rounds):
            for name, run in contestants.items():
                run()
                if on_gpu:
                    torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                found[name].append((time.perf_counter() - start) / calls)
    if on_gpu:
        torch.cuda.synchronize()
    return found


def parts(run: Call, calls: int = 3) -> dict[str, float]:
    """Return the microseconds of each kernel of a call on the device, the longest first."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    on_device = [e for e in seen.key_averages() if str(e.device_type).endswith("CUDA")]
    found = {e.key[:90]: e.self_device_time_total / calls for e in on_device if e.self_device_time_total > 0}
    return dict(sorted(found.items(), key=lambda pair: -pair[1])[:12])


class Ledger:
    """Rows of a bench: printed, and written after each one; nothing is begun once the budget is spent."""

    def __init__(self, path: Path | None, budget: float, each: float, *, on_gpu: bool) -> None:
        self.path, self.each = path, each
        self.until = time.monotonic() + budget
        device = torch.cuda.get_device_name() if on_gpu else platform.processor() or "cpu"
        self.found: dict[str, Any] = {
            "environment": {"device": device, "versions": installed(PACKAGES), "python": platform.python_version()},
            "rows": [],
        }

    @property
    def spent(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() > self.until

    def add(self, row: Row) -> None:
        """Print a row, keep it, and write all rows."""
        self.found["rows"].append(row)
        print(", ".join(f"{k} {_brief(k, v)}" for k, v in row.items() if not isinstance(v, dict)), flush=True)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def measure(self, what: str, name: str, work: Callable[[], Row]) -> Row | None:
        """Add the row that ``work`` returns, or why it did not; None if the budget is spent or it failed."""
        if self.spent:
            self.add({"what": what, "plan": name, "skipped": "the budget is spent"})
            return None
        try:
            with deadline(min(self.each, max(1.0, self.until - time.monotonic()))):
                row = {"what": what, "plan": name, **work()}
        except Exception as error:  # one row that fails must not cost the others
            self.add({"what": what, "plan": name, "failed": f"{type(error).__name__}: {error}"[:400]})
            return None
        self.add(row)
        return row


def _brief(key: str, value: Any) -> str:
    if isinstance(value, float):
        is_time = key.rpartition(" ")[2] in ("seconds", "fastest", "slowest")
        return f"{1e3 * value:.3f} ms" if is_time else f"{value:.4g}"
    return str(value)
