"""The real ring: a process group of torch.distributed (gloo or NCCL)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any

import attrs
import torch
import torch.distributed as dist
from torch import Tensor

from attnplan.runtime.ring.exchanges import Received, Sizes, Start, size_in, size_of
from attnplan.runtime.ring.faults import LostError

BATCH = 64
"""Messages of one batch of point-to-point calls: NCCL has hung on very large ones (pytorch #174288)."""
_PHASES = ("queries", "keys and values", "gradients of outputs", "gradients of keys and values", "outputs",
           "gradients of queries")  # fmt: skip
_TENSORS = 4


@attrs.frozen(eq=False)
class Pending:
    """A started exchange. The tensors that are sent are kept until it is over."""

    request: Start
    works: tuple[tuple[int, Any], ...]
    """Each with the peer that it concerns, -1 where it is all of them."""
    received: Mapping[int, tuple[Tensor, ...]]
    kept: Any


class RealTransport:
    """Moves messages over a process group.

    Parameters
    ----------
    group
        The process group; rank r of the ring is rank r of the group.
    device
        Where messages live.
    timeout
        Seconds for which a rank waits for another.
    """

    def __init__(self, group: Any, device: torch.device, timeout: float) -> None:
        self.group, self.device, self.timeout = group, device, timeout
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.bytes_sent = self.bytes_received = 0
        self._blocks = device.type != "cuda"  # waiting for NCCL orders streams, and returns at once

    def start(self, request: Start) -> Pending:
        """Begin an exchange."""
        self.bytes_sent += sum(map(size_of, request.sends.values()))
        self.bytes_received += sum(map(size_in, request.receives.values()))
        try:
            if request.collective == "p2p":
                return self._point_to_point(request)
            if request.collective == "all-gather" and self._is_uniform(request):
                return self._all_gather(request)
            return self._all_to_all(request)
        except RuntimeError as error:
            raise LostError(-1, request.hop, request.name, error) from error

    def wait(self, handle: Pending) -> Received:
        """Return what has arrived.

        Raises
        ------
        LostError
            If a peer is gone, or does not answer in time.
        """
        for peer, work in handle.works:
            try:
                if self._blocks:
                    work.wait(timedelta(seconds=self.timeout))
                else:
                    work.wait()
            except RuntimeError as error:
                raise LostError(peer, handle.request.hop, handle.request.name, error) from error
        return handle.received

    def _empty(self, sizes: Sizes) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype in sizes)

    def _point_to_point(self, request: Start) -> Pending:
        received = {peer: self._empty(sizes) for peer, sizes in request.receives.items()}
        sends = _contiguous(request.sends)
        operations = [
            *(self._operation(dist.isend, x, peer, request, i) for peer, x, i in _numbered(sends)),
            *(self._operation(dist.irecv, x, peer, request, i) for peer, x, i in _numbered(received)),
        ]
        works: list[tuple[int, Any]] = []
        rest = iter(operations)
        while batch := list(islice(rest, BATCH)):
            started = dist.batch_isend_irecv([operation for _, operation in batch])
            each = [peer for peer, _ in batch] if len(started) == len(batch) else [-1] * len(started)
            works += zip(each, started, strict=True)
        return Pending(request, tuple(works), received, sends)

    def _operation(self, kind: Any, x: Tensor, peer: int, request: Start, number: int) -> tuple[int, Any]:
        tag = (_PHASES.index(request.name) * _TENSORS + number) * (1 << 21) + max(request.hop, 0)
        return peer, dist.P2POp(kind, x, group=self.group, tag=tag, group_peer=peer)

    def _is_uniform(self, request: Start) -> bool:
        """Return whether every rank sends the same number of bytes to every other, and the same tensors."""
        messages = list(request.sends.values())
        sizes = {size_of(m) for m in messages} | {size_in(s) for s in request.receives.values()}
        same = all(m is messages[0] for m in messages)
        return len(messages) == len(request.receives) == self.ranks - 1 and len(sizes) == 1 and same

    def _all_gather(self, request: Start) -> Pending:
        own = _packed(next(iter(request.sends.values())), self.device)
        everything = own.new_empty(self.ranks * own.numel())
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        work = gather(everything, own, group=self.group, async_op=True)
        parts = torch.split(everything, own.numel())
        received = {peer: _unpacked(parts[peer], sizes) for peer, sizes in request.receives.items()}
        return Pending(request, ((-1, work),), received, own)

    def _all_to_all(self, request: Start) -> Pending:
        messages = [request.sends.get(peer, ()) for peer in range(self.ranks)]
        sends = [size_of(m) for m in messages]
        receives = [size_in(request.receives.get(peer, ())) for peer in range(self.ranks)]
        own = _packed([x for m in messages for x in m], self.device)
        everything = own.new_empty(sum(receives))
        work = dist.all_to_all_single(everything, own, receives, sends, group=self.group, async_op=True)
        parts = torch.split(everything, receives)
        received = _Unpacking({p: (parts[p], sizes) for p, sizes in request.receives.items()})
        return Pending(request, ((-1, work),), received, own)


class _Unpacking(Mapping[int, tuple[Tensor, ...]]):
    """Messages of one buffer, taken apart when they are asked for: a part that is not aligned has to be copied."""

    def __init__(self, parts: Mapping[int, tuple[Tensor, Sizes]]) -> None:
        self._parts = parts
        self._made: dict[int, tuple[Tensor, ...]] = {}

    def __getitem__(self, peer: int) -> tuple[Tensor, ...]:
        if peer not in self._made:
            self._made[peer] = _unpacked(*self._parts[peer])
        return self._made[peer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


def _numbered(messages: Mapping[int, Sequence[Tensor]]) -> Iterator[tuple[int, Tensor, int]]:
    """Iterate over the tensors that are not empty, in the order of peers: (peer, tensor, its number in the message)."""
    for peer in sorted(messages):
        for i, x in enumerate(messages[peer]):
            if x.numel():
                yield peer, x, i


def _contiguous(messages: Mapping[int, tuple[Tensor, ...]]) -> dict[int, tuple[Tensor, ...]]:
    """Return messages as a process group takes them, one that goes to many copied once."""
    made = {id(m): tuple(x.contiguous() for x in m) for m in messages.values()}
    return {peer: made[id(m)] for peer, m in messages.items()}


def _packed(message: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return a message as bytes."""
    if not message:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.cat([x.contiguous().view(-1).view(torch.uint8) for x in message])


def _unpacked(data: Tensor, sizes: Sizes) -> tuple[Tensor, ...]:
    """Return the tensors of a message of bytes, as views where they are aligned."""
    found, start = [], 0
    for shape, dtype in sizes:
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        part = data[start:stop]
        part = part if part.storage_offset() % dtype.itemsize == 0 else part.clone()
        found.append(part.view(dtype).view(shape))
        start = stop
    return tuple(found)
