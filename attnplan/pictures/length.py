"""Predicted time against length, for every way to run a spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import attrs

from attnplan.cost import Target, parameters_for
from attnplan.errors import AttnPlanError, SpecError
from attnplan.explain import title
from attnplan.pictures.style import INK, MUTED, PAPER, colours, plain, shortened, styled, wrapped
from attnplan.search import Candidate, candidates
from attnplan.spec import AttentionSpec
from attnplan.units import format_count, format_seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HALVINGS, DOUBLINGS, SHORTEST = 5, 2, 128
_NAMED_REFUSALS = 8


@attrs.frozen
class Curve:
    """One candidate at several lengths."""

    name: str
    lengths: tuple[int, ...]
    """Lengths at which it can run."""
    seconds: tuple[float, ...]
    fits: tuple[bool, ...]
    """Whether its peak is within the device's memory."""
    refused: tuple[tuple[int, str], ...]
    """Lengths at which it cannot run, each with the first reason."""


def spec_at(spec: AttentionSpec, length: int) -> AttentionSpec:
    """Return a spec at another length: of queries and keys if they are equally many, else of the keys alone.

    Raises
    ------
    SpecError
        If the pattern fixes its length.

    Examples
    --------
    >>> spec_at(AttentionSpec(seq_len=1, kv_len=4096, heads=1, head_dim=64), 8192).shape
    Shape(seq_len=1, kv_len=8192, heads=1, batch=1)
    """
    shape = spec.shape
    q = length if shape.seq_len == shape.kv_len else min(shape.seq_len, length)
    return attrs.evolve(spec, seq_len=q, kv_len=length)


def default_lengths(spec: AttentionSpec) -> list[int]:
    """Return the spec's own length, and others half and twice as long.

    Examples
    --------
    >>> default_lengths(AttentionSpec(seq_len=1000, heads=1, head_dim=64))
    [250, 500, 1000, 2000, 4000]
    """
    own = spec.shape.kv_len
    found = {own >> i for i in range(1, HALVINGS + 1) if own >> i >= SHORTEST}
    return sorted({*found, own, *(own << i for i in range(1, DOUBLINGS + 1))})


def length_curves(spec: AttentionSpec, target: Target, lengths: Sequence[int] | None = None) -> list[Curve]:
    """Return every candidate's prediction at some lengths, the fastest at the spec's own length first.

    Raises
    ------
    SpecError
        If the pattern fixes its length, so that there is nothing to compare.
    """
    own = spec.shape.kv_len
    found: dict[str, dict[int, Candidate]] = {}
    wrong: dict[int, str] = {}
    for length in sorted(set(lengths or default_lengths(spec)) | {own}):
        try:
            here = spec_at(spec, length)
        except SpecError as error:
            wrong[length] = str(error)
            continue
        for candidate in candidates(here, target):
            found.setdefault(candidate.name, {})[length] = candidate
    if len({n for by_length in found.values() for n in by_length}) < 2:
        reason = next(iter(wrong.values()), "one length was given")
        raise SpecError(f"no other length can be planned: {reason}")
    made = [_curve(name, by_length, target.device.memory) for name, by_length in found.items()]
    return sorted(made, key=lambda c: dict(zip(c.lengths, c.seconds, strict=True)).get(own, float("inf")))


def _curve(name: str, by_length: dict[int, Candidate], memory: int) -> Curve:
    runs = {n: c.prediction for n, c in by_length.items() if c.prediction is not None}
    return Curve(
        name,
        tuple(runs),
        tuple(p.seconds for p in runs.values()),
        tuple(p.peak_bytes <= memory for p in runs.values()),
        tuple((n, c.reasons[0]) for n, c in by_length.items() if c.prediction is None),
    )


def length_figure(
    spec: AttentionSpec, target: Target, lengths: Sequence[int] | None = None, *, refusals: bool = True
) -> Figure:
    """Draw the predicted time of every candidate against length, on logarithmic axes.

    Parameters
    ----------
    spec, target
        What is computed, and for which device.
    lengths
        Lengths to plan. The default is the spec's own, halved up to five times and doubled twice.
    refusals
        Whether to list refusals below.

    Returns
    -------
    matplotlib.figure.Figure
        Hollow points need more memory than the device has.

    Raises
    ------
    SpecError
        If the pattern fixes its length.
    AttnPlanError
        If matplotlib is missing, or nothing can run at any length.
    """
    with styled():
        from matplotlib.figure import Figure

        curves = length_curves(spec, target, lengths)
        drawn = [c for c in curves if c.lengths]
        if not drawn:
            raise AttnPlanError(f"nothing can run this at any length on {target.device.name}")
        notes = [*_over_memory(curves), *(_refusals(curves) if refusals else ())]
        below = 0.75 + 0.17 * len(notes)
        height = 4.6 + below
        figure = Figure(figsize=(9.2, height))
        axes = figure.add_axes((0.085, below / height, 0.66, 1 - (below + 0.75) / height))
        tints = colours(len(drawn))
        axes.set(xscale="log", yscale="log")
        plain(axes)
        for place, (curve, tint) in enumerate(zip(drawn, tints, strict=True)):
            _draw(axes, curve, tint, place)
        _ticks(axes, drawn)
        axes.axvline(spec.shape.kv_len, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=7.5, frameon=False, labelcolor=INK)
        axes.set_xlabel("tokens" if spec.shape.seq_len == spec.shape.kv_len else f"keys, {spec.shape.seq_len} queries")
        work = "forward and backward" if spec.training else "forward"
        name = f"{work} on {shortened(target.device.title, 60)}, predicted ({parameters_for(target).basis})"
        heading = wrapped(title(spec), 110, lines=2)
        figure.text(0.02, 1 - 0.1 / height, "\n".join(heading), va="top", weight="bold")
        figure.text(0.02, 1 - (0.15 + 0.17 * len(heading)) / height, name, va="top", color=MUTED, size=8)
        for i, note in enumerate(notes):
            figure.text(0.02, (below - 0.62 - 0.17 * i) / height, shortened(note, 150), size=7.5, color=MUTED)
        return figure


def _draw(axes: Axes, curve: Curve, tint: str, place: int) -> None:
    marker = "osD^v<>Ph*"[place % 10]
    axes.plot(curve.lengths, curve.seconds, color=tint, linewidth=1.4, label=curve.name, gid=f"curve-{place}",
              marker=marker, markersize=5, markerfacecolor=tint, zorder=4 - place / 50)  # fmt: skip
    over = [(n, s) for n, s, fits in zip(curve.lengths, curve.seconds, curve.fits, strict=True) if not fits]
    if over:
        x, y = zip(*over, strict=True)
        axes.plot(x, y, color=tint, linestyle="", marker=marker, markersize=5, markerfacecolor=PAPER, zorder=5)


def _ticks(axes: Axes, curves: Sequence[Curve]) -> None:
    lengths = sorted({n for c in curves for n in c.lengths})
    axes.set_xticks(lengths, [_length(n) for n in lengths])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda y, _: format_seconds(y))
    axes.set_yticks([], minor=True)


def _length(tokens: int) -> str:
    return f"{tokens:,}" if tokens < 100_000 else format_count(tokens)


def _over_memory(curves: Sequence[Curve]) -> list[str]:
    over = any(not fits for c in curves for fits in c.fits)
    return ["hollow: needs more memory beside inputs and output than the device has"] if over else []


def _refusals(curves: Sequence[Curve]) -> list[str]:
    """Return one line for each candidate that is refused somewhere."""
    lines = []
    refused = [c for c in curves if c.refused]
    for curve in refused[:_NAMED_REFUSALS]:
        at = [_length(n) for n, _ in curve.refused]
        where = "" if not curve.lengths else f" at {at[0]}" if len(at) == 1 else f" from {at[0]} to {at[-1]}"
        lines.append(f"{curve.name}  refused{where}: {curve.refused[0][1]}")
    if len(refused) > _NAMED_REFUSALS:
        lines.append(f"refused, too: {', '.join(c.name for c in refused[_NAMED_REFUSALS:])}")
    return lines
