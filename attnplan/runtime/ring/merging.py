"""Joining what the hops bring: parts of a softmax by their LSE, in hop order; branches by the rule of the mixture."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from attnplan.patterns import Mixture
from attnplan.runtime.ring.merge_parts import MOST, Piece, merge_parts
from attnplan.runtime.ring.parts import Flow
from attnplan.runtime.ring.surgery import Rows
from attnplan.runtime.views import accumulator
from attnplan.spec import AttentionSpec


class Total:
    """The softmax of one rank's rows from its parts, which are merged a few at a time, in hop order, in float32.

    Parameters
    ----------
    q
        The rows' queries.
    features
        Features of the output.
    """

    def __init__(self, q: Tensor, features: int) -> None:
        self._q, self._features = q, features
        self._pieces: list[Piece] = []
        self._runs = False

    def add(self, out: Tensor, lse: Tensor, rows: Rows = None) -> None:
        """Take a part's output ``[B, H, n, Dv]`` and LSE ``[B, H, n]``, of some rows or of all."""
        if len(self._pieces) == MOST:
            made = merge_parts(self._pieces, self._q, accumulator(self._q.dtype), over=self._runs)
            self._pieces, self._runs = [Piece(*made)], True
        self._pieces.append(Piece(out, lse, rows))

    def result(self) -> tuple[Tensor, Tensor]:
        """Return the output in the dtype of q, and the LSE; 0 and -inf where no part added anything."""
        q = self._q
        if not self._pieces:
            none = torch.full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype), device=q.device)
            return q.new_zeros((*q.shape[:3], self._features)), none
        one = self._pieces[0]
        if len(self._pieces) == 1 and one.rows in (None, (0, q.shape[2])):
            return one.out.to(q.dtype), one.lse.to(accumulator(q.dtype))
        return merge_parts(self._pieces, q, q.dtype, over=self._runs)


@attrs.frozen
class Mixing:
    """How the softmaxes of a program become one output."""

    rule: str
    weights: tuple[float, ...]
    """Constant weight of each softmax under ``mean`` and ``sum``; 1 under the others."""

    @classmethod
    def of(cls, spec: AttentionSpec, softmaxes: Sequence[int]) -> Mixing:
        """Return how the branches in ``softmaxes`` are mixed."""
        if spec.rule == "mean":
            return cls(spec.rule, (1 / len(spec.branches),) * len(softmaxes))
        given = spec.pattern.weights if isinstance(spec.pattern, Mixture) else None
        if spec.rule == "sum" and given is not None:
            return cls(spec.rule, tuple(given[b] for b in softmaxes))
        return cls(spec.rule, (1.0,) * len(softmaxes))

    def forward(self, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor | None]:
        """Return output and, if there is one, LSE of softmaxes ``(out, lse)``."""
        out, lse = parts[0]
        if self.rule in ("mean", "sum"):
            wide = out.to(accumulator(out.dtype)) * self.weights[0]
            for (other, _), weight in zip(parts[1:], self.weights[1:], strict=True):
                wide.add_(other.to(wide.dtype), alpha=weight)
            return wide.to(out.dtype), None
        if len(parts) == 1:
            return out, lse
        joined = Total(out, out.shape[-1])
        for part in parts:
            joined.add(*part)
        return joined.result()

    def backward(
        self, grad: Tensor, grad_lse: Tensor | None, lse: Tensor | None, parts: Sequence[tuple[Tensor, Tensor]]
    ) -> list[Flow]:
        """Return what arrives at each softmax; see :class:`attnplan.backends.eager.places.Owner`."""
        if self.rule in ("mean", "sum"):
            return [
                Flow(grad if weight == 1 else grad * weight, None, *part)
                for part, weight in zip(parts, self.weights, strict=True)
            ]
        assert lse is not None
        return [Flow(grad, grad_lse, out, lse) for out, _ in parts]
