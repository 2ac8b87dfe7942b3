"""Patterns as torch functions of (batch, head, query row, key row) that compilers trace: one module per structure.

``Pattern.pairs`` is traced once by ``make_fx``. Sizes that windows, sinks and ranges of heads compare with, the
position of query row 0 and all tables become tensor arguments, so patterns that differ in nothing else share one
module, and with it every graph that is compiled from it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from attnplan.errors import SpecError
from attnplan.patterns import Pattern, Shape
from attnplan.patterns.bands import Band
from attnplan.patterns.base import And, Not, Or
from attnplan.patterns.keys import Sinks
from attnplan.patterns.segments import Heads
from attnplan.runtime.masks import runtime_tables
from attnplan.runtime.scores import position

_KEPT_MODULES = 256
_NARROW = 2**29
"""Below it no sum of positions and sizes outgrows 32 bits, in which kernels compare twice as fast as in 64."""
_aten = torch.ops.aten
_COMPARES = {
    *(_aten.add, _aten.sub, _aten.eq, _aten.ne, _aten.lt, _aten.le, _aten.gt, _aten.ge),
    *(_aten.bitwise_and, _aten.bitwise_or, _aten.bitwise_not, _aten.logical_not, _aten.clamp, _aten.index),
}
_LIFTED: Mapping[type[Pattern], tuple[str, ...]] = {
    Band: ("left", "right"),
    Sinks: ("count",),
    Heads: ("start", "stop"),
}
"""Fields that are only ever compared with; divisors stay constants, which compilers turn into shifts."""


@attrs.frozen(eq=False)
class Condition:
    """A pattern as a module ``(b, h, q_row, k_row, *captures) -> bool`` on integer tensors that broadcast."""

    module: fx.GraphModule
    constants: tuple[Tensor, ...]
    """Captures that are known: lifted sizes, then static tables."""
    operands: tuple[str, ...]
    """Tables ``[B, kv_len]`` that arrive with the call, in the order of their captures."""
    offset: bool
    """Whether the position of query row 0, int64 ``[B]``, is the last capture."""

    def to(self, device: torch.device) -> Condition:
        """Return the condition with what is known of its captures on a device, so that no call copies it there."""
        return attrs.evolve(self, constants=tuple(x.to(device) for x in self.constants))

    def captures(self, given: Mapping[str, Any], batch: int, kv_len: int, device: torch.device) -> list[Tensor]:
        """Return what the module takes behind its positions, for the operands of one call."""
        tables = runtime_tables(given, kv_len) if self.operands else {}
        first = position(given["q_offset"], device) if self.offset else None
        return [*(x.to(device) for x in self.constants), *self.arriving(tables, first, batch)]

    def arriving(self, tables: Mapping[str, Tensor], first_row: Tensor | None, batch: int) -> list[Tensor]:
        """Return the captures that are not constants, for the tables of runtime operands and the first position."""
        made = [tables[name].expand(batch, -1) for name in self.operands]
        if first_row is not None:
            made.append(first_row.reshape(-1).expand(batch).to(torch.int64))
        return made


class _Look:
    """A table as patterns index it: by position, with the row of its batch element chosen before."""

    def __init__(self, data: Tensor, batch: Tensor) -> None:
        self.data, self.batch = data, batch

    def __getitem__(self, position: Tensor) -> Tensor:
        position = position.clamp(0, self.data.shape[-1] - 1)  # kernels ask about the rows that fill the last tile too
        if self.data.shape[0] == 1:
            return _taken(self.data[0], position)
        return _taken(self.data, self.batch, position)


def _taken(data: Tensor, *index: Tensor) -> Tensor:
    """Return ``data[index]``, whose own form reads an index without dimensions on the host."""
    found: Tensor = torch.ops.aten.index.Tensor(data, list(index))
    return found


def condition(where: Pattern, shape: Shape, shift: int | None) -> Condition:
    """Return a pattern as a module, the same object for patterns of one structure.

    Parameters
    ----------
    where
        The pattern; its runtime operands become arguments.
    shape
        Sizes for which static tables are built.
    shift
        Position of query row 0, or None if it arrives with the call.

    Raises
    ------
    SpecError
        If the pattern is a Python function that cannot be traced.

    Examples
    --------
    >>> from attnplan.patterns import causal, window
    >>> a, b = (condition(window(n) & causal(), Shape(8, 8, 1), 0) for n in (2, 5))
    >>> a.module is b.module
    True
    >>> a.module(*(torch.tensor(n) for n in (0, 0, 6, 3)), *a.constants).item()
    False
    """
    sizes: list[int] = []
    _collect(where, sizes)
    static = {name: torch.from_numpy(t) for name, t in where.tables(shape).items()}
    names = tuple(sorted(where.operands - {"q_offset"}))
    rows = 2 if names or shift is None else 1  # more than one row, so that the batch element is looked at
    known = [*map(torch.tensor, sizes), *([] if shift is None else [torch.tensor(shift)]), *static.values()]
    arriving = [torch.zeros(rows, shape.kv_len, dtype=torch.int64) for _ in names]
    arriving += [torch.zeros(rows, dtype=torch.int64)] if shift is None else []

    def pairs(b: Tensor, h: Tensor, q: Tensor, k: Tensor, *captures: Tensor) -> Tensor:
        rest = list(captures)
        lifted = _lifted(where, rest)
        ahead = rest.pop(0) if shift is not None else _taken(rest.pop(), b)
        tables = {name: _Look(data, b) for name, data in zip((*static, *names), rest, strict=True)}
        result: Tensor = lifted.pairs(tables, h, q + ahead, k)
        return result

    places = [torch.tensor(0) for _ in range(4)]  # four objects: make_fx knows tensors by identity
    try:
        module = make_fx(pairs, tracing_mode="fake")(*places, *known, *arriving)
    except SpecError:
        raise
    except Exception as error:  # a mask(fn) may do whatever it likes
        raise SpecError(f"{where!r} cannot be traced for a compiler: {type(error).__name__}: {error}") from error
    reach = shape.seq_len + shape.kv_len + abs(shift or 0) + sum(map(abs, sizes))
    if reach < _NARROW and _only_compares(module):
        known[: len(known) - len(static)] = [x.to(torch.int32) for x in known[: len(known) - len(static)]]
    return Condition(_interned(module), tuple(known), names, shift is None)


def _only_compares(module: fx.GraphModule) -> bool:
    """Return whether a condition forms sums of its positions and sizes at most, and no products of them."""
    calls = {n.target.overloadpacket for n in module.graph.nodes if isinstance(n.target, torch._ops.OpOverload)}
    return calls <= _COMPARES


def _collect(where: Pattern, sizes: list[int]) -> None:
    """Append the sizes that become tensors, in the order in which :func:`_lifted` takes them."""
    if isinstance(where, And | Or):
        for term in where.terms:
            _collect(term, sizes)
    elif isinstance(where, Not):
        _collect(where.term, sizes)
    else:
        sizes += [n for n in (getattr(where, f) for f in _LIFTED.get(type(where), ())) if n is not None]


def _lifted(where: Pattern, rest: list[Tensor]) -> Pattern:
    """Return a copy of a pattern whose sizes are the first of these tensors; only ``pairs`` may be called on it."""
    if isinstance(where, And | Or):
        return _copy(where, terms=tuple(_lifted(t, rest) for t in where.terms))
    if isinstance(where, Not):
        return _copy(where, term=_lifted(where.term, rest))
    fields = [f for f in _LIFTED.get(type(where), ()) if getattr(where, f) is not None]
    return _copy(where, **{f: rest.pop(0) for f in fields}) if fields else where


def _copy(where: Pattern, **changes: Any) -> Pattern:
    """Return ``attrs.evolve`` without the checks, which refuse tensors."""
    made = object.__new__(type(where))
    for field in attrs.fields(type(where)):
        object.__setattr__(made, field.name, changes.get(field.name, getattr(where, field.name)))
    return made


_modules: OrderedDict[str, fx.GraphModule] = OrderedDict()


def _interned(module: fx.GraphModule) -> fx.GraphModule:
    """Return the one module of this code. One that holds tensors of its own is like no other."""
    if any(True for _ in module.buffers()) or any(n.op == "get_attr" for n in module.graph.nodes):
        return module
    if len(_modules) >= _KEPT_MODULES:
        _modules.popitem(last=False)
    return _modules.setdefault(str(module.code), module)


MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
