"""Who sends what to whom: the messages of a ring, step by step, as matrices of ranks by ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import attrs

from attnplan.cost import Target
from attnplan.errors import SpecError
from attnplan.explain import title
from attnplan.pictures.style import CATEGORIES, INK, LINE, MUTED, shortened, styled, wrapped
from attnplan.ring.build import programs
from attnplan.ring.choose import RingCandidate, choose
from attnplan.ring.mesh import Mesh
from attnplan.ring.program import Exchange, RankProgram, count, forward_traffic
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_RANKS = 64
MAX_PANELS = 9
_NUMBERS_UP_TO = 8  # ranks, between which the sizes of messages are written
_SIDE, _ACROSS = 2.5, 3  # inches, panels


@attrs.frozen
class Step:
    """One exchange of all ranks."""

    name: str
    """``"hop 2: k, v by p2p"``."""
    sizes: tuple[tuple[int, ...], ...]
    """Bytes of the forward pass, for each receiving rank those from each rank; nothing is sent to oneself."""

    @property
    def total(self) -> int:
        """Bytes of all messages."""
        return sum(map(sum, self.sizes))


@attrs.frozen
class Traffic:
    """Everything that moves in a forward pass."""

    candidate: RingCandidate
    ranks: int
    steps: tuple[Step, ...]
    notes: tuple[str, ...]
    """Why more is sent than is needed, if it is."""

    @property
    def received(self) -> tuple[int, ...]:
        """Bytes that each rank receives."""
        return tuple(sum(sum(step.sizes[r]) for step in self.steps) for r in range(self.ranks))


def ring_traffic(
    spec: AttentionSpec, target: Target, mesh: object, layout: str = "auto", transport: str = "auto"
) -> Traffic:
    """Return what :func:`ring_figure` draws; the parameters are the same.

    Examples
    --------
    >>> from attnplan.cost import resolve
    >>> from attnplan.patterns import window
    >>> spec = AttentionSpec(seq_len=4096, heads=2, head_dim=64, pattern=window(256, 0))
    >>> found = ring_traffic(spec, resolve("h200"), 4, "contiguous", "halo")
    >>> found.candidate.name, [step.name for step in found.steps], found.received
    ('contiguous > halo', ['hop 1: k, v by p2p'], (0, 131072, 131072, 131072))
    """
    ranks = Mesh.of(mesh)  # type: ignore[arg-type]  # it words the error
    if ranks.ranks > MAX_RANKS:
        raise SpecError(
            f"a picture shows up to {MAX_RANKS} ranks, not {ranks.ranks}; `attnplan explain --mesh {ranks}` lists hops"
        )
    chosen = choose(spec, ranks, target.device, layout, transport)[0]
    made = programs(spec, chosen.shape, chosen.layout, chosen.transport)
    notes = tuple(dict.fromkeys(note for program in made for note in program.notes))
    return Traffic(chosen, ranks.ranks, tuple(_steps(made, spec)), notes)


def _steps(made: Sequence[RankProgram], spec: AttentionSpec) -> list[Step]:
    """Return every exchange with its messages, in the order in which ranks make them; empty ones are left out."""
    features = {"q": spec.head_dim, "k": spec.head_dim, "v": spec.value_dim, "o": spec.value_dim}
    sizes: dict[tuple[int, int, str], list[list[int]]] = {}
    for program in made:
        for exchange in program.exchanges:
            phase = -1 if exchange is program.first else 1 if exchange is program.last else 0
            key = (phase, exchange.hop, f"{', '.join(exchange.tensors)} by {exchange.collective}")
            matrix = sizes.setdefault(key, [[0] * len(made) for _ in made])
            for peer, each in _received(exchange, features, spec).items():
                matrix[program.rank][peer] += each
    kept = sorted(key for key, matrix in sizes.items() if any(map(any, matrix)))
    return [
        Step(f"{_when(phase, hop)}: {what}", tuple(map(tuple, sizes[phase, hop, what]))) for phase, hop, what in kept
    ]


def _when(phase: int, hop: int) -> str:
    """Say when an exchange is: before the first hop, in a hop, or after the last."""
    return f"hop {hop}" if phase == 0 else "before" if phase < 0 else "after"


def _received(exchange: Exchange, features: Mapping[str, int], spec: AttentionSpec) -> dict[int, int]:
    """Return the bytes of each message that one rank receives in an exchange."""
    if not exchange.received:
        return {}
    each = forward_traffic(exchange, features, spec.dtype).received // exchange.received * spec.batch
    return {peer: count(maps) * each for peer, maps in exchange.receives.items()}


def ring_facts(
    spec: AttentionSpec, target: Target, mesh: object, layout: str = "auto", transport: str = "auto"
) -> dict[str, Any]:
    """Return what :func:`ring_figure` shows, as plain data."""
    found = ring_traffic(spec, target, mesh, layout, transport)
    return {
        "layout": found.candidate.layout,
        "transport": found.candidate.transport,
        "ranks": found.ranks,
        "received_bytes": list(found.received),
        "steps": [{"name": s.name, "bytes": [list(row) for row in s.sizes]} for s in found.steps],
        "notes": list(found.notes),
    }


def ring_figure(
    spec: AttentionSpec, target: Target, mesh: object, layout: str = "auto", transport: str = "auto"
) -> Figure:
    """Draw who sends how many bytes to whom, in each step of a forward pass.

    Parameters
    ----------
    spec
        What is computed, over the whole sequence.
    target
        The device of each rank.
    mesh
        ``"2x8"``, or a number of ranks.
    layout, transport
        Pin one of them; the default is the cheapest.

    Returns
    -------
    matplotlib.figure.Figure
        One matrix for each step: a row is a rank that receives, a column one that sends; the darker, the more bytes.

    Raises
    ------
    SpecError
        If there are more ranks than a picture can show.
    RingError
        If the mesh is none, or nothing can carry the spec over it.
    AttnPlanError
        If matplotlib is missing.
    """
    with styled():
        from matplotlib.figure import Figure

        found = ring_traffic(spec, target, mesh, layout, transport)
        panels = _panels(found)
        down = ceil(len(panels) / _ACROSS)
        heading = _heading(found, spec, 62 if len(panels) < _ACROSS else 92)
        notes = _notes(found)
        above, below = 0.5 + 0.18 * len(heading), 0.2 + 0.19 * len(notes)
        across = max(2, min(_ACROSS, len(panels)))
        width, height = 0.7 + across * (_SIDE + 0.55), above + below + down * (_SIDE + 0.7)
        figure = Figure(figsize=(width, height))
        most = max(max(map(max, s.sizes)) for s in panels)
        for place, step in enumerate(panels):
            left = 0.65 + (place % _ACROSS) * (_SIDE + 0.55)
            top = above + (place // _ACROSS) * (_SIDE + 0.7)
            box = (left / width, 1 - (top + _SIDE) / height, _SIDE / width, _SIDE / height)
            _matrix(figure.add_axes(box, gid=f"step-{place}"), step, most)
        figure.text(0.2 / width, 1 - 0.12 / height, "\n".join(heading), va="top", weight="bold")
        for i, note in enumerate(notes):
            figure.text(0.2 / width, (below - 0.15 - 0.19 * i) / height, note, va="top", size=8, color=MUTED)
        return figure


def _panels(found: Traffic) -> list[Step]:
    """Return the steps to draw: all, or the first ones and the sum of all; one that is empty if there is none."""
    if not found.steps:
        return [Step("nothing is sent", ((0,) * found.ranks,) * found.ranks)]
    if len(found.steps) <= MAX_PANELS:
        return list(found.steps)
    total = tuple(
        tuple(sum(s.sizes[r][c] for s in found.steps) for c in range(found.ranks)) for r in range(found.ranks)
    )
    return [*found.steps[: MAX_PANELS - 1], Step(f"all {len(found.steps)} steps together", total)]


def _heading(found: Traffic, spec: AttentionSpec, width: int) -> list[str]:
    return [*wrapped(title(spec), width, lines=2), f"{found.candidate.name} over {found.ranks} ranks"]


def _notes(found: Traffic) -> list[str]:
    """Return the lines below the picture."""
    got = found.received
    if not any(got):
        return ["every rank has the rows that it needs", *found.notes]
    busiest = got.index(max(got))
    lines = [
        f"forward: a rank receives {format_bytes(min(got))} to {format_bytes(max(got))} (rank {busiest}), all ranks "
        f"{format_bytes(sum(got))}",
        "rows: who receives; columns: who sends; the darker, the more bytes",
    ]
    if len(found.steps) > MAX_PANELS:
        lines.append(f"{len(found.steps) - MAX_PANELS + 1} steps are drawn in the sum only")
    return lines + [shortened(note, 100) for note in found.notes]


def _matrix(axes: Axes, step: Step, most: int) -> None:
    from matplotlib.patches import Rectangle

    ranks = len(step.sizes)
    axes.set(xlim=(0, ranks), ylim=(ranks, 0), aspect="equal")
    for receiver, row in enumerate(step.sizes):
        own = Rectangle((receiver, receiver), 1, 1, facecolor=LINE, alpha=0.55, linewidth=0)
        axes.add_patch(own)
        for sender, size in enumerate(row):
            if not size:
                continue
            shade = 0.25 + 0.75 * size / most
            axes.add_patch(
                Rectangle((sender, receiver), 1, 1, facecolor=CATEGORIES[0], alpha=shade, linewidth=0,
                          gid=f"{axes.get_gid()}-from-{sender}-to-{receiver}")
            )  # fmt: skip
            if ranks <= _NUMBERS_UP_TO:
                text = format_bytes(size).replace(" ", "\n")
                axes.text(sender + 0.5, receiver + 0.5, text, ha="center", va="center", size=6,
                          color="white" if shade > 0.6 else INK)  # fmt: skip
    ticks = [i + 0.5 for i in range(0, ranks, max(1, ranks // 8))]
    for axis, place in ((axes.xaxis, "from rank"), (axes.yaxis, "to rank")):
        axis.set_ticks(ticks, [str(int(t)) for t in ticks], size=7)
        axis.set_label_text(place, size=8)
    axes.tick_params(length=0)
    axes.set_title(f"{step.name}, {format_bytes(step.total)}" if step.total else step.name, size=8.5)
