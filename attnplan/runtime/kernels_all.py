"""The table of kernels, filled: importing this adds those for CUDA. No other package is imported until it is called."""

from __future__ import annotations

from attnplan.runtime.kernels import KERNELS
from attnplan.runtime.kernels_cudnn import CuDNN
from attnplan.runtime.kernels_flash import Flash2, Flash3, Flash4
from attnplan.runtime.kernels_sdpa import Efficient, FlashCUDA
from attnplan.runtime.kernels_xformers import XFormers

KERNELS |= {
    "flash-cuda": FlashCUDA(),
    "cudnn": CuDNN(),
    "efficient": Efficient(),
    "fa2": Flash2("fa2"),
    "fa3": Flash3("fa3"),
    "fa4": Flash4("fa4"),
    "xformers-flash": XFormers("xformers-flash", "flash", "flash", 256),
    "xformers-cutlass": XFormers("xformers-cutlass", "cutlass", "cutlass", 1 << 16),
    "xformers-split-k": XFormers("xformers-split-k", "triton_splitk", "flash", 256),
}

__all__ = ["KERNELS"]
