"""The virtual ring: all ranks in one process, in lockstep, buffers handed over."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import attrs
from torch import Tensor

from attnplan.errors import RingError
from attnplan.runtime.ring.exchanges import Received, Routine, Sizes, Start, Wait, size_of

T = TypeVar("T")
_Key = tuple[str, int, int, int]
"""(name, hop, sender, receiver)."""


@attrs.frozen(eq=False)
class _Waiting:
    rank: int
    request: Start


@attrs.frozen(eq=False)
class _Parcel:
    """A message, measured once: a rank sends the same to many."""

    message: tuple[Tensor, ...]
    sizes: Sizes
    bytes: int

    @classmethod
    def of(cls, message: tuple[Tensor, ...]) -> _Parcel:
        return cls(message, tuple((tuple(x.shape), x.dtype) for x in message), size_of(message))


class VirtualRing:
    """Runs the routines of all ranks, each as far as its next wait, until all are done.

    Messages are handed over as they are: a receiver must not write into one.

    Attributes
    ----------
    bytes_sent : list of int
        Bytes that each rank would have sent to another, so far.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.bytes_sent = [0] * ranks
        self.bytes_received = [0] * ranks

    def run(self, routines: Sequence[Routine[T]]) -> list[T]:
        """Return the result of each rank's routine.

        Raises
        ------
        RingError
            If a message has another size than its receiver expects, is never sent, or is never received.
        """
        mail: dict[_Key, _Parcel] = {}
        results: dict[int, T] = {}
        waits: dict[int, _Waiting | None] = dict.fromkeys(range(self.ranks))
        while len(results) < self.ranks:
            moved = False
            for rank, routine in enumerate(routines):
                waiting = waits[rank]
                if rank in results or (waiting is not None and not self._is_there(waiting, mail)):
                    continue
                moved = True
                answer = None if waiting is None else self._deliver(waiting, mail)
                try:
                    waits[rank] = self._advance(rank, routine, answer, mail)
                except StopIteration as finished:
                    results[rank] = finished.value
            if not moved:
                raise self._stuck(waits, mail)
        if mail:
            name, hop, sender, receiver = next(iter(mail))
            raise RingError(f"rank {receiver} never received the {name} that rank {sender} sent it at hop {hop}")
        return [results[rank] for rank in range(self.ranks)]

    def _advance(self, rank: int, routine: Routine[T], answer: Any, mail: dict[_Key, _Parcel]) -> _Waiting:
        """Run a routine up to its next wait."""
        while True:
            request = routine.send(answer)
            if isinstance(request, Wait):
                assert isinstance(request.handle, _Waiting)
                return request.handle
            parcels: dict[int, _Parcel] = {}  # by the identity of messages, which the request keeps alive
            for peer, message in request.sends.items():
                key = (request.name, request.hop, rank, peer)
                if key in mail:
                    raise RingError(f"rank {rank} sends rank {peer} its {request.name} twice at hop {request.hop}")
                parcel = parcels.get(id(message))
                if parcel is None:
                    parcel = parcels[id(message)] = _Parcel.of(message)
                mail[key] = parcel
                self.bytes_sent[rank] += parcel.bytes
            answer = _Waiting(rank, request)

    @staticmethod
    def _keys(waiting: _Waiting) -> dict[int, _Key]:
        request = waiting.request
        return {peer: (request.name, request.hop, peer, waiting.rank) for peer in request.receives}

    def _is_there(self, waiting: _Waiting, mail: dict[_Key, _Parcel]) -> bool:
        return all(key in mail for key in self._keys(waiting).values())

    def _deliver(self, waiting: _Waiting, mail: dict[_Key, _Parcel]) -> Received:
        found = {}
        for peer, key in self._keys(waiting).items():
            parcel = mail.pop(key)
            wanted = waiting.request.receives[peer]
            if parcel.sizes != wanted:
                raise RingError(
                    f"rank {peer} sent rank {waiting.rank} {_shown(parcel.sizes)} as {key[0]} at hop {key[1]}, "
                    f"{_shown(wanted)} was expected"
                )
            self.bytes_received[waiting.rank] += parcel.bytes
            found[peer] = parcel.message
        return found

    def _stuck(self, waits: dict[int, _Waiting | None], mail: dict[_Key, _Parcel]) -> RingError:
        for rank, waiting in waits.items():
            if waiting is None:
                continue
            for peer, key in self._keys(waiting).items():
                if key not in mail:
                    return RingError(f"rank {rank} waits for the {key[0]} of rank {peer} at hop {key[1]}: never sent")
        return RingError("the virtual ring does not advance")


def _shown(sizes: Any) -> str:
    return ", ".join(f"{dtype} {list(shape)}" for shape, dtype in sizes)
