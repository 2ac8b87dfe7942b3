"""The attention function: take the plan of a proven mask, or fall back to stock SDPA and count it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import attnplan
from attnplan import patterns as P
from attnplan.errors import SpecError
from attnplan.integrations.transformers.masks import MaskRequest, ProvenMask, add_offset
from attnplan.integrations.transformers.stats import count
from attnplan.spec import AttentionSpec, Dim


@lru_cache(maxsize=256)
def _plan(
    pattern: P.Pattern,
    q_offset: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    scale: float | None,
    softcap: float | None,
    q_bound: int,
    kv_bound: int,
    sinks: bool,
) -> attnplan.Plan:
    """Return the plan for all batch sizes and lengths; the cache only spares building the spec at every call."""
    spec = AttentionSpec(
        seq_len=Dim("s", max=q_bound),
        kv_len=Dim("t", max=kv_bound),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        pattern=pattern,
        dtype=str(dtype).removeprefix("torch."),
        scale=scale,
        softcap=softcap,
        q_offset=q_offset,
        sink_logits=sinks,
    )
    return attnplan.compile(spec, device)


def _bound(length: int) -> int:
    """Return the length to plan for: one plan up to 1024, then one for each doubling.

    The model's own maximum would be one plan for all, but priced, and refused for want of memory, at 131072 rows that
    no call brings.
    """
    return max(1024, 1 << (length - 1).bit_length())


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute one layer's attention: the attention function of transformers' ``AttentionInterface``.

    Parameters
    ----------
    module
        The layer; ``module.is_causal`` counts where no mask is given and ``is_causal`` is None.
    query, key, value
        ``[B, H, S, D]``, ``[B, H_kv, T, D]``, ``[B, H_kv, T, Dv]``.
    attention_mask
        What :func:`make_mask` returned; or a dense mask, which runs on stock SDPA; or None.
    dropout, scaling, softcap
        Probability, factor on ``q @ k^T`` and cap of the scores.
    is_causal, sliding_window
        Count only where no mask is given, as everywhere in transformers: a mask says all.
    s_aux
        Sink logits ``[H]``: the score of one more key of value 0. They have gradients.
    options
        Ignored, but for what would change the result: that is refused.

    Returns
    -------
    tuple
        The output ``[B, S, H, Dv]``, contiguous, and None in place of the attention weights.

    Raises
    ------
    SpecError
        If the model asks for something that plans cannot do: dropout, a position bias, a paged cache,
        attention weights.

    References
    ----------
    ``transformers.integrations.sdpa_attention.sdpa_attention_forward``, whose rules for None these are.
    """
    _refuse(dropout, options)
    batch, heads, q_length, head_dim = query.shape
    kv_heads, kv_length, value_dim = value.shape[1:]
    if attention_mask is None:
        request = _without_mask(module, q_length, kv_length, is_causal, sliding_window)
    elif isinstance(attention_mask, ProvenMask) and attention_mask.shape == (batch, 1, q_length, kv_length):
        request = attention_mask.request
    else:
        return _fall_back(module, query, key, value, attention_mask, scaling, softcap, s_aux)
    plan = _plan(
        request.pattern,
        "q_offset" in request.operands,
        heads,
        kv_heads,
        head_dim,
        value_dim,
        query.dtype,
        query.device,
        scaling,
        softcap,
        _bound(q_length),
        _bound(kv_length),
        s_aux is not None,
    )
    count()
    operands: dict[str, Any] = dict(request.operands)
    if s_aux is not None:
        operands["sink_logits"] = s_aux
    return plan(query, key, value, **operands).transpose(1, 2).contiguous(), None


_REFUSED = {
    "position_bias": "a position bias",
    "cache": "a paged cache",
    "output_attentions": "attention weights (output_attentions=True)",
}


def _refuse(dropout: float, options: Mapping[str, Any]) -> None:
    if dropout:
        raise SpecError(
            f"attnplan has no dropout yet, and the model trains with dropout={dropout} on attention weights; set the "
            "config's attention_dropout (attention_probs_dropout_prob) to 0, or use attn_implementation='sdpa'"
        )
    for name, what in _REFUSED.items():
        if options.get(name) is not None and options[name] is not False:
            raise SpecError(f"attnplan cannot run {what}, which this model asks for; use attn_implementation='eager'")


def _without_mask(
    module: torch.nn.Module, q_length: int, kv_length: int, is_causal: bool | None, sliding_window: int | None
) -> MaskRequest:
    """Return what a layer without a mask computes.

    Causality then aligns query row 0 with key 0, and a single query is a decoding step that sees every key. Windows are
    those that transformers gives to flash-attn; stock SDPA ignores them.
    """
    causal = q_length > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    pattern = P.causal() if causal else P.full()
    if sliding_window is not None and kv_length > sliding_window:
        pattern = pattern & P.window(sliding_window - 1)
    return add_offset(MaskRequest(pattern), 0 if causal else kv_length - q_length, q_length, kv_length)


def _fall_back(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None,
    softcap: float | None,
    s_aux: Tensor | None,
) -> tuple[Tensor, None]:
    reason = getattr(mask, "_attnplan_reason", "a dense mask from the model or its caller")
    if isinstance(mask, ProvenMask):
        reason = "a mask whose shape differs from the layer's q and k"
        mask = mask.dense()
    for name, option in {"softcap": softcap, "s_aux": s_aux}.items():
        if option is not None:
            raise SpecError(f"{name} needs a plan, but there is none: {reason}; use attn_implementation='eager'")
    count(reason)
    stock: Any = import_module("transformers.integrations.sdpa_attention")
    out, _ = stock.sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, is_causal=False)
    return out, None
