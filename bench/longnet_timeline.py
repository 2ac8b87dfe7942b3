"""Where the time of a call goes on the device: each kernel, and the gaps between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_CALLS = 5
_LONGEST = 16
"""Kernels, and gaps, that are listed: those that take the longest."""


def timeline(run: Callable[[], Any], *, gpu: bool) -> dict[str, Any]:
    """Return what a call spends on the device, in microseconds: the whole, kernels by name, gaps by what they follow.

    Parameters
    ----------
    run
        The call. It runs some times unobserved, then five times.
    gpu
        Whether to look at CUDA; operators on the CPU else, to try the script.
    """
    for _ in range(3):
        run()
    if gpu:
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as found:
        for _ in range(_CALLS):
            run()
        if gpu:
            torch.cuda.synchronize()
    events = found.events() or []
    wanted = [e for e in events if (e.device_type == DeviceType.CUDA if gpu else e.cpu_parent is None)]
    spans = sorted((e.time_range.start, e.time_range.end, e.name[:90]) for e in wanted)
    return summary([s for s in spans if not s[2].startswith(("cuda", "Activity"))])


def summary(spans: list[tuple[float, float, str]]) -> dict[str, Any]:
    """Return the sums of spans (start, end, name) of five calls, for one call.

    Examples
    --------
    >>> found = summary([(0, 10, "a"), (15, 20, "b"), (20, 45, "a")])
    >>> found["span_us"], found["busy_us"], found["gaps_us"]
    (9.0, 8.0, 1.0)
    >>> found["kernels"][0]
    {'kernel': 'a', 'calls': 0.4, 'us': 7.0}
    """
    if not spans:
        return {"kernels": [], "gaps": []}
    busy: dict[str, list[float]] = defaultdict(list)
    idle: dict[str, float] = defaultdict(float)
    end, last = spans[0][0], ""
    for start, stop, name in spans:
        busy[name].append(stop - start)
        if start > end:
            idle[f"{last[:40]} | {name[:40]}"] += start - end
        if stop > end:
            end, last = stop, name
    kernels = sorted(busy.items(), key=lambda x: -sum(x[1]))
    gaps = sorted(idle.items(), key=lambda x: -x[1])
    return {
        "span_us": round((end - spans[0][0]) / _CALLS, 1),
        "busy_us": round(sum(map(sum, busy.values())) / _CALLS, 1),
        "gaps_us": round(sum(idle.values()) / _CALLS, 1),
        "kernels": [
            {"kernel": name, "calls": len(each) / _CALLS, "us": round(sum(each) / _CALLS, 1)}
            for name, each in kernels[:_LONGEST]
        ],
        "gaps": [{"between": name, "us": round(us / _CALLS, 1)} for name, us in gaps[:_LONGEST]],
    }
