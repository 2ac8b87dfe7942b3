"""A worker's end of the line to its crew: it asks for the device, and leaves it while a compiler works."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from typing import TextIO

from bench.compilers import watch
from bench.measuring import RACE, Row


class Link:
    """Keeps a worker from the device until it is let in.

    Parameters
    ----------
    given, said
        Where messages come from and go to.
    settle
        Waits until nothing of this process runs on the device, and returns how many bytes of it are still taken.
    """

    def __init__(self, given: TextIO, said: TextIO, settle: Callable[[], int]) -> None:
        self.given, self.said, self.settle = given, said, settle
        self.inside = ""
        """What this process is on the device for; empty while it is not on it."""
        self.size = 0
        self.kept_waiting = 0.0

    def say(self, message: Row) -> None:
        self.said.write(json.dumps(message) + "\n")
        self.said.flush()

    def jobs(self) -> Iterator[Row]:
        """Iterate over what is to be done, until nobody asks any more."""
        while line := self.given.readline():
            yield json.loads(line)

    def finish(self, rows: list[Row] | None) -> None:
        self.inside = ""
        self.say({"rows": rows, "keeps": self.settle()})

    def gate(self, name: str, size: int) -> None:
        """Wait until what comes next may use the device.

        Parameters
        ----------
        name
            One of :data:`PHASES`, or a contestant.
        size
            Bytes that it may need on the device beside what is taken.
        """
        watch(self.away)
        self.size = size
        self._ask(name, self.settle())

    @contextlib.contextmanager
    def away(self, compiler: str) -> Iterator[None]:
        """Leave the device to others within, unless this process is not on it, or has it to itself for a race."""
        name = self.inside
        if name in ("", RACE):
            yield
            return
        keeps = self.settle()
        self.inside = ""
        self.say({"leaves": compiler, "keeps": keeps})
        try:
            yield
        finally:
            self._ask(name, keeps)

    def clock(self) -> float:
        """Return a time in seconds that stands still while this process is kept waiting."""
        return time.perf_counter() - self.kept_waiting

    def _ask(self, name: str, keeps: int) -> None:
        start = time.perf_counter()
        self.inside = ""
        self.say({"asks": name, "size": self.size, "keeps": keeps})
        if not self.given.readline():
            os._exit(71)  # nobody asks any more; a compiler that calls this from a thread could not end the process
        self.inside = name
        self.kept_waiting += time.perf_counter() - start
