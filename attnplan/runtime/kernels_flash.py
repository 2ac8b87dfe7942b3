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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnplan.ir.native import EVERYTHING
from attnplan.runtime.fused.replay import replay_of
from attnplan.runtime.kernels import Pair, Request, Triple
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
    interface: str
    """Module that holds the package's functions."""

    def run(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Pair:
        assert asked.mask is None
        if asked.documents is None:
            rows = [x.transpose(1, 2) for x in (q, k, v)]
            out, lse = self._forward(rows, None, asked)
            return out.transpose(1, 2), empty_rows_below(lse) if _may_lack_keys(q, k, asked) else lse
        batch = q.shape[0]
        out, lse = self._forward([packed(x) for x in (q, k, v)], _Packed.of(asked.documents, q), asked)
        return unpacked(out, batch), empty_rows_below(unpacked_lse(lse, batch))

    def run_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, asked: Request
    ) -> Triple:
        assert asked.mask is None
        lse = empty_rows_above(lse) if _may_lack_keys(q, k, asked) else lse.contiguous()
        if asked.documents is None:
            rows = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
            dq, dk, dv = self._backward(rows, lse, None, asked)
            return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)
        flat = [packed(x) for x in (grad, q, k, v, out)]
        dq, dk, dv = self._backward(flat, packed_lse(lse), _Packed.of(asked.documents, q), asked)
        batch = q.shape[0]
        return unpacked(dq, batch), unpacked(dk, batch), unpacked(dv, batch)

    def run_direct(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Tensor:
        window: Any = asked.window if isinstance(self, Flash4) else signed(asked.window)
        found = module(self.interface).flash_attn_func(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            softmax_scale=asked.scale,
            causal=asked.causal,
            window_size=window,
            softcap=asked.softcap,
        )
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    def _forward(self, rows: list[Tensor], lengths: _Packed | None, asked: Request) -> Pair:
        """Return output ``[B, S, H, D]`` or ``[T, H, D]``, and LSE ``[B, H, S]`` or ``[H, T]``."""
        raise NotImplementedError

    def _backward(self, rows: list[Tensor], lse: Tensor, lengths: _Packed | None, asked: Request) -> Triple:
        """Return the gradients of ``rows`` = (grad, q, k, v, out)."""
        raise NotImplementedError


def _may_lack_keys(q: Tensor, k: Tensor, asked: Request) -> bool:
    """Return whether a row may have no key: not where all keys, or as many as the diagonal leaves, are there."""
    beyond = asked.causal and q.shape[2] > k.shape[2]
    return beyond or asked.window != EVERYTHING or asked.documents is not None or asked.blocks is not None


class _Packed(NamedTuple):
    """Documents laid end to end."""

    cu: Tensor
    """Cumulative lengths."""
    longest: int
    """No document is longer."""

    @classmethod
    def of(cls, documents: Tensor, q: Tensor) -> _Packed:
        return cls(boundaries(documents, q.shape[0], q.shape[2]), q.shape[2])

    @property
    def named(self) -> dict[str, Any]:
        """Arguments of versions 3 and 4."""
        cu, longest = self
        return {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}

    @property
    def ordered(self) -> tuple[Any, ...]:
        """Arguments of version 2."""
        return self.cu, self.cu, self.longest, self.longest


class Flash2(_Flash):
    """flash-attn 2."""

    title = "flash-attn 2"
    interface = "flash_attn.flash_attn_interface"

    def _options(self, asked: Request) -> dict[str, Any]:
        left, right = signed(asked.window)
        return {
            "window_size_left": left,
            "window_size_right": right,
            "softcap": asked.softcap,
            "dropout_p": 0.0,
            "softmax_scale": asked.scale,
            "causal": asked.causal,
            "alibi_slopes": None,
        }

    def _forward(self, rows: list[Tensor], lengths: _Packed | None, asked: Request) -> Pair:
        interface = module(self.interface)
        run = interface._flash_attn_forward if lengths is None else interface._flash_attn_varlen_forward
        given = () if lengths is None else lengths.ordered
        out, lse, *_ = run(*rows, *given, **self._options(asked), return_softmax=False)
        return out, lse

    def _backward(self, rows: list[Tensor], lse: Tensor, lengths: _Packed | None, asked: Request) -> Triple:
        grad, q, k, v, out = rows
        made = [x.new_empty(x.shape) for x in (q, k, v)]
        interface = module(self.interface)
        run = interface._flash_attn_backward if lengths is None else interface._flash_attn_varlen_backward
        given = () if lengths is None else lengths.ordered
        run(grad, q, k, v, out, lse, *made, *given, **self._options(asked), deterministic=False)
        return made[0], made[1], made[2]


class Flash3(_Flash):
    """flash-attn 3, the Hopper interface."""

    title = "flash-attn 3"
    interface = "flash_attn_interface"

    def _options(self, asked: Request) -> dict[str, Any]:
        left, right = signed(asked.window)
        return {"window_size_left": left, "window_size_right": right, "softcap": asked.softcap}

    def _forward(self, rows: list[Tensor], lengths: _Packed | None, asked: Request) -> Pair:
        options = self._options(asked) | ({} if lengths is None else lengths.named)
        run = module(self.interface)._flash_attn_forward
        out, lse, *_ = run(*rows, softmax_scale=asked.scale, causal=asked.causal, **options)
        return out, lse

    def _backward(self, rows: list[Tensor], lse: Tensor, lengths: _Packed | None, asked: Request) -> Triple:
        grad, q, k, v, out = rows
        made = [x.new_empty(x.shape) for x in (q, k, v)]
        cu, longest = (None, None) if lengths is None else lengths
        # By position: the names of some of these arguments differ between commits, their order does not.
        given = (cu, cu, None, None, longest, longest)
        options = (asked.scale, asked.causal, *self._options(asked).values(), False)
        module(self.interface)._flash_attn_backward(grad, q, k, v, out, lse, *given, *made, *options)
        return made[0], made[1], made[2]


class Flash4(_Flash):
    """flash-attn 4, the CuTe interface; also over tables of whole tiles."""

    title = "flash-attn 4"
    interface = "flash_attn.cute.interface"
    widest = 128

    def _options(self, asked: Request, lengths: _Packed | None, lists: Lists | None) -> dict[str, Any]:
        left, right = asked.window
        options: dict[str, Any] = {"window_size_left": left, "window_size_right": right}
        if lists is not None:
            assert asked.blocks is not None
            options["block_sparse_tensors"] = block_tensors(asked.blocks, lists)
        return options if lengths is None else options | lengths.named

    def _forward(self, rows: list[Tensor], lengths: _Packed | None, asked: Request) -> Pair:
        function = module(self.interface)._flash_attn_fwd
        plain = lengths is None and asked.blocks is None and asked.window == EVERYTHING and not asked.softcap
        if plain and hasattr(function, "compile_cache"):
            return replay_of(function)(rows[0], rows[1], rows[2], asked.scale, asked.causal)
        options = self._options(asked, lengths, None if asked.blocks is None else asked.blocks.rows)
        options |= {"softmax_scale": asked.scale, "causal": asked.causal, "softcap": asked.softcap or None}
        out, lse, *_ = function(*rows, return_lse=True, **options)
        return out, lse

    def _backward(self, rows: list[Tensor], lse: Tensor, lengths: _Packed | None, asked: Request) -> Triple:
        grad, q, k, v, out = rows
        options = self._options(asked, lengths, None if asked.blocks is None else asked.blocks.columns)
        dq, dk, dv = module(self.interface)._flash_attn_bwd(
            q, k, v, out, grad, lse, asked.scale, asked.causal, asked.softcap, **options
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
