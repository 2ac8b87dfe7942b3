"""Streams: attention over tensors in host memory or files, of which the device holds a few pieces at a time.

Three things overlap on a CUDA device: the copy of the next piece, the computing of this one, and the copy of the last
result back. Keys and values that the next piece needs, too, stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from attnplan.errors import SpecError, StreamError
from attnplan.ir import Graph
from attnplan.passes.chunk import Part, normal, origin
from attnplan.runtime.files import Store, Where
from attnplan.runtime.loops import _forget_masks, piece_operands

Progress = Callable[[int, int], None]


@attrs.frozen
class Work:
    """One piece of one batch element."""

    batch: int
    part: Part
    group: int
    """Query heads per key/value head."""

    @property
    def queries(self) -> Where:
        """Where its queries and its output lie."""
        piece = self.part.piece
        heads = slice(piece.head * self.group, (piece.head + piece.heads) * self.group)
        return self.batch, heads, slice(piece.row, piece.row + piece.rows)

    @property
    def keys(self) -> Where:
        """Where its keys and values lie."""
        piece = self.part.piece
        return self.batch, slice(piece.head, piece.head + piece.heads), slice(*self.part.keys)


@attrs.frozen
class Stores:
    """What a stream reads and writes."""

    q: Store
    k: Store
    v: Store
    out: Store

    def close(self) -> None:
        """Close all files."""
        for one in (self.q, self.k, self.v, self.out):
            one.close()


class Journal:
    """A small file beside the output that says how many pieces are done; it is replaced as a whole.

    Parameters
    ----------
    path
        The file; None keeps no journal.
    identity
        What must be the same for a stream to go on where another ended.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self.path, self.identity = path, dict(identity)
        self.digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    def done(self) -> int:
        """Return how many pieces an earlier stream has finished; 0 if there is no journal.

        Raises
        ------
        SpecError
            If the journal is that of another stream, or unreadable.
        """
        if self.path is None:
            raise SpecError("resume=True needs a journal: give out= as a path or a memory map, or journal=")
        if not self.path.exists():
            return 0
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            digest, done = data["stream"], int(data["done"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SpecError(
                f"cannot read the journal {str(self.path)!r}: {error}; start again with resume=False"
            ) from None
        if digest != self.digest:
            raise SpecError(
                f"the journal {str(self.path)!r} is that of another stream (plan, pieces or files differ); "
                "start again with resume=False"
            )
        return done

    def write(self, done: int) -> None:
        """Say how many pieces are done.

        Raises
        ------
        StreamError
            If the file cannot be written; the one before it stays.
        """
        if self.path is None:
            return
        new = self.path.with_name(self.path.name + ".new")
        try:
            new.write_text(json.dumps({"stream": self.digest, "done": done}), encoding="utf-8")
            os.replace(new, self.path)
        except OSError as error:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise StreamError(f"cannot write the journal {str(self.path)!r} after piece {done}: {error}") from error

    def remove(self) -> None:
        """Remove the file: the stream is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class Stream:
    """One pass over all pieces.

    Parameters
    ----------
    work
        The pieces, in order.
    emit
        Returns the program of a piece's graph.
    stores
        Inputs and output.
    device
        Where pieces run.
    operands
        Runtime operands.
    """

    def __init__(
        self,
        work: list[Work],
        emit: Callable[[Graph], Any],
        stores: Stores,
        device: str,
        operands: Mapping[str, Any],
    ) -> None:
        self.work, self.emit, self.stores = work, emit, stores
        self.device = torch.device(device)
        self.operands = {n: x.to(self.device) if isinstance(x, Tensor) else x for n, x in operands.items()}
        self.programs: dict[Graph, Any] = {}

    def run(self, journal: Journal, start: int, progress: Progress) -> None:
        """Run the pieces from number ``start`` on.

        Raises
        ------
        StreamError
            If a file fails; the pieces before are in the output, and the journal says so.
        """
        mover: _Plain | _Overlapped = _Overlapped(self) if self.device.type == "cuda" else _Plain(self)
        finished = start

        def arrived(count: int) -> None:
            nonlocal finished
            finished = count
            self.stores.out.flush()
            journal.write(count)
            progress(count, len(self.work))

        progress(start, len(self.work))
        try:
            for number in range(start, len(self.work)):
                done = mover.piece(number)
                if done > finished:
                    arrived(done)
            arrived(mover.finish())
        finally:
            mover.release()
        journal.remove()

    def compute(self, number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output ``[heads, rows, Dv]`` of a piece."""
        body = self.body(number)
        assert body is not None
        if body not in self.programs:
            if len(self.programs) >= _KEPT:
                self.programs.pop(next(iter(self.programs)))
            self.programs[body] = self.emit(body)
            _forget_masks(self.programs[body])
        work, batch = self.work[number], slice(self.work[number].batch, self.work[number].batch + 1)
        queries, keys = ((batch, *where[1:]) for where in (work.queries, work.keys))
        here = piece_operands(self.operands, queries, keys, origin(work.part))
        with torch.no_grad():
            out: Tensor = self.programs[body](q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), here, False)[0]
        return out[0]

    def body(self, number: int) -> Graph | None:
        """Return the graph of a piece, None if none of its rows sees a key."""
        graph = self.work[number].part.graph
        return None if graph is None else normal(graph)


_KEPT = 64


class _Plain:
    """Runs pieces on the CPU; what is in memory is read where it lies."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.done = stream, 0

    def piece(self, number: int) -> int:
        """Run one piece and return how many are in the output."""
        stream, work = self.stream, self.stream.work[number]
        stores = stream.stores
        if stream.body(number) is None:
            _, heads, rows = work.queries
            sizes = (heads.stop - heads.start, rows.stop - rows.start, stores.out.sizes[3])
            stores.out.write(work.queries, torch.zeros(sizes, dtype=stores.out.dtype))
        else:
            given = [(stores.q, work.queries), (stores.k, work.keys), (stores.v, work.keys)]
            stores.out.write(work.queries, stream.compute(number, *(_read(*one) for one in given)))
        self.done = number + 1
        return self.done

    def finish(self) -> int:
        """Return how many pieces are in the output."""
        return len(self.stream.work)

    def release(self) -> None:
        """Drop everything."""


def _read(store: Store, where: Where) -> Tensor:
    found = store.view(where)
    if found is not None:
        return found
    made = torch.empty(_sizes(store, where), dtype=store.dtype)
    store.read(where, made)
    return made


def _sizes(store: Store, where: Where) -> tuple[int, int, int]:
    _, heads, rows = where
    return heads.stop - heads.start, rows.stop - rows.start, store.sizes[3]


def _elements(store: Store, where: Where) -> int:
    heads, rows, features = _sizes(store, where)
    return heads * rows * features


class _Slot:
    """A buffer on the device, one in pinned memory if the source has to be staged, and what must have happened."""

    def __init__(self, elements: int, store: Store, device: torch.device, *, staged: bool) -> None:
        self.buffer = torch.empty(elements, dtype=store.dtype, device=device)
        self.staging = torch.empty(elements, dtype=store.dtype, pin_memory=True) if staged else None
        self.free = torch.cuda.Event()  # type: ignore[no-untyped-call]
        """Recorded when nothing on the device reads it any more; for the output, when the host has it."""
        self.holds: Where | None = None

    def view(self, sizes: tuple[int, int, int]) -> Tensor:
        """Return the start of the buffer in some sizes."""
        return self.buffer[: sizes[0] * sizes[1] * sizes[2]].view(sizes)

    def stage(self, sizes: tuple[int, int, int]) -> Tensor:
        """Return the start of the pinned buffer in some sizes."""
        assert self.staging is not None
        return self.staging[: sizes[0] * sizes[1] * sizes[2]].view(sizes)


class _Overlapped:
    """Runs pieces on a CUDA device, two of everything, copies on streams of their own."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        device, stores, work = stream.device, stream.stores, stream.work
        self.inward, self.outward = torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.compute = torch.cuda.current_stream(device)
        some = [w for i, w in enumerate(work) if stream.body(i) is not None] or work[:1]
        ranges = {(w.batch, w.part.piece.head, w.part.keys) for w in some}  # slices have no hash before Python 3.12
        self.slots: dict[str, list[_Slot]] = {}
        for name, count in (("q", 2), ("k", min(2, len(ranges))), ("v", min(2, len(ranges))), ("out", 2)):
            store = getattr(stores, name)
            most = max(_elements(store, w.queries if name in ("q", "out") else w.keys) for w in (*some, *work[:1]))
            staged = not _lies_straight(store)
            self.slots[name] = [_Slot(most, store, device, staged=staged) for _ in range(count)]
        self.turn = {"q": 0, "k": 0, "v": 0, "out": 0}
        for one in (self.inward, self.outward):  # the buffers may be memory that work before them still reads
            one.wait_stream(self.compute)
        self.pending: list[tuple[int, _Slot]] = []
        """Results that are on their way to the host, with the number of their piece."""

    def piece(self, number: int) -> int:
        """Start one piece and return how many are in the output."""
        stream, work = self.stream, self.stream.work[number]
        stores = stream.stores
        slot = self._next("out")
        done = self._land(slot)
        target = slot.view(_sizes(stores.out, work.queries))
        if stream.body(number) is None:
            target.zero_()
        else:
            used = [self._load("q", stores.q, work.queries)]
            used += [self._load(name, getattr(stores, name), work.keys) for name in "kv"]
            self.compute.wait_stream(self.inward)
            wheres = (work.queries, work.keys, work.keys)
            views = [u.view(_sizes(s, w)) for u, s, w in zip(used, (stores.q, stores.k, stores.v), wheres, strict=True)]
            target.copy_(stream.compute(number, *views))
            for one in used:
                one.free.record(self.compute)
        self.outward.wait_stream(self.compute)
        with torch.cuda.stream(self.outward):
            self._send(slot, target, stores.out, work.queries)
            slot.free.record(self.outward)
        slot.holds = work.queries
        self.pending.append((number, slot))
        return max(done, self.pending[0][0])

    def _next(self, name: str) -> _Slot:
        slots = self.slots[name]
        self.turn[name] = (self.turn[name] + 1) % len(slots)
        return slots[self.turn[name]]

    def _load(self, name: str, store: Store, where: Where) -> _Slot:
        """Start the copy of a piece to the device, if it is not there; the host does not wait for it."""
        held = next((s for s in self.slots[name] if s.holds == where), None) if name in "kv" else None
        if held is not None:
            return held
        slot = self._next(name)
        sizes = _sizes(store, where)
        slot.holds = where
        if slot.staging is not None:
            slot.free.synchronize()  # its pinned buffer is read until then
            store.read(where, slot.stage(sizes))
        self.inward.wait_event(slot.free)
        with torch.cuda.stream(self.inward):
            if slot.staging is not None:
                slot.view(sizes).copy_(slot.stage(sizes), non_blocking=True)
            else:
                source = store.view(where)
                assert source is not None
                for into, rows in zip(slot.view(sizes), source, strict=True):  # each lies in one piece
                    into.copy_(rows, non_blocking=True)
        return slot

    def _send(self, slot: _Slot, result: Tensor, store: Store, where: Where) -> None:
        if slot.staging is not None:
            slot.stage(tuple(result.shape)).copy_(result, non_blocking=True)  # type: ignore[arg-type]
            return
        target = store.view(where)
        assert target is not None
        for rows, part in zip(target, result, strict=True):
            rows.copy_(part, non_blocking=True)

    def _land(self, slot: _Slot) -> int:
        """Wait until the last result of a slot is in the output; return the number of pieces that are."""
        done = 0
        while any(s is slot for _, s in self.pending):
            number, first = self.pending.pop(0)
            first.free.synchronize()
            store = self.stream.stores.out
            if first.staging is not None and first.holds is not None:
                store.write(first.holds, first.stage(_sizes(store, first.holds)))
            done = number + 1
        return done

    def finish(self) -> int:
        """Wait for everything and return how many pieces are in the output."""
        for slot in self.slots["out"]:
            self._land(slot)
        return len(self.stream.work)

    def release(self) -> None:
        """Wait until nothing runs any more, and drop the buffers."""
        for one in (self.inward, self.compute, self.outward):
            one.synchronize()
        self.slots.clear()
        self.pending.clear()


def _lies_straight(store: Store) -> bool:
    """Return whether a device can copy each head's rows by itself: pinned memory, rows side by side."""
    x = store.tensor
    return x is not None and x.is_pinned() and x.stride(3) == 1 and x.stride(2) == x.shape[3]


@contextmanager
def shown(progress: bool | Progress | None) -> Iterator[Progress]:
    """Give a function that shows how many pieces are done: a bar if ``progress`` is True."""
    if progress is None or progress is False:
        yield lambda done, total: None
    elif progress is not True:
        yield progress
    else:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        with Bar(TextColumn("streaming"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("pieces")
            yield lambda done, total: bar.update(task, completed=done, total=total)
