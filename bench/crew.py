"""Several processes that measure a grid on one device: they compile at once, and race one at a time.

Nearly all the time of a grid is spent in first calls, where kernels are compiled and libraries choose among theirs. So
each process plans a spec and checks its contestants beside the others. While one races, the others are stopped: none of
them uses the device, nor the cores from which the racing process calls. Races come in batches: the gate stays open
until a few processes are ready or one has waited, then closes; each process stops before its next first call, and those
that are ready race in turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TextIO

import attrs

from bench.grid import Case
from bench.link import Link
from bench.measuring import PHASES, RACE, Job, Row, Rules, measure
from bench.workers import start

PATIENCE = {"starting": 120.0, "planning": 60.0, RACE: 25.0}
"""Seconds after which a process counts as hung, by what it does."""
PATIENCE_FOR_ONE = 40.0
"""Seconds that a contestant may be on the device without a break."""
PATIENCE_FOR_COMPILERS = 90.0
LAST = 12.0
"""Seconds before the end from which no further spec is started."""
RESERVE = 8.0
"""Seconds before the end from which no further contestant is: those that are ready race then."""
STOPPING = 0.1
"""Seconds that a race waits for the other processes to stand still."""
DEATHS = 20
"""Processes that may die before a run is given up."""
BUDGET_BYTES = 0.7
"""Share of the device's memory that first calls which run at once may need; contexts and libraries have the rest."""
ENOUGH = 3
"""Processes that are ready to race for which the gate closes."""
LINGER = 1.0
"""Seconds after which it closes for one."""
LARGE = 3.0
"""Seconds after which one for which there is too little memory keeps those behind it from the device."""


@attrs.define(eq=False)
class Worker:
    """One process, and what it does."""

    number: int
    process: subprocess.Popen[str]
    doing: str = "starting"
    """A contestant's name, one of :data:`PHASES`, ``"starting"``, ``"planning"`` or ``"idle"``."""
    asks: str = ""
    """The phase or contestant for which it waits to be let in."""
    compiler: str = ""
    """What keeps it off the device meanwhile."""
    since: float = attrs.field(factory=time.monotonic)
    case: Case | None = None
    keeps: int = 0
    """Bytes of the device that it holds where it is not on it."""
    size: int = 0
    """Bytes that it may need beside them while it is."""
    alone: bool = False
    paused: float = 0.0
    """When it was stopped, as it would work on the host while another races; 0 while it goes on."""

    def pause(self) -> None:
        """Stop it for a race: compilers on all cores make a call's host time two to three times what it is."""
        if not self.asks and self.doing != "idle" and not self.paused and self.process.poll() is None:
            self.process.send_signal(signal.SIGSTOP)
            self.paused = time.monotonic()

    def stopped(self) -> bool:
        """Say whether a pause is in effect: a signal sent is not a process stopped, where the host is busy."""
        if not self.paused:
            return True
        flags = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT
        with contextlib.suppress(ChildProcessError):  # it ended, and was waited for
            return os.waitid(os.P_PID, self.process.pid, flags) is not None
        return True

    def resume(self) -> float:
        """Let it go on, and return for how long it was stopped, which counts as nothing that it did."""
        if not self.paused:
            return 0.0
        self.process.send_signal(signal.SIGCONT)
        seconds, self.paused = time.monotonic() - self.paused, 0.0
        self.since += seconds
        return seconds

    def tell(self, message: Row) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it died; its end is noticed elsewhere
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    @property
    def on_device(self) -> bool:
        return self.doing not in ("starting", "planning", "idle") and not self.asks and not self.compiler

    @property
    def waited(self) -> float:
        return time.monotonic() - self.since

    @property
    def hung(self) -> bool:
        if self.asks or self.paused or self.doing == "idle":
            return False
        limit = PATIENCE_FOR_COMPILERS if self.compiler else PATIENCE.get(self.doing, PATIENCE_FOR_ONE)
        return self.waited > limit

    @property
    def label(self) -> str:
        """What its time is spent on, in a word."""
        if self.asks:
            return "waiting for a race" if self.asks == RACE else "waiting for the device"
        if self.compiler:
            return f"compiling: {self.compiler}"
        if self.doing in (*PHASES, "starting", "planning", "idle"):
            return self.doing
        return f"first call: {self.doing.rpartition(' > ')[2]}"


class Crew:
    """Runs a grid.

    Parameters
    ----------
    command
        What starts another worker: it runs :func:`work` on its standard input and output.
    cases
        What is left to measure.
    until
        When to stop, by :func:`time.time`.
    known
        Digests of the graphs that were measured earlier, by candidate, by spec.
    done
        Called with a spec and its rows when it is measured; with None for rows that are up to date.
    begin
        Called with what each worker says about itself.
    started
        The first workers.
    """

    def __init__(
        self,
        command: list[str],
        cases: list[Case],
        until: float,
        known: Mapping[str, Mapping[str, str]],
        done: Callable[[Case, list[Row] | None], None],
        begin: Callable[[Row], None],
        started: list[subprocess.Popen[str]],
    ) -> None:
        self.command, self.until, self.memory = command, until, 0
        self.waiting, self.alone = list(cases), list[Case]()
        self.known, self.done, self.begin = known, done, begin
        self.broken: dict[str, list[Row]] = {}
        self.events: queue.Queue[tuple[Worker, Row]] = queue.Queue()
        self.workers: list[Worker] = []
        self.spent: Counter[str] = Counter()
        """Seconds of all processes, by what they were spent on."""
        self.raced: list[tuple[float, float]] = []
        """When races began and ended, by :func:`time.monotonic`."""
        self.deaths = 0
        self.open = True
        """Whether first calls may use the device; else those that are ready race first."""
        for number, process in enumerate(started):
            self._hire(number, process)

    @property
    def left(self) -> float:
        return self.until - time.time()

    def run(self) -> None:
        """Measure until everything is measured, or the time is over."""
        try:
            while self.workers and self.left > 0 and (self._busy() or (self._more() and self.left > LAST)):
                with contextlib.suppress(queue.Empty):
                    self._heard(*self.events.get(timeout=0.05))
                for worker in [w for w in self.workers if w.hung]:
                    self._lost(worker, "hung")
                self._admit()
        finally:
            print(self._report(), file=sys.stderr, flush=True)
            for worker in self.workers:
                _end(worker)

    def _busy(self) -> bool:
        return any(w.doing != "idle" for w in self.workers)

    def _more(self) -> bool:
        return bool(self.waiting or self.alone)

    def _hire(self, number: int, process: subprocess.Popen[str]) -> None:
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
            self.memory = message["memory"]
            self.begin(message["hello"])
            self._turn(worker, "idle")
        elif "asks" in message:
            worker.size, worker.keeps = message["size"], message["keeps"]
            self._turn(worker, worker.doing, asks=message["asks"])
        elif "leaves" in message:
            worker.keeps = message["keeps"]
            self._turn(worker, worker.doing, compiler=message["leaves"])
        elif "rows" in message:
            worker.keeps = message["keeps"]
            self._finished(worker, message["rows"])

    def _turn(self, worker: Worker, doing: str, *, asks: str = "", compiler: str = "") -> None:
        """Note what a worker does from now on."""
        now = time.monotonic()
        self.spent[worker.label] += now - worker.since
        if worker.doing == RACE and not worker.asks:
            self.raced.append((worker.since, now))
        worker.doing, worker.asks, worker.compiler, worker.since = doing, asks, compiler, now

    def _finished(self, worker: Worker, rows: list[Row] | None) -> None:
        case, alone = worker.case, worker.alone
        assert case is not None
        worker.case = None
        self._turn(worker, "idle")
        if rows is not None and not alone and any("OutOfMemory" in r.get("failed", "") for r in rows):
            self.alone.append(case)  # others had the memory; it is measured again when they are done
        self.done(case, None if rows is None else [*self.broken.get(case.name, []), *rows])

    def _lost(self, worker: Worker, how: str) -> None:
        """Replace a process, and measure its spec anew without the contestant that it was lost in."""
        case, doing = worker.case, worker.doing
        self._turn(worker, "idle")
        _end(worker)
        self.workers.remove(worker)
        self.deaths += 1
        print(f"a process {how} in {doing} of {case.name if case else 'nothing'}", file=sys.stderr, flush=True)
        if case is not None:
            mode = "training" if case.spec.training else "forward"
            facts = {"spec": case.name, "family": case.family, "mode": mode}
            row = {**facts, "candidate": doing, "failed": f"ended the process: {how}"}
            if doing in PHASES or doing == "planning":
                self.done(case, [*self.broken.get(case.name, []), row])
            else:
                self.broken.setdefault(case.name, []).append(row)
                (self.alone if worker.alone else self.waiting).insert(0, case)
        if self.deaths <= DEATHS:
            self._hire(worker.number, start(self.command))

    def _admit(self) -> None:
        self._hand_out()
        if any(w.doing == RACE and not w.asks for w in self.workers):
            return
        self.spent["stopped for a race"] += sum(w.resume() for w in self.workers)
        ready = sorted((w for w in self.workers if w.asks == RACE), key=lambda w: w.since)
        if not ready:
            self.open = True
        elif len(ready) >= ENOUGH or ready[0].waited >= LINGER:
            self.open = False
        if self.open:
            self._let_in()
        if ready and not any(w.on_device for w in self.workers):
            self.open = False
            for other in self.workers:
                if other is not ready[0]:
                    other.pause()
            self._still()
            self._let(ready[0])

    def _still(self) -> None:
        """Wait until the processes that are paused stand still; one in a driver's call gets no longer than this."""
        end = time.monotonic() + STOPPING
        while not all(w.stopped() for w in self.workers) and time.monotonic() < end:
            time.sleep(0.0002)

    def _let_in(self) -> None:
        """Let first calls begin in the order in which they were asked for, while there is memory."""
        taken = sum(w.keeps + w.size * w.on_device for w in self.workers)
        for worker in sorted((w for w in self.workers if w.asks and w.asks != RACE), key=lambda w: w.since):
            if taken + worker.size <= BUDGET_BYTES * self.memory or not any(w.on_device for w in self.workers):
                self._let(worker)
                taken += worker.size
            elif worker.waited > LARGE:
                return

    def _let(self, worker: Worker) -> None:
        self._turn(worker, worker.asks)
        worker.tell({"go": True})

    def _hand_out(self) -> None:
        for worker in self.workers:
            if worker.doing != "idle" or self.left < LAST:
                continue
            if self.waiting:
                self._give(worker, self.waiting.pop(0), alone=False)
            elif self.alone and all(w.doing in ("idle", "starting") for w in self.workers):
                for other in [w for w in self.workers if w is not worker]:  # their memory is wanted
                    self._turn(other, "idle")
                    _end(other)
                self.workers = [worker]
                self._give(worker, self.alone.pop(0), alone=True)
                return

    def _give(self, worker: Worker, case: Case, *, alone: bool) -> None:
        worker.case, worker.alone = case, alone
        self._turn(worker, "planning")
        broken = [r["candidate"] for r in self.broken.get(case.name, [])]
        known = dict(self.known.get(case.name, {}))
        job = {"spec": case.name, "left": self.left - RESERVE, "broken": broken, "known": known, "alone": alone}
        worker.tell(job)

    def _report(self) -> str:
        """Say what the time was spent on, and what each worker does now."""
        spent = self.spent.copy()
        lines = []
        for worker in self.workers:
            spent[worker.label] += worker.waited
            of = f" ({worker.asks or worker.doing})" if worker.case else ""
            spec = f", {worker.case.name}" if worker.case else ""
            lines.append(f"  process {worker.number}: {worker.label} for {worker.waited:.1f} s{of}{spec}")
        racing = sum(end - begin for begin, end in self.raced)
        since = time.monotonic() - self.raced[0][0] if self.raced else 0.0
        share = f"{len(self.raced)} races, {racing:.0f} s of the {since:.0f} s since the first began"
        sums = [f"  {seconds:7.1f}  {label}" for label, seconds in spent.most_common() if seconds >= 0.05]
        title = "seconds of all processes, by what they were spent on:"
        return "\n".join([share, title, *sums, "at the end:", *lines])


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
    link = Link(given, said, lambda: _settle(rules))
    link.say({"hello": about, "memory": rules.target.device.memory})
    for message in link.jobs():
        case = cases[message["spec"]]
        if rules.may_compile:
            import torch._dynamo  # noqa: F401  # its compilations are watched from the first on
        job = Job(case, message["left"], frozenset(message["broken"]), message["known"], message["alone"])
        link.finish(_rows(job, rules, link))


def _rows(job: Job, rules: Rules, link: Link) -> list[Row] | None:
    from attnplan.harness.entrants import PoisonedError, poisons

    try:
        return measure(job, rules, link.gate, link.clock)
    except Exception as error:  # one spec that fails must not cost the others
        if isinstance(error, PoisonedError) or poisons(error):  # the next process starts without the contestant
            print(f"{job.case.name}: {error}", file=sys.stderr, flush=True)
            os._exit(70)
        mode = "training" if job.case.spec.training else "forward"
        facts = {"spec": job.case.name, "family": job.case.family, "mode": mode}
        return [{**facts, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}]


def _settle(rules: Rules) -> int:
    """Leave the device to others, with all memory that is not in use, and return the bytes that are."""
    if rules.target.device.kind != "cuda":
        return 0
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()
