"""What a spec would cost over a mesh that need not be here: any number of ranks, without a process on any of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from attnplan.backends import Backend, Schedule, registry
from attnplan.cost import Device, resolve
from attnplan.cost.calibration import parameters_for
from attnplan.cost.comm import links
from attnplan.explain import title
from attnplan.explain_tables import hop_table, moved, ring_candidates
from attnplan.ir import Graph
from attnplan.ring.choose import RingCandidate, candidate_facts, choose
from attnplan.ring.mesh import Mesh
from attnplan.ring.price import Kernel, hop_facts
from attnplan.ring.program import ITEM_BYTES
from attnplan.spec import AttentionSpec
from attnplan.units import format_bytes, format_count, format_seconds


def kernels(spec: AttentionSpec, device: Device) -> tuple[Kernel, ...]:
    """Return every schedule that a search would consider on a device."""
    return tuple(
        Kernel(f"{backend.name} ({schedule.name})", schedule.priced, _Refuses(backend, schedule, spec, device))
        for backend in registry().backends.values()
        if backend.automatic and not backend.naive
        for schedule in backend.schedules(device)
    )


class _Refuses:
    """Why a schedule refuses a graph of a rank; nothing if it does not."""

    def __init__(self, backend: Backend, schedule: Schedule, spec: AttentionSpec, device: Device) -> None:
        self.backend, self.schedule, self.spec, self.device = backend, schedule, spec, device

    def __call__(self, graph: Graph) -> tuple[str, ...]:
        return self.backend.refuse(graph, self.spec, self.schedule, self.device)


def facts(
    spec: AttentionSpec, mesh: object, device: object = "auto", layout: str = "auto", transport: str = "auto"
) -> dict[str, Any]:
    """Return how a spec would be spread over a mesh, as plain data.

    Parameters
    ----------
    spec
        What to compute, over the whole sequence.
    mesh
        ``"128x8"`` is 128 nodes of 8 ranks; a number of ranks is one node, or nodes of 8.
    device
        The device of each rank, as in :func:`attnplan.compile`.
    layout, transport
        Pin one of them.

    Returns
    -------
    dict
        ``spec mesh device choice ranks hops others``; bytes are those that one rank receives.

    Raises
    ------
    RingError
        If the mesh is none, a name is unknown, or every layout and transport is refused.

    Examples
    --------
    >>> from attnplan.patterns import window
    >>> spec = AttentionSpec(seq_len=65536, heads=8, head_dim=128, pattern=window(256, 0))
    >>> found = facts(spec, 16, "h200")
    >>> found["choice"]["name"], found["choice"]["received_bytes"], len(found["hops"])
    ('contiguous > halo', 1048576, 2)
    """
    target = resolve(device)
    ranks = Mesh.of(mesh)  # type: ignore[arg-type]  # it words the error
    known = links(target.device)
    table = parameters_for(target)
    found = choose(spec, ranks, target.device, layout, transport, kernels(spec, target.device), known, table)
    best, others = found[0], found[1:]
    each = -(-spec.shape.seq_len // ranks.ranks)
    return {
        "schema": 1,
        "spec": {"title": title(spec), "seq_len": spec.shape.seq_len, "rows_per_rank": each, "dtype": spec.dtype},
        "mesh": {"nodes": ranks.nodes, "per_node": ranks.per_node, "ranks": ranks.ranks},
        "device": {
            "name": target.device.name,
            "title": target.device.title,
            "inside_gb_s": known.inside.bandwidth / 1e9,
            "between_gb_s": known.between.bandwidth / 1e9,
            "source": f"{known.inside.source}; {known.between.source}",
        },
        "choice": {
            **candidate_facts(best, spec.training),
            "work": "forward and backward" if spec.training else "forward",
            "basis": table.basis,
            "inputs_and_output_bytes": _held_bytes(spec, each),
            "flops": 2 * max(r.pairs for r in best.ranks) * (spec.head_dim + spec.value_dim),
        },
        "ranks": [_rank_facts(best, i) for i in range(len(best.ranks))],
        "hops": hop_facts(best.slowest),
        "others": [candidate_facts(c, spec.training) for c in others],
    }


def _held_bytes(spec: AttentionSpec, rows: int) -> int:
    features = spec.heads * (spec.head_dim + spec.value_dim) + spec.kv_heads * (spec.head_dim + spec.value_dim)
    return spec.batch * rows * features * ITEM_BYTES[spec.dtype]


def _rank_facts(candidate: RingCandidate, i: int) -> dict[str, Any]:
    rank = candidate.ranks[i]
    return {
        "rank": rank.rank,
        "seconds": rank.seconds,
        "received_bytes": rank.forward_bytes,
        "received_bytes_backward": rank.backward_bytes,
        "peak_bytes": rank.peak_bytes,
        "pairs": rank.pairs,
        "hops": len(rank.hops),
    }


def render(found: dict[str, Any]) -> str:
    """Return the facts of :func:`facts` as a page of text."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    spec, mesh, device, choice = (found[key] for key in ("spec", "mesh", "device", "choice"))
    yield spec["title"]
    yield f"           {spec['dtype']}, {spec['seq_len']:,} rows, {spec['rows_per_rank']:,} on each rank"
    yield (
        f"mesh       {mesh['ranks']} ranks on {mesh['nodes']} node{'s' * (mesh['nodes'] > 1)} of {mesh['per_node']}, "
        f"{device['title']}; {device['inside_gb_s']:.4g} GB/s inside a node"
        + (f", {device['between_gb_s']:.4g} between" if mesh["nodes"] > 1 else "")
    )
    yield f"choice     {choice['name']}"
    yield (
        f"predicted  {format_seconds(choice['seconds'])} {choice['work']} ({choice['basis']})    peak "
        f"{format_bytes(choice['peak_bytes'])} a rank, beside {format_bytes(choice['inputs_and_output_bytes'])} of "
        "inputs and output"
    )
    yield from moved(choice)
    yield f"does       {format_count(choice['flops'])}FLOP on the busiest rank; imbalance {choice['imbalance']:.2f}"
    yield from hop_table(found["hops"])
    yield from ring_candidates(found["others"], choice["seconds"])
