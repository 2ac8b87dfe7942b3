"""Draws the speed of flash-attn 4 over random blocks against the share of them that is kept, beside dense attention.

    python -m bench.blocks_plot bench/results/kernels-fa4-h100.json docs/img/random-blocks.svg

A plan, flash-attn 4 called by hand, and what was wanted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.targets import OF_DENSE

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def points(rows: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    """Return the kept share of blocks, and how many times as fast as dense a plan and a call by hand are.

    Examples
    --------
    >>> row = {"what": "random blocks", "keep": 0.5, "dense seconds": 4.0, "plan seconds": 2.0, "raw seconds": 1.0}
    >>> points([row, {"what": "longformer"}])
    [(0.5, 2.0, 4.0)]
    """
    made = [r for r in rows if r["what"] == "random blocks" and "plan seconds" in r]
    found = [(r["keep"], r["dense seconds"] / r["plan seconds"], r["dense seconds"] / r["raw seconds"]) for r in made]
    return sorted(found)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the points of rows, beside the ideal and what was wanted."""
    from matplotlib.figure import Figure

    found = points(rows)
    keeps = [keep for keep, _, _ in found]
    wanted = {keep: share / keep for keep, share in OF_DENSE.items() if share is not None}
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(keeps, [1 / keep for keep in keeps], "--", color="#888888", label="1 / kept")
    axes.plot([*wanted], [*wanted.values()], "x", color="#c1440e", markersize=8, label="wanted")
    axes.plot(keeps, [hand for _, _, hand in found], "s", color="#3a5a9b", mfc="none", markersize=8, label="by hand")
    axes.plot(keeps, [plan for _, plan, _ in found], "o-", color="#0b6e4f", markersize=4, label="plan")
    for scale in (axes.set_xscale, axes.set_yscale):
        scale("log")
    axes.set_xticks(keeps, [f"{keep:g}" for keep in keeps])
    ticks = (2, 5, 10, 20, 50)
    axes.set_yticks(ticks, [str(t) for t in ticks])
    axes.minorticks_off()
    axes.invert_xaxis()
    axes.set_xlabel("share of the blocks of 128 x 128 that are kept, 65,536 tokens")
    axes.set_ylabel("times as fast as dense flash-attn 4")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    save(figure, path, found)


def digest(data: Any) -> str:
    """Return what tells the data of a picture from other data."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def save(figure: Figure, path: Path, data: Any) -> None:
    """Write a picture; an SVG says which data it shows, so that a test sees when it is out of date."""
    import matplotlib as mpl

    mpl.rcParams["svg.hashsalt"] = "attnplan"  # equal data give equal bytes
    about = {"Date": None, "Description": f"data {digest(data)}"}
    figure.savefig(path, metadata=about if path.suffix == ".svg" else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    draw(json.loads(options.rows.read_text())["rows"], options.picture)


if __name__ == "__main__":
    main()
