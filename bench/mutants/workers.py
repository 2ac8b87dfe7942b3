"""All mutants, in worker processes that are killed when they take too long."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from attnplan.errors import VerifyError
from bench.mutants.judging import Baseline, Result, examine
from bench.mutants.pipelines import TIME_LIMIT
from bench.mutants.syntax import Mutant


def _serve(pipe: Connection) -> None:
    """Judge mutants until killed; runs in a process of its own."""
    torch.set_num_threads(1)
    baseline = Baseline.compute()
    pipe.send("ready")
    while True:
        module, source = pipe.recv()
        pipe.send(examine(module, source, baseline))


class Worker:
    """A process that judges one mutant at a time and is replaced when one takes too long."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.task: int | None = None
        self.deadline = float("inf")

    def submit(self, number: int, mutant: Mutant, limit: float) -> None:
        """Start on a mutant."""
        self.ready, self.task, self.deadline = False, number, time.monotonic() + limit
        self.pipe.send((mutant.module, mutant.source()))

    def collect(self) -> Result | None:
        """Return what the process has to say, once its pipe is readable; None if only that it is ready.

        Raises
        ------
        VerifyError
            If the process ended before it was ready: the unmutated code fails.
        """
        try:
            answer = self.pipe.recv()
        except EOFError:
            if self.task is None:
                raise VerifyError("the unmutated code does not pass; see the traceback above") from None
            return self.replace("crash")
        result = None if self.task is None else (self.task, answer)
        self.ready, self.task, self.deadline = True, None, float("inf")
        return result

    def replace(self, verdict: str) -> Result:
        """Give up on the mutant at hand with a verdict, and start a fresh process."""
        assert self.task is not None
        result = self.task, {"verdict": verdict, "by": {}, "counts": {}}
        self.stop()
        self._start()
        return result

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.pipe.close()


def _results(chosen: Sequence[Mutant], workers: Sequence[Worker], limit: float) -> Iterator[Result]:
    """Iterate over (number, verdict) of the mutants as they are done."""
    waiting = deque(enumerate(chosen))
    missing = len(chosen)
    while missing:
        soonest = min(w.deadline for w in workers)
        readable = wait([w.pipe for w in workers], None if soonest == float("inf") else soonest - time.monotonic())
        for worker in workers:
            result = None
            # The deadline comes first: an answer that is late counts as none, however the two race.
            if time.monotonic() >= worker.deadline:
                result = worker.replace("timeout")
            elif worker.pipe in readable:
                result = worker.collect()
            if result is not None:
                missing -= 1
                yield result
            if worker.ready and waiting:
                worker.submit(*waiting.popleft(), limit)


def run(chosen: Sequence[Mutant], jobs: int = 2, limit: float = TIME_LIMIT) -> list[dict[str, Any]]:
    """Judge mutants in worker processes and return one row for each.

    Raises
    ------
    VerifyError
        If the unmutated code does not pass its own proof.
    """
    rows: list[dict[str, Any]] = [{} for _ in chosen]
    workers = [Worker() for _ in range(min(jobs, len(chosen)))]
    console = Console(stderr=True)
    columns = (TextColumn("mutants"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            bar = progress.add_task("mutants", total=len(chosen))
            for number, answer in _results(chosen, workers, limit):
                mutant = chosen[number]
                place = {"file": mutant.file, "line": mutant.line, "kind": mutant.kind}
                rows[number] = {**place, "original": mutant.original, "mutated": mutant.mutated, **answer}
                progress.advance(bar)
    finally:
        for worker in workers:
            worker.stop()
    return rows
