"""Whether the fused kernels run as Triton or as plain torch."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from attnplan.runtime.opaque import is_watched


def runs_triton(*tensors: Tensor) -> bool:
    """Return whether tensors go to the Triton kernels.

    Those on the CPU and those in float64 do not. Neither do those that a dispatch mode looks at: it sees operators of
    torch, and a kernel of our own would have none for its fake tensors.
    """
    if is_watched() or tensors[0].dtype == torch.float64:
        return False
    return tensors[0].is_cuda or is_interpreted()


def is_interpreted() -> bool:
    """Return whether Triton interprets its kernels, on the CPU, as tests ask it to by ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def features_of_block(features: int) -> int:
    """Return the power of two that holds a row of features."""
    return 1 << max(features - 1, 0).bit_length()
