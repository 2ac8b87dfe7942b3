"""Tensors that a stream reads and writes: in memory, mapped, or in files that are read piece by piece."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attnplan.errors import SpecError, StreamError

Where = tuple[int, slice, slice]
"""Batch element, heads and rows."""


class Store:
    """A tensor ``[B, H, S, D]``, or ``[B, S, H, D]`` if ``swapped``, of which pieces are read or written.

    Parameters
    ----------
    name
        ``"q"``, ``"k"``, ``"v"`` or ``"out"``, for messages.
    data
        A tensor on the CPU, a numpy array or memory map, or the path of a file of its elements, without a header, in
        the order of the layout. bfloat16 in numpy is uint16 or int16. A map of a file that shrinks while it is read
        ends the process; a path raises instead.
    sizes
        ``(B, H, S, D)``.
    dtype
        Of its elements.
    swapped
        Whether heads and rows are swapped.
    write
        Whether a file is written: it is made if it does not exist.

    Raises
    ------
    SpecError
        If the sizes or the dtype do not fit, or a file is shorter than it has to be.
    """

    def __init__(
        self, name: str, data: Any, sizes: Sequence[int], dtype: torch.dtype, *, swapped: bool, write: bool = False
    ) -> None:
        self.name, self.sizes, self.dtype, self.swapped = name, tuple(sizes), dtype, swapped
        self.path: Path | None = None
        self.tensor: Tensor | None = None
        self._file: int | None = None
        self._map = data if isinstance(data, np.memmap) else None
        if isinstance(data, str | os.PathLike):
            self.path = Path(data)
            self._open(write)
            return
        tensor = _from_numpy(name, data, dtype, write=write) if isinstance(data, np.ndarray) else data
        if not isinstance(tensor, Tensor):
            raise SpecError(f"{name} must be a tensor, a numpy array or a path, got {type(data).__name__}")
        self._check(tensor)
        self._check_map()
        self.tensor = tensor.transpose(1, 2) if swapped else tensor

    @property
    def item(self) -> int:
        """Bytes of one element."""
        return self.dtype.itemsize

    def _check(self, tensor: Tensor) -> None:
        b, h, s, d = self.sizes
        needed = (b, s, h, d) if self.swapped else (b, h, s, d)
        if tuple(tensor.shape) != needed or tensor.dtype != self.dtype or tensor.device.type != "cpu":
            got = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise SpecError(f"{self.name} is {got}; this stream needs {list(needed)} {self.dtype} on the CPU")

    def _check_map(self) -> None:
        """Refuse a map of a file that is shorter by now: reading it would end the process."""
        if self._map is None or getattr(self._map, "filename", None) is None:
            return
        path, needed = str(self._map.filename), int(self._map.offset) + self._map.nbytes
        has = os.stat(path).st_size
        if has < needed:
            raise SpecError(f"{self.name}: the file {path!r} has {has} bytes by now, its map needs {needed}")

    def _open(self, write: bool) -> None:
        assert self.path is not None
        needed = int(np.prod(self.sizes)) * self.item
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT if write else os.O_RDONLY, 0o644)
            has = os.fstat(self._file).st_size
            if write and has != needed:
                os.ftruncate(self._file, needed)
        except OSError as error:
            self.close()
            raise StreamError(f"cannot open {self.name} {str(self.path)!r}: {error.strerror}") from error
        if not write and has < needed:
            self.close()
            raise SpecError(
                f"{self.name}: the file {str(self.path)!r} has {has} bytes, the spec needs {needed}: it ends in "
                f"{self._element(has // self.item)}"
            )

    def _element(self, number: int) -> str:
        """Return where an element lies, in words."""
        _, h, s, d = self.sizes
        outer, inner = (s, h) if self.swapped else (h, s)
        at = number // d
        batch, first, second = at // (outer * inner), at // inner % outer, at % inner
        head, row = (second, first) if self.swapped else (first, second)
        return f"batch element {batch}, head {head}, row {row}"

    def close(self) -> None:
        """Close the file, if there is one."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def flush(self) -> None:
        """Bring what was written to the disk.

        Raises
        ------
        StreamError
            If the disk does not take it; what was written since the last time may be lost.
        """
        try:
            if self._file is not None:
                os.fsync(self._file)
            elif self._map is not None:
                self._map.flush()
        except OSError as error:
            place = self.path if self._map is None else getattr(self._map, "filename", None)
            raise StreamError(f"bringing {self.name} {str(place)!r} to the disk failed: {error}") from error

    def view(self, where: Where) -> Tensor | None:
        """Return a piece ``[heads, rows, D]`` without a copy; None if it is in a file."""
        return None if self.tensor is None else self.tensor[where[0], where[1], where[2]]

    def read(self, where: Where, into: Tensor) -> None:
        """Copy a piece into a tensor ``[heads, rows, D]`` on the CPU.

        Raises
        ------
        StreamError
            If the file cannot be read there; the message says where, the cause is the disk's.
        """
        found = self.view(where)
        if found is not None:
            into.copy_(found)
            return
        for start, part in self._runs(where, into):
            straight = part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
            self._transfer("reading", where, start, _bytes(straight))
            if straight is not part:
                part.copy_(straight)

    def write(self, where: Where, piece: Tensor) -> None:
        """Copy a tensor ``[heads, rows, D]`` on the CPU to its place.

        Raises
        ------
        StreamError
            If the file cannot be written there.
        """
        found = self.view(where)
        if found is not None:
            found.copy_(piece)
            return
        for start, part in self._runs(where, piece):
            self._transfer("writing", where, start, _bytes(part.contiguous()))

    def _runs(self, where: Where, piece: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Iterate over (first byte, its rows) of the runs that a piece is in the file."""
        (batch, heads, rows), (_, h, s, d) = where, self.sizes
        if not self.swapped:
            for i, head in enumerate(range(heads.start, heads.stop)):
                yield ((batch * h + head) * s + rows.start) * d * self.item, piece[i]
            return
        for j, row in enumerate(range(rows.start, rows.stop)):
            yield ((batch * s + row) * h + heads.start) * d * self.item, piece[:, j]

    def _transfer(self, what: str, where: Where, start: int, buffer: memoryview) -> None:
        done = 0
        try:
            assert self._file is not None
            while done < len(buffer):
                if what == "reading":
                    count = os.preadv(self._file, [buffer[done:]], start + done)
                else:
                    count = os.pwrite(self._file, buffer[done:], start + done)
                if count == 0:
                    raise OSError("the file ends here")
                done += count
        except OSError as error:
            b, heads, rows = where
            place = f"batch element {b}, heads {heads.start} to {heads.stop - 1}, rows {rows.start} to {rows.stop - 1}"
            raise StreamError(
                f"{what} {self.name} {str(self.path)!r} failed at byte {start + done} ({place}): {error}"
            ) from error


def _from_numpy(name: str, array: np.ndarray, dtype: torch.dtype, *, write: bool) -> Tensor:
    if write and not array.flags.writeable:
        raise SpecError(f"{name} is an array that cannot be written; open the map with mode='r+' or 'w+'")
    if dtype == torch.bfloat16 and array.dtype in (np.uint16, np.int16):
        array = array.view(np.int16)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about arrays that are read-only: they are only read
            made = torch.from_numpy(array)
    except TypeError as error:
        raise SpecError(f"{name}: {error}") from None
    return made.view(dtype) if made.dtype == torch.int16 and dtype == torch.bfloat16 else made


def _bytes(x: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    array: Any = x.view(torch.uint8).numpy().reshape(-1)
    return memoryview(array)
