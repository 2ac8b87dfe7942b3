"""One graph of a hop as it runs: a part of a softmax forward, and backward from the whole softmax's output and LSE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, fx

from attnplan.runtime.attend import in_dtype_of
from attnplan.runtime.views import accumulator

Triple = tuple[Tensor, Tensor, Tensor]


class Program(Protocol):
    """An emitted graph; see :class:`attnplan.backends.Program`."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and LSE."""
        ...


@attrs.frozen(eq=False)
class Flow:
    """What arrives at the rows of a softmax in the backward: all of it is of the whole softmax, not of a part."""

    grad: Tensor
    grad_lse: Tensor | None
    out: Tensor
    lse: Tensor


@attrs.frozen(eq=False)
class Part:
    """An emitted graph over a rank's queries and a hop's store."""

    program: Program

    def forward(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the part's output ``[B, H, S, Dv]`` and LSE ``[B, H, S]``."""
        with torch.no_grad():
            out, lse = self.program(q, k, v, operands, True)
        assert lse is not None
        return out, lse

    def backward(self, flow: Flow, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> Triple:
        """Return the part of dq, dk and dv, of sums in the accumulating dtype."""
        own = getattr(self.program, "gradients", None)
        if own is None:
            return self._by_autograd(flow, q, k, v, operands)
        found: Triple = own((flow.grad, flow.grad_lse), (q, k, v, flow.out, flow.lse), operands)
        return found

    def _by_autograd(self, flow: Flow, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> Triple:
        """Differentiate the part's output and LSE, each with the gradient that the merge has for it.

        With weights w = exp(l - L) the merge is O = sum w o, so that o has the gradient w dO, and l has
        w (dO . (o - O) + dL).
        """
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (q, k, v)]
                out, lse = self.program(leaves[0], leaves[1], leaves[2], operands, True)
            assert lse is not None
            with torch.no_grad():
                wide = flow.grad.to(accumulator(out.dtype))
                weight = torch.exp(lse - flow.lse.masked_fill(flow.lse == -torch.inf, 0))
                to_lse = (wide * (out - flow.out)).sum(-1)
                to_lse = weight * (to_lse if flow.grad_lse is None else to_lse + flow.grad_lse)
                to_out = (wide * weight.unsqueeze(-1)).to(out.dtype)
            dq, dk, dv = torch.autograd.grad(
                (out, lse), leaves, (to_out, to_lse.to(lse.dtype)), allow_unused=True, materialize_grads=True
            )
        return dq, dk, dv


def widened(module: fx.GraphModule) -> fx.GraphModule:
    """Return a backward whose gradients are not rounded to the dtype of the inputs at the end.

    The hops of a ring add to them.
    """
    code = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    code.graph_copy(module.graph, copied)

    def bare(node: Any) -> fx.Node:
        while node.op == "call_function" and node.target is in_dtype_of:
            node = node.args[0]
        return copied[node]

    output: Any = next(iter(module.graph.find_nodes(op="output"))).args[0]
    code.output(tuple(bare(node) for node in output))
    return fx.GraphModule(module, code, "Backward")


def part(program: Any) -> Part:
    """Return an emitted program as a part."""
    fused = getattr(program, "fused", program)  # a single kernel call has its backward beside it
    if isinstance(getattr(fused, "backward", None), fx.GraphModule):
        return Part(attrs.evolve(fused, backward=widened(fused.backward)))
    return Part(program)
