"""The mask drawn small, in characters."""

from __future__ import annotations

from typing import Any

from attnplan.patterns.counts import Table
from attnplan.patterns.operands import static_part
from attnplan.spec import AttentionSpec

TILES = 8
SHADES = " ·░▒▓█"
_DOT = SHADES[1]
_SAMPLES = 192


_STEPS = [step for power in range(31) for step in (1 << power, 3 << power)]
_NEAR, _FAR = 256, 8
"""For each step, pairs near the diagonal, and pairs in each tile."""


def mask_lines(spec: AttentionSpec, tiles: int = TILES) -> list[str]:
    """Return the mask of all heads and branches as ``tiles`` rows of characters, darker where more pairs meet.

    Every tile is sampled at fixed pseudo-random pairs. Where none of these meets, pairs are asked that sparse patterns
    keep: near the diagonal, and both in step with a rate of dilation; if one of these meets, the tile has a dot.
    Conditions on data that arrives with a call count as met.

    Examples
    --------
    >>> for row in mask_lines(AttentionSpec(seq_len=1024, heads=1, head_dim=8, causal=True), tiles=4):
    ...     print(row)
    ▒
    █▒
    ██▒
    ███▒
    """
    import numpy as np

    shape = spec.shape
    source = np.random.default_rng(0)
    draw = source.random((2, tiles, tiles, _SAMPLES))
    q = _positions(draw[0], shape.seq_len, axis=0)
    k = _positions(draw[1], shape.kv_len, axis=1)
    share = _met(spec, q, k).mean(axis=(0, 3))
    few = (share == 0) & _witnessed(spec, tiles, source)
    if not (share.any() or few.any()):
        return ["(nothing)"]
    shades = [
        [_DOT if dot else _shade(float(x)) for x, dot in zip(*line, strict=True)]
        for line in zip(share, few, strict=True)
    ]
    return ["".join(row).rstrip() for row in shades]


def _met(spec: AttentionSpec, q: Any, k: Any) -> Any:
    """Return whether query rows and keys meet, for each head: ``[heads, ...]``."""
    import numpy as np

    shape = spec.shape
    q = np.broadcast_to(q, np.broadcast_shapes(q.shape, k.shape)) + shape.shift
    heads = np.arange(spec.heads).reshape(-1, *(1 for _ in k.shape))
    inside = np.zeros((spec.heads, *q.shape), dtype=bool)
    for branch in spec.branches:
        known = static_part(branch)
        tables = {name: Table(t) for name, t in known.tables(shape).items()}
        found = known.pairs(tables, heads, q[None], k[None])
        inside |= np.broadcast_to(found, (shape.batch, *inside.shape))[0] if found.ndim > inside.ndim else found
    return inside


def _witnessed(spec: AttentionSpec, tiles: int, source: Any) -> Any:
    """Return for each tile whether one of the pairs meets that a sparse pattern is likely to keep."""
    import numpy as np

    shape = spec.shape
    shorter = min(shape.seq_len, shape.kv_len)
    seen = np.zeros((tiles, tiles), dtype=bool)
    for step in [n for n in _STEPS if n < shorter]:
        draw = source.random((2, tiles, tiles, _FAR))
        q = np.concatenate([_positions(draw[0], shape.seq_len, 0).ravel(), source.integers(shape.seq_len, size=_NEAR)])
        back = source.integers(4, size=_NEAR) * step - shape.shift
        k = np.concatenate([_positions(draw[1], shape.kv_len, 1).ravel(), q[-_NEAR:] - back])
        for offset in dict.fromkeys((0, spec.heads // 2, spec.heads - 1)):
            rows = q - (q + shape.shift) % step + offset
            keys = k - k % step + offset
            kept = (rows >= 0) & (rows < shape.seq_len) & (keys >= 0) & (keys < shape.kv_len)
            rows, keys = rows[kept], keys[kept]
            met = _met(spec, rows, keys).any(axis=0)
            seen[rows[met] * tiles // shape.seq_len, keys[met] * tiles // shape.kv_len] = True
    return seen


def _positions(draw: Any, length: int, axis: int) -> Any:
    import numpy as np

    tiles = draw.shape[axis]
    start = np.arange(tiles).reshape([-1 if i == axis else 1 for i in range(3)])
    return np.minimum(((start + draw) * length / tiles).astype(np.int64), length - 1)


def _shade(share: float) -> str:
    steps = (0.0, 0.04, 0.25, 0.75, 0.999)
    return SHADES[sum(share > step for step in steps)]
