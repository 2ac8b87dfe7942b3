"""Several processes that measure a grid on one device: they compile at once, and race one at a time.

Nearly all the time of a grid is spent in first calls, where kernels are compiled and libraries choose among theirs;
that is work of the host. So each process plans a spec and checks its contestants beside the others. A race starts when
no other process uses the device, and no other uses it until the race is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

import attrs

from bench.grid import Case
from bench.measuring import PHASES, PREPARATION, RACE, Job, Row, Rules, measure

PATIENCE = {"starting": 120.0, "planning": 60.0, RACE: 25.0}
"""Seconds after which a process counts as hung, by what it does."""
PATIENCE_FOR_ONE = 60.0
"""Seconds that one contestant may take to compile and be checked."""
RESERVE = 8.0
"""Seconds before the end from which no further spec is started."""
DEATHS = 20
"""Processes that may die before a run is given up."""
BUDGET_BYTES = 0.75
"""Share of the device's memory that specs which are checked at once may need."""


@attrs.define(eq=False)
class Worker:
    """One process, and what it does."""

    number: int
    process: subprocess.Popen[str]
    doing: str = "starting"
    """A contestant's name, one of :data:`PHASES`, ``"starting"``, ``"planning"`` or ``"idle"``."""
    asks: str = ""
    """The phase that it waits to be let into."""
    since: float = attrs.field(factory=time.monotonic)
    case: Case | None = None
    size: int = 0
    alone: bool = False

    def tell(self, message: Row) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it died; its end is noticed elsewhere
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def does(self, doing: str) -> None:
        self.doing, self.since, self.asks = doing, time.monotonic(), ""

    @property
    def on_device(self) -> bool:
        return self.doing not in ("starting", "planning", "idle") and not self.asks

    @property
    def hung(self) -> bool:
        limit = float("inf") if self.asks or self.doing == "idle" else PATIENCE.get(self.doing, PATIENCE_FOR_ONE)
        return time.monotonic() - self.since > limit


class Crew:
    """Runs a grid.

    Parameters
    ----------
    command
        What starts a worker: it runs :func:`work` on its standard input and output.
    cases
        What is left to measure.
    count
        Number of processes.
    until
        When to stop, by :func:`time.time`.
    memory
        Bytes of the device.
    known
        Digests of the graphs that were measured earlier, by candidate, by spec.
    done
        Called with a spec and its rows when it is measured; with None for rows that are up to date.
    start
        Called with what the first worker says about itself.
    """

    def __init__(
        self,
        command: list[str],
        cases: list[Case],
        count: int,
        until: float,
        memory: int,
        known: Mapping[str, Mapping[str, str]],
        done: Callable[[Case, list[Row] | None], None],
        start: Callable[[Row], None],
    ) -> None:
        self.command, self.until, self.memory = command, until, memory
        self.waiting, self.alone = list(cases), list[Case]()
        self.known, self.done, self.start = known, done, start
        self.broken: dict[str, list[Row]] = {}
        self.events: queue.Queue[tuple[Worker, Row]] = queue.Queue()
        self.workers: list[Worker] = []
        self.deaths = 0
        self.gathering = True
        """Whether specs may be checked; else those that are checked are raced first."""
        for number in range(max(1, min(count, len(cases)))):
            self._hire(number)

    @property
    def left(self) -> float:
        return self.until - time.time()

    def run(self) -> None:
        """Measure until everything is measured, or the time is over."""
        try:
            while self.workers and self.left > 0 and (self._busy() or (self._more() and self.left > RESERVE)):
                with contextlib.suppress(queue.Empty):
                    self._heard(*self.events.get(timeout=0.2))
                for worker in [w for w in self.workers if w.hung]:
                    self._lost(worker, "hung")
                self._admit()
        finally:
            for worker in self.workers:
                _end(worker)

    def _busy(self) -> bool:
        return any(w.doing != "idle" for w in self.workers)

    def _more(self) -> bool:
        return bool(self.waiting or self.alone)

    def _hire(self, number: int) -> None:
        env = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, bufsize=1
        )
        worker = Worker(number, process)
        self.workers.append(worker)
        threading.Thread(target=self._listen, args=(worker,), daemon=True).start()

    def _listen(self, worker: Worker) -> None:
        assert worker.process.stdout is not None
        for line in worker.process.stdout:
            self.events.put((worker, json.loads(line)))
        self.events.put((worker, {"ended": worker.process.wait()}))

    def _heard(self, worker: Worker, message: Row) -> None:
        if worker not in self.workers:  # it was given up
            return
        if "ended" in message:
            self._lost(worker, f"died with code {message['ended']}")
        elif "hello" in message:
            self.start(message["hello"])
            worker.does("idle")
        elif "asks" in message:
            worker.asks, worker.size = message["asks"], max(worker.size, message["size"])
        elif "does" in message:
            worker.does(message["does"])
        elif "rows" in message:
            self._finished(worker, message["rows"])

    def _finished(self, worker: Worker, rows: list[Row] | None) -> None:
        case, alone = worker.case, worker.alone
        assert case is not None
        worker.case, worker.size = None, 0
        worker.does("idle")
        if rows is not None and not alone and any("OutOfMemory" in r.get("failed", "") for r in rows):
            self.alone.append(case)  # others had the memory; it is measured again when they are done
            return
        self.done(case, None if rows is None else [*self.broken.pop(case.name, []), *rows])

    def _lost(self, worker: Worker, how: str) -> None:
        """Replace a process, and measure its spec anew without the contestant that it was lost in."""
        case, doing = worker.case, worker.doing
        _end(worker)
        self.workers.remove(worker)
        self.deaths += 1
        print(f"a process {how} in {doing} of {case.name if case else 'nothing'}", file=sys.stderr, flush=True)
        if case is not None:
            mode = "training" if case.spec.training else "forward"
            facts = {"spec": case.name, "family": case.family, "mode": mode}
            row = {**facts, "candidate": doing, "failed": f"ended the process: {how}"}
            if doing in PHASES or doing == "planning":
                self.done(case, [*self.broken.pop(case.name, []), row])
            else:
                self.broken.setdefault(case.name, []).append(row)
                (self.alone if worker.alone else self.waiting).insert(0, case)
        if self.deaths <= DEATHS:
            self._hire(worker.number)

    def _admit(self) -> None:
        self._hand_out()
        if any(w.doing == RACE for w in self.workers):
            return
        ready = [w for w in self.workers if w.asks == RACE]
        coming = any(w.doing == "planning" and not w.asks for w in self.workers)
        if not ready:
            self.gathering = True
        elif 2 * len(ready) >= len(self.workers):
            self.gathering = False
        if self.gathering:
            for worker in [w for w in self.workers if w.asks == PREPARATION]:
                taken = sum(w.size for w in self.workers if w.on_device or w.asks == RACE)
                if taken == 0 or taken + worker.size <= BUDGET_BYTES * self.memory:
                    self._let(worker)
        if ready and not any(w.on_device for w in self.workers) and not (self.gathering and coming):
            self.gathering = False
            self._let(ready[0])

    def _let(self, worker: Worker) -> None:
        worker.does(worker.asks)
        worker.tell({"go": True})

    def _hand_out(self) -> None:
        for worker in self.workers:
            if worker.doing != "idle" or self.left < RESERVE:
                continue
            if self.waiting:
                self._give(worker, self.waiting.pop(0), alone=False)
            elif self.alone and all(w.doing in ("idle", "starting") for w in self.workers):
                for other in [w for w in self.workers if w is not worker]:  # their memory is wanted
                    _end(other)
                self.workers = [worker]
                self._give(worker, self.alone.pop(0), alone=True)
                return

    def _give(self, worker: Worker, case: Case, *, alone: bool) -> None:
        worker.case, worker.alone = case, alone
        worker.does("planning")
        broken = [r["candidate"] for r in self.broken.get(case.name, [])]
        known = dict(self.known.get(case.name, {}))
        job = {"spec": case.name, "left": self.left - 2, "broken": broken, "known": known, "alone": alone}
        worker.tell(job)


def _end(worker: Worker) -> None:
    worker.process.kill()
    worker.process.wait()


def work(rules: Rules, cases: Mapping[str, Case], about: Row, given: TextIO, said: TextIO) -> None:
    """Measure the specs that arrive as lines, and say what is done.

    Parameters
    ----------
    rules
        What is the same for all.
    cases
        The grid, by name.
    about
        What to say first.
    given, said
        Where messages come from and go to.
    """

    def say(message: Row) -> None:
        said.write(json.dumps(message) + "\n")
        said.flush()

    def gate(name: str, size: int) -> None:
        if name in PHASES:
            _settle(rules)
            say({"asks": name, "size": size})
            if not given.readline():
                raise SystemExit("nobody asks any more")
        else:
            say({"does": name})

    say({"hello": about})
    for message in _messages(given):
        case = cases[message["spec"]]
        job = Job(case, message["left"], frozenset(message["broken"]), message["known"], message["alone"])
        say({"rows": _rows(job, rules, gate)})
        _settle(rules)


def _messages(given: TextIO) -> Iterator[Row]:
    while line := given.readline():
        yield json.loads(line)


def _rows(job: Job, rules: Rules, gate: Callable[[str, int], None]) -> list[Row] | None:
    from attnplan.harness.entrants import PoisonedError

    try:
        return measure(job, rules, gate)
    except PoisonedError as error:  # the next process starts without the contestant
        print(f"{job.case.name}: {error}", file=sys.stderr, flush=True)
        os._exit(70)
    except Exception as error:  # one spec that fails must not cost the others
        mode = "training" if job.case.spec.training else "forward"
        facts = {"spec": job.case.name, "family": job.case.family, "mode": mode}
        return [{**facts, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}]


def _settle(rules: Rules) -> None:
    """Leave the device to others: nothing runs, and no memory is kept beside what is in use."""
    import torch

    if rules.target.device.kind == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
