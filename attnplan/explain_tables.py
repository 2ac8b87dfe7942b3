"""What pages about a plan have in common: the table of hops of a rank, and that of the other candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from attnplan.units import format_bytes, format_count, format_factor, format_seconds

SHOWN_HOPS = 12
"""Most hops in the table; of more, the first ones and the last four are shown."""


def other_candidates(
    others: list[dict[str, Any]], best: float, costs: Callable[[dict[str, Any]], str]
) -> Iterator[str]:
    """Iterate over the lines about candidates that were not chosen: their times, or every reason why one is refused.

    Parameters
    ----------
    others
        The candidates as plain data: ``name``, ``seconds`` and ``refused``, a reason, several, or none;
        ``estimated`` where only a part was priced.
    best
        Seconds of the one that was chosen.
    costs
        What is said of a candidate behind its time.

    Examples
    --------
    >>> refused = {"name": "flash", "refused": ["no GPU", "rank 5"]}
    >>> others = [{"name": "eager", "seconds": 2e-3, "refused": None}, refused]
    >>> for line in other_candidates(others, 1e-3, lambda one: "peak 1 MiB"):
    ...     print(line)
    <BLANKLINE>
    others     eager  2 ms      x 2      peak 1 MiB
               flash  refused   no GPU
                                rank 5
    """
    width = max((len(one["name"]) for one in others), default=0)
    for i, one in enumerate(others):
        if i == 0:
            yield ""
        label = f"{'others' if i == 0 else '':<11}{one['name']:<{width}}"
        if one["refused"]:
            first, *more = [one["refused"]] if isinstance(one["refused"], str) else one["refused"]
            yield f"{label}  refused   {first}"
            yield from (f"{'':<{11 + width}}            {reason}" for reason in more)
            continue
        about = "about " if one.get("estimated") else ""
        factor = format_factor(one["seconds"] / best if best else 1.0)
        yield f"{label}  {about}{format_seconds(one['seconds']):<9} {factor:<8} {costs(one)}"


def compiles(seconds: float) -> str:
    """Say what a first call takes beside, behind what else is said of a candidate.

    Examples
    --------
    >>> compiles(6.0), compiles(0.0)
    (', compiles once, about 6 s', '')
    """
    return f", compiles once, about {format_seconds(seconds)}" if seconds else ""


def ring_candidates(others: list[dict[str, Any]], best: float) -> Iterator[str]:
    """Iterate over the lines about the other layouts and transports."""
    return other_candidates(
        others, best, lambda one: f"receives {format_bytes(one['received_bytes'])}, imbalance {one['imbalance']:.2f}"
    )


def moved(choice: dict[str, Any]) -> Iterator[str]:
    """Iterate over the lines about the bytes that a layout and transport moves."""
    backward = choice["received_bytes_backward"]
    yield (
        f"moves      {format_bytes(choice['received_bytes'])} to the rank that receives most"
        + (f", {format_bytes(backward)} backward" if backward is not None else "")
        + f"; {100 * choice['hidden']:.0f} % of the time behind compute"
    )
    if choice["sends_more"]:
        yield f"           more than is needed: {choice['sends_more']}"


def hop_table(hops: list[dict[str, Any]]) -> Iterator[str]:
    """Iterate over the lines of a table of hops: what arrives from whom, when, and what is computed meanwhile."""
    yield ""
    heads = f"{'hop':>5} {'from':>10} {'rows asked':>12} {'rows sent':>12} {'bytes':>10} {'pairs':>8} {'arrive':>10}"
    yield f"  {heads} {'hidden':>7} {'compute':>10} {'copies':>7}  kernel"
    kept = hops if len(hops) <= SHOWN_HOPS else [*hops[: SHOWN_HOPS - 4], *hops[-4:]]
    for i, hop in enumerate(kept):
        if len(kept) < len(hops) and i == SHOWN_HOPS - 4:
            yield f"  ... and {len(hops) - SHOWN_HOPS} more hops; the JSON lists all"
        yield (
            f"  {hop['hop']:>5} {_from(hop['peers']):>10} {hop['asked']:>12,} {hop['received']:>12,} "
            f"{format_bytes(hop['bytes']):>10} {format_count(hop['pairs']):>8} {format_seconds(hop['comm']):>10} "
            f"{_percent(hop['hidden']):>7} {format_seconds(hop['compute']):>10} "
            f"{_percent(hop['around'] / hop['compute'] if hop['compute'] else None):>7}  {hop['kernel']}"
        )


def _from(peers: int) -> str:
    return f"{peers} rank{'s' * (peers > 1)}" if peers else "itself"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
