# mypy: ignore-errors
# ruff: noqa: RUF005  # Triton has no unpacking
"""The Triton kernels. Imported only where Triton is.

Both treat a row of features as the unit and compute in float32. Offsets of rows are int64: a tensor may have more than
2^31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _copy_rows(
    src, dst, table, by_batch, by_head, by_row, cell, block, batch, cells, count,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    entry = table + cell * 3
    head, first, step = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    rows = block * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < count)[:, None] & (columns < D)[None, :]
    start = batch.to(tl.int64) * by_batch + head * by_head
    at = start + (first + rows * step) * by_row
    x = tl.load(src + at[:, None] + columns[None, :], mask=inside, other=0.0)
    to = (batch.to(tl.int64) * cells + cell) * count + rows
    tl.store(dst + to[:, None] * D + columns[None, :], x, mask=inside)


@triton.jit
def gather_kernel(
    sources, targets, tables, strides, cells, counts, widest, features: tl.constexpr, blocks_d: tl.constexpr,
    BLOCK_R: tl.constexpr, TENSORS: tl.constexpr,
):  # fmt: skip
    """Copy rows of several tensors ``[B, H, S, D]`` into buffers ``[B, cells, R, D]``; the cell runs fastest."""
    which = tl.program_id(2)
    batch = tl.program_id(1)
    cell = tl.program_id(0) % widest
    block = tl.program_id(0) // widest
    for t in tl.static_range(TENSORS):
        if which == t:  # noqa: SIM102  # one is known when it is compiled
            if (cell < cells[t]) & (block * BLOCK_R < counts[t]):
                _copy_rows(
                    sources[t], targets[t], tables[t], strides[t][0], strides[t][1], strides[t][2],
                    cell, block, batch, cells[t], counts[t], features[t], blocks_d[t], BLOCK_R,
                )  # fmt: skip


@triton.jit
def _quotient(numbers, factor, shift):
    """Divide numbers below 2^31 by an invariant: see :func:`attnplan.runtime.fused.maps.division`."""
    return (tl.umulhi((numbers * 2).to(tl.uint32), factor.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit
def _beyond_first(pointers, index, size: tl.constexpr, low: tl.constexpr, high: tl.constexpr):
    """Return how many units of some bytes a pointer lies beyond the first; its index lies from ``low`` to ``high``."""
    found = tl.full((), 0, tl.int64)
    for t in tl.static_range(low, high):
        if t > 0:
            found += tl.where(index == t, (pointers[t].to(tl.int64) - pointers[0].to(tl.int64)) // size, 0)
    return found


@triton.jit
def _walk_back(entry, rows):
    """Return which rows a part holds, and at which two indices."""
    beyond = rows - tl.load(entry + 1)
    ahead = tl.maximum(beyond, 0)
    outer = _quotient(ahead, tl.load(entry + 4), tl.load(entry + 5))
    rest = ahead - outer * tl.load(entry + 3)
    inner = _quotient(rest, tl.load(entry + 8), tl.load(entry + 9))
    held = (beyond >= 0) & (outer < tl.load(entry + 2)) & (inner < tl.load(entry + 6))
    return held & (rest == inner * tl.load(entry + 7)), outer, inner


@triton.jit
def _within(strides, outer, inner, WIDE: tl.constexpr):
    """Return the distance of two indices from the first, by two strides; the sum may need 64 bits."""
    if WIDE:
        found = outer.to(tl.int64) * tl.load(strides) + inner.to(tl.int64) * tl.load(strides + 1)
    else:
        found = (outer * tl.load(strides) + inner * tl.load(strides + 1)).to(tl.int64)
    return found


@triton.jit
def _counted(there, changes, held, tensor, BASES: tl.constexpr):
    """Count rows that a part holds: among those that are the whole itself, or among the others."""
    if BASES != 0:
        own = (tl.full((), BASES, tl.int64) >> tensor.to(tl.int64)) & 1
        there += tl.where(own == 1, held.to(tl.int32), 0)
        changes += tl.where(own == 1, 0, held.to(tl.int32))
    return there, changes


@triton.jit
def _zeros(BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr):
    made = ()
    for _ in tl.static_range(PIECES):
        made = made + (tl.full((BLOCK_R, BLOCK_C), 0.0, tl.float32),)
    return made


@triton.jit
def _store_rows(
    out, to, totals, scale, written, columns, D: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    for c in tl.static_range(PIECES):
        shown = written[:, None] & (c * BLOCK_C + columns < D)[None, :]
        made = (totals[c] * scale[:, None]).to(out.dtype.element_ty)
        tl.store(out + to[:, None] + (c * BLOCK_C + columns)[None, :], made, mask=shown)


@triton.jit
def pull_kernel(
    parts, part_lses, table, out, lse, by_batch, by_head, by_row, heads, length,
    ENTRIES: tl.constexpr, TENSORS: tl.constexpr, UNIT: tl.constexpr, WIDE: tl.constexpr,
    D: tl.constexpr, BLOCK_C: tl.constexpr, PIECES: tl.constexpr, BLOCK_R: tl.constexpr, BY_LSE: tl.constexpr,
    BASES: tl.constexpr,
):  # fmt: skip
    """Write each row of the whole once: the parts that hold it, found by their maps, weighted and summed.

    First where each part holds the rows, and with which LSE, then their features: no load waits for another part's.
    Features come in narrow pieces: every thread that has some of a row works its place out, so they should be few.

    ``TENSORS`` are pairs (first, behind the last): the tensors that an entry may point into. ``BASES`` has a bit
    for each that is the whole itself, or rows of it: a row that only its part holds is there already, and is neither
    read nor written.
    """
    head = tl.program_id(0) % heads
    rows = (tl.program_id(0) // heads) * BLOCK_R + tl.arange(0, BLOCK_R)
    batch = tl.program_id(1).to(tl.int64)
    columns = tl.arange(0, BLOCK_C)
    inside = rows < length
    size: tl.constexpr = parts[0].dtype.element_ty.primitive_bitwidth // 8
    largest = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    offsets = ()
    weights = ()
    there = tl.full((BLOCK_R,), 0, tl.int32)  # how many of these parts hold a row
    changes = tl.full((BLOCK_R,), 0, tl.int32)  # how many others do
    for e in tl.static_range(ENTRIES):
        entry = table + (head * ENTRIES + e) * 18
        tensor = tl.load(entry)
        held, outer, inner = _walk_back(entry, rows)
        there, changes = _counted(there, changes, held, tensor, BASES)
        start = tl.load(entry + 10).to(tl.int64) + batch * tl.load(entry + 11)
        start += _beyond_first(parts, tensor, UNIT * size, TENSORS[2 * e], TENSORS[2 * e + 1])
        offsets = offsets + (start + _within(entry + 12, outer, inner, WIDE),)
        if BY_LSE:
            start = tl.load(entry + 14).to(tl.int64) + batch * tl.load(entry + 15)
            start += _beyond_first(part_lses, tensor, 4, TENSORS[2 * e], TENSORS[2 * e + 1])
            at = start + _within(entry + 16, outer, inner, WIDE)
            logs = tl.load(part_lses[0] + at, mask=held, other=float("-inf"))
            largest = tl.maximum(largest, logs)
            weights = weights + (logs,)
        else:
            weight = tl.load(entry + 14).to(tl.int32).to(tl.float32, bitcast=True)
            weights = weights + (tl.where(held, weight, 0.0),)
    safe = tl.where(largest == float("-inf"), 0.0, largest)  # -inf minus -inf would be NaN
    totals = _zeros(BLOCK_R, BLOCK_C, PIECES)
    mass = tl.full((BLOCK_R,), 0.0, tl.float32)
    written = inside & ((changes > 0) | (there == 0))
    for e in tl.static_range(ENTRIES):
        if BY_LSE:
            weight = tl.exp(weights[e] - safe)
            mass += weight
        else:
            weight = weights[e]
        at = offsets[e] * UNIT
        sums = ()
        for c in tl.static_range(PIECES):
            shown = (written & (weight != 0.0))[:, None] & (c * BLOCK_C + columns < D)[None, :]
            x = tl.load(parts[0] + at[:, None] + (c * BLOCK_C + columns)[None, :], mask=shown, other=0.0)
            sums = sums + (totals[c] + x.to(tl.float32) * weight[:, None],)
        totals = sums
    scale = tl.full((BLOCK_R,), 1.0, tl.float32)
    if BY_LSE:
        mass = tl.where(mass == 0.0, 1.0, mass)
        scale = 1.0 / mass
        tl.store(lse + (batch * heads + head) * length + rows, largest + tl.log(mass), mask=inside)
    to = batch * by_batch + head.to(tl.int64) * by_head + rows.to(tl.int64) * by_row
    _store_rows(out, to, totals, scale, written, columns, D, BLOCK_C, PIECES)
