"""The flash-attn packages: versions 2, 3 and 4, each with windows, softcap, packed documents and grouped heads.

They take ``[B, S, H, D]``: transposed views go in without a copy. Windows and causality are aligned to the last query
and the last key. Version 2 reports LSE +inf for rows without a key, version 4 -inf; every backward is right with +inf.

References
----------
Dao, FlashAttention-2, arXiv 2307.08691; Shah et al., FlashAttention-3, arXiv 2407.08608; ``flash_attn.cute``, 4.0.0b36.
"""

from __future__ import annotations

from functools import lru_cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnplan.errors import KernelError
from attnplan.runtime.fused.replay import backward_replay_of, replay_of, stepping
from attnplan.runtime.kernels import Pair, Request, Triple, may_lack_keys
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
from attnplan.runtime.split_keys import pieces_of, split_attention
from attnplan.runtime.tables import BlockLists, Lists, RowBounds, TileMasks

_MASK_FUNCTIONS = "attnplan.runtime.mask_functions"


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
            return out.transpose(1, 2), empty_rows_below(lse) if may_lack_keys(q, k, asked) else lse
        batch = q.shape[0]
        out, lse = self._forward([packed(x) for x in (q, k, v)], _Packed.of(asked.documents, q), asked)
        return unpacked(out, batch), unpacked_lse(lse, batch)

    def run_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, asked: Request
    ) -> Triple:
        assert asked.mask is None
        lse = empty_rows_above(lse) if may_lack_keys(q, k, asked) else lse.contiguous()
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
    """flash-attn 4, the CuTe interface; also over tables of tiles."""

    title = "flash-attn 4"
    interface = "flash_attn.cute.interface"
    widest = 128

    def run_direct(self, q: Tensor, k: Tensor, v: Tensor, asked: Request) -> Tensor:
        learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if learns:
            return super().run_direct(q, k, v, asked)
        rows = [x.transpose(1, 2) for x in (q, k, v)]  # without gradients its compiled kernel is enough
        return self._forward(rows, None, asked)[0].transpose(1, 2)

    def _forward(self, rows: list[Tensor], lengths: _Packed | None, asked: Request) -> Pair:
        function = module(self.interface)._flash_attn_fwd
        pieces = pieces_of(rows[0], rows[1]) if asked.is_plain and not asked.causal else 1
        if pieces > 1:
            return split_attention(partial(_packed4, function, asked.scale), rows[0], rows[1], rows[2], pieces)
        into = asked.into[0].transpose(1, 2) if asked.into and asked.into[0] is not None else None
        if lengths is None and asked.sinks is None and hasattr(function, "compile_cache"):
            return replay_of(function, forward_options)(rows[0], rows[1], rows[2], asked, into)
        options = forward_options(asked)
        if asked.sinks is not None:
            options["learnable_sink"] = asked.sinks.detach().to(torch.float32)
        if lengths is not None:
            options |= lengths.named
        elif into is not None:
            options["out"] = stepping(into)
        out, lse, *_ = function(*rows, return_lse=True, **options)
        return out, lse

    def _backward(self, rows: list[Tensor], lse: Tensor, lengths: _Packed | None, asked: Request) -> Triple:
        grad, q, k, v, out = rows
        if asked.blocks is not None and asked.blocks.masks is not None:
            raise KernelError(NO_MASKED_BACKWARD)
        interface = module(self.interface)
        into = [None if x is None else x.transpose(1, 2) for x in asked.into or (None, None, None)]
        replay = backward_replay_of(interface, backward_options) if lengths is None else None
        if replay is not None:
            return replay(q, k, v, out, grad, lse, asked, into)
        options = backward_options(asked)
        if lengths is None:
            options |= {n: stepping(x) for n, x in zip(("dq", "dk", "dv"), into, strict=True) if x is not None}
        else:
            options |= lengths.named
        dq, dk, dv = interface._flash_attn_bwd(q, k, v, out, grad, lse, **options)
        return dq, dk, dv


def forward_options(asked: Request) -> dict[str, Any]:
    """Return how flash-attn 4's forward is asked, but for packed documents and sinks."""
    options = _options4(asked, None if asked.blocks is None else asked.blocks.rows)
    options["softcap"] = asked.softcap or None
    if asked.blocks is not None and asked.blocks.masks is not None:
        options |= _mask_function(asked.blocks, asked.blocks.masks)
    return options


def backward_options(asked: Request) -> dict[str, Any]:
    """Return how flash-attn 4's backward is asked, but for packed documents."""
    return _options4(asked, None if asked.blocks is None else asked.blocks.columns)


def _options4(asked: Request, lists: Lists | None) -> dict[str, Any]:
    left, right = asked.window
    options = {
        "softmax_scale": asked.scale,
        "causal": asked.causal,
        "softcap": asked.softcap,
        "window_size_left": left,
        "window_size_right": right,
    }
    if lists is None:
        return options
    assert asked.blocks is not None
    return options | {"block_sparse_tensors": block_tensors(asked.blocks, lists)}


def _packed4(
    function: Any, scale: float, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, rows: int, keys: int
) -> Pair:
    """Run flash-attn 4 on packed documents whose queries and keys differ in number."""
    lengths = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": rows, "max_seqlen_k": keys}
    out, lse, *_ = function(q, k, v, softmax_scale=scale, return_lse=True, **lengths)
    return out, lse


NO_MASKED_BACKWARD = (
    "flash-attn 4 gave wrong gradients with mask functions (flash-attention issue 2101): its backward is called for "
    "whole tiles only"
)


def _mask_function(blocks: BlockLists, masks: TileMasks | RowBounds) -> dict[str, Any]:
    """Return the arguments by which a call masks its partial tiles."""
    functions = module(_MASK_FUNCTIONS)
    if isinstance(masks, RowBounds):
        return {"mask_mod": functions.between(), "aux_tensors": [masks.bounds]}
    chosen = functions.in_tile if masks.places.dim() == 2 else functions.in_tile_of_head
    return {"mask_mod": chosen(*blocks.tile), "aux_tensors": [masks.places, masks.masks]}


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
