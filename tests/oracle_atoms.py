"""The oracle's rules for strided, blockwise and neighbourhood patterns: the keys of one query, listed one by one.

Like :mod:`tests.oracle` it reads the fields of patterns and shares no code with attnplan.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import numpy as np

WORD = 2**64


def _listed(grid: Any, keys_of: Callable[[int, int], Iterable[int]], heads: int = 1) -> np.ndarray:
    """Return booleans ``[B, heads, S, K]`` from a function (position, head) -> keys; others than 0..K-1 are ignored."""
    positions = grid.q[:, 0, :, 0]
    result = np.zeros((grid.batch, heads, positions.shape[1], grid.kv_len), dtype=bool)
    known: dict[tuple[int, int], list[int]] = {}
    for b, h, i in np.ndindex(result.shape[:3]):
        place = (int(positions[b, i]), h)
        if place not in known:
            known[place] = [k for k in keys_of(*place) if 0 <= k < grid.kv_len]
        result[b, h, i, known[place]] = True
    return result


def strided(pattern: Any, grid: Any) -> np.ndarray:
    def keys_of(q: int, h: int) -> Iterable[int]:
        return [*range(q, grid.kv_len, pattern.stride), *range(q, -1, -pattern.stride)]

    return _listed(grid, keys_of)


def columns(pattern: Any, grid: Any) -> np.ndarray:
    if pattern.every is None:
        return np.isin(grid.k, pattern.indices)
    return np.isin(grid.k, [k for i in pattern.indices for k in range(i, grid.kv_len, pattern.every)])


def _block(index: int, size: int) -> range:
    return range(index * size, index * size + size)


def blocks(pattern: Any, grid: Any) -> np.ndarray:
    *heads, rows, cols = pattern.shape
    each = -(-rows * cols // 8)

    def keys_of(q: int, h: int) -> Iterable[int]:
        for row, column in product(range(rows), range(cols)):
            place = row * cols + column
            kept = pattern.bits[h * each + place // 8] & (1 << place % 8)
            if kept and q in _block(row, pattern.block[0]):
                yield from _block(column, pattern.block[1])

    return _listed(grid, keys_of, heads[0] if heads else 1)


def block_window(pattern: Any, grid: Any) -> np.ndarray:
    def keys_of(q: int, h: int) -> Iterable[int]:
        own = next(n for n in range(-999, 999) if q in _block(n, pattern.block_size))
        for column in range(own - pattern.left, own + pattern.right + 1):
            yield from _block(column, pattern.block_size)

    return _listed(grid, keys_of)


def splitmix(state: int) -> int:
    """Return the output of SplitMix64 for one state, in exact integers."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ state >> shift) * factor % WORD
    return state ^ state >> 31


def random_blocks(pattern: Any, grid: Any) -> np.ndarray:
    golden, size = 0x9E3779B97F4A7C15, pattern.block_size
    total = len(range(0, grid.kv_len, size))
    share = pattern.count if pattern.count is not None else int(pattern.keep * total + 0.5)

    def keys_of(q: int, h: int) -> Iterable[int]:
        own = splitmix((splitmix((pattern.seed + golden) % WORD) + (q // size + 1) * golden) % WORD)
        order = sorted(range(total), key=lambda j: splitmix((own + (j + 1) * golden) % WORD))
        for column in order[: max(share, 1)]:
            yield from _block(column, size)

    return _listed(grid, keys_of)


def neighbors_of(x: int, size: int, kernel: int, dilation: int, causal: bool) -> list[int]:
    """Return the neighbours of one coordinate: among the cells of its residue, those nearest, as NATTEN has it."""
    group = [y for y in range(size) if y % dilation == x % dilation]
    place = group.index(x)
    if causal:
        return [group[i] for i in range(place - kernel + 1, place + 1) if i >= 0]
    first = place - kernel // 2
    while first < 0:
        first += 1
    while first + kernel > len(group):
        first -= 1
    return group[first : first + kernel]


def neighborhood(pattern: Any, grid: Any) -> np.ndarray:
    sizes = (grid.kv_len,) if pattern.shape is None else pattern.shape
    cells = list(np.ndindex(*sizes))
    number = {cell: i for i, cell in enumerate(cells)}

    def keys_of(q: int, h: int) -> Iterable[int]:
        along = [
            neighbors_of(*each)
            for each in zip(cells[q], sizes, pattern.kernel, pattern.dilation, pattern.causal, strict=True)
        ]
        return [number[cell] for cell in product(*along)]

    return _listed(grid, keys_of)


RULES = {
    "Strided": strided, "Columns": columns, "Blocks": blocks, "BlockWindow": block_window,
    "RandomBlocks": random_blocks, "Neighborhood": neighborhood,
}  # fmt: skip
