"""What a plan is to a tracer: its nodes in compiled and exported programs, and what is done ahead."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

from attnplan.backends import Backend, Program
from attnplan.calls import require_here
from attnplan.cost import Target
from attnplan.errors import SpecError
from attnplan.ir import Attend, Graph, Merge, Mix, Take
from attnplan.ir.slots import slot_condition
from attnplan.spec import AttentionSpec

if TYPE_CHECKING:
    from torch import Tensor


def _asks_torch() -> bool:
    """Return whether a compiler traces this call; plans that run here ask torch itself, which needs no import."""
    from torch.compiler import is_compiling

    return is_compiling()


class Traced:
    """Base of :class:`~attnplan.plan.Plan`."""

    spec: AttentionSpec
    target: Target
    graph: Graph
    _backend: Backend
    _swapped: bool
    _has_lse: bool
    _next: Any
    _handle: Tensor | None = None
    _inlined: Any = None
    _fits: tuple[Any, ...] = ()
    _dtype: Any = None
    _kind = ""
    _is_compiling: Callable[[], bool] = staticmethod(_asks_torch)

    if TYPE_CHECKING:  # defined by Plan

        @property
        def program(self) -> Program: ...
        def _program_at(self, seq_len: int, kv_len: int) -> Program: ...
        def _text(self) -> str: ...
        def _check_call(self, q: Any, k: Any, v: Any, return_lse: bool, operands: Mapping[str, Any]) -> None: ...
        def _run(
            self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
        ) -> tuple[Tensor, Tensor | None]: ...
        def __call__(self, q: Tensor, k: Tensor, v: Tensor, **operands: Any) -> Any: ...

    def _expose(self) -> None:
        """Make the plan known to traced programs, and emit it if it is a program that they take up whole.

        A trace sees the same attributes on every plan, so plans of one structure share a graph.
        """
        if self.target.torch_device is None or "torch" not in sys.modules:
            return
        import torch

        from attnplan.runtime.planned import handle_of

        self._handle = handle_of(self)
        self._is_compiling = torch.compiler.is_compiling
        shape, spec = self.spec.shape, self.spec
        self._fits = (
            (spec.heads, shape.seq_len, spec.head_dim),
            (spec.kv_heads, shape.kv_len, spec.head_dim),
            (spec.kv_heads, shape.kv_len, spec.value_dim),
        )
        self._dtype, self._kind = getattr(torch, spec.dtype), str(self.target.torch_device).partition(":")[0]
        if spec.is_static and self._is_taken_up():
            self._inlined = getattr(self.program, "inlined", None)

    def _is_taken_up(self) -> bool:
        """Return whether a trace takes up the program itself, which is then emitted ahead of it."""
        if getattr(self._backend, "inlines", False):
            return True
        if any(isinstance(node.op, Take | Merge | Mix) for node in self.graph):
            return False
        (node, op), *more = self.graph.of(Attend)
        if more:
            return False
        q, k = (n.type.rows for n in self.graph.args(node)[:2])
        return op.tile is None and slot_condition(op, q, k) != "mask"

    def _traced(
        self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool, operands: Mapping[str, Any]
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the nodes of a call in a traced program: those of the plan, or one operator that runs it.

        Nothing here reads what differs between plans of one structure, or takes a lock. What does not fit the spec is
        left to the operator, which raises as a call does.
        """
        from torch import compiler

        from attnplan.runtime.planned import planned

        if self._swapped:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        inlined, lse = self._inlined, None
        out: Tensor
        if inlined is not None and self._fit(q, k, v) and inlined.takes(q, k, v, return_lse):
            out, lse = inlined(q, k, v, operands, return_lse)
        elif compiler._is_exporting_flag:  # torch 2.11 calls every trace an export; the flag is what it means
            out, lse = planned(q, k, v, operands, self._has_lse, None, self._text())
        else:
            out, lse = planned(q, k, v, operands, self._has_lse, self._handle)
        if self._swapped:
            out = out.transpose(1, 2)
        if not return_lse:
            return out
        if lse is None:
            raise SpecError(f"there is no one LSE under mix={self.spec.rule!r}")
        return out, lse

    def _fit(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Return whether a traced call has the spec's shapes and one batch size, dtype and device."""
        return (
            (q.shape[1:], k.shape[1:], v.shape[1:]) == self._fits
            and q.shape[0] == k.shape[0] == v.shape[0]
            and q.dtype == k.dtype == v.dtype == self._dtype
            and q.device == k.device == v.device
            and q.device.type == self._kind
        )

    def answer(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Check a call and run it, on q, k, v in ``[B, H, S, D]`` whatever the layout; for traced programs."""
        a, b, c = (x.transpose(1, 2) if self._swapped else x for x in (q, k, v))
        self._check_call(a, b, c, return_lse, operands)
        running: Traced = self._next or self
        return running._run(q, k, v, operands, return_lse)

    def gradients(
        self,
        flow: Sequence[Tensor | None],
        given: Sequence[Tensor],
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> tuple[Tensor, ...]:
        """Return dq, dk, dv from ``(grad, grad_lse)`` and ``(q, k, v, out, lse)``; for traced programs.

        Behind them come the gradients of the operands of these names.
        """
        from attnplan.runtime.planned import gradients_by_autograd

        running = self._next or self
        program = running._program_at(given[0].shape[2], given[1].shape[2])
        own = getattr(program, "gradients", None)
        if own is not None:
            found: tuple[Tensor, ...] = own(flow, given, operands, names)
            return found

        def call(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
            *more, lse = rest
            return program(q, k, v, {**operands, **dict(zip(names, more, strict=True))}, lse)

        return gradients_by_autograd(call, flow, (*given[:3], *(operands[n] for n in names)), self._has_lse)

    def warmup(
        self, batch: int | None = None, *, seq_len: int | None = None, kv_len: int | None = None, backward: bool = False
    ) -> Self:
        """Do now what the first call would: emit, build static tables, compile kernels. One call on zeros runs.

        Parameters
        ----------
        batch
            Batch size; the default is the spec's.
        seq_len, kv_len
            Lengths of a spec with open lengths; the default is their maximum.
        backward
            Run a backward too.

        Returns
        -------
        attnplan.Plan
            This plan.

        Raises
        ------
        NoBackendError
            If the plan is for hardware that is not here.
        SpecError
            If a length is outside the spec.

        Examples
        --------
        >>> import attnplan
        >>> spec = attnplan.AttentionSpec(seq_len=64, heads=2, head_dim=16, causal=True, dtype="float32")
        >>> attnplan.compile(spec).warmup().source.splitlines()[0]
        'def forward(self, q, k, v):'
        """
        require_here(self.target)
        import torch

        from attnplan.runtime.planned import neutral_operands

        shape = self.spec.shape
        rows = (seq_len or shape.seq_len, kv_len or shape.kv_len, kv_len or shape.kv_len)
        heads = (self.spec.heads, self.spec.kv_heads, self.spec.kv_heads)
        features = (self.spec.head_dim, self.spec.head_dim, self.spec.value_dim)
        made = []
        for s, h, d in zip(rows, heads, features, strict=True):
            sizes = (batch or self.spec.batch, *((s, h) if self._swapped else (h, s)), d)
            made.append(torch.zeros(sizes, dtype=self._dtype, device=self.target.torch_device, requires_grad=backward))
        operands = neutral_operands(self.spec.operands, made[0].shape[0], heads[0], rows[1], made[0].device)
        with torch.set_grad_enabled(backward):
            out = self(*made, **operands)
        if backward:
            out.sum().backward()
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        """Return the plan itself: copies of a model share its plans, which hold no parameters."""
        return self


def compile_report() -> Any:
    """Return what this process compiled and why: graphs, programs of plans, graph breaks, recompilations.

    Returns
    -------
    attnplan.runtime.compiling.CompileReport
        Counts and reasons; ``str`` of it is a page.

    Examples
    --------
    >>> import attnplan
    >>> attnplan.compile_report().graphs >= 0
    True
    """
    from attnplan.runtime.compiling import report

    return report()
