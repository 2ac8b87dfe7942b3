"""The operators of xformers 0.0.35, and of its successor package, behind the convention of :mod:`.kernels`.

They take ``[B, S, H, D]`` and a bias object. Grouped heads become batches along which keys broadcast: their backward
has no groups.

References
----------
``xformers.ops.fmha`` 0.0.35; its successor ``mslk.attention.fmha`` has the same names.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from attnplan.ir.native import EVERYTHING
from attnplan.runtime.kernels import Pair, Request, Triple, additive, blank_empty_rows, may_lack_keys
from attnplan.runtime.kernels_sdpa import (
    Groups,
    boundaries,
    empty_rows_above,
    empty_rows_below,
    packed,
    packed_lse,
    unpacked,
    unpacked_lse,
)
from attnplan.runtime.opaque import Opaque

MODULES = ("mslk.attention.fmha", "xformers.ops.fmha")
_ALIGN = 16
_KEPT = 4096
"""Kinds of tensors that are remembered as checked."""


@lru_cache(maxsize=1)
def fmha() -> Any:
    """Return the module of the successor package, or of xformers."""
    failures = []
    for name in MODULES:
        try:
            return import_module(name)
        except Exception as error:  # a package may raise anything while it loads
            failures.append(f"{name}: {type(error).__name__}: {error}")
    raise ImportError("; ".join(failures))


class XFormers(Opaque):
    """One pair of forward and backward operators."""

    family = "xformers"
    title = "xformers"

    def __init__(self, name: str, forward: str, backward: str, widest: int) -> None:
        super().__init__(name)
        self.operators, self.widest = (forward, backward), widest
        self._checked: set[tuple[Any, ...]] = set()

    def run(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Pair:
        heads = Groups(q, k)
        batch = q.shape[0]
        if asked.documents is not None:
            rows = [packed(x).unsqueeze(0) for x in (q, k, v)]
        else:
            rows = [x.transpose(1, 2) for x in (heads.queries(q), heads.keys(k), heads.keys(v))]
        bias = self._bias(heads, q, k, asked)
        out, lse = self._forward(rows, bias, asked, with_lse=True)
        if asked.documents is not None:
            return unpacked(out[0], batch), unpacked_lse(lse[0], batch)
        out, lse = heads.back(out.transpose(1, 2)), heads.back(lse[..., : q.shape[2]])
        if asked.mask is not None and asked.mask.dtype == torch.bool:
            out, lse = out.contiguous(), lse.contiguous()
            blank_empty_rows(asked.mask, out, lse)
        return out, empty_rows_below(lse) if may_lack_keys(q, k, asked) else lse

    def run_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, asked: Request
    ) -> Triple:
        heads = Groups(q, k)
        batch = q.shape[0]
        lse = empty_rows_above(lse) if may_lack_keys(q, k, asked) else lse
        bias = self._bias(heads, q, k, asked)
        if asked.documents is not None:
            grad, out, q, k, v = (packed(x).unsqueeze(0) for x in (grad, out, q, k, v))
            given = (grad.contiguous(), out.contiguous(), packed_lse(lse).unsqueeze(0), q, k, v)
        else:
            spread = [heads.queries(x) for x in (grad, out, q)] + [heads.keys(x) for x in (k, v)]
            grad, out, q, k, v = (x.transpose(1, 2) for x in spread)
            given = (grad.contiguous(), out.contiguous(), heads.queries(lse).contiguous(), q, k, v)
        found = fmha().memory_efficient_attention_backward(*given, bias, scale=asked.scale, op=self._operator(1))
        if asked.documents is not None:
            dq, dk, dv = (unpacked(x[0], batch) for x in found)
            return dq, dk, dv
        dq, dk, dv = (x.transpose(1, 2) for x in found)
        return heads.back(dq), heads.reduce(dk), heads.reduce(dv)

    def run_direct(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Tensor:
        heads = Groups(q, k)
        bias = self._bias(heads, q, k, asked)
        rows = [x.transpose(1, 2) for x in (heads.queries(q), heads.keys(k), heads.keys(v))]
        if q.requires_grad or k.requires_grad or v.requires_grad:
            operators = (self._operator(0), self._operator(1))
            out = fmha().memory_efficient_attention(*rows, attn_bias=bias, scale=asked.scale, op=operators)
        else:
            out = self._forward(rows, bias, asked, with_lse=False)[0]
        return heads.back(out.transpose(1, 2))

    def _forward(self, rows: list[Tensor], bias: Any, asked: Request, *, with_lse: bool) -> tuple[Tensor, Any]:
        """Return output and, if it is asked for, LSE.

        What the package asks of tensors takes the host longer than the launch, and depends on their sizes, strides and
        kind alone: where no tensor belongs to the bias it is asked once, and then the operator is called by itself.
        """
        operator, bare = self._operator(0), asked.mask is None and asked.bias is None and asked.documents is None
        key = (with_lse, type(bias), *((x.shape, x.stride(), x.dtype, x.device) for x in rows)) if bare else ()
        if key in self._checked:
            q, k, v = rows
            given = fmha().Inputs(query=q, key=k, value=v, attn_bias=bias, scale=asked.scale)
            out, context = operator.apply(given, with_lse)
            return out, context.lse if with_lse else None
        if with_lse:
            run = fmha().memory_efficient_attention_forward_requires_grad
        else:
            run = fmha().memory_efficient_attention_forward
        found = run(*rows, bias, scale=asked.scale, op=operator)
        if bare:
            if len(self._checked) >= _KEPT:
                self._checked.clear()
            self._checked.add(key)
        return found if with_lse else (found, None)

    def _operator(self, which: int) -> Any:
        return getattr(getattr(fmha(), self.operators[which]), ("FwOp", "BwOp")[which])

    def _bias(self, heads: Groups, q: Tensor, k: Tensor, asked: Request) -> Any:
        kinds = fmha().attn_bias
        left, right = asked.window
        if asked.documents is not None:
            return _documents(kinds, boundaries(asked.documents, q.shape[0], q.shape[2]), q, asked)
        if asked.mask is not None or asked.bias is not None:
            mask = asked.mask
            if asked.causal:  # its own causal bias is another object
                mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
                mask = mask.expand(q.shape[0], q.shape[1], -1, -1)
            return additive(heads.mask(mask), q.dtype, _ALIGN, heads.mask(asked.bias))
        if asked.causal:
            return kinds.LowerTriangularMask()
        if asked.window == EVERYTHING:
            return None
        if right == 0:
            if left is None:
                return kinds.LowerTriangularFromBottomRightMask()
            return kinds.LowerTriangularFromBottomRightLocalAttentionMask(left + 1)
        whole = k.shape[2] + q.shape[2]
        return kinds.LocalAttentionFromBottomRightMask(
            window_left=whole if left is None else left, window_right=whole if right is None else right
        )


def _documents(kinds: Any, cu: Tensor, q: Tensor, asked: Request) -> Any:
    """Return the bias of packed documents. Its host copies of the boundaries stay empty: reading them would wait."""
    left, right = asked.window
    info = kinds._SeqLenInfo(seqstart=cu, max_seqlen=q.shape[2], min_seqlen=0, seqstart_py=[])
    if asked.causal or asked.window == (None, 0):
        return kinds.BlockDiagonalCausalFromBottomRightMask(q_seqinfo=info, k_seqinfo=info)
    if asked.window == EVERYTHING:
        return kinds.BlockDiagonalMask(q_seqinfo=info, k_seqinfo=info)
    assert left is not None
    assert right == 0
    return kinds.BlockDiagonalCausalLocalAttentionFromBottomRightMask(
        q_seqinfo=info, k_seqinfo=info, _window_size=left + 1
    )
