"""Hugging Face transformers: run a model's attention through attnplan.

Transformers asks twice. Once per forward pass a *mask function* is given a rule and returns a mask; then every layer's
*attention function* is given that mask with its q, k and v. Here the mask function proves which pattern the rule is and
returns a :class:`ProvenMask`, from which the attention function takes a plan. A rule without a proof becomes the dense
mask of stock SDPA and runs there, and :func:`stats` counts it with its reason: nothing is guessed and nothing dropped.

References
----------
https://huggingface.co/docs/transformers/attention_interface; ``transformers/masking_utils.py`` and
``transformers/integrations/sdpa_attention.py`` of transformers 5.23.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch

from attnplan.integrations.transformers.attend import attention
from attnplan.integrations.transformers.masks import MaskRequest, ProvenMask, make_mask, transformers_masks
from attnplan.integrations.transformers.stats import Stats, reset_stats, stats

NAME = "attnplan"
"""The ``attn_implementation``; dispatch by substring forbids names with "flash", "sdpa", "flex_attention", "paged"."""


def register() -> str:
    """Make ``attn_implementation="attnplan"`` known to transformers; doing it again changes nothing.

    Returns
    -------
    str
        The name to pass to ``from_pretrained`` or ``model.set_attn_implementation``.

    Raises
    ------
    ImportError
        If transformers is not installed, or too old.

    Examples
    --------
    >>> import pytest
    >>> _ = pytest.importorskip("transformers")
    >>> register()
    'attnplan'

    References
    ----------
    https://huggingface.co/docs/transformers/attention_interface
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(f"attn_implementation={NAME!r} needs transformers >= 5.4: {error}") from error
    if "q_offset" not in signature(transformers_masks().sdpa_mask).parameters:
        raise ImportError(f"attn_implementation={NAME!r} needs transformers >= 5.4, which tells masks their q_offset")
    # Proofs, plan look-ups and counts are Python: torch.compile leaves them out, at the cost of two graph breaks.
    eager: Any = torch.compiler.disable
    # Both: for a name without a mask function transformers passes no mask at all, and padding silently vanishes.
    AttentionInterface.register(NAME, eager(attention, reason="attnplan looks up and counts plans in Python"))
    AttentionMaskInterface.register(NAME, eager(make_mask, reason="attnplan proves masks in Python"))
    return NAME


__all__ = [
    "NAME",
    "MaskRequest",
    "ProvenMask",
    "Stats",
    "attention",
    "make_mask",
    "register",
    "reset_stats",
    "stats",
]
