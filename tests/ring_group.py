"""Runs a function in a group of processes over gloo, under a hard deadline, and says how each of them ended."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

import attrs

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["tests.ring_workers", "torch.fx.experimental.symbolic_shapes"]
)  # which backward imports


class Clock:
    """When what is timed began, in this process."""

    start: ClassVar[float] = 0.0

    @classmethod
    def begin(cls) -> None:
        """Start again: what came before is not timed."""
        cls.start = time.monotonic()


@attrs.frozen
class Ended:
    """How one process ended."""

    rank: int
    value: Any = None
    error: str = ""
    """``"RingError: ..."``, empty if it ended well."""
    facts: tuple[Any, ...] = ()
    """(rank, peer, hop, step) of a RingError."""
    cause: str = ""
    trace: str = ""
    seconds: float = 0.0
    """Since the start, or since :meth:`Clock.begin` was called last."""
    exit_code: int | None = None


def _child(rank: int, ranks: int, meeting: str, sender: Connection, function: Callable[..., Any], args: Any) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(meeting, ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
    Clock.begin()
    try:
        ended = Ended(rank, function(rank, *args))
    except Exception as error:
        facts = tuple(getattr(error, name, None) for name in ("rank", "peer", "hop", "step"))
        cause = "" if error.__cause__ is None else f"{type(error.__cause__).__name__}: {error.__cause__}"
        ended = Ended(rank, None, f"{type(error).__name__}: {error}", facts, cause, traceback.format_exc())
    sender.send(attrs.evolve(ended, seconds=time.monotonic() - Clock.start))
    sender.close()
    os._exit(1 if ended.error else 0)  # torn connections would make the group's own farewell wait


def run_group(
    ranks: int, function: Callable[..., Any], *args: Any, deadline: float = 60.0, hangs: int = -1
) -> list[Ended]:
    """Run ``function(rank, *args)`` in a process for each rank; what is still running at the deadline is killed.

    A rank that ``hangs`` is killed as soon as the others have ended.

    Returns
    -------
    list of Ended
        One for each rank; a process that died without a word has its exit code, one that was killed has None.
    """
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        pipes = [CONTEXT.Pipe(duplex=False) for _ in range(ranks)]
        processes = [
            CONTEXT.Process(target=_child, args=(rank, ranks, meeting, pipes[rank][1], function, args), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        for _, sender in pipes:
            sender.close()
        end = time.monotonic() + deadline
        found = []
        for rank, (process, (receiver, _)) in enumerate(zip(processes, pipes, strict=True)):
            ended = Ended(rank)
            if rank == hangs:
                found.append(ended)
                continue
            if receiver.poll(max(0.0, end - time.monotonic())):
                try:
                    ended = receiver.recv()
                except EOFError:  # it died without a word
                    process.join(5)
            process.join(max(0.0, min(2.0, end - time.monotonic())))
            found.append(attrs.evolve(ended, exit_code=process.exitcode))
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
        return found


def values(ended: list[Ended]) -> list[Any]:
    """Return what the processes returned, all of which must have ended well."""
    for one in ended:
        assert not one.error, f"rank {one.rank}: {one.trace}"
        assert one.exit_code == 0, f"rank {one.rank} ended with {one.exit_code} and said nothing"
    return [one.value for one in ended]
