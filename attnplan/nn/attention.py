"""Attention without projections, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnplan.api import attention
from attnplan.deferred import Deferred, run_deferred
from attnplan.errors import SpecError
from attnplan.patterns import Mixture, Pattern, full, parse


class PlannedAttention(torch.nn.Module):
    """Compute attention with a pattern; the plan is chosen from the shapes of each call.

    Parameters
    ----------
    pattern
        Which pairs may meet: a pattern, a mixture, or the text form of one. The default is all.
    causal, scale, softcap, layout
        As in :class:`~attnplan.AttentionSpec`.

    Raises
    ------
    SpecError
        If the pattern cannot be read; at a call, if it does not fit the tensors.

    Examples
    --------
    >>> attend = PlannedAttention("longnet([8, 16], [1, 2])", causal=True)
    >>> q = k = v = torch.randn(2, 4, 32, 8)
    >>> attend(q, k, v).shape
    torch.Size([2, 4, 32, 8])
    """

    def __init__(
        self,
        pattern: Pattern | Mixture | str | None = None,
        *,
        causal: bool = False,
        scale: float | None = None,
        softcap: float | None = None,
        layout: str = "bhsd",
    ) -> None:
        super().__init__()
        self.pattern = _read(pattern)
        self.causal, self.scale, self.softcap, self.layout = causal, scale, softcap, layout
        self._deferred = {return_lse: Deferred(self._options, return_lse) for return_lse in (False, True)}

    def _options(self, *call: Any) -> dict[str, Any]:
        names = ("pattern", "causal", "scale", "softcap", "layout")
        return {name: getattr(self, name) for name in names}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **operands: Any) -> Any:
        """Return the output, or with ``return_lse`` a pair of it and the log-sum-exp; see :class:`~attnplan.Plan`."""
        if torch.compiler.is_compiling():
            out, lse = run_deferred(q, k, v, operands, self._deferred[return_lse].handle, self.layout)
            return (out, lse) if return_lse else out
        return attention(q, k, v, **self._options(), return_lse=return_lse, **operands)

    def extra_repr(self) -> str:
        """Return the pattern for ``repr(module)``."""
        return f"{self.pattern!r}{', causal' if self.causal else ''}"


def _read(pattern: Pattern | Mixture | str | None) -> Pattern | Mixture:
    if pattern is None:
        return full()
    if isinstance(pattern, str):
        return parse(pattern)
    if not isinstance(pattern, Pattern | Mixture):
        raise SpecError(f"pattern must be a pattern, a mixture or its text form, got {pattern!r}")
    return pattern
