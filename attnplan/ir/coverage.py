"""The proof: which (branch, head, query, key) pairs a graph computes, as a fingerprint at full size.

The multiset of pairs is a generating function: the sum of ``B^branch z^head c^kv_head x^row y^key`` over all pairs,
evaluated modulo the prime 2^61 - 1 at two random points. Row maps are affine and segments are periodic, so every sum
is a product of geometric sums; nothing of the size of the sequence is ever built. A spec and a graph with unlike pairs
have equal fingerprints with probability below 1e-20.

Conditions without a closed form (runtime operands, unions, functions) are carried as the key of the sum they filter,
and so are the scale, the softcap and the way in which the result is mixed: a pass that drops or alters one of them
changes the coverage.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod

import attrs

from attnplan.errors import PassError, VerifyError
from attnplan.ir.graph import Graph, Node
from attnplan.ir.ops import Attend, Input, Merge, Mix, Output
from attnplan.ir.rows import RowMap
from attnplan.patterns.bands import Full
from attnplan.patterns.base import Pattern, conjuncts
from attnplan.patterns.sums import PRIME, Cell, Conjunction, Point, head_sum
from attnplan.spec import AttentionSpec


@attrs.frozen(cache_hash=True)
class _Probe:
    """One random point for all five variables."""

    branch: int
    head: int
    kv_head: int
    pairs: Point

    @classmethod
    def draw(cls, source: random.Random) -> _Probe:
        values = [source.randrange(2, PRIME - 1) for _ in range(5)]
        return cls(values[0], values[1], values[2], Point(values[3], values[4], PRIME))

    def weight(self, branch: int, head: int, kv_head: int) -> int:
        powers = (pow(self.branch, branch, PRIME), pow(self.head, head, PRIME), pow(self.kv_head, kv_head, PRIME))
        return prod(powers) % PRIME


_SOURCE = random.Random(0x61747470)  # fixed, so that a graph has the same fingerprint everywhere
PROBES = (_Probe.draw(_SOURCE), _Probe.draw(_SOURCE))


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
    mixing: tuple[object, ...] = ()


Pairs = Mapping[Term, tuple[int, ...]]


@attrs.frozen
class Coverage:
    """What is computed: from which inputs, and which pairs of them."""

    inputs: frozenset[Input]
    pairs: Pairs


def coverage(graph: Graph) -> Coverage:
    """Return the coverage of a graph, read at its output.

    Raises
    ------
    PassError
        If an attend keeps a condition that has no closed form over its rows.
    """
    inputs = frozenset(op for _, op in graph.of(Input))
    return Coverage(inputs, _node_coverage(graph, graph.output))


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


def _add(parts: Sequence[Pairs]) -> Pairs:
    total: dict[Term, tuple[int, ...]] = {}
    for part in parts:
        for term, values in part.items():
            old = total.get(term, (0,) * len(PROBES))
            total[term] = tuple((a + b) % PRIME for a, b in zip(old, values, strict=True))
    return {term: values for term, values in total.items() if any(values)}


@lru_cache(maxsize=512)
def attend_coverage(op: Attend, q: RowMap, k: RowMap) -> Pairs:
    conjunction = _closed_part(op.where, op.shift)
    opaque = conjunction.opaque if op.shift is not None else _flat(op.where)
    term = Term(opaque, _shift(opaque, op.shift), op.scale, op.softcap, op.dropout, op.precision)
    if q.keeps_rows and k.keeps_rows:
        values = tuple(_by_head(probe, op, conjunction, q, k) for probe in PROBES)
    elif conjunction.dilated or conjunction.heads:
        raise PassError(f"attend where {op.where!r} keeps a segment or head condition over rows that were taken apart")
    else:
        values = tuple(_by_axes(probe, op, conjunction, q, k) for probe in PROBES)
    return {term: values} if any(values) else {}


def _shift(opaque: frozenset[Pattern], shift: int | None) -> int | None:
    """Return the shift as far as the sums do not show it already."""
    return shift if opaque or shift is None else 0


def _flat(where: Pattern) -> frozenset[Pattern]:
    return frozenset(c for c in conjuncts(where) if not isinstance(c, Full))


def _closed_part(where: Pattern, shift: int | None) -> Conjunction:
    """Return what can be summed: nothing at all if positions arrive with the call."""
    return Conjunction.of(where if shift is not None else Full())


def _by_head(probe: _Probe, op: Attend, conjunction: Conjunction, q: RowMap, k: RowMap) -> int:
    """Sum head by head over whole rows, with the pattern's own closed form; heads with one offset share it."""
    weights: dict[tuple[object, ...], int] = {}
    examples: dict[tuple[object, ...], int] = {}
    for index, head in q.batch_heads():
        key = (conjunction.admits(head), conjunction.offsets(head))
        weights[key] = weights.get(key, 0) + probe.weight(op.branch, head, k.head_at(index))
        examples.setdefault(key, head)
    return sum(
        weight % PRIME * head_sum(conjunction, examples[key], probe.pairs, op.shift or 0, q.length, k.length)
        for key, weight in weights.items()
    ) % PRIME  # fmt: skip


def _by_axes(probe: _Probe, op: Attend, conjunction: Conjunction, q: RowMap, k: RowMap) -> int:
    """Sum over affine rows: a geometric factor for each batch axis, times the sum over one block of rows."""
    point = probe.pairs
    total = probe.weight(op.branch, q.head, k.head)
    for a, b in zip(q.batch, k.batch, strict=True):
        b = b if b.size > 1 else attrs.evolve(b, head=0, row=0)
        if conjunction.banded and a.row != b.row and a.size > 1:
            raise PassError(f"attend where {op.where!r}: queries and keys drift apart along a batch axis")
        step = pow(probe.head, a.head, PRIME) * pow(probe.kv_head, b.head, PRIME)
        step = step * pow(point.x, a.row, PRIME) * pow(point.y, b.row, PRIME)
        total = total * point.geometric(step % PRIME, a.size) % PRIME
    return total * _block(point, op, conjunction, q, k) % PRIME


def _block(point: Point, op: Attend, conjunction: Conjunction, q: RowMap, k: RowMap) -> int:
    rows, keys, shift = q.axes[-1], k.axes[-1], op.shift or 0
    if conjunction.banded and not rows.row == keys.row > 0:
        raise PassError(f"attend where {op.where!r}: query rows step by {rows.row}, keys by {keys.row}")
    if conjunction.banded:
        cell = Cell(q.row + shift, k.row, rows.size, keys.size, rows.row)
        return cell.sum(point, conjunction.left, conjunction.right, shift)
    x, y = point.power(point.x, rows.row), point.power(point.y, keys.row)
    start = point.power(point.x, q.row) * point.power(point.y, k.row)
    return start * point.rectangle(x, y, rows.size, keys.size) % PRIME


def spec_coverage(spec: AttentionSpec) -> Coverage:
    """Return the coverage that a spec asks for, straight from its pattern and independent of any graph.

    Raises
    ------
    SpecError
        If the pattern cuts the sequence into too many irregular pieces to sum.
    """
    shape = spec.shape
    whole = RowMap.whole(spec.heads, shape.seq_len)
    group = spec.heads // spec.kv_heads
    parts: list[Pairs] = []
    for branch, where in enumerate(spec.branches):
        shift = None if spec.q_offset else shape.shift
        conjunction = _closed_part(where, shift)
        opaque = conjunction.opaque if shift is not None else _flat(where)
        term = Term(
            opaque=opaque,
            shift=_shift(opaque, shift),
            scale=spec.softmax_scale,
            softcap=spec.softcap,
            dropout=spec.dropout,
            precision=spec.precision,
            mixing=_spec_mixing(spec, branch),
        )
        values = tuple(
            sum(
                probe.weight(branch, head, head // group)
                * head_sum(conjunction, head, probe.pairs, shift or 0, shape.seq_len, shape.kv_len)
                for _, head in whole.batch_heads()
            )
            % PRIME
            for probe in PROBES
        )
        parts.append({term: values})
    return Coverage(_spec_inputs(spec), _add(parts))


def _spec_inputs(spec: AttentionSpec) -> frozenset[Input]:
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
            + (f", mixed by {t.mixing}" if t.mixing else "")
            for t in terms
        )
        or "nothing"
    )


__all__ = ["Coverage", "Term", "check_coverage", "coverage", "spec_coverage"]
