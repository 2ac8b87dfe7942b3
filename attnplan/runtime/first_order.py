"""Gradients that have none of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KERNELS = (
    "the flash schedule cannot be differentiated twice: its kernels have first-order gradients only; compile "
    'with backend="reference" for second derivatives'
)
RING = (
    "a ring cannot be differentiated twice: its backward has first-order gradients only; for second "
    'derivatives compile with backend="reference", without mesh or ring_size'
)


def first_order(gradients: Sequence[Tensor], why: str = KERNELS) -> Sequence[Tensor]:
    """Return gradients; where they are to be differentiated themselves, that raises a RuntimeError with the reason.

    Torch's ``once_differentiable`` loses second derivatives silently instead, where the upstream gradient is a
    constant.
    """
    if not torch.is_grad_enabled():  # it is under create_graph=True only
        return gradients
    found: tuple[Tensor, ...] = _FirstOrder.apply(why, *(x.detach().requires_grad_() for x in gradients))  # type: ignore[no-untyped-call]
    return found


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, why: str, *gradients: Tensor) -> Any:
        ctx.why = why
        return tuple(x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(ctx.why)
