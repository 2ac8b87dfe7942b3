"""What pictures show, as plain data: the same numbers, for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from attnplan.cost import Target, parameters_for
from attnplan.pictures.cells import EMPTY, FULL, PARTIAL, UNDECIDED
from attnplan.pictures.graph import layers
from attnplan.pictures.length import length_curves
from attnplan.pictures.mask import mask_panels
from attnplan.pictures.roofline import roofline_points
from attnplan.plan import Plan
from attnplan.spec import AttentionSpec


def mask_facts(spec: AttentionSpec, **region: Any) -> dict[str, Any]:
    """Return what :func:`~attnplan.pictures.mask_figure` shows; the parameters are the same.

    Examples
    --------
    >>> spec = AttentionSpec(seq_len=1024, heads=2, head_dim=64, causal=True)
    >>> mask_facts(spec, tile=256)["panels"][0]["branches"]
    [{'pattern': 'full() & causal()', 'full': 6, 'partial': 4, 'empty': 6, 'undecided': 0, 'sampled': 0}]
    """
    panels = mask_panels(spec, **region)
    grid = panels[0].branches[0].grid
    names = {"full": FULL, "partial": PARTIAL, "empty": EMPTY, "undecided": UNDECIDED}
    return {
        "tile": grid.tile[0],
        "rows": grid.rows,
        "columns": grid.columns,
        "panels": [
            {
                "head": panel.head,
                "alike": list(panel.alike),
                "branches": [
                    {
                        "pattern": str(branch),
                        **{name: cells.count(state) for name, state in names.items()},
                        "sampled": cells.sampled,
                    }
                    for branch, cells in zip(spec.branches, panel.branches, strict=True)
                ],
            }
            for panel in panels
        ],
    }


def roofline_facts(plan: Plan) -> dict[str, Any]:
    """Return what :func:`~attnplan.pictures.roofline_figure` shows."""
    device = plan.device
    return {
        "plan": repr(plan),
        "basis": plan.predicted.basis,
        "flops_per_second": device.rate(plan.spec.dtype, plan.spec.precision) or device.rate("float32"),
        "bytes_per_second": device.bandwidth,
        "points": [attrs.asdict(point) for point in roofline_points(plan)],
    }


def length_facts(spec: AttentionSpec, target: Target, lengths: Sequence[int] | None = None) -> dict[str, Any]:
    """Return what :func:`~attnplan.pictures.length_figure` shows."""
    curves: list[Mapping[str, Any]] = [attrs.asdict(curve) for curve in length_curves(spec, target, lengths)]
    basis = parameters_for(target).basis
    return {"device": target.device.name, "basis": basis, "curves": [dict(curve) for curve in curves]}


def graph_facts(plan: Plan) -> dict[str, Any]:
    """Return what :func:`~attnplan.pictures.graph_figure` shows of a plan."""
    return {"plan": repr(plan), "nodes": len(plan.graph), "layers": layers(plan.graph), "graph": str(plan.graph)}
