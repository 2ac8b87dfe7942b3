"""One graph of a hop as it runs: a part of a softmax forward, and backward from the whole softmax's output and LSE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import attrs
import torch
from torch import Tensor, fx

from attnplan.ir import Graph, Input
from attnplan.runtime.ring.surgery import Rows, backward_pieces, forward_piece, widened
from attnplan.runtime.views import accumulator

Gradients = tuple[Tensor, ...]
"""Of q, k and v, and of what a call brings for the scores."""


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
    rows: Rows = None
    """Of the output and LSE that :meth:`forward` returns; None is all queries."""
    into: tuple[Rows, ...] = (None, None, None)
    """Of the gradients of q, k and v that :meth:`backward` returns."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return the part's output ``[B, H, n, Dv]`` and LSE ``[B, H, n]``."""
        with torch.no_grad():
            out, lse = self.program(q, k, v, operands, True)
        assert lse is not None
        return (out, lse) if lse.dim() == 3 else (out.flatten(1, -3), lse.flatten(1, -2))

    def backward(
        self, flow: Flow, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], names: Sequence[str] = ()
    ) -> Gradients:
        """Return the part of dq, dk and dv, of sums in the accumulating dtype, and of the operands of these names."""
        own = getattr(self.program, "gradients", None)
        if own is None:
            return self._by_autograd(flow, q, k, v, operands, names)
        found: Gradients = own((flow.grad, flow.grad_lse), (q, k, v, flow.out, flow.lse), operands, names)
        return found

    def _by_autograd(
        self, flow: Flow, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], names: Sequence[str]
    ) -> Gradients:
        """Differentiate the part's output and LSE, each with the gradient that the merge has for it.

        With weights w = exp(l - L) the merge is O = sum w o, so that o has the gradient w dO, and l has
        w (dO . (o - O) + dL).
        """
        with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (q, k, v, *(operands[n] for n in names))]
                given = {**operands, **dict(zip(names, leaves[3:], strict=True))}
                out, lse = self.program(leaves[0], leaves[1], leaves[2], given, True)
            assert lse is not None
            with torch.no_grad():
                wide = flow.grad.to(accumulator(out.dtype))
                weight = torch.exp(lse - flow.lse.masked_fill(flow.lse == -torch.inf, 0))
                to_lse = (wide * (out - flow.out)).sum(-1)
                to_lse = weight * (to_lse if flow.grad_lse is None else to_lse + flow.grad_lse)
                to_out = (wide * weight.unsqueeze(-1)).to(out.dtype)
            return torch.autograd.grad(
                (out, lse), leaves, (to_out, to_lse.to(lse.dtype)), allow_unused=True, materialize_grads=True
            )


def part(program: Any, graph: Graph | None = None) -> Part:
    """Return an emitted program as a part: as a piece of some rows, if its graph is given and that is what it is."""
    fused = getattr(program, "fused", program)  # a single kernel call has its backward beside it
    if not isinstance(getattr(fused, "backward", None), fx.GraphModule):
        return Part(program)
    plain = Part(attrs.evolve(fused, backward=widened(fused.backward)))
    if graph is None:
        return plain
    heads = [_heads(graph, name) for name in "qkv"]
    out, back = forward_piece(fused.forward, heads[0]), backward_pieces(fused.backward, heads)
    if out is None or back is None:
        return plain
    return Part(attrs.evolve(fused, forward=out.module, backward=back.module), out.rows[0], back.rows)


def _heads(graph: Graph, name: str) -> int:
    op = graph.inputs[name].op
    assert isinstance(op, Input)
    return op.heads
