"""The picture of ``bench.longnet_lengths``: the time of a token against the length, as SVG."""

from __future__ import annotations

from math import ceil, log2
from typing import Any

Row = dict[str, Any]
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 720, 380, 70, 30, 190, 50
_COLOURS = ("#0b6e4f", "#c1440e", "#3a5a9b", "#8a6d3b", "#7a4e9f", "#555555")
_STEPS = [10.0**power * lead for power in range(-3, 9) for lead in (1, 2, 5)]
"""Distances of the lines of the grid; at most five are drawn above the first."""


def series(rows: list[Row]) -> dict[str, list[tuple[int, float]]]:
    """Return (tokens, nanoseconds a token) of each contestant, by length; the planner's choice replayed, too.

    Examples
    --------
    >>> series([{"name": "plan", "tokens": 4, "ms": 0.002}, {"name": "plan", "tokens": 2, "ms": 0.001}, {"failed": ""}])
    {'plan': [(2, 500.0), (4, 500.0)]}
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for row in sorted((r for r in rows if "ms" in r), key=lambda r: r["tokens"]):
        found.setdefault(row["name"], []).append((row["tokens"], row["ms"] * 1e6 / row["tokens"]))
        if row["name"] == "plan auto" and "graph_ms" in row:  # without what the host adds
            replayed = found.setdefault("plan auto, CUDA graph", [])
            replayed.append((row["tokens"], row["graph_ms"] * 1e6 / row["tokens"]))
    return found


def flatness(rows: list[Row], start: int) -> dict[str, tuple[int, float]]:
    """Return, for each contestant, the longest length and the slowest over the fastest token, from a length on.

    Examples
    --------
    >>> flatness([{"name": "plan", "tokens": 4, "ms": 2.2}, {"name": "plan", "tokens": 2, "ms": 1.0}], 2)
    {'plan': (4, 1.1)}
    """
    found = {}
    for name, points in series(rows).items():
        times = [ns for tokens, ns in points if tokens >= start]
        if times:
            found[name] = (points[-1][0], round(max(times) / min(times), 4))
    return found


def svg(rows: list[Row]) -> str:
    """Return the picture: lengths on a logarithmic axis, nanoseconds a token from 0.

    Raises
    ------
    ValueError
        If no row has a time.
    """
    lines = series(rows)
    if not lines:
        raise ValueError("no row has a time: there is nothing to draw")
    lengths = sorted({tokens for points in lines.values() for tokens, _ in points})
    highest = max(ns for points in lines.values() for _, ns in points)
    step = next(s for s in _STEPS if highest <= 5 * s)
    top = step * ceil(highest / step)
    low, span = log2(lengths[0]), max(log2(lengths[-1]) - log2(lengths[0]), 1.0)

    def at(tokens: int, ns: float) -> tuple[float, float]:
        x = _LEFT + (log2(tokens) - low) / span * (_WIDTH - _LEFT - _RIGHT)
        return round(x, 1), round(_HEIGHT - _BOTTOM - ns / top * (_HEIGHT - _TOP - _BOTTOM), 1)

    made = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        f'<text x="{_LEFT}" y="18">LongNet forward, nanoseconds a token, by length</text>',
    ]
    for tokens in lengths:
        x, y = at(tokens, 0)
        made.append(f'<text x="{x}" y="{y + 18}" text-anchor="middle">{_short(tokens)}</text>')
        made.append(f'<line x1="{x}" y1="{y}" x2="{x}" y2="{y + 4}" stroke="black"/>')
    for part in range(round(top / step) + 1):
        ns = step * part
        (x, y), (end, _) = at(lengths[0], ns), at(lengths[-1], ns)
        made.append(f'<line x1="{x}" y1="{y}" x2="{end}" y2="{y}" stroke="#dddddd"/>')
        made.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{ns:.3g}</text>')
    for i, (name, points) in enumerate(lines.items()):
        colour, places = _COLOURS[i % len(_COLOURS)], [at(*p) for p in points]
        path = " ".join(f"{x},{y}" for x, y in places)
        made.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        made += [f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places]
        x, y = _WIDTH - _RIGHT + 14, _TOP + 20 + 18 * i
        made.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        made.append(f'<text x="{x + 16}" y="{y}">{name}</text>')
    return "\n".join([*made, "</svg>", ""])


def _short(tokens: int) -> str:
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K" if tokens >= 1024 else str(tokens)
