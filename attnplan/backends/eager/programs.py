"""The three kinds of eager program: one kernel call, one autograd function for a whole plan, plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, fx

from attnplan.errors import SpecError
from attnplan.runtime.views import with_features_in_line


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
        result = self.forward.forward(q, k, v, operands)
        return result[0], result[1]


class _Fused(torch.autograd.Function):
    """Runs a :class:`FusedProgram`; the backward gets the merged output and LSE (design, Gradients)."""

    @staticmethod
    def forward(ctx: Any, program: FusedProgram, operands: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse, *saved = program.forward.forward(q, k, v, operands)
        ctx.program, ctx.operands = program, operands
        ctx.save_for_backward(q, k, v, out, lse, *saved)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> Any:
        q, k, v, out, lse, *saved = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else with_features_in_line(grad)
        with torch.no_grad():
            gradients = ctx.program.backward.forward(grad, grad_lse, ctx.operands, q, k, v, out, lse, *saved)
        if torch.is_grad_enabled():  # only under create_graph=True
            gradients = _FirstOrder.apply(*(x.detach().requires_grad_() for x in gradients))  # type: ignore[no-untyped-call]
        return None, None, *gradients


class _FirstOrder(torch.autograd.Function):
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
        return self.module.forward(q, k, v), None


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
        out, lse = self.module.forward(q, k, v, operands)
        return out, lse
