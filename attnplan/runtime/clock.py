"""Clocks: what a call takes, on the device and on the host, the contestants taking turns.

A call is timed in bursts: back to back, as a model makes calls, so that a burst takes the longer of what the device
needs and what the host needs to start it. One more call goes before each burst, untimed, so that the device is busy
when the clock starts: without it, every burst would hold the host's time for one call beside the device's. ``device``
times start behind a kernel that idles while the host queues the calls, and hold no host time.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import attrs
import torch

Call = Callable[[], Any]

_BURST = 2e-3
"""Seconds that a burst should last at least: behind a pause, a core's first calls take up to three times as long."""
_MOST = 50
_CYCLES_PER_SECOND = 2e9
_LONG = 2e-2
"""Calls that take longer are not led by another: the host's time for one is nothing beside theirs."""
_HOST_BOUND = 2e-3
"""Calls that take longer are not timed behind an idle kernel: the host is long done."""
_OWN_FROZEN = 1000
"""Python 3.12 starts with a few hundred objects frozen; a program that freezes what it loaded has more than this."""


@attrs.frozen
class Times:
    """What one contestant took, in seconds per call."""

    seconds: tuple[float, ...]
    """One for each round."""
    host: float
    """Median time for which a call keeps the host busy."""
    device: tuple[float, ...] = ()
    """Times of the device alone, where they were taken."""
    burst: int = 1
    """Calls in a round."""

    @property
    def median(self) -> float:
        """Median over rounds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Difference of the third and the first quartile over the median."""
        if len(self.seconds) < 2:
            return 0.0
        first, _, third = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (third - first) / self.median


@attrs.frozen
class Plenty:
    """How much to measure."""

    warm_ups: int = 2
    rounds: int = 8
    least: int = 3
    seconds: float = 0.06
    """Time for all rounds of one contestant; slow ones get fewer rounds, not fewer than ``least``."""
    slow: float = 0.25
    """A call that takes longer is timed once more after its warm-up, and no more."""
    further: int = 0
    """Rounds that follow for those which are close to the fastest, and whose times vary: see :data:`CLOSE`."""
    further_seconds: float = 0.2
    """Time for these of one contestant."""


CLOSE = 2.0
"""Contestants that take up to this many times as long as the fastest may still turn out to be it."""
QUIET = 0.02
"""Spread up to which further rounds would say the same again."""


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def once(call: Call, on_gpu: bool, count: int = 1, *, led: bool = False) -> tuple[float, float]:
    """Return (seconds per call, host seconds per call) of one burst, on a GPU behind one more call if ``led``."""
    if not on_gpu:
        start = time.perf_counter()
        for _ in range(count):
            call()
        seconds = (time.perf_counter() - start) / count
        return seconds, seconds
    first, last = _event(), _event()
    torch.cuda.synchronize()
    if led:
        call()
    first.record()
    start = time.perf_counter()
    for _ in range(count):
        call()
    host = time.perf_counter() - start
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / count, host / count


def behind_idling(call: Call, idle: float, count: int) -> float:
    """Return the device's seconds per call, the host's work hidden behind a kernel that idles for ``idle`` seconds."""
    first, last = _event(), _event()
    torch.cuda.synchronize()
    torch.cuda._sleep(int(idle * _CYCLES_PER_SECOND))  # type: ignore[no-untyped-call]
    first.record()
    for _ in range(count):
        call()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3 / count


def race(calls: Mapping[str, Call], on_gpu: bool, plenty: Plenty | None = None) -> dict[str, Times]:
    """Return the times of contestants that take turns, after their warm-ups.

    Parameters
    ----------
    calls
        What to call, by name.
    on_gpu
        Whether the work runs on the current CUDA device, timed by its events.
    plenty
        How much to measure.

    Examples
    --------
    >>> found = race({"nothing": lambda: None, "sum": lambda: sum(range(9))}, on_gpu=False)
    >>> sorted(found), len(found["sum"].seconds)
    (['nothing', 'sum'], 8)
    """
    with uncollected():
        return _race(calls, on_gpu, plenty or Plenty())


@contextmanager
def uncollected() -> Iterator[None]:
    """Keep the garbage collector out of what is timed: with a compiler loaded, it takes longer than a burst.

    What exists is frozen, so that collecting between rounds is cheap; not where the program froze something itself. It
    is not collected first: an interrupt that meets a finalizer is lost.
    """
    collects, freezes = gc.isenabled(), gc.get_freeze_count() < _OWN_FROZEN
    gc.disable()
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
        if collects:
            gc.enable()


def _race(calls: Mapping[str, Call], on_gpu: bool, plenty: Plenty) -> dict[str, Times]:
    counts, rounds, led, each = dict[str, int](), dict[str, int](), dict[str, bool](), dict[str, float]()
    taken, hosts = dict[str, list[float]](), dict[str, list[float]]()

    def turns(wanted: Mapping[str, int]) -> None:
        names = list(wanted)
        for turn in range(max(wanted.values(), default=0)):
            gc.collect()  # what calls left in cycles may hold memory of the device
            first = turn % len(names)  # nobody is always the one behind the pause
            for name in (*names[first:], *names[:first]):
                if turn < wanted[name]:
                    seconds, host = once(calls[name], on_gpu, counts[name], led=led[name])
                    taken[name].append(seconds)
                    hosts[name].append(host)

    for name, call in calls.items():
        for _ in range(plenty.warm_ups - 1):
            call()
        first, host = once(call, on_gpu)
        counts[name] = max(1, min(_MOST, round(_BURST / max(first, 1e-7))))
        led[name] = first < _LONG
        each[name] = max(first * (counts[name] + (on_gpu and led[name])), 1e-7)  # seconds of a round
        wanted = int(plenty.seconds / each[name])
        rounds[name] = 1 if first > plenty.slow else max(plenty.least, min(plenty.rounds, wanted))
        taken[name], hosts[name] = [], [host] if first > plenty.slow else []
    turns(rounds)
    if plenty.further and calls:
        turns({n: min(plenty.further, int(plenty.further_seconds / each[n])) for n in _undecided(taken)})
    found = {}
    for name, call in calls.items():
        host = statistics.median(hosts[name])
        alone = _alone(call, statistics.median(taken[name]), host) if on_gpu else ()
        found[name] = Times(tuple(taken[name]), host, alone, counts[name])
    return found


def _undecided(taken: Mapping[str, list[float]]) -> list[str]:
    """Return the names of contestants that are close to the fastest, and whose times vary."""
    fastest = min(map(statistics.median, taken.values()))
    close = [n for n, times in taken.items() if statistics.median(times) <= CLOSE * fastest]
    return [n for n in close if Times(tuple(taken[n]), 0.0).spread > QUIET]


def _alone(call: Call, seconds: float, host: float) -> tuple[float, ...]:
    if seconds > _HOST_BOUND or host < 0.3 * seconds:
        return ()
    count = max(1, min(4, int(_HOST_BOUND / max(host, 1e-6))))
    idle = 1.5 * count * host + 2e-4
    return tuple(behind_idling(call, idle, count) for _ in range(3))
