"""What a pattern is, and the set algebra ``& | ~`` over patterns.

A pattern says which (query, key) pairs of a head may meet. It is frozen, hashable data with one definition of
membership, :meth:`Pattern.pairs`, written with operators and indexing only, so that the same text serves NumPy arrays,
torch tensors and the scalars of a vmapped mask function.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from attnplan.errors import SpecError

if TYPE_CHECKING:
    import numpy as np

Array = Any
"""An integer or boolean array: NumPy, torch, or a scalar under ``vmap``."""

P = TypeVar("P", bound="Pattern")


def digest(data: object) -> str:
    """Return a short stable name for frozen data, used to name its table."""
    return hashlib.blake2b(repr(data).encode(), digest_size=6).hexdigest()


def in_trace(self: Any, function: Callable[..., Any], *arguments: object) -> Any:
    """Return ``function(pattern, *arguments)``; a compiler's trace calls it once and keeps the result."""
    return function(self, *arguments)


in_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]  # what torch.compiler.assume_constant_result sets


@attrs.frozen
class Shape:
    """The sizes against which a pattern is checked and its tables are built.

    Query row i sits at position ``i + shift``; the default alignment is to the end of the keys.
    """

    seq_len: int
    kv_len: int
    heads: int
    batch: int = 1

    @property
    def shift(self) -> int:
        """Position of query row 0."""
        return self.kv_len - self.seq_len


@attrs.frozen(cache_hash=True)
class Pattern:
    """A set of (head, query position, key position) triples, closed under ``&``, ``|`` and ``~``."""

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        """Return whether query position ``q`` of head ``h`` may meet key position ``k``.

        Parameters
        ----------
        tables
            The arrays that :meth:`tables` and the call's operands provide, each indexed by position.
        h, q, k
            Integer arrays that broadcast together.

        Returns
        -------
        Array
            Booleans that broadcast to the shape of ``h``, ``q`` and ``k`` together.
        """
        raise NotImplementedError

    @property
    def operands(self) -> frozenset[str]:
        """Names of the runtime operands that membership depends on."""
        return frozenset()

    def tables(self, shape: Shape) -> dict[str, np.ndarray]:
        """Return the static tables, each of shape ``[batch or 1, length]``; most lengths are ``kv_len``."""
        return {}

    def check(self, shape: Shape) -> None:
        """Raise :class:`~attnplan.errors.SpecError` where this pattern cannot apply to ``shape``."""

    def bind(self, heads: int) -> Pattern:
        """Return the pattern with everything that depends on the number of heads filled in."""
        return self

    def head_key(self, h: int) -> tuple[object, ...]:
        """Return a key that is equal for two heads exactly when the pattern treats them alike."""
        return ()

    @property
    def period(self) -> int:
        """Modulus of the residue classes on which membership is constant between :meth:`breaks`."""
        return 1

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        """Return, for each query position, the key positions at which membership may change.

        Between two of them membership is constant on every residue class modulo :attr:`period`. None means that
        nothing is known, so that every key has to be asked.
        """
        raise NotImplementedError

    def walk(self) -> Iterator[Pattern]:
        """Iterate over this pattern and everything inside it."""
        yield self

    in_trace = in_trace

    def __and__(self, other: object) -> Pattern:
        return _join(And, self, other)

    def __or__(self, other: object) -> Pattern:
        return _join(Or, self, other)

    def __invert__(self) -> Pattern:
        return self.term if isinstance(self, Not) else Not(self)


def _join(kind: type[And] | type[Or], left: Pattern, right: object) -> Pattern:
    if not isinstance(right, Pattern):
        return NotImplemented  # type: ignore[no-any-return]  # lets Python try the other operand
    terms = [t for side in (left, right) for t in (side.terms if isinstance(side, kind) else (side,))]
    return kind(tuple(terms))


@attrs.frozen(cache_hash=True, repr=False)
class _Compound(Pattern):
    """Shared parts of the two n-ary operators."""

    terms: tuple[Pattern, ...]

    @property
    def operands(self) -> frozenset[str]:
        return frozenset().union(*(t.operands for t in self.terms))

    def tables(self, shape: Shape) -> dict[str, np.ndarray]:
        return {name: table for t in self.terms for name, table in t.tables(shape).items()}

    def check(self, shape: Shape) -> None:
        for term in self.terms:
            term.check(shape)

    def bind(self, heads: int) -> Pattern:
        terms = tuple(t.bind(heads) for t in self.terms)
        return self if all(a is b for a, b in zip(terms, self.terms, strict=True)) else attrs.evolve(self, terms=terms)

    def head_key(self, h: int) -> tuple[object, ...]:
        return tuple(t.head_key(h) for t in self.terms)

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        found = [t.breaks(tables, q, kv_len) for t in self.terms]
        return None if any(f is None for f in found) else [b for f in found if f is not None for b in f]

    def walk(self) -> Iterator[Pattern]:
        yield self
        for term in self.terms:
            yield from term.walk()


@attrs.frozen(cache_hash=True, repr=False)
class And(_Compound):
    """Pairs that every term contains."""

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        result = self.terms[0].pairs(tables, h, q, k)
        for term in self.terms[1:]:
            result = result & term.pairs(tables, h, q, k)
        return result

    def __repr__(self) -> str:
        return " & ".join(f"({t})" if isinstance(t, Or) else repr(t) for t in self.terms)


@attrs.frozen(cache_hash=True, repr=False)
class Or(_Compound):
    """Pairs that at least one term contains: a set union under one softmax, never a mixture."""

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        result = self.terms[0].pairs(tables, h, q, k)
        for term in self.terms[1:]:
            result = result | term.pairs(tables, h, q, k)
        return result

    def __repr__(self) -> str:
        return " | ".join(repr(t) for t in self.terms)


@attrs.frozen(cache_hash=True, repr=False)
class Not(Pattern):
    """Pairs that the term does not contain."""

    term: Pattern

    def pairs(self, tables: Mapping[str, Array], h: Array, q: Array, k: Array) -> Array:
        return ~self.term.pairs(tables, h, q, k)

    @property
    def operands(self) -> frozenset[str]:
        return self.term.operands

    def tables(self, shape: Shape) -> dict[str, np.ndarray]:
        return self.term.tables(shape)

    def check(self, shape: Shape) -> None:
        self.term.check(shape)

    def bind(self, heads: int) -> Pattern:
        term = self.term.bind(heads)
        return self if term is self.term else Not(term)

    def head_key(self, h: int) -> tuple[object, ...]:
        return self.term.head_key(h)

    def breaks(self, tables: Mapping[str, Array], q: np.ndarray, kv_len: int) -> list[Array] | None:
        return self.term.breaks(tables, q, kv_len)

    def walk(self) -> Iterator[Pattern]:
        yield self
        yield from self.term.walk()

    def __repr__(self) -> str:
        return f"~({self.term})" if isinstance(self.term, _Compound) else f"~{self.term}"


def conjuncts(pattern: Pattern) -> tuple[Pattern, ...]:
    """Return the terms whose intersection is ``pattern``."""
    return pattern.terms if isinstance(pattern, And) else (pattern,)


def require(condition: bool, message: str) -> None:
    """Raise :class:`~attnplan.errors.SpecError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise SpecError(message)


def require_int(value: object, name: str, least: int) -> None:
    """Raise :class:`~attnplan.errors.SpecError` unless ``value`` is an int of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise SpecError(f"{name} must be an int, got {value!r} ({type(value).__name__})")
    if value < least:
        raise SpecError(f"{name} must be at least {least}, got {value}")
