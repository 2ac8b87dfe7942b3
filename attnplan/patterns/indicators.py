"""Set unions in closed form: the indicator of a pattern as a polynomial in conditions that can be summed.

The indicator is 1 on the pairs of the pattern and 0 elsewhere. With ``[a & b] = [a][b]``, ``[~a] = 1 - [a]`` and
``[a | b] = 1 - (1 - [a])(1 - [b])`` it is a polynomial whose monomials are intersections: bands, segments, ranges of
heads, queries and keys, each with a closed form, and opaque atoms, which stay formal variables. An indicator squared
is itself, so every polynomial is multilinear, and two that are equal are equal for any data behind the variables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from math import lcm

import attrs

from attnplan.patterns.bands import Band, Full
from attnplan.patterns.base import And, Not, Or, Pattern
from attnplan.patterns.keys import GlobalTokens, Sinks
from attnplan.patterns.operands import Documents
from attnplan.patterns.segments import Dilated, Heads
from attnplan.patterns.strides import Columns, Strided
from attnplan.patterns.sums import Conjunction, Range, overlap

LIMIT = 4096
"""Most monomials of a polynomial; a union that has more stays one opaque atom."""
MAX_RUNS = 24
"""Most runs of consecutive global tokens that are expanded: each two of them give a monomial."""
MAX_DOCUMENTS = 64
"""Most documents with known lengths that are expanded, one monomial each."""

Polynomial = Mapping[Conjunction, int]
"""Integer coefficients of monomials."""

_ONE = Conjunction(None, None, (), (), frozenset())


@lru_cache(maxsize=1024)
def indicator(pattern: Pattern) -> tuple[tuple[Conjunction, int], ...]:
    """Return the monomials of a pattern's indicator and their coefficients.

    Examples
    --------
    >>> from attnplan.patterns import causal, sinks, window
    >>> for term, coefficient in indicator((window(8) | sinks(2)) & causal()):
    ...     print(coefficient, term.left, term.right, term.keys)
    1 None 0 (None, 2)
    1 8 0 (None, None)
    -1 8 0 (None, 2)
    """
    plain = Conjunction.of(pattern)
    if not plain.opaque:
        return ((plain, 1),)
    return tuple(_polynomial(pattern).items())


def unread(pattern: Pattern) -> frozenset[Pattern]:
    """Return the set unions and complements in ``pattern`` that are carried along whole, for want of a closed form."""
    return frozenset(o for term, _ in indicator(pattern) for o in term.opaque if isinstance(o, And | Or | Not))


def runs(positions: Sequence[int]) -> tuple[Range, ...]:
    """Return the ranges of consecutive numbers in a rising sequence.

    Examples
    --------
    >>> runs([0, 1, 2, 7, 9, 10])
    ((0, 3), (7, 8), (9, 11))
    """
    ends = [i + 1 for i, (a, b) in enumerate(pairwise(positions)) if b != a + 1]
    return tuple((positions[i], positions[j - 1] + 1) for i, j in pairwise((0, *ends, len(positions))))


def boxes(lengths: Sequence[int]) -> Iterator[Range]:
    """Iterate over the ranges of positions of documents that follow one another."""
    start = 0
    for length in lengths:
        yield start, start + length
        start += length


def _polynomial(pattern: Pattern) -> Polynomial:
    if isinstance(pattern, And):
        return _intersection(pattern)
    if isinstance(pattern, Not | Or):
        return _compound(pattern)
    rule = _ATOMS.get(type(pattern))
    found = None if rule is None else rule(pattern)
    return _variable(pattern) if found is None else found


def _variable(pattern: Pattern) -> Polynomial:
    return {attrs.evolve(_ONE, opaque=frozenset({pattern})): 1}


def _intersection(pattern: And) -> Polynomial:
    """Multiply the conjuncts, small ones first; those that would exceed the limit stay opaque.

    Which ones those are depends on their sizes and spelling only, not on the order in which they stand.
    """
    factors = [(_polynomial(t), t) for t in dict.fromkeys(pattern.terms)]
    factors.sort(key=lambda f: (len(f[0]), repr(f[1])))
    total: Polynomial = {_ONE: 1}
    size = 1
    for factor, term in factors:
        fits = size * len(factor) <= LIMIT
        size *= len(factor) if fits else 1
        total = times(total, factor if fits else _variable(term))
    return total


def _compound(pattern: Not | Or) -> Polynomial:
    """Expand a complement or a union; one that cuts the sequence at irregular places stays opaque."""
    found = _complement(_polynomial(pattern.term)) if isinstance(pattern, Not) else _union(pattern.terms)
    if found is None or len(found) > LIMIT or any(len(term.dilated) > 1 for term in found):
        return _variable(pattern)
    return found


def _complement(polynomial: Polynomial) -> Polynomial:
    return _without_zeros({_ONE: 1 - polynomial.get(_ONE, 0), **{m: -c for m, c in polynomial.items() if m != _ONE}})


def _union(terms: Sequence[Pattern]) -> Polynomial | None:
    outside: Polynomial = {_ONE: 1}
    for term in dict.fromkeys(terms):
        factor = _complement(_polynomial(term))
        if len(outside) * len(factor) > 4 * LIMIT:
            return None
        outside = times(outside, factor)
    return _complement(outside)


def times(a: Polynomial, b: Polynomial) -> Polynomial:
    """Return the product of two polynomials, without the monomials that hold no pair."""
    total: dict[Conjunction, int] = {}
    for x, c in a.items():
        for y, d in b.items():
            both = _intersect(x, y)
            if both is not None:
                total[both] = total.get(both, 0) + c * d
    return _without_zeros(total)


def _without_zeros(polynomial: Polynomial) -> Polynomial:
    return {term: c for term, c in polynomial.items() if c}


def _intersect(a: Conjunction, b: Conjunction) -> Conjunction | None:
    """Return the intersection of two monomials, or None if nothing is in it."""
    if a == _ONE or b == _ONE:
        return b if a == _ONE else a
    left = min((n for n in (a.left, b.left) if n is not None), default=None)
    right = min((n for n in (a.right, b.right) if n is not None), default=None)
    queries, keys = overlap(a.queries, b.queries), overlap(a.keys, b.keys)
    heads = _common_heads((*a.heads, *b.heads))
    empty = left is not None and right is not None and left + right < 0
    empty = empty or any(low is not None and high is not None and low >= high for low, high in (queries, keys))
    if empty or any(h.start == h.stop for h in heads):
        return None
    dilated, opaque = _nested((*a.dilated, *b.dilated)), a.opaque | b.opaque
    return Conjunction(left, right, dilated, heads, opaque, queries, keys, lcm(a.period, b.period))


def _common_heads(parts: tuple[Heads, ...]) -> tuple[Heads, ...]:
    if len(parts) < 2:
        return parts
    start = max(p.start for p in parts)
    return (Heads(start, max(start, min(p.stop for p in parts))),)


def _nested(parts: tuple[Dilated, ...]) -> tuple[Dilated, ...]:
    """Return segment patterns in one order, each that holds a finer one joined with it."""
    kept: list[Dilated] = []
    for part in sorted(dict.fromkeys(parts), key=lambda p: (p.length, p.rate, repr(p))):
        for place, finer in enumerate(kept):
            if _joins(part, finer):
                kept[place] = finer if part.rate == 1 else attrs.evolve(part, length=finer.length)
                break
        else:
            kept.append(part)
    return tuple(kept)


def _joins(coarse: Dilated, fine: Dilated) -> bool:
    """Return whether both together are one pattern with the segments of ``fine``."""
    if coarse.length % fine.length:
        return False
    return coarse.rate == 1 or (fine.rate == 1 and fine.length % coarse.rate == 0)


def _band(pattern: Band) -> Polynomial:
    return {attrs.evolve(_ONE, left=pattern.left, right=pattern.right): 1}


def _heads(pattern: Heads) -> Polynomial:
    return {attrs.evolve(_ONE, heads=(pattern,)): 1} if pattern.start < pattern.stop else {}


def _sinks(pattern: Sinks) -> Polynomial:
    return {attrs.evolve(_ONE, keys=(None, pattern.count)): 1}


def _global_tokens(pattern: GlobalTokens) -> Polynomial | None:
    """Return rows plus columns minus what lies in both; runs share no position."""
    found = runs(pattern.indices)
    if len(found) > MAX_RUNS:
        return None
    rows = {attrs.evolve(_ONE, queries=r): 1 for r in found}
    columns = {attrs.evolve(_ONE, keys=(r[0] or None, r[1])): 1 for r in found}
    return {**rows, **columns, **{term: -c for term, c in times(rows, columns).items()}}


def _columns(pattern: Columns) -> Polynomial | None:
    found = runs(pattern.indices)
    if pattern.every is not None or len(found) > MAX_RUNS:
        return None
    return {attrs.evolve(_ONE, keys=(r[0] or None, r[1])): 1 for r in found}


def _documents(pattern: Documents) -> Polynomial | None:
    if pattern.lengths is None or len(pattern.lengths) > MAX_DOCUMENTS:
        return None
    return {attrs.evolve(_ONE, queries=box, keys=box): 1 for box in boxes(pattern.lengths)}


_ATOMS: Mapping[type[Pattern], Callable[..., Polynomial | None]] = {
    Full: lambda pattern: {_ONE: 1},
    Band: _band,
    Dilated: lambda pattern: {attrs.evolve(_ONE, dilated=(pattern,)): 1},
    Heads: _heads,
    Sinks: _sinks,
    Columns: _columns,
    Strided: lambda pattern: {attrs.evolve(_ONE, period=pattern.stride): 1},
    GlobalTokens: _global_tokens,
    Documents: _documents,
}
