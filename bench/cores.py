"""The cores of a host on which Python runs fastest: where a race is run from.

    taskset -c $(python -m bench.cores) python -m bench.longnet --gpu
    python -m bench.cores --watch 10  # how fast each core is, again and again for ten seconds

A call of microseconds is paid by the host, and cores of one host differ, as others share them. The process that races
stays on the fastest of the moment, as ``taskset`` would keep it there, and says in its rows how fast they were.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KEPT = 2
"""Cores that a race has: the calling thread's, and one for that of autograd."""
TURNS = 2
"""Times that each core is tried; the faster counts."""


def pace() -> float:
    """Return the seconds of a fixed piece of plain Python, about a sixth of a millisecond.

    That of :mod:`bench.spine` takes a hundred times as long, too long for every core before every race.
    """
    start = time.perf_counter()
    found: dict[int, int] = {}
    for i in range(4000):
        found[i & 63] = i
    return time.perf_counter() - start


@contextmanager
def on_the_fastest() -> Iterator[dict[str, Any]]:
    """Keep all threads of this process on the fastest cores, and yield which they are and how fast all of them were.

    Yields nothing where a process cannot be kept on cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield {}
        return
    allowed = os.sched_getaffinity(0)
    try:
        taken = paces()
        fastest = sorted(taken, key=lambda core: taken[core])[:KEPT]
        _keep_on(set(fastest))
        yield {"cores": fastest, "pace": taken[fastest[0]], "median pace": statistics.median(taken.values())}
    finally:
        _keep_on(allowed)


def paces() -> dict[int, float]:
    """Return the pace on each core that this process may use; the calling thread ends up on the last."""
    return {core: _pace_on(core) for core in sorted(os.sched_getaffinity(0))}


def _pace_on(core: int) -> float:
    os.sched_setaffinity(0, {core})
    return min(pace() for _ in range(TURNS))


def _keep_on(cores: set[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cores)
        except OSError:  # a thread that ended meanwhile
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, default=KEPT + 1, help="cores to name, the fastest first")
    parser.add_argument("--watch", type=float, default=0.0, metavar="SECONDS", help="print microseconds of every core")
    given = parser.parse_args()
    allowed, end = os.sched_getaffinity(0), time.monotonic() + given.watch
    while given.watch and time.monotonic() < end:
        print(" ".join(f"{1e6 * taken:.0f}" for taken in paces().values()), flush=True)
        _keep_on(allowed)
        time.sleep(min(0.5, given.watch / 4))
    if not given.watch:
        found = paces()
        print(",".join(map(str, sorted(found, key=lambda core: found[core])[: given.keep])))


if __name__ == "__main__":
    main()
