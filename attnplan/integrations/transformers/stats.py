"""Counts of what the attention function ran."""

from __future__ import annotations

import threading
from collections import Counter

import attrs


@attrs.frozen
class Stats:
    """How often the attention function ran, by what it ran.

    Parameters
    ----------
    plan_calls, fallbacks
        Calls of a plan and of stock SDPA; one per layer and forward pass.
    reasons
        Fallbacks by reason.
    """

    plan_calls: int
    fallbacks: int
    reasons: dict[str, int]


_lock = threading.Lock()
_plan_calls = 0
_reasons: Counter[str] = Counter()


def stats() -> Stats:
    """Return the counts since the last :func:`reset_stats`.

    Examples
    --------
    >>> reset_stats()
    >>> stats()
    Stats(plan_calls=0, fallbacks=0, reasons={})
    """
    with _lock:
        return Stats(_plan_calls, _reasons.total(), dict(_reasons))


def reset_stats() -> None:
    """Set all counts to zero."""
    global _plan_calls
    with _lock:
        _plan_calls = 0
        _reasons.clear()


def count(reason: str | None = None) -> None:
    """Count one call of a plan, or one fallback with its reason."""
    global _plan_calls
    with _lock:
        if reason is None:
            _plan_calls += 1
        else:
            _reasons[reason] += 1
