"""Mixtures: several patterns, each with a softmax of its own, and the rule that mixes their outputs.

A mixture is a multiset, a union ``a | b`` is a set: with the ``lse`` rule a key that two branches see counts twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from math import isfinite
from operator import and_
from typing import TypeVar

import attrs

from attnplan.errors import SpecError, did_you_mean
from attnplan.patterns.bands import Full
from attnplan.patterns.base import Pattern, Shape, conjuncts, in_trace, require, require_int
from attnplan.patterns.segments import OFFSETS, Dilated, Heads

RULES = ("lse", "lse-detached", "mean", "sum")

M = TypeVar("M", bound="Mixture")


@attrs.frozen(cache_hash=True, repr=False)
class Mixture:
    """Several branches and the rule that mixes them. ``mixture & pattern`` restricts every branch."""

    where: Pattern = attrs.field(factory=Full, kw_only=True)
    """A condition on every branch."""
    in_trace = in_trace

    @property
    def rule(self) -> str:
        """How branch outputs are mixed: one of :data:`RULES`."""
        raise NotImplementedError

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Constant weights of the branches; only the ``sum`` rule takes them."""
        return None

    def _branches(self, heads: int) -> tuple[Pattern, ...]:
        raise NotImplementedError

    def branches(self, heads: int) -> tuple[Pattern, ...]:
        """Return one pattern per branch for a spec with ``heads`` heads."""
        bare = self._branches(heads)
        restricted = bare if isinstance(self.where, Full) else tuple(b & self.where for b in bare)
        return tuple(b.bind(heads) for b in restricted)

    @property
    def operands(self) -> frozenset[str]:
        """Names of the runtime operands that any branch depends on."""
        return self.where.operands

    def check(self, shape: Shape) -> None:
        """Raise :class:`~attnplan.errors.SpecError` where a branch cannot apply to ``shape``."""
        for branch in self.branches(shape.heads):
            branch.check(shape)

    def walk(self) -> Iterator[Pattern]:
        """Iterate over every pattern that the user wrote into this mixture."""
        yield from self.where.walk()

    def __and__(self: M, other: object) -> M:
        if not isinstance(other, Pattern):
            return NotImplemented
        # full() is dropped, as it is when the text form is read back term by term
        terms = [c for c in (*conjuncts(self.where), *conjuncts(other)) if not isinstance(c, Full)]
        return attrs.evolve(self, where=reduce(and_, terms) if terms else Full())

    def __rand__(self: M, other: object) -> M:
        return self & other

    def __or__(self, other: object) -> Pattern:
        raise SpecError(
            "a mixture has no union: its branches are separate softmaxes. Write mix([...]) for more branches, or "
            "join patterns with | before mixing them"
        )

    __ror__ = __or__

    def __invert__(self) -> Pattern:
        raise SpecError("a mixture has no complement: complement the patterns inside it")

    def _repr(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        if isinstance(self.where, Full):
            return self._repr()
        where = repr(self.where)
        return f"{self._repr()} & ({where})" if " | " in where else f"{self._repr()} & {where}"


def _check_branches(segment_lengths: tuple[int, ...], dilation_rates: tuple[int, ...]) -> None:
    if not segment_lengths or len(segment_lengths) != len(dilation_rates):
        raise SpecError(
            f"segment_lengths and dilation_rates must pair up, at least one of each; got {list(segment_lengths)} and "
            f"{list(dilation_rates)}"
        )
    if any(r > w for w, r in zip(segment_lengths, dilation_rates, strict=True)) and all(
        w <= r for w, r in zip(segment_lengths, dilation_rates, strict=True)
    ):
        raise SpecError(
            f"every dilation rate exceeds its segment length: segment_lengths={list(segment_lengths)}, "
            f"dilation_rates={list(dilation_rates)}; are the two swapped?"
        )
    for w, r in zip(segment_lengths, dilation_rates, strict=True):
        Dilated(w, r)


def _arguments(mixture: LongNet | Grouped, **options: tuple[object, object]) -> str:
    parts = [f"segment_lengths={list(mixture.segment_lengths)}", f"dilation_rates={list(mixture.dilation_rates)}"]
    parts += [f'{name}="{value}"' for name, (value, default) in options.items() if value != default]
    return ", ".join(parts)


@attrs.frozen(cache_hash=True, repr=False)
class LongNet(Mixture):
    """Every head takes part in every dilated branch."""

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    offset: str = "interleave"
    mix: str = "lse"

    def __attrs_post_init__(self) -> None:
        _check_branches(self.segment_lengths, self.dilation_rates)
        if self.offset not in OFFSETS:
            raise SpecError(f"unknown longnet offset {self.offset!r}{did_you_mean(str(self.offset), OFFSETS)}")
        if self.mix not in RULES:
            raise SpecError(f"unknown longnet mix {self.mix!r}{did_you_mean(str(self.mix), RULES)}")

    @property
    def rule(self) -> str:
        return self.mix

    def _branches(self, heads: int) -> tuple[Pattern, ...]:
        pairs = zip(self.segment_lengths, self.dilation_rates, strict=True)
        return tuple(Dilated(w, r, self.offset if r > 1 else 0) for w, r in pairs)

    def _repr(self) -> str:
        return f"longnet({_arguments(self, offset=(self.offset, 'interleave'), mix=(self.mix, 'lse'))})"


@attrs.frozen(cache_hash=True, repr=False)
class Grouped(Mixture):
    """Heads split into contiguous groups, one dilated branch each."""

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    mix: str = "none"

    def __attrs_post_init__(self) -> None:
        _check_branches(self.segment_lengths, self.dilation_rates)
        if self.mix not in ("none", "mean"):
            raise SpecError(f"unknown grouped mix {self.mix!r}{did_you_mean(str(self.mix), ('none', 'mean'))}")

    @property
    def rule(self) -> str:
        # Each head has one branch, so merging by LSE gives that branch's output unchanged.
        return "lse" if self.mix == "none" else "mean"

    def ranges(self, heads: int) -> tuple[tuple[int, int], ...]:
        """Return each group's first head and the head after its last."""
        groups = len(self.segment_lengths)
        sizes = [heads // groups + (j < heads % groups) for j in range(groups)]
        starts = [sum(sizes[:j]) for j in range(groups)]
        return tuple((a, a + n) for a, n in zip(starts, sizes, strict=True))

    def _branches(self, heads: int) -> tuple[Pattern, ...]:
        triples = zip(self.segment_lengths, self.dilation_rates, self.ranges(heads), strict=True)
        return tuple(Heads(*ends) & Dilated(w, r, j % r) for j, (w, r, ends) in enumerate(triples))

    def _repr(self) -> str:
        return f"grouped({_arguments(self, mix=(self.mix, 'none'))})"


@attrs.frozen(cache_hash=True, repr=False)
class Mix(Mixture):
    """Any patterns as branches."""

    patterns: tuple[Pattern, ...]
    _rule: str = attrs.field(default="lse", alias="rule")
    _weights: tuple[float, ...] | None = attrs.field(default=None, alias="weights")

    def __attrs_post_init__(self) -> None:
        if not self.patterns or not all(isinstance(p, Pattern) for p in self.patterns):
            raise SpecError(f"mix needs at least one pattern, and patterns only; got {list(self.patterns)}")
        if self._rule not in RULES:
            raise SpecError(f"unknown mix rule {self._rule!r}{did_you_mean(str(self._rule), RULES)}")
        if self._weights is not None:
            require(
                self._rule == "sum",
                f'weights go with rule="sum" only, got rule="{self._rule}": the other rules define their own weights',
            )
            require(
                len(self._weights) == len(self.patterns),
                f"mix needs one weight per pattern: {len(self._weights)} weights for {len(self.patterns)} patterns",
            )

    @property
    def rule(self) -> str:
        return self._rule

    @property
    def weights(self) -> tuple[float, ...] | None:
        return self._weights

    def _branches(self, heads: int) -> tuple[Pattern, ...]:
        return self.patterns

    @property
    def operands(self) -> frozenset[str]:
        return self.where.operands.union(*(p.operands for p in self.patterns))

    def walk(self) -> Iterator[Pattern]:
        yield from self.where.walk()
        for pattern in self.patterns:
            yield from pattern.walk()

    def _repr(self) -> str:
        rule = "" if self._rule == "lse" else f', rule="{self._rule}"'
        weights = "" if self._weights is None else f", weights={list(self._weights)}"
        return f"mix({list(self.patterns)}{rule}{weights})"


def _ints(values: Sequence[int], name: str) -> tuple[int, ...]:
    if isinstance(values, (str, int)) or not isinstance(values, Sequence):
        raise SpecError(f"{name} must be a list of ints, got {values!r}")
    for value in values:
        require_int(value, f"each of {name}", 1)
    return tuple(values)


def longnet(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int], offset: str = "interleave", mix: str = "lse"
) -> Mixture:
    """Mix dilated branches of growing segment length and rate; every head takes part in every branch.

    Parameters
    ----------
    segment_lengths, dilation_rates
        One segment length w and one rate r per branch.
    offset
        ``"interleave"`` gives head h the offset ``h % r`` (the paper), ``"block"`` gives ``h // ceil(H / r)``
        (torchscale).
    mix
        ``"lse"`` weighs branches by their softmax denominators, ``"lse-detached"`` is the same without a gradient
        through the weights (torchscale), ``"mean"`` and ``"sum"`` are what they say.

    Raises
    ------
    SpecError
        If the lists do not pair up, a rate exceeds its segment, or an option is unknown.

    Examples
    --------
    >>> longnet(segment_lengths=[2048, 4096], dilation_rates=[1, 2])
    longnet(segment_lengths=[2048, 4096], dilation_rates=[1, 2])

    References
    ----------
    Ding et al., LongNet: Scaling Transformers to 1,000,000,000 Tokens, arXiv 2307.02486, eq. 9-13.
    """
    return LongNet(_ints(segment_lengths, "segment_lengths"), _ints(dilation_rates, "dilation_rates"), offset, mix)


def grouped(segment_lengths: Sequence[int], dilation_rates: Sequence[int], mix: str = "none") -> Mixture:
    """Split the heads into contiguous groups and give each group one dilated branch.

    With H heads and G branches the groups have ``H // G`` heads, and the first ``H % G`` groups one more. Branch j
    has the offset ``j % r``.

    Parameters
    ----------
    segment_lengths, dilation_rates
        One segment length and one rate per group.
    mix
        ``"none"`` leaves each head's output as it is, ``"mean"`` divides it by the number of groups.

    Raises
    ------
    SpecError
        If the lists do not pair up, a rate exceeds its segment, or ``mix`` is unknown.

    Examples
    --------
    >>> grouped([8, 16], [1, 2]).ranges(5)
    ((0, 3), (3, 5))
    """
    return Grouped(_ints(segment_lengths, "segment_lengths"), _ints(dilation_rates, "dilation_rates"), mix)


def mix(patterns: Sequence[Pattern], rule: str = "lse", weights: Sequence[float] | None = None) -> Mixture:
    """Mix arbitrary patterns, each with a softmax of its own.

    Parameters
    ----------
    patterns
        One pattern per branch.
    rule
        ``"lse"``, ``"lse-detached"``, ``"mean"`` or ``"sum"``, as in :func:`longnet`.
    weights
        Constant weights of the branches, for ``rule="sum"`` only.

    Raises
    ------
    SpecError
        If there is no pattern, the rule is unknown, or weights do not fit.

    Examples
    --------
    >>> from attnplan.patterns import window, segments
    >>> mix([window(512), segments(4096)], rule="sum", weights=[0.75, 0.25])
    mix([window(512), segments(4096)], rule="sum", weights=[0.75, 0.25])
    """
    if isinstance(patterns, Pattern):
        raise SpecError(f"mix needs a list of patterns, got one pattern: mix([{patterns!r}])")
    if weights is not None and not all(isinstance(w, int | float) and isfinite(w) for w in weights):
        raise SpecError(f"mix weights must be finite numbers, got {list(weights)}")
    return Mix(tuple(patterns), rule, None if weights is None else tuple(float(w) for w in weights))
