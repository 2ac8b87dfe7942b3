"""Starts Triton kernels: the first call of a kind compiles, later ones skip what Triton does for each call.

Triton binds every argument anew in each call, tuples element by element, to find the compiled kernel: several times as
long as starting it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

_KEPT = 64
_ALIGNED = 16
"""Bytes: Triton compiles for pointers that are multiples of it or are not, and so does every key of ours."""


class Launcher:
    """Starts one kernel.

    Parameters
    ----------
    kernel
        Returns the Triton kernel, which is imported on first use.
    warps
        Warps of each program.
    """

    def __init__(self, kernel: Callable[[], Any], warps: int = 4) -> None:
        self._kernel, self._warps = kernel, warps
        self._ready: dict[Hashable, Callable[..., Any]] = {}

    def __call__(
        self, grid: tuple[int, int, int], key: Hashable, device: torch.device, pointers: int, *args: Any
    ) -> None:
        """Start the kernel.

        Parameters
        ----------
        grid
            Programs along each axis.
        key
            What the compiled kernel depends on beside alignment: dtypes, and every number among ``args``.
        device
            Where the tensors are.
        pointers
            The addresses of all tensors, combined by ``or``.
        args
            All arguments, in order.
        """
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._start(grid, key, pointers, args)
        else:
            self._start(grid, key, pointers, args)

    def _start(self, grid: tuple[int, int, int], key: Hashable, pointers: int, args: tuple[Any, ...]) -> None:
        known = (key, grid)
        ready = self._ready.get(known) if pointers % _ALIGNED == 0 else None
        if ready is not None:
            ready(*args)
            return
        compiled = self._kernel()[grid](*args, num_warps=self._warps)
        if compiled is not None and pointers % _ALIGNED == 0:  # interpreted kernels return nothing
            if len(self._ready) >= _KEPT:
                self._ready.clear()
            self._ready[known] = compiled[grid]
