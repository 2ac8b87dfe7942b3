"""Calls of flash-attn 4 without its host code: the compiled kernel, started again with other tensors.

Its interface works for hundreds of microseconds on the host to find the compiled kernel of a call, longer than many
kernels run. What it finds depends on sizes, strides, options and tables of tiles alone: the first call of a kind is
recorded where the interface calls the kernel, and later ones start that with their own tensors. Tables do not change,
so a kernel gets the views of them again that the interface made. Where a call is not what this expects, the interface
is called each time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, partial
from threading import Lock, get_ident
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from attnplan.runtime.kernels import Request
from attnplan.runtime.tables import TileMasks
from attnplan.runtime.views import accumulator

_KEPT = 256
"""Kinds of calls whose kernels and tables are kept."""
_DEEPEST = 4
"""Levels of containers in an argument that are looked into for tensors."""
_recording = Lock()

T = TypeVar("T")
Call = tuple[Callable[..., Any], tuple[Any, ...]]
Tables = tuple[Tensor, ...]
Options = Callable[[Request], dict[str, Any]]
"""What makes the arguments of the interface, beside its tensors, of a request."""


class _Recorder:
    """Stands for a table of compiled kernels, and writes down which are called with what by the thread that made it."""

    def __init__(self, table: Any, calls: list[Call]) -> None:
        self.table, self.calls, self.thread = table, calls, get_ident()

    def __contains__(self, key: Hashable) -> bool:
        return key in self.table

    def __setitem__(self, key: Hashable, value: Any) -> None:
        self.table[key] = value

    def __getitem__(self, key: Hashable) -> Callable[..., Any]:
        kernel = self.table[key]

        def call(*args: Any) -> Any:
            if get_ident() == self.thread:
                self.calls.append((kernel, args))
            return kernel(*args)

        return call


def _recorded(steps: Sequence[Any], run: Callable[[], None]) -> list[Call]:
    """Return the compiled kernels that this thread calls in a run of the interface's steps, in order."""
    calls: list[Call] = []
    with _recording:
        tables = [step.compile_cache for step in steps]
        for step, table in zip(steps, tables, strict=True):
            step.compile_cache = _Recorder(table, calls)
        try:
            run()
        finally:
            for step, table in zip(steps, tables, strict=True):
                step.compile_cache = table
    return calls


class _Known(NamedTuple):
    """What a forward starts again: the kernel, what follows its tensors, and the tables that must live as long."""

    kernel: Callable[..., Any]
    rest: tuple[Any, ...]
    tables: Tables


class Replay:
    """Runs attention by flash-attn 4 on ``[B, S, H, D]``: whole, causal, in a window, or over tables of tiles.

    Packed documents and learnable sinks are not for it: their tensors come with each call.

    Parameters
    ----------
    function
        The interface's forward, which keeps its compiled kernels in ``function.compile_cache``.
    options
        What makes its arguments of a request. They are made where the interface is called, not for a kernel that is
        started again.
    """

    def __init__(self, function: Any, options: Options) -> None:
        self._function, self._options = function, options
        self._known: OrderedDict[Hashable, _Known | None] = OrderedDict()

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, asked: Request, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return output ``[B, S, H, Dv]``, which is ``into`` if that is given, and LSE ``[B, H, S]``."""
        batch, length, heads, _ = q.shape
        out = q.new_empty((batch, length, heads, v.shape[3])) if into is None else stepping(into)
        lse = q.new_empty((batch, heads, length), dtype=accumulator(q.dtype))
        tensors = [*_detached(q, k, v), out, lse]
        strides = tuple([x.stride() for x in tensors])
        current = torch.cuda.current_device() if q.is_cuda else None
        key = (q.shape, k.shape, v.shape, strides, q.dtype, q.device, current, _kind(asked, _tables(asked, "rows")))
        known = self._known.get(key)
        if known is not None:
            known.kernel(*tensors, *known.rest)
        elif key in self._known:
            self._run(tensors, asked)
        else:
            _keep(self._known, key, self._record(tensors, asked))
        return out, lse

    def _run(self, tensors: list[Tensor], asked: Request) -> None:
        q, k, v, out, lse = tensors
        self._function(q, k, v, out=out, lse=lse, return_lse=True, **self._options(asked))

    def _record(self, tensors: list[Tensor], asked: Request) -> _Known | None:
        calls = _recorded([self._function], partial(self._run, tensors, asked))
        return _as_forward(calls, tensors, _tables(asked, "rows"))


@lru_cache(maxsize=4)
def replay_of(function: Any, options: Options) -> Replay:
    """Return the replay of an interface's function, the same for the same one."""
    return Replay(function, options)


class BackwardReplay:
    """Runs the backward of :class:`Replay`: three kernels, one after the other, with buffers between them.

    Parameters
    ----------
    interface
        The module of the interface, whose steps keep their compiled kernels in ``compile_cache``.
    options
        What makes the arguments of its backward of a request, whose tables are those by columns.
    """

    def __init__(self, interface: Any, options: Options) -> None:
        self._function, self._options = interface._flash_attn_bwd, options
        self._steps = (interface._bwd_preprocess, self._function, interface._bwd_postprocess_convert)
        self._known: OrderedDict[Hashable, _Backward | None] = OrderedDict()

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        grad: Tensor,
        lse: Tensor,
        asked: Request,
        into: Sequence[Tensor | None] = (None, None, None),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv ``[B, S, H, D]``: those of ``into``, or laid out as q, k and v are where dense."""
        given = _detached(q, k, v, out, grad, lse)
        made = [torch.empty_like(x) if y is None else stepping(y) for x, y in zip(given, into, strict=False)]
        strides = tuple([x.stride() for x in (*given, *made)])
        current = torch.cuda.current_device() if q.is_cuda else None
        key = (q.shape, k.shape, v.shape, strides, q.dtype, q.device, current, _kind(asked, _tables(asked, "columns")))
        known = self._known.get(key)
        if known is not None:
            known(given, made)
        elif key in self._known:
            self._run(given, made, asked)
        else:
            _keep(self._known, key, self._record(given, made, asked))
        return made[0], made[1], made[2]

    def _run(self, given: list[Tensor], made: list[Tensor], asked: Request) -> None:
        self._function(*given, dq=made[0], dk=made[1], dv=made[2], **self._options(asked))

    def _record(self, given: list[Tensor], made: list[Tensor], asked: Request) -> _Backward | None:
        calls = _recorded(self._steps, partial(self._run, given, made, asked))
        return _as_backward(calls, given, made, _tables(asked, "columns"))


class _Backward(NamedTuple):
    """The three kernels of one backward, what follows the tensors of each, the buffers' sizes, and the tables."""

    kernels: tuple[Callable[..., Any], ...]
    rest: tuple[tuple[Any, ...], ...]
    sizes: tuple[tuple[int, ...], ...]
    tables: Tables

    def __call__(self, given: list[Tensor], made: list[Tensor]) -> None:
        number = accumulator(made[0].dtype)
        buffers = [made[0].new_empty(size, dtype=number) for size in self.sizes]
        for kernel, tensors, rest in zip(self.kernels, _in_order(given, made, buffers), self.rest, strict=True):
            kernel(*tensors, *rest)


def _in_order(given: list[Tensor], made: list[Tensor], buffers: list[Tensor]) -> list[tuple[Tensor, ...]]:
    """Return the tensors with which each of the three kernels is called, first of all arguments."""
    q, k, v, out, grad, lse = given
    dq, dk, dv = made
    delta, lse_base_2, total = buffers  # the first kernel writes all of them, and the sum of dq as zeros
    return [
        (out, grad, delta, lse, lse_base_2, total),
        (q, k, v, grad, lse_base_2, delta, total, dk, dv),
        (total, dq),
    ]


def _as_backward(calls: list[Call], given: list[Tensor], made: list[Tensor], tables: Tables) -> _Backward | None:
    """Return the three calls, if they were on these tensors, three buffers between them, and tables: on no others."""
    if len(calls) != 3:
        return None
    args = [a for _, a in calls]
    buffers = [args[0][i] for i in (2, 4, 5) if len(args[0]) > i]
    number = accumulator(made[0].dtype)
    if len(buffers) != 3 or not all(isinstance(x, Tensor) and x.dtype == number and x.is_contiguous() for x in buffers):
        return None
    expected = _in_order(given, made, buffers)
    rest = tuple(a[len(e) :] for a, e in zip(args, expected, strict=True))
    if not all(_are_same(a, e) for a, e in zip(args, expected, strict=True)) or not _belongs(rest, tables):
        return None
    return _Backward(tuple(k for k, _ in calls), rest, tuple(tuple(x.shape) for x in buffers), tables)


@lru_cache(maxsize=4)
def backward_replay_of(interface: Any, options: Options) -> BackwardReplay | None:
    """Return the replay of an interface's backward, the same for the same one; None for one without these steps."""
    steps = [
        getattr(interface, name, None) for name in ("_bwd_preprocess", "_flash_attn_bwd", "_bwd_postprocess_convert")
    ]
    return BackwardReplay(interface, options) if all(hasattr(step, "compile_cache") for step in steps) else None


def _keep(known: OrderedDict[Hashable, T], key: Hashable, call: T) -> None:
    """Keep what a kind of call starts again; the oldest goes, and with it what it alone holds of tables."""
    if len(known) >= _KEPT:
        known.popitem(last=False)
    known[key] = call


def _kind(asked: Request, tables: Tables) -> tuple[Hashable, ...]:
    """Return what a compiled kernel depends on, beside its tensors, and on which tables it was recorded."""
    tile = None if asked.blocks is None else asked.blocks.tile
    return asked.scale, asked.causal, asked.window, asked.softcap, tile, *map(id, tables)


def _tables(asked: Request, direction: Literal["rows", "columns"]) -> Tables:
    """Return the tensors of one direction of the tables, and of the masks of partial tiles; none without tables.

    While a recorded call holds them no other tensors get their identities, by which it is found.
    """
    blocks = asked.blocks
    if blocks is None:
        return ()
    lists, masks = blocks.rows if direction == "rows" else blocks.columns, blocks.masks
    more: Tables = ()
    if masks is not None:
        more = (masks.places, masks.masks) if isinstance(masks, TileMasks) else (masks.bounds,)
    return lists.partial_count, lists.partial_index, lists.full_count, lists.full_index, *more


def _detached(*tensors: Tensor) -> list[Tensor]:
    """Return tensors that need no gradient; a detached view of one that does not would only take time."""
    return [x.detach() if x.requires_grad else x for x in tensors]


def stepping(x: Tensor) -> Tensor:
    """Return a tensor to write whose every stride is positive: the interface refuses 0, as that of a broadcast.

    Views of rows have strides of 0 along dimensions of size 1, where no stride means anything.
    """
    strides = x.stride()
    return x.as_strided(x.shape, [n or x.shape[-1] for n in strides]) if 0 in strides else x


def _are_same(args: tuple[Any, ...], tensors: Sequence[Tensor]) -> bool:
    """Return whether the first arguments of a call are these tensors."""
    first = args[: len(tensors)]
    return len(first) == len(tensors) and all(
        isinstance(a, Tensor) and a.data_ptr() == x.data_ptr() and a.stride() == x.stride() and a.shape == x.shape
        for a, x in zip(first, tensors, strict=True)
    )


def _as_forward(calls: list[Call], tensors: list[Tensor], tables: Tables) -> _Known | None:
    """Return the kernel and what follows its tensors, if it was one call on these tensors and tables: on no others."""
    if len(calls) != 1:
        return None
    kernel, args = calls[0]
    rest = args[len(tensors) :]
    return _Known(kernel, rest, tables) if _are_same(args, tensors) and _belongs(rest, tables) else None


def _belongs(rest: Any, tables: Tables) -> bool:
    """Return whether every tensor in what follows the tensors of a call is a view of one of the tables.

    A kernel that is started again gets these views again, so another tensor, which may be that of one call, will not
    do, nor an object into which this cannot look.
    """
    places = frozenset(x.untyped_storage().data_ptr() for x in tables)
    return _is_known(rest, places, _DEEPEST)


def _is_known(x: Any, places: frozenset[int], deep: int) -> bool:
    if x is None or isinstance(x, bool | int | float | str):
        return True
    if isinstance(x, Tensor):
        return x.untyped_storage().data_ptr() in places
    if isinstance(x, tuple | list):
        inside: Sequence[Any] = x
    elif callable(x) or any(t.__dict__.get("__slots__") for t in type(x).__mro__) or not hasattr(x, "__dict__"):
        return False
    else:
        inside = list(vars(x).values())
    return deep > 0 and all(_is_known(y, places, deep - 1) for y in inside)
