"""Random patterns, mixtures and small specs, with the awkward cases drawn often."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from attnplan import patterns as P
from attnplan.spec import AttentionSpec

RULES = ("lse", "lse-detached", "mean", "sum")
MASKS = (
    P.mask(lambda h, q, k: (q + 2 * k + h) % 3 != 0),
    P.mask(lambda h, q, k: (q - k) * (q - k) < 9 + h),
    P.mask(lambda h, q, k: (h % 2 == 0) | (k > 2)),
)


@st.composite
def shapes(draw: st.DrawFn, longest: int = 19) -> P.Shape:
    """Sizes with odd lengths, and with more queries than keys or fewer."""
    seq_len = draw(st.integers(1, longest))
    kv_len = draw(st.one_of(st.just(seq_len), st.integers(1, longest)))
    return P.Shape(seq_len, kv_len, heads=draw(st.integers(1, 6)), batch=draw(st.integers(1, 2)))


@st.composite
def dilations(draw: st.DrawFn, longest: int = 24) -> P.Pattern:
    rate = draw(st.integers(1, 5))
    length = draw(st.integers(rate, longest))  # often no multiple of the rate, or longer than the sequence
    offset = draw(st.one_of(st.integers(0, rate - 1), st.sampled_from(["interleave", "block"])))
    return P.dilated(length, rate, offset=offset)


def bands() -> st.SearchStrategy[P.Pattern]:
    side = st.one_of(st.none(), st.integers(0, 8))
    return st.one_of(st.just(P.causal()), st.builds(P.window, st.integers(0, 8)), st.builds(P.band, side, side))


@st.composite
def head_ranges(draw: st.DrawFn, heads: int) -> P.Pattern:
    start = draw(st.integers(0, heads))
    return P.heads(start, draw(st.integers(start, heads)))


@st.composite
def cuts(draw: st.DrawFn, total: int) -> list[int]:
    """Positive lengths that sum to ``total``."""
    ends = sorted({*draw(st.lists(st.integers(1, total), max_size=4)), total})
    return [b - a for a, b in zip([0, *ends], ends, strict=False)]


def closed_atoms(shape: P.Shape) -> st.SearchStrategy[P.Pattern]:
    """Atoms whose intersections have a closed form."""
    return st.one_of(st.just(P.full()), bands(), dilations(), head_ranges(shape.heads))


def table_atoms(shape: P.Shape) -> st.SearchStrategy[P.Pattern]:
    """Atoms that proofs and passes carry along unread."""
    tokens = st.lists(st.integers(0, shape.kv_len - 1), min_size=1, max_size=4, unique=True)
    lengths = st.lists(st.integers(0, shape.kv_len), min_size=shape.batch, max_size=shape.batch)
    choices = [
        st.builds(P.sinks, st.integers(1, shape.kv_len)),
        st.builds(P.global_tokens, st.integers(1, shape.kv_len)),
        st.builds(P.global_tokens, tokens),
        st.builds(P.padding, lengths),
    ]
    if shape.seq_len <= shape.kv_len:
        choices.append(st.builds(P.documents, cuts(shape.kv_len)))
    return st.one_of(*choices, sparse_atoms(shape))


def sparse_atoms(shape: P.Shape) -> st.SearchStrategy[P.Pattern]:
    """Strides, columns, blocks and neighbourhoods; their periods divide 60 together with those of dilations."""
    small, listed = st.integers(0, 3), st.lists(st.integers(0, shape.kv_len - 1), min_size=1, max_size=4, unique=True)
    choices = [
        st.builds(P.strided, st.integers(1, 6)),
        st.builds(P.columns, listed),
        st.sampled_from([2, 4, 5, 6]).flatmap(
            lambda n: st.builds(P.columns, st.lists(st.integers(0, n - 1), min_size=1, unique=True), every=st.just(n))
        ),
        st.builds(P.block_window, st.integers(1, 6), small, small),
    ]
    if shape.seq_len <= shape.kv_len:
        choices += [layouts(shape), random_layouts(), neighborhoods(shape.kv_len)]
    return st.one_of(choices)


@st.composite
def layouts(draw: st.DrawFn, shape: P.Shape) -> P.Pattern:
    """Block layouts of one head or all heads; the last blocks are often ragged."""
    size = draw(st.tuples(st.integers(2, 7), st.integers(2, 7)))
    rows, columns = (-(-shape.kv_len // n) for n in size)
    heads = draw(st.sampled_from([None, shape.heads]))
    count = rows * columns * (heads or 1)
    word = draw(st.integers(0, 2**count - 1))
    bits = np.array([word >> i & 1 for i in range(count)], dtype=bool)
    return P.blocks(bits.reshape((rows, columns) if heads is None else (heads, rows, columns)), size)


def random_layouts() -> st.SearchStrategy[P.Pattern]:
    size, seed = st.integers(1, 7), st.integers(0, 2**64 - 1)
    share = st.floats(0, 1, exclude_min=True)
    counted = st.builds(
        lambda n, size, seed: P.random_blocks(count=n, block_size=size, seed=seed), st.integers(1, 5), size, seed
    )
    return st.one_of(st.builds(P.random_blocks, share, size, seed), counted)


@st.composite
def neighborhoods(draw: st.DrawFn, length: int) -> P.Pattern:
    """Neighbourhoods of one to three dimensions whose cells are the keys."""
    dimensions = draw(st.integers(1, 3))
    sizes: list[int] = []
    for _ in range(dimensions - 1):
        rest = length // math.prod(sizes)
        sizes.append(draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0])))
    sizes.append(length // math.prod(sizes))
    dilation = [draw(st.integers(1, min(n, 4))) for n in sizes]
    kernel = [draw(st.integers(1, n // d)) for n, d in zip(sizes, dilation, strict=True)]
    causal = [draw(st.booleans()) for _ in sizes]
    if dimensions == 1 and draw(st.booleans()):
        return P.neighborhood(kernel[0], dilation[0], causal=causal[0])
    return P.neighborhood(kernel, dilation, sizes, causal)


def runtime_atoms(shape: P.Shape) -> st.SearchStrategy[P.Pattern]:
    """Atoms whose data arrives with the call."""
    return st.sampled_from([P.padding(), *([P.documents()] if shape.seq_len <= shape.kv_len else [])])


def combined(atoms: st.SearchStrategy[P.Pattern]) -> st.SearchStrategy[P.Pattern]:
    """Close a set of atoms under ``&``, ``|`` and ``~``."""
    return st.recursive(
        atoms,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
        ),
        max_leaves=5,
    )


def patterns(shape: P.Shape, *, runtime: bool = False, masks: bool = False) -> st.SearchStrategy[P.Pattern]:
    """Any pattern of the algebra that fits ``shape``."""
    atoms = [closed_atoms(shape), table_atoms(shape)]
    atoms += [runtime_atoms(shape)] if runtime else []
    atoms += [st.sampled_from(MASKS)] if masks else []
    return combined(st.one_of(atoms))


def conjunctions(shape: P.Shape) -> st.SearchStrategy[P.Pattern]:
    """Intersections with a closed form."""
    return st.lists(closed_atoms(shape), min_size=1, max_size=4).map(_all_of)


def _all_of(terms: list[P.Pattern]) -> P.Pattern:
    result = terms[0]
    for term in terms[1:]:
        result = result & term
    return result


@st.composite
def ladders(draw: st.DrawFn) -> dict[str, list[int]]:
    """Segment lengths and rates of dilated branches."""
    rates = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    return {"segment_lengths": [draw(st.integers(r, 20)) for r in rates], "dilation_rates": rates}


@st.composite
def mixtures(draw: st.DrawFn, shape: P.Shape, *, runtime: bool = False, masks: bool = False) -> P.Mixture:
    kind = draw(st.sampled_from(["longnet", "grouped", "mix"]))
    inner = patterns(shape, runtime=runtime, masks=masks)
    if kind == "longnet":
        offset = draw(st.sampled_from(["interleave", "block"]))
        mixture = P.longnet(**draw(ladders()), offset=offset, mix=draw(st.sampled_from(RULES)))
    elif kind == "grouped":
        mixture = P.grouped(**draw(ladders()), mix=draw(st.sampled_from(["none", "mean"])))
    else:
        parts = draw(st.lists(st.one_of(conjunctions(shape), inner), min_size=1, max_size=3))
        rule = draw(st.sampled_from(RULES))
        weighted = rule == "sum" and draw(st.booleans())
        weight = st.floats(-2, 2, allow_nan=False, width=32)
        weights = draw(st.lists(weight, min_size=len(parts), max_size=len(parts))) if weighted else None
        mixture = P.mix(parts, rule=rule, weights=weights)
    return mixture & draw(st.one_of(conjunctions(shape), inner)) if draw(st.integers(0, 3)) == 0 else mixture


@st.composite
def specs(draw: st.DrawFn, *, opaque: bool = True, masks: bool = False, longest: int = 19) -> AttentionSpec:
    """Small float64 specs; with ``opaque=False`` every condition has a closed form."""
    shape = draw(shapes(longest))
    kv_heads = draw(st.sampled_from([n for n in range(1, shape.heads + 1) if shape.heads % n == 0]))
    q_offset = opaque and shape.seq_len <= shape.kv_len and draw(st.integers(0, 5)) == 0
    head_dim = draw(st.integers(1, 3))
    return AttentionSpec(
        seq_len=shape.seq_len,
        kv_len=shape.kv_len,
        heads=shape.heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([head_dim, head_dim + 1])),
        batch=shape.batch,
        pattern=draw(_spec_pattern(shape, opaque, masks)),
        causal=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.25, 1.5])),
        softcap=draw(st.sampled_from([None, None, 2.0])),
        dtype="float64",
        q_offset=q_offset,
    )


def _spec_pattern(shape: P.Shape, opaque: bool, masks: bool) -> st.SearchStrategy[P.Pattern | P.Mixture]:
    if opaque:
        plain = st.one_of(conjunctions(shape), patterns(shape, runtime=True, masks=masks))
        return st.one_of(plain, mixtures(shape, runtime=True, masks=masks))
    closed = st.builds(P.mix, st.lists(conjunctions(shape), min_size=1, max_size=3), st.sampled_from(RULES))
    dilated = mixtures(shape).filter(lambda m: not isinstance(m, type(P.mix([P.full()]))) and m.where == P.full())
    return st.one_of(conjunctions(shape), closed, dilated)


@st.composite
def operands(draw: st.DrawFn, spec: AttentionSpec) -> Mapping[str, Any]:
    """The runtime operands of one call of ``spec``, as tensors."""
    batch, kv_len, values = spec.batch, spec.shape.kv_len, {}
    if "documents" in spec.operands:
        rows = draw(st.sampled_from([1, batch]))
        inner = st.lists(st.integers(0, kv_len), min_size=2, max_size=2).map(sorted)  # documents may be empty
        bounds = torch.tensor([[0, *draw(inner), kv_len] for _ in range(rows)])
        values["documents"] = bounds[0] if rows == 1 else bounds
    if "key_padding" in spec.operands:
        row = st.lists(st.booleans(), min_size=kv_len, max_size=kv_len)
        values["key_padding"] = torch.tensor([draw(row) for _ in range(draw(st.sampled_from([1, batch])))])
    if spec.q_offset:
        first = st.integers(0, kv_len - spec.shape.seq_len)
        each = draw(st.lists(first, min_size=batch, max_size=batch))
        values["q_offset"] = torch.tensor(each) if draw(st.booleans()) else each[0]
    return values
