"""What a plan over several ranks says about itself: the choice, what moves at each hop, what everything costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attnplan.explain import _shape_line, _share, title
from attnplan.explain_tables import hop_table, moved, ring_candidates
from attnplan.ring.choose import ALL_RANKS, candidate_facts
from attnplan.ring.price import hop_facts
from attnplan.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from attnplan.plan_ring import RingPlan

SCHEMA = 1
"""Version of the dict that :func:`facts` returns."""


def facts(plan: RingPlan) -> dict[str, Any]:
    """Return everything that an explain page says, as plain data.

    Keys: ``schema``, ``spec``, ``device``, ``choice``, ``does``, ``hops``, ``others``, ``refused``.
    """
    spec, best = plan.spec, plan.candidate
    slowest = best.slowest
    return {
        "schema": SCHEMA,
        "spec": {"title": title(spec), "shape": _shape_line(spec)},
        "device": {"name": plan.device.name, "title": plan.device.title, "here": plan.target.torch_device is not None},
        "choice": {
            **candidate_facts(best, spec.training),
            "ranks": plan.ranks,
            "where": "a virtual ring on one device" if plan.mesh is None else f"a mesh of {plan.ranks} processes",
            "backend": plan.backend,
            "schedule": plan.schedule,
            "basis": "data sheet",
            "work": "forward and backward" if spec.training else "forward",
            "rank": slowest.rank,
            "whole_peak_bytes": plan.predicted.peak_bytes if plan.mesh is None and plan.ranks <= ALL_RANKS else None,
        },
        "does": _share(spec),
        "hops": hop_facts(slowest),
        "others": [candidate_facts(c, spec.training) for c in plan.candidates[1:]],
        "refused": [{"name": name, "reasons": list(reasons)} for name, reasons in plan.refused],
    }


def render(found: dict[str, Any]) -> str:
    """Return the page as text."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    spec, choice, device, does = found["spec"], found["choice"], found["device"], found["does"]
    here = "" if device["here"] else " (not here)"
    yield spec["title"]
    yield f"           {spec['shape']}"
    yield f"device     {choice['ranks']} x {device['title']}{here}, {choice['where']}"
    yield f"choice     {choice['name']} > {choice['backend']} ({choice['schedule']})"
    whole = choice["whole_peak_bytes"]
    yield (
        f"predicted  {format_seconds(choice['seconds'])} {choice['work']} ({choice['basis']})    peak "
        f"{format_bytes(choice['peak_bytes'])} a rank beside its inputs and output"
        + ("" if whole is None else f", {format_bytes(whole)} of all ranks here")
    )
    yield from moved(choice)
    pairs = "" if does["pairs"] is None else f"{format_count(does['pairs'])} pairs, "
    yield f"does       {pairs}busiest rank {choice['imbalance']:.2f} x the mean; verify() proves each pair covered once"
    yield ""
    yield f"  rank {choice['rank']}, the slowest"
    yield from hop_table(found["hops"])
    yield from ring_candidates(found["others"], choice["seconds"])
