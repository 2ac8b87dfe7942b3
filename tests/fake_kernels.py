"""Stand-ins for the packages that need a GPU: their interfaces in plain torch, which check what they are given.

They follow the sources of flash-attn 2.8, flash-attn 3's Hopper interface, flash-attn-4 4.0.0b36, xformers 0.0.35 and
torch 2.11: argument names and order, ``[B, S, H, D]`` or ``[T, H, D]``, shapes and conventions of the LSE, alignment.
"""

from __future__ import annotations

import sys
from types import ModuleType

from tests.fake_attention import broken, calls
from tests.fake_flash import BlockSparseTensorsTorch, fa2, fa3, fa4, mask_language
from tests.fake_xformers import Aten, xformers

__all__ = ["Aten", "BlockSparseTensorsTorch", "broken", "calls", "install", "xformers"]


def install(monkeypatch, *, without=()):
    """Put the packages where imports find them, as if they were installed, and torch's operators where they are."""
    from attnplan.backends import base
    from attnplan.runtime import kernels_cudnn, kernels_flash, kernels_sdpa, kernels_xformers

    calls.clear()
    broken.clear()
    four, sparsity = fa4()
    modules = {
        "flash_attn": ModuleType("flash_attn"),
        "flash_attn.cute": ModuleType("flash_attn.cute"),
        "flash_attn.cute.interface": four,
        "flash_attn.cute.block_sparsity": sparsity,
        "flash_attn.flash_attn_interface": fa2(),
        "flash_attn_interface": fa3(),
        **mask_language(),
        "xformers": ModuleType("xformers"),
        "xformers.ops": ModuleType("xformers.ops"),
        "xformers.ops.fmha": xformers(),
    }
    for name, module in modules.items():
        if name not in without:
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "attnplan.runtime.mask_functions", raising=False)
    for cached in (kernels_flash.module, kernels_xformers.fmha, base.import_failure):
        cached.cache_clear()
    monkeypatch.setattr(base, "_version", lambda name: "0.0")
    monkeypatch.setattr(kernels_sdpa, "_aten", Aten())
    monkeypatch.setattr(kernels_cudnn, "_aten", Aten())
