"""What a rank asks of a transport, and who answers: the interface of real, virtual and dry transports.

The executor of a rank is a generator. It yields :class:`Start` and is sent a handle, goes on computing, and yields
:class:`Wait` to be sent what has arrived. So one executor runs on a process group, beside others in one process, and
without data.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any, Protocol, TypeVar

import attrs
import torch
from torch import Tensor

from attnplan.ring.program import Collective

Sizes = tuple[tuple[tuple[int, ...], torch.dtype], ...]
"""Shape and dtype of each tensor of a message."""


@attrs.frozen(eq=False)
class Start:
    """Begin to send and receive. A message may be views of what its sender holds, who does not write to it."""

    name: str
    """What it is for, as errors say it: ``"keys and values"``, ``"gradients of keys and values"``, ``"queries"``..."""
    hop: int
    collective: Collective
    sends: Mapping[int, tuple[Tensor, ...]]
    receives: Mapping[int, Sizes]


@attrs.frozen(eq=False)
class Wait:
    """Wait for what a started exchange receives: ``{peer: tensors}``."""

    handle: Any


Received = Mapping[int, tuple[Tensor, ...]]
T = TypeVar("T")
Routine = Generator[Start | Wait, Any, T]
"""A rank's part of a call: yields requests, returns its result."""


class Transport(Protocol):
    """Moves messages between ranks."""

    bytes_sent: int
    bytes_received: int

    def start(self, request: Start) -> Any:
        """Begin an exchange and return a handle, without waiting."""
        ...

    def wait(self, handle: Any) -> Received:
        """Return what has arrived from each peer."""
        ...


def run(routine: Routine[T], transport: Transport) -> T:
    """Run a rank's routine on a transport of its own."""
    answer: Any = None
    while True:
        try:
            request = routine.send(answer)
        except StopIteration as finished:
            result: T = finished.value
            return result
        answer = transport.start(request) if isinstance(request, Start) else transport.wait(request.handle)


def size_of(message: tuple[Tensor, ...]) -> int:
    """Return the bytes of a message."""
    return sum(x.nbytes for x in message)


def size_in(sizes: Sizes) -> int:
    """Return the bytes of a message that is to come."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in sizes)
