"""Specs, their candidates and their peers, side by side: what ``attnplan bench`` runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from attnplan.cost import Target
from attnplan.harness.entrants import Asked, PoisonedError, contest, contestants
from attnplan.harness.peers import contestants_by_hand
from attnplan.runtime.clock import Plenty
from attnplan.spec import AttentionSpec


def run_specs(
    specs: Mapping[str, AttentionSpec],
    target: Target,
    backends: frozenset[str],
    peers: frozenset[str],
    rounds: int = 8,
    advance: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Measure every candidate of each spec beside calls by hand, and return a row for each.

    Parameters
    ----------
    specs
        By name.
    target
        A device that is here.
    backends, peers
        Who takes part; no backends are all of them.
    rounds
        Timed rounds of each contestant; calls that take long get fewer.
    advance
        Called with a spec's name when it is done.
    """
    asked = Asked(plenty=Plenty(rounds=rounds, seconds=0.3), backends=backends)
    rows: list[dict[str, Any]] = []
    for name, spec in specs.items():
        facts = {"spec": name, "mode": "training" if spec.training else "forward"}
        entrants, others = contestants(spec, target, asked)
        by_hand, failed = contestants_by_hand(spec, str(target.torch_device), peers)
        found = [*others, *failed]
        try:
            found += contest(spec, target, [*entrants, *by_hand], asked)
        except PoisonedError as error:
            found.append({"candidate": "all others", "failed": f"the device cannot be used any more: {error}"})
            rows += [{**facts, **row} for row in found]
            break
        rows += [{**facts, **row} for row in found]
        advance(name)
    return rows
