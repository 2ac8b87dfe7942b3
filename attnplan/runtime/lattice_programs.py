"""Lattices as programs: compiled once for each recipe, differentiated as one function, taken up by traces.

See :mod:`attnplan.runtime.lattices` for what they compute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import attrs
import torch
from torch import Tensor

from attnplan.runtime.compiling import PerShape
from attnplan.runtime.first_order import first_order
from attnplan.runtime.lattices import Recipe, backward, forward
from attnplan.runtime.views import in_line, with_features_in_line


class Lattice:
    """All plans of one recipe: their compiled programs, and their node in a trace."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.forward = PerShape(forward, "lattice, forward")
        self.backward = PerShape(backward, "lattice, backward")
        self.with_lse, self.alone = _functions(recipe)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Any:
        """Return the result of :func:`forward`, compiled."""
        q, k, v = q.detach(), k.detach(), v.detach()  # Dynamo asks tensors that have a history for their gradient
        return self.forward(None, q, k, v, self.recipe)

    def gradients(
        self,
        grad: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor | None,
        saved: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Return the result of :func:`backward`, compiled."""
        key = (grad_lse is None, *((x.shape, x.stride()) for x in saved))
        grad, grad_lse = grad.contiguous(), None if grad_lse is None else grad_lse.contiguous()
        found: tuple[Tensor, ...] = self.backward(key, grad, grad_lse, q, k, v, out, lse, saved, self.recipe)
        return found


@lru_cache(maxsize=64)
def lattice(recipe: Recipe) -> Lattice:
    """Return what plans of a recipe share, the same object for equal ones."""
    return Lattice(recipe)


def _functions(recipe: Recipe) -> tuple[Any, Any]:
    """Return autograd functions of q, k and v with the LSE as a result, and without: a trace fills absent gradients.

    They are made for each recipe, which a trace then knows as a constant.
    """

    class WithLSE(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
            found = forward(q, k, v, recipe)
            ctx.save_for_backward(q, k, v, *found)
            return found[0], found[1]

        @staticmethod
        def backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> Any:
            q, k, v, out, lse, *saved = ctx.saved_tensors
            return backward(grad, grad_lse, q, k, v, out, lse, saved, recipe)

    class Alone(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Any:
            found = forward(q, k, v, recipe)
            ctx.save_for_backward(q, k, v, *found)
            return found[0]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            q, k, v, out, *saved = ctx.saved_tensors
            lse = saved[0] if recipe.has_lse else None
            return backward(grad, None, q, k, v, out, lse, saved[recipe.results - 1 :], recipe)

    return WithLSE, Alone


@attrs.frozen(eq=False)
class LatticeProgram:
    """A lattice as one compiled forward and one compiled backward."""

    recipe: Recipe
    follows_lengths: bool = False
    differentiable_lse: bool = True

    @property
    def source(self) -> str:
        """The recipe: rows as (first head, first row, [(size, head step, row step), ...])."""
        lines = [f"# {self.recipe.kernel}, and everything around it fused by Inductor"]
        for part in self.recipe.parts:
            weight = "by LSE" if part.constant is None else f"times {part.constant:g}"
            lines.append(f"# rows {part.q} of q, {part.k} of k{', causal' if part.causal else ''}; joined {weight}")
        return "\n".join(lines) + "\n"

    @property
    def inlined(self) -> Inlined | None:
        """What a trace takes up; None where as many lattices as may be are taken up already."""
        return taken_up(self.recipe)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run on q, k, v in ``[B, H, S, D]``."""
        q, k, v = in_line(q, k, v)
        shared = lattice(self.recipe)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            found = _Planned.apply(shared, q, k, v)  # type: ignore[no-untyped-call]
        else:
            found = shared(q, k, v)
        return found[0], found[1] if self.recipe.has_lse else None

    def gradients(
        self,
        flow: Sequence[Tensor | None],
        given: Sequence[Tensor],
        operands: Mapping[str, Any],
        names: Sequence[str] = (),
    ) -> tuple[Tensor, ...]:
        """Return dq, dk, dv from ``(grad, grad_lse)`` and ``(q, k, v, out, lse)``.

        Where parts are needed one by one, the forward runs again for them.
        """
        q, k, v, out, lse = (x.detach() for x in given)
        q, k, v = in_line(q, k, v)
        shared = lattice(self.recipe)
        grad, grad_lse = (None if x is None else x.detach() for x in flow)
        grad = torch.zeros_like(out) if grad is None else grad
        with torch.no_grad():
            saved = shared(q, k, v)[self.recipe.results :] if self.recipe.keeps_parts else ()
            own_lse = lse if self.recipe.has_lse else None
            return shared.gradients(grad, grad_lse if self.recipe.has_lse else None, q, k, v, out, own_lse, saved)


class _Planned(torch.autograd.Function):
    """A compiled lattice, with first-order gradients only."""

    @staticmethod
    def forward(ctx: Any, shared: Lattice, *given: Tensor) -> Any:
        found = shared(*given)
        ctx.shared = shared
        ctx.save_for_backward(*given, *found)
        ctx.set_materialize_grads(False)
        return found[: shared.recipe.results]

    @staticmethod
    def backward(ctx: Any, *flow: Tensor | None) -> Any:
        recipe = ctx.shared.recipe
        q, k, v, *rest = (x.detach() for x in ctx.saved_tensors)
        out, *lse = rest[: recipe.results]
        grad = torch.zeros_like(out) if flow[0] is None else flow[0]
        grad_lse = flow[1] if recipe.has_lse else None
        with torch.no_grad():
            given = (grad, grad_lse, q, k, v, out, lse[0] if lse else None, rest[recipe.results :])
            gradients = ctx.shared.gradients(*given)
        return None, *first_order(gradients)


MOST_TAKEN_UP = 4
"""Lattices of different rows that traces take up: each is a graph of its own, and Dynamo gives up after eight."""
_taken_up: WeakValueDictionary[Recipe, Inlined] = WeakValueDictionary()


class Inlined:
    """A lattice as a traced program takes it up, for Inductor to fuse with what stands around it."""

    def __init__(self, recipe: Recipe) -> None:
        self.lattice, self.has_lse = lattice(recipe), recipe.has_lse

    def takes(self, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> bool:
        """Return whether this call can be taken up."""
        return self.has_lse or not return_lse

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, operands: Mapping[str, Any], return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return output and LSE."""
        q, k, v = with_features_in_line(q), with_features_in_line(k), with_features_in_line(v)
        if return_lse:
            out, lse = self.lattice.with_lse.apply(q, k, v)
            return out, lse
        return self.lattice.alone.apply(q, k, v), None


def taken_up(recipe: Recipe) -> Inlined | None:
    """Return what a trace takes up of a lattice, the same object for equal ones; None beyond :data:`MOST_TAKEN_UP`.

    The others stay one operator, all in one graph. A place is free again when no plan of its lattice lives.
    """
    found = _taken_up.get(recipe)
    if found is None and len(_taken_up) < MOST_TAKEN_UP:
        found = _taken_up[recipe] = Inlined(recipe)
    return found


def count_taken_up() -> int:
    """Return how many lattices traces take up."""
    return len(_taken_up)
