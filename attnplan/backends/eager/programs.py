"""The three kinds of eager program: one kernel call, one autograd function for a whole plan, plain torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, fx

from attnplan.errors import SpecError
from attnplan.runtime.destinations import without
from attnplan.runtime.first_order import first_order
from attnplan.runtime.ranges import run
from attnplan.runtime.scores import learned
from attnplan.runtime.views import in_line, with_features_in_line


@attrs.frozen(eq=False)
class FusedProgram:
    """A whole plan as one autograd function, which saves one output and one LSE for all parts of a softmax."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    source: str
    follows_lengths: bool = False
    differentiable_lse: bool = True
    learned: fx.GraphModule | None = None
    """Gradients of what a call brings for the scores, by name; None if the plan takes none of it."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``."""
        q, k, v = in_line(q, k, v)
        names = () if self.learned is None else learned(operands)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad or names):
            given = (operands[name] for name in names)
            out, lse = _Fused.apply(self, operands, names, q, k, v, *given)  # type: ignore[no-untyped-call]
            return out, lse
        result = run(self.forward, q, k, v, operands)
        return result[0], result[1]

    def gradients(
        self,
        flow: Sequence[Tensor | None],
        given: Sequence[Tensor],
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> tuple[Tensor, ...]:
        """Return dq, dk, dv from ``(grad, grad_lse)`` and ``(q, k, v, out, lse)``, with nothing else saved.

        Behind them come the gradients of the operands of these names. Where branches are needed one by one, the forward
        runs again for them.
        """
        q, k, v, out, lse = given
        q, k, v = in_line(q, k, v)
        grad = torch.zeros_like(out) if flow[0] is None else with_features_in_line(flow[0])
        known = [n.name for n in self.backward.graph.find_nodes(op="placeholder")]
        saved: Sequence[Tensor] = ()
        with torch.no_grad():
            if len(known) > len(_KNOWN):
                saved = run(self.forward, q, k, v, without(operands))[2:]
            return self.run_backward(names, grad, flow[1], operands, q, k, v, out, lse, *saved)

    def run_backward(self, names: Sequence[str], *given: Any) -> tuple[Tensor, ...]:
        """Return dq, dk, dv, and the gradients of the operands of these names."""
        found: tuple[Tensor, ...] = run(self.backward, *given)
        if not names:
            return found
        assert self.learned is not None
        by_name = run(self.learned, *given)
        operands = given[2]
        return *found, *(by_name[name].to(operands[name].dtype) for name in names)


_KNOWN = ("grad", "grad_lse", "operands", "q", "k", "v", "out", "lse")
"""Arguments of every backward; those behind are what the forward saved."""


class _Fused(torch.autograd.Function):
    """Runs a :class:`FusedProgram`; the backward gets the merged output and LSE (design, Gradients)."""

    @staticmethod
    def forward(
        ctx: Any, program: FusedProgram, operands: Mapping[str, Any], names: tuple[str, ...], *given: Tensor
    ) -> Any:
        q, k, v, *own = given
        out, lse, *saved = run(program.forward, q, k, v, operands)
        ctx.program, ctx.names = program, names
        ctx.operands = {name: x for name, x in operands.items() if name not in names}
        ctx.save_for_backward(q, k, v, out, lse, *own, *saved)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        q, k, v, out, lse, *rest = ctx.saved_tensors
        own, saved = rest[: len(ctx.names)], rest[len(ctx.names) :]
        grad = torch.zeros_like(out) if grad is None else with_features_in_line(grad)
        operands = {**ctx.operands, **dict(zip(ctx.names, own, strict=True))}
        with torch.no_grad():
            given = (grad, grad_lse, operands, q, k, v, out, lse, *saved)
            gradients = ctx.program.run_backward(ctx.names, *given)
        return None, None, None, *first_order(gradients)


@attrs.frozen(eq=False)
class DirectProgram:
    """A plan that is one kernel call; torch differentiates it. The LSE takes the fused program."""

    module: fx.GraphModule
    quick: fx.GraphModule
    """The same without what a backward needs."""
    fused: FusedProgram
    source: str
    learns: bool = True
    """Whether the kernel's own backward is used: some cost the host less through the fused program."""
    follows_lengths: bool = False
    differentiable_lse: bool = True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``."""
        learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if return_lse or (learns and not self.learns):
            return self.fused(q, k, v, operands, return_lse)
        q, k, v = in_line(q, k, v)
        return run(self.module if learns else self.quick, q, k, v), None

    @property
    def inlined(self) -> Inlined:
        """What a traced program takes up whole; the same object for equal calls."""
        return _inlined(str(self.module.code), self.module)

    def gradients(
        self,
        flow: Sequence[Tensor | None],
        given: Sequence[Tensor],
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> tuple[Tensor, ...]:
        """Return :meth:`FusedProgram.gradients`."""
        return self.fused.gradients(flow, given, operands, names)


class Inlined:
    """A kernel call as a traced program takes it up; it gives no LSE."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module

    def takes(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> bool:
        """Return whether this call can be taken up."""
        return not return_lse

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, None]:
        """Return the output."""
        q, k, v = with_features_in_line(q), with_features_in_line(k), with_features_in_line(v)
        return self.module.forward(q, k, v), None


_interned: OrderedDict[str, Inlined] = OrderedDict()
_KEPT_CALLS = 256


def _inlined(code: str, module: fx.GraphModule) -> Inlined:
    """Return the one module of this code, which is all that a module without attributes is.

    Dynamo guards on a module's class, and every fx module has a class of its own.
    """
    if len(_interned) >= _KEPT_CALLS:
        _interned.popitem(last=False)
    return _interned.setdefault(code, Inlined(module))


@attrs.frozen(eq=False)
class PlainProgram:
    """A plan in plain torch operators, which autograd differentiates any number of times."""

    module: fx.GraphModule
    source: str
    follows_lengths: bool = False
    differentiable_lse: bool = True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``."""
        if q.is_cuda and q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
            raise SpecError(
                "this process lets float32 products use TF32, the spec says precision='ieee', and a plan changes no "
                "global flag: call torch.set_float32_matmul_precision('highest')"
            )
        out, lse = run(self.module, q, k, v, operands)
        return out, lse
