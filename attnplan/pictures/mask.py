"""The mask, drawn tile by tile: empty, partial or full, each branch in a colour of its own."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import attrs

from attnplan.errors import SpecError
from attnplan.explain import title
from attnplan.patterns import Mixture
from attnplan.patterns.operands import static_part
from attnplan.pictures.cells import (
    EMPTY,
    FULL,
    PARTIAL,
    UNDECIDED,
    Cells,
    branch_cells,
    looks,
    region_grid,
)
from attnplan.pictures.style import DPI, INK, LINE, MUTED, colours, shortened, styled, wrapped
from attnplan.spec import AttentionSpec
from attnplan.units import format_count

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_PANELS = 6
_GRID_UP_TO = 64  # cells along a side, between which lines are drawn
_LEGEND_ROW = 0.1875  # inches


@attrs.frozen
class Panel:
    """One head, and the tiles of each of its branches."""

    head: int
    alike: tuple[int, ...]
    """The heads that look like it."""
    branches: tuple[Cells, ...]


def mask_panels(
    spec: AttentionSpec,
    head: int | str = "auto",
    rows: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
    tile: int | None = None,
) -> list[Panel]:
    """Return what :func:`mask_figure` draws; the parameters are the same."""
    grid = region_grid(spec.shape, rows, keys, tile)
    return [
        Panel(h, tuple(alike), tuple(branch_cells(b, spec.shape, grid, h) for b in spec.branches))
        for h, alike in _heads(spec, head)
    ]


def _heads(spec: AttentionSpec, head: int | str) -> list[tuple[int, list[int]]]:
    if isinstance(head, str):
        if head not in ("auto", "all"):
            raise SpecError(f'head is a number, "auto" or "all", got {head!r}')
        found = looks(spec.branches, spec.shape) if head == "auto" else {h: [h] for h in range(spec.heads)}
        return list(found.items())[: MAX_PANELS if head == "auto" else 4 * MAX_PANELS]
    if not 0 <= head < spec.heads:
        raise SpecError(f"head {head} does not exist: the spec has heads 0..{spec.heads - 1}")
    return [(head, [head])]


def mask_figure(
    spec: AttentionSpec,
    head: int | str = "auto",
    rows: tuple[int, int] | None = None,
    keys: tuple[int, int] | None = None,
    tile: int | None = None,
) -> Figure:
    """Draw the mask of a spec, in memory that does not depend on its length.

    Parameters
    ----------
    spec
        What is computed. Data that arrives with a call counts as "every pair may meet"; of a batch, element 0 is drawn.
    head
        A head; ``"auto"``: one of each kind that looks different, at most 6; or ``"all"``, at most 24.
    rows, keys
        The region to draw: first query row and key, and those after the last.
    tile
        Queries and keys of a tile. The default gives at most 512 x 512 tiles; 1 draws every pair.

    Returns
    -------
    matplotlib.figure.Figure
        Full tiles in full colour, partial ones lighter the fewer pairs they have. A tile of several branches has the
        colour of the one that has the fewest tiles.

    Raises
    ------
    SpecError
        If the head does not exist, or the region is empty or has too many tiles.
    AttnPlanError
        If matplotlib is missing.

    Examples
    --------
    >>> from attnplan.patterns import longnet
    >>> spec = AttentionSpec(seq_len=4096, heads=4, head_dim=64, pattern=longnet([512, 2048], [1, 4]), causal=True)
    >>> [panel] = mask_panels(spec, tile=512)  # what the figure shows
    >>> [(cells.count(FULL), cells.count(PARTIAL), cells.count(EMPTY)) for cells in panel.branches]
    [(0, 8, 56), (0, 20, 44)]

    References
    ----------
    Gray et al., GPU Kernels for Block-Sparse Weights, 2017: full, partial and empty tiles.
    """
    with styled():
        from matplotlib.figure import Figure

        panels = mask_panels(spec, head, rows, keys, tile)
        across = min(len(panels), 3)
        down = ceil(len(panels) / across)
        legend = _legend_lines(spec, panels)
        heading = wrapped(title(spec), 82 if across == 1 else 62 * across, lines=3)
        tall, wide = _panel_size(panels)
        above, below = 0.3 + 0.175 * len(heading) + 0.2 * (across > 1), 0.8 + _LEGEND_ROW * len(legend)
        width = max(6.6, (wide + 0.8) * across + 0.25)
        height = above + below + tall * down + 0.75 * (down - 1)
        figure = Figure(figsize=(width, height))
        tints = colours(len(spec.branches))
        for place, panel in enumerate(panels):
            left, top = 0.75 + (wide + 0.8) * (place % across), above + (tall + 0.75) * (place // across)
            ax = figure.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))
            _draw(ax, panel, tints, spec, rows[0] if rows else 0, len(panels) > 1)
        figure.text(0.12 / width, 1 - 0.1 / height, "\n".join(heading), va="top", weight="bold")
        _write_legend(figure, legend, tints, width, height)
        return figure


def _panel_size(panels: Sequence[Panel]) -> tuple[float, float]:
    """Return height and width of a panel in inches.

    A cell is square and a whole number of pixels wide, so that fine patterns are drawn evenly; unless the region is
    very long.
    """
    grid = panels[0].branches[0].grid
    side = 5.6 if len(panels) == 1 else 3.1
    cells = max(grid.rows, grid.columns)
    pixels = max(1, round(side * DPI / cells))
    tall, wide = (n / grid.tile[0] * pixels / DPI for n in (grid.queries, grid.keys))
    return max(tall, wide / 4), max(wide, tall / 4)


def _draw(ax: Axes, panel: Panel, tints: Sequence[Any], spec: AttentionSpec, first_row: int, several: bool) -> None:
    grid = panel.branches[0].grid
    size = grid.tile[0]
    box = (grid.k_start, grid.k_start + grid.columns * size, first_row + grid.rows * size, first_row)
    ax.imshow(composed(panel, tints), extent=box, interpolation="none", aspect="auto", gid="cells")
    ax.set_xlim(grid.k_start, grid.k_stop)
    ax.set_ylim(first_row + grid.queries, first_row)
    ax.xaxis.set_major_formatter(lambda x, _: format_count(x))
    ax.yaxis.set_major_formatter(lambda x, _: format_count(x))
    ax.locator_params(nbins=5, steps=[1, 2, 4, 5, 10], integer=True)
    ax.set_xlabel("key")
    ax.set_ylabel("query row")
    if max(grid.rows, grid.columns) <= _GRID_UP_TO:
        lines = {"color": LINE, "linewidth": 0.4}
        ax.hlines([first_row + r * size for r in range(grid.rows + 1)], *ax.get_xlim(), **lines)  # type: ignore[arg-type]
        ax.vlines([grid.k_start + c * size for c in range(grid.columns + 1)], *ax.get_ylim(), **lines)  # type: ignore[arg-type]
    if several:
        ax.set_title(f"head {_ranges(panel.alike)}", size=9)


def composed(panel: Panel, tints: Sequence[Any]) -> np.ndarray:
    """Return the tiles of a panel as colours, uint8 ``[rows, columns, 4]``; empty tiles are transparent.

    Full tiles are opaque; partial ones lie between 20 % and 70 %; tiles that sampling could not decide are grey.
    """
    import numpy as np
    from matplotlib.colors import to_rgb

    grid = panel.branches[0].grid
    result = np.zeros((grid.rows, grid.columns, 4), dtype=np.uint8)
    shown = sorted(zip(panel.branches, tints, strict=True), key=_tiles_and_pairs)
    for cells, tint in shown:
        for state in (UNDECIDED, PARTIAL, FULL):
            here = cells.state == state
            result[here, :3] = np.round(255 * np.array(to_rgb(MUTED if state == UNDECIDED else tint)))
            result[here, 3] = _opacity(state, cells.share[here])
    return result


def _tiles_and_pairs(branch: tuple[Cells, Any]) -> tuple[int, float]:
    """Order branches from the lowest to the uppermost: fewer tiles above, of equally many the denser ones."""
    cells, _ = branch
    return -int((cells.state > EMPTY).sum()), float(cells.share.sum())


def _opacity(state: int, share: np.ndarray) -> Any:
    import numpy as np

    if state == FULL:
        return 255
    if state == UNDECIDED:
        return 40
    return np.round(255 * (0.2 + 0.5 * share**0.125)).astype(np.uint8)


def _ranges(numbers: Sequence[int]) -> str:
    """Write rising numbers as ranges.

    Examples
    --------
    >>> _ranges([0, 1, 2, 5])
    '0-2, 5'
    """
    spans: list[list[int]] = []
    for n in numbers:
        if spans and spans[-1][1] == n - 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans)


def _legend_lines(spec: AttentionSpec, panels: Sequence[Panel]) -> list[tuple[int | None, str]]:
    """Return the lines below the picture, each with the number of the branch whose colour it explains, if any."""
    mixture = isinstance(spec.pattern, Mixture)
    bare = spec.pattern.branches(spec.heads) if isinstance(spec.pattern, Mixture) else (spec.pattern,)
    lines: list[tuple[int | None, str]] = []
    for i, branch in enumerate(bare):
        name = shortened(repr(branch) if mixture else "mask", 48)
        cells = [p.branches[i] for p in panels]
        counts = [sum(c.count(s) for c in cells) for s in (FULL, PARTIAL, EMPTY, UNDECIDED)]
        text = f"{name}: {counts[0]:,} full, {counts[1]:,} partial, {counts[2]:,} empty"
        lines.append((i, text + (f", {counts[3]:,} undecided" if counts[3] else "")))
    return lines + [(None, text) for text in caption(spec, panels)]


def caption(spec: AttentionSpec, panels: Sequence[Panel]) -> list[str]:
    """Return what has to be known to read the picture: tiles, heads, what is exact and what is assumed."""
    grid = panels[0].branches[0].grid
    size = grid.tile[0]
    what = "every cell is one pair" if size == 1 else f"cells are tiles of {size:,} x {size:,}"
    if len(panels) == 1:
        drawn = f"head {panels[0].head} of {spec.heads}"
    else:
        shown = sum(len(p.alike) for p in panels)
        drawn = f"one head of each look ({len(panels)} panels, counted together)" + (
            "" if shown == spec.heads else f", {spec.heads - shown} heads not drawn"
        )
    sampled = sum(c.sampled for p in panels for c in p.branches)
    exact = "states are exact"
    if sampled:
        exact = f"{sampled:,} tiles that no rule decides are sampled (grey: no sampled pair meets)"
    lines = [f"{what}; {drawn}; {exact}"]
    if any(static_part(b) != b for b in spec.branches):
        lines.append(f"counted as met, since they arrive with the call: {', '.join(sorted(spec.operands))}")
    if spec.shape.batch > 1 and any("padding" in repr(b) for b in spec.branches):
        lines.append("batch element 0")
    return lines


def _write_legend(
    figure: Figure, legend: Sequence[tuple[int | None, str]], tints: Sequence[Any], width: float, height: float
) -> None:
    from matplotlib.patches import Rectangle

    top = _LEGEND_ROW * len(legend)
    for place, (branch, text) in enumerate(legend):
        y = (top - place * _LEGEND_ROW) / height
        if branch is not None:
            for step, alpha in enumerate((0.4, 1.0)):  # partial, then full
                figure.add_artist(
                    Rectangle(((0.75 + 0.13 * step) / width, y - 0.05 / height), 0.13 / width, 0.11 / height,
                              color=tints[branch], alpha=alpha, linewidth=0, gid=f"key-{branch}-{step}")
                )  # fmt: skip
        left = 0.75 if branch is None else 1.1
        figure.text(left / width, y, text, va="center", size=8, color=MUTED if branch is None else INK)
