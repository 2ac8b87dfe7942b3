"""Every error that attnplan raises on purpose.

A message says what was got, what is needed, which part is concerned, and what to try.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AttnPlanError(Exception):
    """Root of all errors of this package."""


class SpecError(AttnPlanError, ValueError):
    """What was asked for, or what was passed to a plan, is impossible or contradicts itself."""


class VerifyError(AttnPlanError):
    """A graph does not cover its spec, or a plan's numbers differ from the reference."""


class PassError(AttnPlanError):
    """A pass built a graph that is ill-typed or that cannot be proved."""


class MemoryBudgetError(AttnPlanError, MemoryError):
    """No plan fits the memory budget."""


class NoBackendError(AttnPlanError):
    """Every backend refused; the message lists each with its reasons."""


class KernelError(AttnPlanError, RuntimeError):
    """A kernel of another library failed in a call; the message says which, on what, and how."""


class StreamError(AttnPlanError, OSError):
    """A file could not be read or written in the middle of a stream; the message says where, the cause why."""


class RingError(AttnPlanError):
    """Something about distributed execution is missing, mismatched or broken.

    Attributes
    ----------
    rank, peer, hop, step : int or None
        The rank that raised it, the rank that is the cause, and where the call was; None where that has no meaning.
    """

    rank: int | None = None
    peer: int | None = None
    hop: int | None = None
    step: int | None = None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the nearest known word, or the list of known words.

    Examples
    --------
    >>> did_you_mean("windw", ["window", "causal"])
    "; did you mean 'window'?"
    >>> did_you_mean("zzz", ["window", "causal"])
    '; known: causal, window'
    """
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
