"""Calls of flash-attn 4 without its host code: the compiled kernel, started again with other tensors.

Its interface works for hundreds of microseconds on the host to find the compiled kernel of a call, longer than many
kernels run. What it finds depends on sizes, strides and options alone: the first call of a kind is recorded where the
interface calls the kernel, and later ones start that with their own tensors. Where a call is not what this expects, the
interface is called each time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch import Tensor

_KEPT = 256
_recording = Lock()

Call = tuple[Callable[..., Any], tuple[Any, ...]]


class _Recorder:
    """Stands for a table of compiled kernels, and writes down which are called with what."""

    def __init__(self, table: Any, calls: list[Call]) -> None:
        self.table, self.calls = table, calls

    def __contains__(self, key: Hashable) -> bool:
        return key in self.table

    def __setitem__(self, key: Hashable, value: Any) -> None:
        self.table[key] = value

    def __getitem__(self, key: Hashable) -> Callable[..., Any]:
        kernel = self.table[key]

        def call(*args: Any) -> Any:
            self.calls.append((kernel, args))
            return kernel(*args)

        return call


class Replay:
    """Runs whole or causal attention by flash-attn 4 on ``[B, S, H, D]``.

    Parameters
    ----------
    function
        The interface's forward, which keeps its compiled kernels in ``function.compile_cache``.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._known: OrderedDict[Hashable, Call | None] = OrderedDict()

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, into: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return output ``[B, S, H, Dv]``, which is ``into`` if that is given, and LSE ``[B, H, S]``."""
        batch, length, heads, _ = q.shape
        out = q.new_empty((batch, length, heads, v.shape[3])) if into is None else stepping(into)
        lse = q.new_empty((batch, heads, length), dtype=torch.float32)
        tensors = [*_detached(q, k, v), out, lse]
        strides = tuple([x.stride() for x in tensors])
        current = torch.cuda.current_device() if q.is_cuda else None
        key = (q.shape, k.shape, v.shape, strides, q.dtype, q.device, current, scale, causal)
        known = self._known.get(key)
        if known is not None:
            kernel, rest = known
            kernel(*tensors, *rest)
        elif key in self._known:
            self._run(tensors, scale, causal)
        else:
            self._keep(key, self._record(tensors, scale, causal))
        return out, lse

    def _run(self, tensors: list[Tensor], scale: float, causal: bool) -> None:
        q, k, v, out, lse = tensors
        self._function(q, k, v, softmax_scale=scale, causal=causal, out=out, lse=lse, return_lse=True)

    def _record(self, tensors: list[Tensor], scale: float, causal: bool) -> Call | None:
        calls: list[Call] = []
        with _recording:
            table = self._function.compile_cache
            self._function.compile_cache = _Recorder(table, calls)
            try:
                self._run(tensors, scale, causal)
            finally:
                self._function.compile_cache = table
        return _as_expected(calls, tensors)

    def _keep(self, key: Hashable, call: Call | None) -> None:
        if len(self._known) >= _KEPT:
            self._known.popitem(last=False)
        self._known[key] = call


@lru_cache(maxsize=4)
def replay_of(function: Any) -> Replay:
    """Return the replay of an interface's function, the same for the same one."""
    return Replay(function)


class BackwardReplay:
    """Runs the backward of :class:`Replay`: three kernels, one after the other, with buffers between them.

    Parameters
    ----------
    interface
        The module of the interface, whose steps keep their compiled kernels in ``compile_cache``.
    """

    def __init__(self, interface: Any) -> None:
        self._function = interface._flash_attn_bwd
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
        scale: float,
        causal: bool,
        into: Sequence[Tensor | None] = (None, None, None),
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv ``[B, S, H, D]``: those of ``into``, or laid out as q, k and v are where dense."""
        given = _detached(q, k, v, out, grad, lse)
        made = [torch.empty_like(x) if y is None else stepping(y) for x, y in zip(given, into, strict=False)]
        strides = tuple([x.stride() for x in (*given, *made)])
        current = torch.cuda.current_device() if q.is_cuda else None
        key = (q.shape, k.shape, v.shape, strides, q.dtype, q.device, current, scale, causal)
        known = self._known.get(key)
        if known is not None:
            known(given, made)
        elif key in self._known:
            self._run(given, made, scale, causal)
        else:
            if len(self._known) >= _KEPT:
                self._known.popitem(last=False)
            self._known[key] = self._record(given, made, scale, causal)
        return made[0], made[1], made[2]

    def _run(self, given: list[Tensor], made: list[Tensor], scale: float, causal: bool) -> None:
        self._function(*given, softmax_scale=scale, causal=causal, dq=made[0], dk=made[1], dv=made[2])

    def _record(self, given: list[Tensor], made: list[Tensor], scale: float, causal: bool) -> _Backward | None:
        calls: list[Call] = []
        with _recording:
            tables = [step.compile_cache for step in self._steps]
            for step, table in zip(self._steps, tables, strict=True):
                step.compile_cache = _Recorder(table, calls)
            try:
                self._run(given, made, scale, causal)
            finally:
                for step, table in zip(self._steps, tables, strict=True):
                    step.compile_cache = table
        return _as_backward(calls, given, made)


class _Backward(NamedTuple):
    """The three kernels of one backward, what follows the tensors of each, and the sizes of the buffers."""

    kernels: tuple[Callable[..., Any], ...]
    rest: tuple[tuple[Any, ...], ...]
    sizes: tuple[tuple[int, ...], ...]

    def __call__(self, given: list[Tensor], made: list[Tensor]) -> None:
        buffers = [made[0].new_empty(size, dtype=torch.float32) for size in self.sizes]
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


def _as_backward(calls: list[Call], given: list[Tensor], made: list[Tensor]) -> _Backward | None:
    """Return the three calls, if they were on these tensors and three buffers between them, and on no others."""
    if len(calls) != 3:
        return None
    args = [a for _, a in calls]
    buffers = [args[0][i] for i in (2, 4, 5) if len(args[0]) > i]
    if len(buffers) != 3 or not all(
        isinstance(x, Tensor) and x.dtype == torch.float32 and x.is_contiguous() for x in buffers
    ):
        return None
    expected = _in_order(given, made, buffers)
    rest = tuple(a[len(e) :] for a, e in zip(args, expected, strict=True))
    if not all(_are_same(a, e) for a, e in zip(args, expected, strict=True)) or _holds_tensor(rest):
        return None
    return _Backward(tuple(k for k, _ in calls), rest, tuple(tuple(x.shape) for x in buffers))


@lru_cache(maxsize=4)
def backward_replay_of(interface: Any) -> BackwardReplay | None:
    """Return the replay of an interface's backward, the same for the same one; None for one without these steps."""
    steps = [
        getattr(interface, name, None) for name in ("_bwd_preprocess", "_flash_attn_bwd", "_bwd_postprocess_convert")
    ]
    return BackwardReplay(interface) if all(hasattr(step, "compile_cache") for step in steps) else None


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


def _as_expected(calls: list[Call], tensors: list[Tensor]) -> Call | None:
    """Return the kernel and what follows its tensors, if it was one call on these tensors and no others."""
    if len(calls) != 1:
        return None
    kernel, args = calls[0]
    rest = args[len(tensors) :]
    return (kernel, rest) if _are_same(args, tensors) and not _holds_tensor(rest) else None


def _holds_tensor(x: Any) -> bool:
    if isinstance(x, tuple | list):
        return any(_holds_tensor(y) for y in x)
    return isinstance(x, Tensor)
