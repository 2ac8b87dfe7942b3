"""Kernels called by hand, as their packages document them, for the kernel benches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnplan import AttentionSpec
from attnplan.patterns.tiles import block_table
from attnplan.plan import Plan
from attnplan.runtime.kernels_all import KERNELS
from attnplan.runtime.kernels_flash import block_tensors
from attnplan.runtime.tables import block_lists, to_block_mask

Window = tuple[int | None, int | None]


def raw(plan: Plan, q: Tensor, k: Tensor, v: Tensor, window: Window = (None, 0)) -> Callable[[], Tensor]:
    """Return the call of the kernel of a plan's schedule by hand, causal or over a causal window."""
    aten, scale = torch.ops.aten, plan.spec.softmax_scale
    key = plan._schedule.runs
    if key == "flash-cpu":
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if key == "flash-cuda":
        return lambda: aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)[0]
    if key == "cudnn":
        return lambda: aten._scaled_dot_product_cudnn_attention(q, k, v, None, False, 0.0, True, False, scale=scale)[0]
    if key == "efficient":
        return lambda: aten._scaled_dot_product_efficient_attention(q, k, v, None, False, 0.0, True, scale=scale)[0]
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    if key.startswith("xformers"):
        from attnplan.runtime.kernels_xformers import fmha

        operator = {"xformers-flash": fmha().flash, "xformers-cutlass": fmha().cutlass}[key].FwOp
        bias = fmha().attn_bias.LowerTriangularMask()
        return lambda: fmha().memory_efficient_attention_forward(*rows, bias, scale=scale, op=operator).transpose(1, 2)
    function = import_module(str(getattr(KERNELS[key], "interface"))).flash_attn_func  # noqa: B009  # not all have one
    options: dict[str, Any] = {"softmax_scale": scale, "causal": True}
    if window != (None, 0):
        options = {"softmax_scale": scale, "causal": False, "window_size": window}

    def by_hand() -> Tensor:
        found = function(*rows, **options)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    return by_hand


def blocks_by_hand(plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Return the call of flash-attn 4 over the tables of a plan's whole blocks."""
    made = block_lists(block_table(plan.spec.branches[0], plan.spec.shape, plan._schedule.tile or (128, 128)), q.device)
    tensors = block_tensors(made, made.rows)
    function = import_module("flash_attn.cute.interface").flash_attn_func
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    return lambda: function(*rows, softmax_scale=plan.spec.softmax_scale, block_sparse_tensors=tensors)[0]


def flex_by_hand(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """Return compiled FlexAttention over the mask of a Longformer, its block mask made from our tables."""
    from torch.nn.attention.flex_attention import flex_attention

    wide, first = 8 * 128, 128

    def mask(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return ((i - j).abs() <= wide) | (i < first) | (j < first)

    made: list[Any] = []

    def by_hand() -> Tensor:
        if not made:
            made.append(to_block_mask(block_table(spec.branches[0], spec.shape, (128, 128)), mask, q.device))
            made.append(torch.compile(flex_attention))
        out: Tensor = made[1](q, k, v, block_mask=made[0])
        return out

    return by_hand


def _bias(
    spec: AttentionSpec, masks: Sequence[Tensor], keep: Any, added: Tensor | None, sinks: Any, q: Tensor
) -> Tensor:
    """Return a mask as what is added to scores, or raise for what is no such thing."""
    if len(masks) != 1 or keep is not None or sinks is not None or spec.softcap is not None:
        raise NotImplementedError("the kernel takes one mask that is added to scores, and this is more than that")
    made = torch.zeros(masks[0].shape, dtype=q.dtype, device=q.device).masked_fill(~masks[0], -torch.inf)
    return made if added is None else made + added.to(q.dtype)


def _cudnn_masked(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, None]:
    masks, keep, added, sinks = rest
    bias = _bias(spec, masks, keep, added, sinks, q)
    given = (q, k, v, bias, True, 0.0, False, False)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(*given, scale=spec.softmax_scale)[0], None


def _xformers_masked(operator: str) -> Callable[..., tuple[Tensor, None]]:
    def by_hand(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, None]:
        from attnplan.runtime.kernels_xformers import fmha

        masks, keep, added, sinks = rest
        bias = _bias(spec, masks, keep, added, sinks, q)
        group = q.shape[1] // k.shape[1]
        rows = [x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1))]
        both = getattr(fmha(), operator)
        op = (both.FwOp, getattr(both, "BwOp", fmha().flash.BwOp))
        return fmha().memory_efficient_attention(*rows, bias, scale=spec.softmax_scale, op=op).transpose(1, 2), None

    return by_hand


MASKED_BY_HAND: dict[str, Callable[..., tuple[Tensor, None]]] = {
    "cudnn": _cudnn_masked,
    "xformers-flash": _xformers_masked("flash"),
    "xformers-split-k": _xformers_masked("triton_splitk"),
}
"""Kernels whose interface takes a mask as a tensor, whether or not the kernel does: functions as those of
:meth:`attnplan.testing.numbers.Call.by_autograd`."""
