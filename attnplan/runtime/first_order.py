"""Marks gradients that have none of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
