"""Patterns worth a look for a length, a budget and a device: what each reaches, computes, takes and needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from attnplan import patterns as P
from attnplan.cost import Target, resolve
from attnplan.errors import AttnPlanError, SpecError
from attnplan.patterns import Mixture, Pattern
from attnplan.plan import Plan
from attnplan.search import search
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes, format_count, format_seconds, parse_bytes

SCHEMA = 1
"""Version of the dict that :func:`facts` returns."""
SHORTEST = 512
"""Narrowest window and shortest segment that is suggested."""


@attrs.frozen
class Suggestion:
    """A pattern, what it reaches, and what it is expected to cost."""

    pattern: Pattern | Mixture
    reach: int
    """Largest distance over which a stack of layers can carry information from one token to another."""
    pairs: int
    """(head, query, key) pairs of one layer and batch element, branches counted each."""
    plan: Plan | None
    error: str = ""
    """Why nothing runs it within the budget."""


def suggest(
    seq_len: int,
    heads: int,
    head_dim: int,
    device: object = "auto",
    max_memory: int | str | None = None,
    layers: int = 12,
    **fields: Any,
) -> list[Suggestion]:
    """Return dense attention, windows and LongNet ladders for a length, the fastest first.

    Parameters
    ----------
    seq_len, heads, head_dim
        Sizes of the attention.
    device, max_memory
        As in :func:`attnplan.compile`; but only plans in one piece are looked for, since cutting each pattern into
        pieces that fit takes seconds to minutes.
    layers
        Depth of the stack whose reach is listed.
    fields
        Other fields of :class:`~attnplan.AttentionSpec`; causal unless it says otherwise.

    Raises
    ------
    SpecError
        If a size is impossible, or a pattern is given: it is what is suggested.

    Notes
    -----
    A window of w carries information w tokens per layer. Segments never let it cross the border of the longest one,
    however many layers there are, so the reach of a LongNet ladder is that segment; where the longest segment is the
    sequence, it is everything.

    Examples
    --------
    >>> found = suggest(65_536, heads=12, head_dim=64, device="h100", layers=24)
    >>> [(str(s.pattern), s.reach) for s in found][:2]
    [('window(512, 0)', 12288), ('window(1024, 0)', 24576)]
    """
    if "pattern" in fields:
        raise SpecError("suggest proposes patterns itself; leave pattern out")
    if not isinstance(layers, int) or layers < 1:
        raise SpecError(f"layers must be a positive int, got {layers!r}")
    spec = AttentionSpec(seq_len=seq_len, heads=heads, head_dim=head_dim, **{"causal": True, **fields})
    if not spec.is_static or spec.kv_len != spec.seq_len:
        raise SpecError("suggest needs one length, the same for queries and keys")
    target, budget = resolve(device), None if max_memory is None else parse_bytes(max_memory)
    found = [_one(spec, p, reach, target, budget) for p, reach in _patterns(seq_len, spec.causal, layers)]
    return sorted(found, key=lambda s: s.plan.predicted.seconds if s.plan else float("inf"))


def _patterns(length: int, causal: bool, layers: int) -> Iterator[tuple[Pattern | Mixture, int]]:
    yield P.full(), length - 1
    sizes = [n for n in (SHORTEST << i for i in range(40)) if n < length]
    for size in sizes:
        yield P.window(size, 0) if causal else P.window(size), min(length - 1, layers * size)
    for first in sizes[1:4]:
        ladder = [first]
        while ladder[-1] * 2 < length and len(ladder) < 8:
            ladder.append(ladder[-1] * 2)
        if len(ladder) > 1:
            rates = [1 << i for i in range(len(ladder))]
            yield P.longnet(ladder, rates), min(length, ladder[-1]) - 1
            yield P.longnet([*ladder[:-1], length], rates), length - 1


def _one(spec: AttentionSpec, pattern: Pattern | Mixture, reach: int, target: Target, budget: int | None) -> Suggestion:
    here = attrs.evolve(spec, pattern=pattern)
    pairs = here.count_pairs() // here.batch
    try:
        found = search(here, target, max_memory=budget, loops=False)
    except AttnPlanError as error:
        return Suggestion(pattern, reach, pairs, None, str(error).splitlines()[0])
    return Suggestion(pattern, reach, pairs, Plan(here, target, found, {"max_memory": budget}))


def render(found: Sequence[Suggestion]) -> str:
    """Return suggestions as a table; where nothing runs a pattern, why, up to what to try."""
    cells = [("pattern", "reach", "pairs", "predicted", "peak", "choice")]
    for s in found:
        head = (str(s.pattern), format_count(s.reach), format_count(s.pairs))
        if s.plan is None:
            cells.append((*head, "-", "-", f"refused   {s.error.split('; try')[0]}"))
        else:
            best = s.plan.predicted
            cells.append((*head, format_seconds(best.seconds), format_bytes(best.peak_bytes), s.plan.choice))
    widths = [max(len(c[i]) for c in cells) for i in range(6)]
    table = "".join("  ".join(f"{x:<{w}}" for x, w in zip(c, widths, strict=True)).rstrip() + "\n" for c in cells)
    bases = dict.fromkeys(s.plan.predicted.basis for s in found if s.plan)
    notes = [f"predictions: {', '.join(bases)}"] if bases else []
    if any("in one piece" in s.error for s in found):
        notes.append("what is refused may run in pieces: `attnplan explain --max-memory` says at what price")
    return table + "".join(f"{note}\n" for note in notes)


def facts(found: Sequence[Suggestion]) -> dict[str, Any]:
    """Return suggestions as plain data: ``schema`` and ``rows``; docs/explain.md says what every key holds."""
    return {"schema": SCHEMA, "rows": [_facts(s) for s in found]}


def _facts(s: Suggestion) -> dict[str, Any]:
    plan = s.plan
    return {
        "pattern": str(s.pattern),
        "reach": s.reach,
        "pairs": s.pairs,
        "choice": None if plan is None else plan.choice,
        "seconds": None if plan is None else plan.predicted.seconds,
        "basis": None if plan is None else plan.predicted.basis,
        "peak_bytes": None if plan is None else plan.predicted.peak_bytes,
        "error": s.error or None,
    }
