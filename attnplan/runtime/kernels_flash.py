"""The flash-attn packages: versions 2, 3 and 4, each with windows, softcap, packed documents and grouped heads.

They take ``[B, S, H, D]``: transposed views go in without a copy. Windows and causality are aligned to the last query
and the last key. Version 2 reports LSE +inf for rows without a key, version 4 -inf; every backward is right with +inf.

References
----------
Dao, FlashAttention-2, arXiv 2307.08691; Shah et al., FlashAttention-3, arXiv 2407.08608; ``flash_attn.cute``, 4.0.0b36.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from attnplan.runtime.kernels import Native
from attnplan.runtime.kernels_sdpa import (
    boundaries,
    empty_rows_above,
    empty_rows_below,
    packed,
    packed_lse,
    signed,
    unpacked,
    unpacked_lse,
)
from attnplan.runtime.opaque import Opaque
from attnplan.runtime.tables import BlockLists, Lists


@lru_cache(maxsize=16)
def module(name: str) -> Any:
    """Return a module of another package, imported on first use."""
    return import_module(name)


class _Flash(Opaque):
    family = "flash"
    widest = 256

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, native: Native
    ) -> tuple[Tensor, Tensor]:
        assert mask is None
        if native.documents is None:
            rows = [x.transpose(1, 2) for x in (q, k, v)]
            out, lse = self._forward(rows, None, 0, causal, scale, native)
            return out.transpose(1, 2), empty_rows_below(lse)
        batch, length = q.shape[0], q.shape[2]
        cu = boundaries(native.documents, batch, length)
        out, lse = self._forward([packed(x) for x in (q, k, v)], cu, length, causal, scale, native)
        return unpacked(out, batch), empty_rows_below(unpacked_lse(lse, batch))

    def run_backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
        native: Native,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert mask is None
        lse = empty_rows_above(lse)
        if native.documents is None:
            rows = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
            dq, dk, dv = self._backward(rows, lse, None, 0, causal, scale, native)
            return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
        batch, length = q.shape[0], q.shape[2]
        cu = boundaries(native.documents, batch, length)
        flat = [packed(x) for x in (grad, q, k, v, out)]
        dq, dk, dv = self._backward(flat, packed_lse(lse), cu, length, causal, scale, native)
        return unpacked(dq, batch), unpacked(dk, batch), unpacked(dv, batch)

    def run_direct(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, native: Native) -> Tensor:
        window: Any = native.window if isinstance(self, Flash4) else signed(native.window)
        found = module(self.interface).flash_attn_func(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            softmax_scale=scale,
            causal=causal,
            window_size=window,
            softcap=native.softcap,
        )
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    interface: str

    def _forward(
        self, rows: list[Tensor], cu: Tensor | None, length: int, causal: bool, scale: float, native: Native
    ) -> tuple[Tensor, Tensor]:
        """Return output ``[B, S, H, D]`` or ``[T, H, D]``, and LSE ``[B, H, S]`` or ``[H, T]``."""
        raise NotImplementedError

    def _backward(
        self,
        rows: list[Tensor],
        lse: Tensor,
        cu: Tensor | None,
        length: int,
        causal: bool,
        scale: float,
        native: Native,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of ``rows`` = (grad, q, k, v, out)."""
        raise NotImplementedError


class Flash2(_Flash):
    """flash-attn 2."""

    title = "flash-attn 2"
    interface = "flash_attn.flash_attn_interface"

    def _forward(
        self, rows: list[Tensor], cu: Tensor | None, length: int, causal: bool, scale: float, native: Native
    ) -> tuple[Tensor, Tensor]:
        left, right = signed(native.window)
        options: dict[str, Any] = {"window_size_left": left, "window_size_right": right, "softcap": native.softcap}
        options |= {"dropout_p": 0.0, "softmax_scale": scale, "causal": causal}
        options |= {"alibi_slopes": None, "return_softmax": False}
        interface = module(self.interface)
        if cu is None:
            out, lse, *_ = interface._flash_attn_forward(*rows, **options)
        else:
            out, lse, *_ = interface._flash_attn_varlen_forward(*rows, cu, cu, length, length, **options)
        return out, lse

    def _backward(
        self,
        rows: list[Tensor],
        lse: Tensor,
        cu: Tensor | None,
        length: int,
        causal: bool,
        scale: float,
        native: Native,
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, right = signed(native.window)
        options: dict[str, Any] = {"window_size_left": left, "window_size_right": right, "softcap": native.softcap}
        options |= {"dropout_p": 0.0, "softmax_scale": scale, "causal": causal}
        options |= {"alibi_slopes": None, "deterministic": False}
        grad, q, k, v, out = rows
        made = [x.new_empty(x.shape) for x in (q, k, v)]
        interface = module(self.interface)
        lengths = () if cu is None else (cu, cu, length, length)
        run = interface._flash_attn_backward if cu is None else interface._flash_attn_varlen_backward
        run(grad, q, k, v, out, lse, *made, *lengths, **options)
        return made[0], made[1], made[2]


class Flash3(_Flash):
    """flash-attn 3, the Hopper interface."""

    title = "flash-attn 3"
    interface = "flash_attn_interface"

    def _forward(
        self, rows: list[Tensor], cu: Tensor | None, length: int, causal: bool, scale: float, native: Native
    ) -> tuple[Tensor, Tensor]:
        left, right = signed(native.window)
        options: dict[str, Any] = {"window_size_left": left, "window_size_right": right, "softcap": native.softcap}
        if cu is not None:
            options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": length, "max_seqlen_k": length}
        out, lse, *_ = module(self.interface)._flash_attn_forward(*rows, softmax_scale=scale, causal=causal, **options)
        return out, lse

    def _backward(
        self,
        rows: list[Tensor],
        lse: Tensor,
        cu: Tensor | None,
        length: int,
        causal: bool,
        scale: float,
        native: Native,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad, q, k, v, out = rows
        made = [x.new_empty(x.shape) for x in (q, k, v)]
        longest = None if cu is None else length
        # By position: the names of some of these arguments differ between commits, their order does not.
        lengths = (cu, cu, None, None, longest, longest)
        options = (scale, causal, *signed(native.window), native.softcap, False)
        module(self.interface)._flash_attn_backward(grad, q, k, v, out, lse, *lengths, *made, *options)
        return made[0], made[1], made[2]


class Flash4(_Flash):
    """flash-attn 4, the CuTe interface; also over tables of whole tiles."""

    title = "flash-attn 4"
    interface = "flash_attn.cute.interface"
    widest = 128

    def _forward(
        self, rows: list[Tensor], cu: Tensor | None, length: int, causal: bool, scale: float, native: Native
    ) -> tuple[Tensor, Tensor]:
        left, right = native.window
        options: dict[str, Any] = {"window_size_left": left, "window_size_right": right}
        if cu is not None:
            options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": length, "max_seqlen_k": length}
        if native.blocks is not None:
            options["block_sparse_tensors"] = block_tensors(native.blocks, native.blocks.rows)
        out, lse, *_ = module(self.interface)._flash_attn_fwd(
            *rows, softmax_scale=scale, causal=causal, softcap=native.softcap or None, return_lse=True, **options
        )
        return out, lse

    def _backward(
        self,
        rows: list[Tensor],
        lse: Tensor,
        cu: Tensor | None,
        length: int,
        causal: bool,
        scale: float,
        native: Native,
    ) -> tuple[Tensor, Tensor, Tensor]:
        left, right = native.window
        options: dict[str, Any] = {"window_size_left": left, "window_size_right": right}
        if cu is not None:
            options |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": length, "max_seqlen_k": length}
        if native.blocks is not None:
            options["block_sparse_tensors"] = block_tensors(native.blocks, native.blocks.columns)
        grad, q, k, v, out = rows
        dq, dk, dv = module(self.interface)._flash_attn_bwd(
            q, k, v, out, grad, lse, scale, causal, native.softcap, **options
        )
        return dq, dk, dv


def block_tensors(blocks: BlockLists, lists: Lists) -> Any:
    """Return index lists as flash-attn 4 takes them: by tiles of queries forward, by tiles of keys backward."""
    return module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch(
        mask_block_cnt=lists.partial_count,
        mask_block_idx=lists.partial_index,
        full_block_cnt=lists.full_count,
        full_block_idx=lists.full_index,
        block_size=blocks.tile,
    )


def states_of_block_tensors(tensors: Any, columns: int) -> Tensor:
    """Return the inverse of :func:`block_tensors`: the states of tiles, int8 ``[B, H, rows, columns]``."""
    full = tensors.full_block_cnt, tensors.full_block_idx
    if full[0] is None:
        full = torch.zeros_like(tensors.mask_block_cnt), tensors.mask_block_idx
    return Lists(tensors.mask_block_cnt, tensors.mask_block_idx, *full).states(columns)
