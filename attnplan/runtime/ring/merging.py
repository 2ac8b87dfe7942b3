"""Joining what the hops bring: parts of a softmax by their LSE, in hop order; branches by the rule of the mixture."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor

from attnplan.patterns import Mixture
from attnplan.runtime.ring.merge_two import merge_two
from attnplan.runtime.ring.parts import Flow
from attnplan.runtime.views import accumulator
from attnplan.spec import AttentionSpec


class Total:
    """The running softmax of one rank's rows: the first part is kept as it is, the others are merged in float32.

    Parameters
    ----------
    parts
        Number of parts that will come, so that the last merge can write the dtype of the output.
    """

    def __init__(self, parts: int = 0) -> None:
        self.out: Tensor | None = None
        self.lse: Tensor | None = None
        self._left = parts
        self._dtype: torch.dtype | None = None
        self._runs = False

    def add(self, out: Tensor, lse: Tensor) -> None:
        """Merge a part's output ``[B, H, S, Dv]`` and LSE ``[B, H, S]``. A row without a key has LSE -inf."""
        self._left -= 1
        if self.out is None or self.lse is None:
            self.out, self.lse, self._dtype = out, lse.to(accumulator(out.dtype)), out.dtype
            return
        assert self._dtype is not None
        dtype = self._dtype if self._left == 0 else accumulator(self._dtype)
        self.out, self.lse = merge_two((self.out, self.lse), (out, lse), dtype, over=self._runs)
        self._runs = True

    def result(self, q: Tensor, features: int) -> tuple[Tensor, Tensor]:
        """Return the output in the dtype of q, and the LSE; 0 and -inf where no hop added anything."""
        if self.out is None or self.lse is None:
            none = torch.full(q.shape[:3], -torch.inf, dtype=accumulator(q.dtype), device=q.device)
            return q.new_zeros((*q.shape[:3], features)), none
        return self.out.to(q.dtype), self.lse


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
        joined = Total()
        for part in parts:
            joined.add(*part)
        assert joined.out is not None
        return joined.out.to(out.dtype), joined.lse

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
