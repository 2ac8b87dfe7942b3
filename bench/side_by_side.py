"""Rows of a benchmark in processes of their own: prepared side by side, measured one by one, and each may fail alone.

A process prepares its row (it compiles, and runs everything once), says that it is ready, and waits for its turn. Those
that are not ready when the others are measured are stopped meanwhile, and go on afterwards.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ONE_THREAD = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
"""Each row compiles few kernels, one after the other; a pool of compilers for each row would only start slowly."""


class Child:
    """A process that measures one row, in a group of its own: the compilers that it starts end with it."""

    def __init__(self, name: str, command: Sequence[str], folder: Path) -> None:
        self.name, self.into = name, folder / f"{name}.json"
        self.said = (folder / f"{name}.txt").open("w+")
        self.process = subprocess.Popen(
            [*command, "--row", name, "--into", str(self.into)], start_new_session=True, stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=self.said, env={**os.environ, **ONE_THREAD},
        )  # fmt: skip

    @property
    def ready(self) -> bool:
        """Whether it is prepared, or has ended."""
        return _mark(self.into).exists() or self.process.poll() is not None

    def signal(self, number: int) -> None:
        """Send a signal to the process and what it started."""
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, number)

    def measured(self, seconds: float) -> dict[str, Any]:
        """Return its row, or how it ended."""
        assert self.process.stdin is not None
        why = ""
        with suppress(BrokenPipeError):
            self.process.stdin.write(b"go\n")
            self.process.stdin.close()
        try:
            self.process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            why = f"ended after {seconds:.0f} seconds of measuring"
        return self.end(why)

    def end(self, why: str = "") -> dict[str, Any]:
        """End the process, and return the row that it wrote, or why there is none."""
        self.signal(signal.SIGKILL)
        self.process.wait()
        self.said.seek(0)
        said = self.said.read()[-1500:]
        self.said.close()
        if self.into.exists():
            found: dict[str, Any] = json.loads(self.into.read_text(encoding="utf-8"))
            return found
        return {"case": self.name, "error": why or f"ended with {self.process.returncode}: {said}"}


def _mark(into: Path) -> Path:
    return into.with_suffix(".ready")


def write_row(name: str, work: Callable[[], Any], into: Path) -> None:
    """Prepare a row, wait for its turn, measure it, and write it; what goes wrong is its text.

    ``work`` returns the row, or an iterator that stops once when it is prepared, and whose value is the row.
    """
    try:
        row = _in_turn(work, into)
    except Exception as error:  # one row must not lose the others
        traceback.print_exc()
        row = {"case": name, "error": f"{type(error).__name__}: {error}"[:1500]}
    part = into.with_suffix(".part")
    part.write_text(json.dumps(row), encoding="utf-8")
    part.replace(into)


def _in_turn(work: Callable[[], Any], into: Path) -> dict[str, Any]:
    start = time.perf_counter()
    made = work()
    prepared = isinstance(made, Generator)
    if prepared:
        next(made)
    seconds = time.perf_counter() - start
    _mark(into).touch()
    sys.stdin.readline()
    row = _value(made) if prepared else made
    return {**row, "prepared_seconds": round(seconds, 1)}


def _value(made: Generator[None, None, dict[str, Any]]) -> dict[str, Any]:
    """Return the value of a generator that stops no more."""
    try:
        next(made)
    except StopIteration as end:
        found: dict[str, Any] = end.value
        return found
    raise RuntimeError("a row stopped twice")


def run(
    names: Sequence[str],
    command: Sequence[str],
    folder: Path,
    budget: float,
    limit: float,
    done: Callable[[dict[str, Any]], None],
) -> None:
    """Prepare rows side by side, measure them one by one in this order, and call ``done`` with each.

    Parameters
    ----------
    command
        What a process is started with; ``--row NAME --into FILE`` is added.
    folder
        Where processes leave what they found.
    budget
        Seconds for all of it.
    limit
        Most seconds in which one row is measured.
    """
    start = time.perf_counter()
    waiting = {name: Child(name, command, folder) for name in names}
    patience = 0.6 * budget
    try:
        while waiting:
            spent = time.perf_counter() - start
            ready = [name for name, child in waiting.items() if child.ready]
            if spent > budget - 3:
                for name, child in list(waiting.items()):
                    done(child.end(f"not {'measured' if name in ready else 'prepared'} within {budget:.0f} seconds"))
                    del waiting[name]
            elif ready and (len(ready) == len(waiting) or spent > patience):
                others = [child for name, child in waiting.items() if name not in ready]
                for child in others:
                    child.signal(signal.SIGSTOP)
                for name in ready:
                    left = budget - (time.perf_counter() - start)
                    done(waiting.pop(name).measured(min(limit, left)))
                for child in others:
                    child.signal(signal.SIGCONT)
            else:
                time.sleep(0.2)
    finally:
        for child in waiting.values():
            child.end()
