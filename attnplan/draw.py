"""The mask drawn small, in characters."""

from __future__ import annotations

from typing import Any

from attnplan.patterns.counts import Table
from attnplan.patterns.operands import static_part
from attnplan.spec import AttentionSpec

TILES = 8
SHADES = " ·░▒▓█"
_SAMPLES = 24


def mask_rows(spec: AttentionSpec, tiles: int = TILES) -> list[str]:
    """Return the mask of all heads and branches as ``tiles`` rows of characters, darker where more pairs meet.

    Every tile is sampled at fixed pseudo-random pairs; conditions on data that arrives with a call count as met.

    Examples
    --------
    >>> for row in mask_rows(AttentionSpec(seq_len=1024, heads=1, head_dim=8, causal=True), tiles=4):
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
    q = _positions(draw[0], shape.seq_len, axis=0) + shape.shift
    k = _positions(draw[1], shape.kv_len, axis=1)
    heads = np.arange(spec.heads)[:, None, None, None]
    inside = np.zeros((spec.heads, tiles, tiles, _SAMPLES), dtype=bool)
    for branch in spec.branches:
        known = static_part(branch)
        tables = {name: Table(t) for name, t in known.tables(shape).items()}
        found = known.pairs(tables, heads, q[None], k[None])
        inside |= np.broadcast_to(found, (shape.batch, *inside.shape))[0] if found.ndim == 5 else found
    share = inside.mean(axis=(0, 3))
    return ["".join(_shade(float(x)) for x in row).rstrip() for row in share] if share.any() else ["(nothing)"]


def _positions(draw: Any, length: int, axis: int) -> Any:
    import numpy as np

    tiles = draw.shape[axis]
    start = np.arange(tiles).reshape([-1 if i == axis else 1 for i in range(3)])
    return np.minimum(((start + draw) * length / tiles).astype(np.int64), length - 1)


def _shade(share: float) -> str:
    steps = (0.0, 0.04, 0.25, 0.75, 0.999)
    return SHADES[sum(share > step for step in steps)]
