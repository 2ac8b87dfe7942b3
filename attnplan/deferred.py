"""Calls in compiled programs whose plan is found when they run, from the shapes that they bring."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from attnplan.errors import SpecError
from attnplan.patterns import Mixture, Pattern

if TYPE_CHECKING:
    from torch import Tensor

    from attnplan.plan import Plan

Options = Callable[["Tensor", "Tensor", "Tensor", Mapping[str, Any]], Mapping[str, Any]]


class Deferred:
    """What the operator ``attnplan::planned`` runs where a trace knows no plan.

    Parameters
    ----------
    options
        ``(q, k, v, operands) -> the arguments of`` :func:`attnplan.attention` beside them, asked at each call. The
        tensors are ``[B, H, S, D]``.
    return_lse
        Whether the LSE is asked for: where there is none, the call raises.

    A copy is known by a handle of its own.
    """

    def __init__(self, options: Options, return_lse: bool = False) -> None:
        from attnplan.runtime.planned import handle_of

        self.options, self.return_lse = options, return_lse
        self.handle = handle_of(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Deferred:
        return type(self)(copy.deepcopy(self.options, memo), self.return_lse)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.options, self.return_lse)

    def _plan(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> Plan:
        from attnplan.api import plan_for

        options = dict(self.options(q, k, v, operands))
        if options.get("layout") == "bshd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return plan_for(q, k, v, operands, **options)

    def answer(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor]:
        """Find the plan and run it; where branches have no one LSE, it is -inf."""
        plan = self._plan(q, k, v, operands)
        out, lse = plan.answer(q, k, v, operands, self.return_lse or plan.spec.has_lse)
        return out, no_lse(q) if lse is None else lse

    def gradients(
        self,
        flow: Sequence[Tensor | None],
        given: Sequence[Tensor],
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> tuple[Tensor, ...]:
        """Return dq, dk, dv, then the gradients of the named operands."""
        q, k, v = given[:3]
        return self._plan(q, k, v, operands).gradients(flow, given, operands, names)


def no_lse(q: Tensor) -> Tensor:
    """Return what stands for the LSE ``[B, H, S]`` of a plan that has none."""
    from attnplan.runtime.views import accumulator

    return q.new_full(q.shape[:3], -float("inf"), dtype=accumulator(q.dtype))


def run_deferred(
    q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], handle: Tensor, layout: str
) -> tuple[Tensor, Tensor]:
    """Return output and LSE of a deferred call as one operator of a traced program.

    Raises
    ------
    SpecError
        If the program is being exported: an exported program holds plans, and there is none yet.
    """
    from torch import compiler

    from attnplan.runtime.planned import planned

    if compiler._is_exporting_flag:
        raise SpecError("an exported program holds plans: call one made by attnplan.compile instead of attention()")
    if layout == "bshd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out, lse = planned(q, k, v, operands, True, handle)
    assert lse is not None
    return (out.transpose(1, 2) if layout == "bshd" else out), lse


_known: dict[tuple[Any, ...], Deferred] = {}
"""Never forgotten: a compiled program holds the handle, and nothing says when it is gone."""


def _given(options: Mapping[str, Any], *call: Any) -> Mapping[str, Any]:
    return options


def handle_for(pattern: Pattern | Mixture, return_lse: bool, *options: Any) -> Tensor:
    """Return the handle of calls of a pattern; ``options`` are names and values in turn. A trace calls this once."""
    key = (pattern, return_lse, *options)
    if key not in _known:
        named = dict(zip(options[::2], options[1::2], strict=True))
        _known[key] = Deferred(partial(_given, {"pattern": pattern, **named}), return_lse)
    return _known[key].handle
