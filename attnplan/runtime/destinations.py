"""Where a piece's results go: kernels that can be told write there, all others are copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attnplan.runtime.views import empty_whole

INTO = "where the results of the piece go"
"""Name, among a piece's operands, of the slices that its output, or dq, dk and dv, belong in; None for none."""


def given(operands: Mapping[str, Any], index: int) -> Tensor | None:
    """Return the slice in which a result belongs, None if nobody said."""
    found = operands.get(INTO)
    return None if found is None else found[index]


def given_or_new(operands: Mapping[str, Any], index: int, x: Tensor, like: Tensor) -> Tensor:
    """Return the slice in which a result belongs, or a new tensor of the rows of ``x`` and the features of ``like``."""
    found = given(operands, index)
    return empty_whole(x, like) if found is None else found


def without(operands: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return operands that say nothing about where results go."""
    return {name: x for name, x in operands.items() if name != INTO} if INTO in operands else operands


def put(target: Tensor, result: Tensor) -> None:
    """Copy a result to its slice, unless it was written there.

    Examples
    --------
    >>> import torch
    >>> whole = torch.zeros(4)
    >>> put(whole[:2], whole[:2].fill_(1)), put(whole[2:], torch.ones(2)), whole
    (None, None, tensor([1., 1., 1., 1.]))
    """
    if not is_there(target, result):
        target.copy_(result)


def is_there(target: Tensor, result: Tensor) -> bool:
    """Return whether a result lies in its slice: of that storage, which is new, kernels write nothing else."""
    same = target.untyped_storage()._cdata == result.untyped_storage()._cdata
    return same and target.storage_offset() == result.storage_offset() and target.dtype == result.dtype
