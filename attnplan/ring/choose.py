"""The choice of layout and transport together, by what they cost on a mesh."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import attrs

from attnplan.cost import Device, KernelModel
from attnplan.cost.comm import Links, links
from attnplan.cost.parameters import Parameters
from attnplan.errors import RingError, SpecError, did_you_mean
from attnplan.ring.layouts import LAYOUTS
from attnplan.ring.mesh import Mesh
from attnplan.ring.price import Kernel, Pricer, RankCost
from attnplan.ring.transports import TRANSPORTS, Setting, estimated_parts, local_plan, setting_of
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes

ALL_RANKS = 16
"""Most ranks that are priced one by one; of more, the first, the middle and the last."""
HOPS = 16
"""Hops of a ring that are planned, of candidates that are not chosen."""
ESTIMATES_AGREE = 0.02
"""How far below a candidate that is planned hop by hop an estimate must lie to be looked at in its place."""
MAX_PARTS = 4200
"""Most attends of a rank in a ring; 1,024 ranks of a causal zigzag ring have some 4,100."""
FUSED = Kernel("fused", KernelModel(efficiency=0.6, native=frozenset({"window", "softcap", "mask", "shared-keys"})))
"""A kernel as such, where no backend is asked."""


MAX_AT_ONCE = 512
"""Most attends of a rank in a transport of one exchange."""


@attrs.frozen
class RingCandidate:
    """A layout and a transport: priced, or refused with the reason."""

    layout: str
    transport: str
    ring: int
    ulysses: int
    ranks: tuple[RankCost, ...] = ()
    """The ranks that were priced."""
    mean_pairs: float = 0.0
    """Pairs of a rank on average."""
    why: str = ""
    """Why more rows are sent than are needed, in a transport that sends needed rows only."""
    refused: str = ""
    every: int = 1
    """Above 1: one in so many hops was planned, and bytes and seconds are estimates."""

    @property
    def name(self) -> str:
        """The candidate as reports write it."""
        shape = f" {self.ring}x{self.ulysses}" if self.transport == "hybrid" else ""
        return f"{self.layout} > {self.transport}{shape}"

    @property
    def shape(self) -> int | tuple[int, int]:
        """Number of ranks; for ``hybrid``, (groups of the ring, ranks of a group)."""
        return (self.ring, self.ulysses) if self.transport == "hybrid" else self.ring * self.ulysses

    @property
    def slowest(self) -> RankCost:
        """The priced rank that takes the longest."""
        return max(self.ranks, key=lambda r: r.seconds)

    @property
    def seconds(self) -> float:
        """Time of a call: that of the slowest rank."""
        return self.slowest.seconds if self.ranks else float("inf")

    @property
    def peak_bytes(self) -> int:
        """Memory of the rank that needs the most."""
        return max((r.peak_bytes for r in self.ranks), default=0)

    @property
    def imbalance(self) -> float:
        """Pairs of the busiest priced rank over the mean."""
        most = max((r.pairs for r in self.ranks), default=0)
        return most / self.mean_pairs if self.mean_pairs else 1.0

    @property
    def hidden(self) -> float:
        """Share of the slowest rank's communication that its compute hides, by the prediction."""
        rank = self.slowest
        total = sum(h.comm for h in rank.hops)
        first = rank.hops[0].comm if rank.hops else 0.0
        shown = first + sum(max(0.0, b.comm - a.compute) for a, b in zip(rank.hops, rank.hops[1:], strict=False))
        return 1 - shown / total if total else 1.0


def choose(
    spec: AttentionSpec,
    mesh: Mesh | str | int | tuple[int, ...],
    device: Device,
    layout: str = "auto",
    transport: str = "auto",
    kernels: Sequence[Kernel] = (FUSED,),
    known: Links | None = None,
    parameters: Parameters | None = None,
) -> tuple[RingCandidate, ...]:
    """Price every layout and transport.

    Parameters
    ----------
    spec
        What to compute, over the whole sequence.
    mesh
        Ranks: ``"128x8"``, ``(128, 8)``, a number, or a :class:`Mesh`.
    device
        The device of each rank.
    layout, transport
        Pin one of them; ``"hybrid 4x2"`` pins the groups of the ring, and the ranks of a group, too.
    kernels
        What may run the graphs of a rank; the fastest that does not refuse is priced.
    known
        Links; the default are those of the device's data sheet.
    parameters
        Calibrated figures of the kernels.

    Returns
    -------
    tuple of RingCandidate
        The accepted ones by predicted time, then the refused ones with their reasons.

    Raises
    ------
    RingError
        If every candidate is refused, or a name or the mesh is unknown.

    Examples
    --------
    >>> from attnplan.cost import catalogue
    >>> from attnplan.patterns import window
    >>> spec = AttentionSpec(seq_len=65536, heads=8, head_dim=128, pattern=window(256, 0))
    >>> best = choose(spec, "2x8", catalogue()["h200"])[0]
    >>> best.name, best.ranks[3].forward_bytes
    ('contiguous > halo', 1048576)
    """
    mesh = Mesh.of(mesh)
    transport, shape = _pinned(transport, mesh)
    for name, given, names in (("layout", layout, LAYOUTS), ("transport", transport, TRANSPORTS)):
        if given not in ("auto", *names):
            raise RingError(f"unknown {name} {given!r}{did_you_mean(given, [*names, 'auto'])}")
    pricer = Pricer(spec, mesh, device, known or links(device), kernels, parameters)
    found = [
        candidate
        for each in LAYOUTS if layout in ("auto", each)
        for one in TRANSPORTS if transport in ("auto", one)
        for candidate in _priced(pricer, each, one, shape)
    ]  # fmt: skip
    fitting = sorted((c for c in found if not c.refused), key=lambda c: c.seconds)
    while fitting and fitting[0].every > 1:  # what is chosen is planned hop by hop
        best, *rest = fitting
        exact = _candidate(pricer, best.layout, best.transport, (best.ring, best.ulysses), sampled=False)
        if not rest or exact.seconds <= (1 + ESTIMATES_AGREE) * rest[0].seconds:
            fitting = [exact, *rest]
        else:
            fitting = sorted((exact, *rest), key=lambda c: c.seconds)
    if not fitting:
        lines = "\n".join(f"  {c.name}: {c.refused}" for c in found)
        raise RingError(f"no layout and transport carry this over {mesh.ranks} ranks:\n{lines}")
    return (*fitting, *(c for c in found if c.refused))


def _pinned(transport: str, mesh: Mesh) -> tuple[str, tuple[int, int] | None]:
    """Return a transport's name, and the shape that :attr:`RingCandidate.name` shows behind ``hybrid``, if it is there.

    Examples
    --------
    >>> _pinned("hybrid 4x2", Mesh(1, 8)), _pinned("hybrid", Mesh(1, 8))
    (('hybrid', (4, 2)), ('hybrid', None))
    """
    found = re.fullmatch(r"hybrid (\d+)x(\d+)", transport)
    if found is None:
        return transport, None
    ring, ulysses = map(int, found.groups())
    if ring * ulysses != mesh.ranks:
        raise RingError(f"{transport!r} is for {ring * ulysses} ranks, there are {mesh.ranks}")
    return "hybrid", (ring, ulysses)


def _priced(
    pricer: Pricer, layout: str, transport: str, shape: tuple[int, int] | None = None
) -> Iterator[RingCandidate]:
    for each in [shape] if shape else _shapes(pricer.spec, pricer.mesh, transport):
        yield _candidate(pricer, layout, transport, each)


def _candidate(
    pricer: Pricer, layout: str, transport: str, shape: tuple[int, int], *, sampled: bool = True
) -> RingCandidate:
    ring, ulysses = shape
    bare = RingCandidate(layout, transport, ring, ulysses)
    try:
        setting = setting_of(pricer.spec, shape, layout, transport)
        ranks = _sample(setting.ranks)
        _check_size(setting)
        every = max(1, ring // HOPS) if sampled and transport in ("ring", "hybrid") else 1
        plans = [local_plan(setting, r, every) for r in ranks]
        costs = tuple(pricer.rank(setting, plan) for plan in plans)
    except RingError as error:
        return attrs.evolve(bare, refused=str(error).split("is refused: ", 1)[-1])
    why = next((p.why for p in plans if p.why), "")
    mean = _mean_pairs(pricer.spec, setting.ranks, costs)
    priced = attrs.evolve(bare, ranks=costs, mean_pairs=mean, why=why, every=every)
    if priced.peak_bytes > pricer.device.memory:
        need, has = format_bytes(priced.peak_bytes), format_bytes(pricer.device.memory)
        return attrs.evolve(bare, refused=f"needs {need} beside inputs and output, {pricer.device.name} has {has}")
    return priced


def _shapes(spec: AttentionSpec, mesh: Mesh, transport: str) -> list[tuple[int, int]]:
    """Return (groups of the ring, ranks of a group) to be priced."""
    if transport != "hybrid":
        return [(mesh.ranks, 1)]
    if mesh.nodes > 1 and mesh.per_node > 1:
        return [(mesh.nodes, mesh.per_node)]
    fits = [u for u in range(2, mesh.ranks) if mesh.ranks % u == 0 and spec.heads % u == 0]
    fits = [u for u in fits if spec.kv_heads % u == 0 or u % spec.kv_heads == 0]
    return [(mesh.ranks // u, u) for u in fits[-2:]] or [(mesh.ranks, 1)]


def _sample(ranks: int) -> list[int]:
    return list(range(ranks)) if ranks <= ALL_RANKS else [0, ranks // 2, ranks - 1]


def _check_size(setting: Setting) -> None:
    """Refuse a layout that would cut the attends of a rank into very many small ones."""
    parts = estimated_parts(setting)
    limit = MAX_PARTS if setting.transport in ("ring", "hybrid") else MAX_AT_ONCE
    if parts > limit:
        raise RingError(f"every rank would run more than {limit} attends, about {parts}")


def _mean_pairs(spec: AttentionSpec, ranks: int, costs: Sequence[RankCost]) -> float:
    if ranks <= ALL_RANKS:
        return sum(c.pairs for c in costs) / ranks
    try:
        return spec.count_pairs() / ranks
    except SpecError:
        return sum(c.pairs for c in costs) / len(costs)


def candidate_facts(candidate: RingCandidate, training: bool) -> dict[str, Any]:
    """Return a candidate as plain data."""
    base: dict[str, Any] = {"name": candidate.name, "layout": candidate.layout, "transport": candidate.transport}
    if candidate.refused:
        return {**base, "refused": candidate.refused}
    slowest = candidate.slowest
    return {
        **base,
        "ring": candidate.ring,
        "ulysses": candidate.ulysses,
        "seconds": candidate.seconds,
        "peak_bytes": candidate.peak_bytes,
        "received_bytes": max(r.forward_bytes for r in candidate.ranks),
        "received_bytes_backward": max(r.backward_bytes for r in candidate.ranks) if training else None,
        "imbalance": candidate.imbalance,
        "hidden": candidate.hidden,
        "estimated": candidate.every > 1,
        "sends_more": candidate.why or None,
        "hops": len(slowest.hops),
        "refused": None,
    }
