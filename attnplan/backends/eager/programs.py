"""The three kinds of eager program: one kernel call, one autograd function for a whole plan, plain torch."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from operator import getitem
from typing import Any

import attrs
import torch
from torch import Tensor, fx
from torch.autograd import profiler

from attnplan.errors import SpecError
from attnplan.runtime.views import with_features_in_line


def run(module: fx.GraphModule, *args: Any) -> Any:
    """Return the result of an emitted module; under the profiler every op has a range with its name."""
    if profiler._is_profiler_enabled:
        return _Ranges(module).run(*args)
    return module.forward(*args)


class _Ranges(fx.Interpreter):
    """Runs a module node by node, each in a range of the profiler named after the plan's op."""

    def run_node(self, n: fx.Node) -> Any:
        if not n.op.startswith("call") or n.target is getitem:
            return super().run_node(n)
        ids = [found[1] for x in (n, *n.users) if (found := _NAMED.fullmatch(x.name))]
        what = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", n.name)
        with profiler.record_function(f"attnplan: %{ids[0]} {what}" if ids else f"attnplan: {what}"):
            return super().run_node(n)


_NAMED = re.compile(r"(?:out|lse|[qkv]|d[qkv]|where|keep)_(\d+)")
"""Names by which emitted code says which op of the plan a value belongs to."""


@attrs.frozen(eq=False)
class FusedProgram:
    """A whole plan as one autograd function, which saves one output and one LSE for all parts of a softmax."""

    forward: fx.GraphModule
    backward: fx.GraphModule
    source: str
    follows_lengths: bool = False
    differentiable_lse: bool = True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``."""
        q, k, v = with_features_in_line(q), with_features_in_line(k), with_features_in_line(v)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            out, lse = _Fused.apply(self, operands, q, k, v)  # type: ignore[no-untyped-call]
            return out, lse
        result = run(self.forward, q, k, v, operands)
        return result[0], result[1]

    def gradients(
        self, flow: Sequence[Tensor | None], given: Sequence[Tensor], operands: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv from ``(grad, grad_lse)`` and ``(q, k, v, out, lse)``, with nothing else saved.

        Where branches are needed one by one, the forward runs again for them.
        """
        q, k, v, out, lse = given
        q, k, v = with_features_in_line(q), with_features_in_line(k), with_features_in_line(v)
        grad = torch.zeros_like(out) if flow[0] is None else with_features_in_line(flow[0])
        known = [n.name for n in self.backward.graph.find_nodes(op="placeholder")]
        saved: Sequence[Tensor] = ()
        with torch.no_grad():
            if len(known) > len(_KNOWN):
                saved = run(self.forward, q, k, v, operands)[2:]
            found: tuple[Tensor, Tensor, Tensor] = run(
                self.backward, grad, flow[1], operands, q, k, v, out, lse, *saved
            )
        return found


_KNOWN = ("grad", "grad_lse", "operands", "q", "k", "v", "out", "lse")
"""Arguments of every backward; those behind are what the forward saved."""


class _Fused(torch.autograd.Function):
    """Runs a :class:`FusedProgram`; the backward gets the merged output and LSE (design, Gradients)."""

    @staticmethod
    def forward(ctx: Any, program: FusedProgram, operands: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse, *saved = run(program.forward, q, k, v, operands)
        ctx.program, ctx.operands = program, operands
        ctx.save_for_backward(q, k, v, out, lse, *saved)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        q, k, v, out, lse, *saved = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else with_features_in_line(grad)
        with torch.no_grad():
            gradients = run(ctx.program.backward, grad, grad_lse, ctx.operands, q, k, v, out, lse, *saved)
        if torch.is_grad_enabled():  # only under create_graph=True
            gradients = FirstOrder.apply(*(x.detach().requires_grad_() for x in gradients))  # type: ignore[no-untyped-call]
        return None, None, *gradients


class FirstOrder(torch.autograd.Function):
    """Marks gradients that have none of their own.

    Torch's ``once_differentiable`` loses them silently instead, where the upstream gradient is a constant.
    """

    @staticmethod
    def forward(ctx: Any, *gradients: Tensor) -> Any:
        return tuple(x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(
            "the flash schedule cannot be differentiated twice: its kernels have first-order gradients only; compile "
            'with backend="reference" for second derivatives'
        )


@attrs.frozen(eq=False)
class DirectProgram:
    """A plan that is one kernel call; torch differentiates it. The LSE takes the fused program."""

    module: fx.GraphModule
    fused: FusedProgram
    source: str
    follows_lengths: bool = False
    differentiable_lse: bool = True

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``."""
        if return_lse:
            return self.fused(q, k, v, operands, return_lse)
        q, k, v = with_features_in_line(q), with_features_in_line(k), with_features_in_line(v)
        return run(self.module, q, k, v), None

    @property
    def inlined(self) -> Inlined:
        """What a traced program takes up whole; the same object for equal calls."""
        return _inlined(str(self.module.code), self.module)

    def gradients(
        self, flow: Sequence[Tensor | None], given: Sequence[Tensor], operands: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return :meth:`FusedProgram.gradients`."""
        return self.fused.gradients(flow, given, operands)


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
