"""The published package dilated-attention-pytorch 0.2.0, importable without xformers: its kernel call becomes SDPA."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import torch.nn.functional as F
from torch import Tensor


class _LowerTriangularMask:
    """Stands for the xformers mask."""


def _attention(query: Tensor, key: Tensor, value: Tensor, op: object = None, attn_bias: object = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    causal = isinstance(attn_bias, _LowerTriangularMask)
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


@contextmanager
def loaded() -> Iterator[ModuleType]:
    """Import the published module over a stub of xformers, and forget both afterwards.

    Raises
    ------
    ImportError
        If the package, or einops, is not installed.
    """
    ops = ModuleType("xformers.ops")
    ops.LowerTriangularMask, ops.memory_efficient_attention, ops.AttentionOp = _LowerTriangularMask, _attention, object
    root = ModuleType("xformers")
    root.ops = ops
    with mock.patch.dict(sys.modules, {"xformers": root, "xformers.ops": ops}):
        yield importlib.import_module("dilated_attention_pytorch.dilated_attention")
