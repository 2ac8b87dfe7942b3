"""Faults of a ring: who failed first, and a message that says so on every rank.

Every rank that fails leaves a report in the store of the process group before it raises. A report says what went wrong
and, where a message did not come, whose. The others read the reports when their own turn to fail comes, so that a rank
that lost a neighbour, which had itself lost a neighbour, names the first of them.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import attrs

from attnplan.errors import RingError

GRACE = 3.5
"""Seconds for which a rank that failed waits for the reports of the others."""
ANSWER = 1.0
"""Seconds in which a store answers that is there."""
T = TypeVar("T")


@attrs.frozen
class Report:
    """What one rank says about its failure."""

    rank: int
    step: int
    hop: int
    kind: str
    """``"raised"``: an exception on this rank. ``"lost"``: a peer's message did not come."""
    peer: int
    """Whose message did not come; -1 if it is not known, or none was missing."""
    what: str

    def to_text(self) -> str:
        """Return the report as it is stored."""
        return json.dumps(attrs.asdict(self))


class LostError(Exception):
    """A message did not come, or could not be sent."""

    def __init__(self, peer: int, hop: int, doing: str, error: BaseException) -> None:
        super().__init__(str(error))
        self.peer, self.hop, self.doing, self.error = peer, hop, doing, error


class Board:
    """Where the ranks of one ring leave their reports: keys in the store of the process group."""

    def __init__(self, store: Any, rank: int, ranks: int, name: str) -> None:
        self._store, self.rank, self.ranks, self._name = store, rank, ranks, name

    def post(self, report: Report) -> None:
        """Leave a report; a store that does not answer is left alone."""
        within(ANSWER, lambda: self._store.set(self._key(report.rank), report.to_text()))

    def read(self, ranks: Iterable[int]) -> dict[int, Report]:
        """Return the reports of some ranks that are there by now."""
        found: dict[int, Report] = {}

        def look() -> None:
            for rank in ranks:
                if self._store.check([self._key(rank)]):
                    found[rank] = Report(**json.loads(self._store.get(self._key(rank))))

        within(ANSWER, look)
        return dict(found)

    def collect(self, own: Report, grace: float = GRACE) -> dict[int, Report]:
        """Return the reports of the others: wait for them until one says who began, or the grace is over."""
        end = time.monotonic() + grace
        while True:
            reports = {own.rank: own, **self.read(r for r in range(self.ranks) if r != own.rank)}
            silent = self.ranks - len(reports)
            known = any(r.kind == "raised" for r in reports.values())
            if silent == 1:  # and this one is to blame: there is nothing to wait for
                known = known or culprit(own, reports, self.ranks) not in (-1, *reports)
            if known or not silent or time.monotonic() > end:
                return reports
            time.sleep(0.05)

    def _key(self, rank: int) -> str:
        return f"attnplan/ring/{self._name}/{rank}"


def within(seconds: float, action: Callable[[], object]) -> None:
    """Run an action on a store for some seconds at most: the process that serves it may be gone."""

    def quietly() -> None:
        try:
            action()
        except Exception:  # the store is gone with the rank that served it: there is nothing to read
            return

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)


def culprit(own: Report, reports: Mapping[int, Report], ranks: int) -> int:
    """Return the rank that failed first, as far as the reports tell; -1 if they do not.

    A rank that raised is it. Otherwise it is one that said nothing: the one that this rank waits for, or that the rank
    that it waits for waits for, and so on.

    Examples
    --------
    >>> lost = {0: Report(0, 1, 1, "lost", 1, ""), 1: Report(1, 1, 1, "lost", 2, "")}
    >>> culprit(lost[0], lost, 4)
    2
    """
    raised = [r for r in sorted(reports) if reports[r].kind == "raised"]
    if raised:
        return raised[0]
    rank, seen = own.peer, {own.rank}
    while rank in reports and rank not in seen:
        seen.add(rank)
        rank = reports[rank].peer
    if rank >= 0 and rank not in reports:
        return rank
    silent = [r for r in range(ranks) if r not in reports]
    blamed = [r.peer for r in reports.values() if r.peer in silent]
    return blamed[0] if blamed else silent[0] if len(silent) == 1 else own.peer


def error_of(own: Report, reports: Mapping[int, Report], ranks: int, doing: str) -> RingError:
    """Return the error that this rank raises."""
    first = culprit(own, reports, ranks)
    where = f"step {own.step}" + (f", hop {own.hop}" if own.hop >= 0 else "")
    begun = reports.get(first)
    if begun is not None and begun.kind == "raised":
        why = f"rank {first} raised {begun.what}"
    elif first < 0:
        why = f"a rank did not answer: {own.what}"
    elif first == own.peer:
        why = f"rank {first} did not answer: {own.what}"
    else:
        why = f"rank {first} did not answer other ranks, on which this one depends: {own.what}"
    error = RingError(f"rank {own.rank} of {ranks}, {where}, {doing}: {why}")
    error.rank, error.peer, error.hop, error.step = own.rank, first if first >= 0 else None, own.hop, own.step
    return error


def bounded(action: Callable[[], T], seconds: float) -> T:
    """Return the result of a blocking action, or raise TimeoutError after some seconds."""
    box: list[Any] = []

    def work() -> None:
        try:
            box.append((True, action()))
        except BaseException as error:  # handed to the thread that waits
            box.append((False, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if not box:
        raise TimeoutError(f"timed out after {seconds:g} s")
    done, value = box[0]
    if not done:
        raise value
    result: T = value
    return result
