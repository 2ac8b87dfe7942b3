"""The proof: which (branch, head, query, key) pairs a graph computes, as a fingerprint at full size.

The multiset of pairs is a generating function: the sum of ``B^branch z^head c^kv_head x^row y^key`` over all pairs,
evaluated modulo the prime 2^61 - 1 at two random points. Row maps are affine and segments are periodic, so every sum
is a product of geometric sums; nothing of the size of the sequence is ever built. A spec and a graph with unlike pairs
have equal fingerprints with probability below 1e-20.

A set union is a polynomial in indicators, each monomial of which is summed (:mod:`attnplan.patterns.indicators`).
Conditions without a closed form (runtime operands, functions) are the variables of that polynomial: they are the key of
the sum that they filter, and so are the scale, the softcap and the way in which the result is mixed. A pass that drops
or alters one of them, or lets two parts of a union overlap, changes the coverage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product

import attrs

from attnplan.errors import PassError, VerifyError
from attnplan.ir.graph import Graph, Node
from attnplan.ir.ops import Attend, Input, Merge, Mix, Output
from attnplan.ir.probes import PROBES, attend_sum
from attnplan.ir.rows import RowMap
from attnplan.patterns.bands import Full
from attnplan.patterns.base import Pattern, conjuncts
from attnplan.patterns.indicators import indicator
from attnplan.patterns.sums import PRIME, Conjunction, head_sum
from attnplan.spec import AttentionSpec


@attrs.frozen(cache_hash=True)
class Term:
    """What a sum of pairs is filtered by, computed with and mixed by."""

    opaque: frozenset[Pattern]
    shift: int | None
    """Position of query row 0 in the opaque conditions (0 without any); None if it arrives with the call."""
    scale: float
    softcap: float | None
    dropout: float
    precision: str
    biases: tuple[str, ...] = ()
    mixing: tuple[object, ...] = ()


Pairs = Mapping[Term, tuple[int, ...]]


@attrs.frozen
class Coverage:
    """What is computed: from which inputs, and which pairs of them."""

    inputs: frozenset[Input]
    pairs: Pairs
    sinks: bool = False
    """Whether every row meets its head's sink too."""


def coverage(graph: Graph) -> Coverage:
    """Return the coverage of a graph, read at its output.

    Raises
    ------
    PassError
        If an attend keeps a condition that has no closed form over its rows.
    """
    inputs = frozenset(op for _, op in graph.of(Input))
    op = graph.output.op
    return Coverage(inputs, _node_coverage(graph, graph.output), isinstance(op, Output) and op.sinks)


def _node_coverage(graph: Graph, node: Node) -> Pairs:
    op, args = node.op, graph.args(node)
    if isinstance(op, Attend):
        return attend_coverage(op, args[0].type.rows, args[1].type.rows)
    parts = [_node_coverage(graph, arg) for arg in args]
    if isinstance(op, Merge | Mix) and any(term.mixing for part in parts for term in part):
        raise PassError(f"%{node.id} {op.name} joins what is mixed already: the weights would get another gradient")
    if isinstance(op, Output | Merge):
        return _add(parts)
    if isinstance(op, Mix):
        if op.rule == "lse":  # the multiset of keys under one softmax, as a merge is
            return _add(parts)
        labelled = [
            {attrs.evolve(term, mixing=(*term.mixing, *_mixing(op, branch))): value for term, value in part.items()}
            for part, branch in zip(parts, op.branches, strict=True)
        ]
        return _add(labelled)
    raise PassError(f"%{node.id} {op.name} is no attention output")


def _mixing(op: Mix, branch: int) -> tuple[object, ...]:
    return (op.rule, branch) if op.rule == "lse-detached" else (op.rule, branch, op.weight(branch))


def join_pairs(parts: Sequence[Pairs]) -> Pairs:
    """Return the pairs of several graphs together."""
    return _add(parts)


def _add(parts: Sequence[Pairs]) -> Pairs:
    total: dict[Term, tuple[int, ...]] = {}
    for part in parts:
        for term, values in part.items():
            old = total.get(term, (0,) * len(PROBES))
            total[term] = tuple((a + b) % PRIME for a, b in zip(old, values, strict=True))
    return {term: values for term, values in total.items() if any(values)}


@lru_cache(maxsize=512)
def attend_coverage(op: Attend, q: RowMap, k: RowMap) -> Pairs:
    """Return what one attend computes over the rows that it is given.

    Raises
    ------
    PassError
        If its condition has no closed form over its rows.
    """
    parts: list[Pairs] = []
    for at_q, at_k in product(*op.runs(q, k)):
        for condition, coefficient in _monomials(op.where, op.shift):
            shift = _shift(condition.opaque, op.shift)
            term = Term(condition.opaque, shift, op.scale, op.softcap, op.dropout, op.precision, op.biases)
            parts.append({term: tuple(coefficient * attend_sum(probe, op, condition, at_q, at_k) for probe in PROBES)})
    return _add(parts)


def _shift(opaque: frozenset[Pattern], shift: int | None) -> int | None:
    """Return the shift as far as the sums do not show it already."""
    return shift if opaque or shift is None else 0


def _monomials(where: Pattern, shift: int | None) -> Sequence[tuple[Conjunction, int]]:
    """Return what a condition's pairs are the sum of; nothing can be summed if positions arrive with the call."""
    if shift is not None:
        return indicator(where)
    flat = frozenset(c for c in conjuncts(where) if not isinstance(c, Full))
    return ((Conjunction(None, None, (), (), flat), 1),)


def spec_coverage(spec: AttentionSpec) -> Coverage:
    """Return the coverage that a spec asks for, straight from its pattern and independent of any graph.

    Raises
    ------
    SpecError
        If the pattern cuts the sequence into too many irregular pieces to sum.
    """
    shape = spec.shape
    parts: list[Pairs] = []
    for branch, where in enumerate(spec.branches):
        shift = None if spec.q_offset else shape.shift
        for condition, coefficient in _monomials(where, shift):
            term = Term(
                opaque=condition.opaque,
                shift=_shift(condition.opaque, shift),
                scale=spec.softmax_scale,
                softcap=spec.softcap,
                dropout=spec.dropout,
                precision=spec.precision,
                biases=spec.biases,
                mixing=_spec_mixing(spec, branch),
            )
            sums = _spec_sums(spec, branch, condition, shift or 0)
            parts.append({term: tuple(coefficient * each for each in sums)})
    return Coverage(spec_inputs(spec), _add(parts), spec.sink_logits)


def _spec_sums(spec: AttentionSpec, branch: int, condition: Conjunction, shift: int) -> tuple[int, ...]:
    """Return the sums over the pairs of a branch that one intersection admits, one for each probe, head by head."""
    shape, group = spec.shape, spec.heads // spec.kv_heads
    alike: dict[tuple[int, ...], list[int]] = {}
    for head in range(spec.heads):
        if condition.admits(head):
            alike.setdefault(condition.offsets(head), []).append(head)
    totals = []
    for probe in PROBES:
        total = 0
        for heads in alike.values():
            each = head_sum(condition, heads[0], probe.pairs, shift, shape.seq_len, shape.kv_len)
            total += each * sum([probe.weight(branch, head, head // group) for head in heads])
        totals.append(total % PRIME)
    return tuple(totals)


def spec_inputs(spec: AttentionSpec) -> frozenset[Input]:
    """Return the inputs that a graph for ``spec`` takes."""
    shape, group = spec.shape, spec.heads // spec.kv_heads
    sizes = {
        "q": (spec.heads, shape.seq_len, spec.head_dim),
        "k": (spec.kv_heads, shape.kv_len, spec.head_dim),
        "v": (spec.kv_heads, shape.kv_len, spec.value_dim),
    }
    return frozenset(
        Input(name, heads, group, length, features, spec.dtype) for name, (heads, length, features) in sizes.items()
    )


def _spec_mixing(spec: AttentionSpec, branch: int) -> tuple[object, ...]:
    if spec.rule == "lse":
        return ()
    if spec.rule == "lse-detached":
        return (spec.rule, branch)
    if spec.rule == "mean":
        return (spec.rule, branch, 1 / len(spec.branches))
    weights = spec.pattern.weights if not isinstance(spec.pattern, Pattern) else None
    return (spec.rule, branch, 1.0 if weights is None else weights[branch])


def check_coverage(expected: Coverage, got: Coverage, who: str) -> None:
    """Raise :class:`~attnplan.errors.VerifyError` unless the two are equal; ``who`` names what was checked."""
    if expected == got:
        return
    if expected.inputs != got.inputs:
        wrong = ", ".join(sorted(map(repr, got.inputs - expected.inputs)))
        raise VerifyError(f"{who} takes inputs that are not those of the spec: {wrong}")
    if expected.sinks != got.sinks:
        raise VerifyError(f"{who} {'lost' if expected.sinks else 'gained'} the sink logits")
    missing, extra = set(expected.pairs) - set(got.pairs), set(got.pairs) - set(expected.pairs)
    if missing or extra:
        raise VerifyError(f"{who} changed what is computed: lost {_describe(missing)}, gained {_describe(extra)}")
    raise VerifyError(f"{who} does not compute exactly the (branch, head, query, key) pairs of the spec, once each")


def _describe(terms: set[Term]) -> str:
    return (
        "; ".join(
            f"{' & '.join(sorted(map(repr, t.opaque))) or 'plain pairs'} at scale {t.scale:.6g}"
            + (f", softcap {t.softcap:.6g}" if t.softcap is not None else "")
            + (f", row 0 at {t.shift}" if t.opaque else "")
            + (f", dropout {t.dropout:.6g}" if t.dropout else "")
            + (f", {t.precision}" if t.precision != "ieee" else "")
            + (f", with {' and '.join(t.biases)}" if t.biases else "")
            + (f", mixed by {t.mixing}" if t.mixing else "")
            for t in terms
        )
        or "nothing"
    )


__all__ = ["Coverage", "Term", "check_coverage", "coverage", "join_pairs", "spec_coverage", "spec_inputs"]
