"""The sections of a report about a plan over several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnplan.pictures import ring_figure
from attnplan.report.html import Html, join, table, tag
from attnplan.report.sections import opening, picture
from attnplan.units import format_bytes, format_count, format_seconds

if TYPE_CHECKING:
    from attnplan.plan_ring import RingPlan

Facts = dict[str, Any]


def summary(plan: RingPlan, facts: Facts) -> Html:
    """Return the title and the figures of the choice, each with its basis."""
    spec, choice, device, does = facts["spec"], facts["choice"], facts["device"], facts["does"]
    here = "" if device["here"] else " (not here)"
    pairs = "" if does["pairs"] is None else f"{format_count(does['pairs'])} pairs; "
    cards = [
        (choice["name"], f"choice, {choice['backend']} ({choice['schedule']}) on each rank"),
        (format_seconds(choice["seconds"]), f"{choice['work']}, predicted ({choice['basis']})"),
        (format_bytes(choice["peak_bytes"]), "peak of a rank beside its inputs and output"),
        (
            format_bytes(choice["received_bytes"]),
            f"to the rank that receives most, {100 * choice['hidden']:.0f} % hidden behind compute",
        ),
        (f"{choice['imbalance']:.2f} x the mean", f"{pairs}what the busiest rank computes"),
    ]
    return opening(spec, f"{choice['ranks']} x {device['title']}{here}, {choice['where']}", cards)


def transfers(plan: RingPlan, facts: Facts) -> Html:
    """Return who sends what to whom, and what each hop of the slowest rank costs."""
    choice = facts["choice"]
    rows = [
        (
            h["hop"],
            h["peers"] or "itself",
            f"{h['received']:,}",
            format_bytes(h["bytes"]),
            format_count(h["pairs"]),
            format_seconds(h["comm"]),
            format_seconds(h["compute"]),
            h["kernel"],
        )
        for h in facts["hops"]
    ]
    drawn = picture(
        "ring", "who sends how many bytes to whom",
        lambda: ring_figure(plan.spec, plan.target, plan.ranks, choice["layout"], choice["transport"]), scroll=True,
    )  # fmt: skip
    more = f"More than is needed: {choice['sends_more']}." if choice["sends_more"] else ""
    return join([
        tag("h2", "Transfers"),
        drawn,
        tag("p", f"Rank {choice['rank']}, the slowest, hop by hop. {more}", class_="muted"),
        table(("hop", "from", "rows", "bytes", "pairs", "transfer", "compute", "kernel"), rows, "nnnnnnnw"),
    ])  # fmt: skip


def candidates(plan: RingPlan, facts: Facts) -> Html:
    """Return every layout and transport with its prediction, or why it is refused; and so for the backends."""
    every = [facts["choice"], *facts["others"]]
    best = facts["choice"]["seconds"]
    rows = [
        (c["name"], format_seconds(c["seconds"]), f"x {c['seconds'] / best:.3g}", format_bytes(c["received_bytes"]),
         format_bytes(c["peak_bytes"]))
        for c in every if not c["refused"]
    ]  # fmt: skip
    refused = [join([tag("dt", c["name"]), tag("dd", c["refused"])]) for c in every if c["refused"]]
    refused += [join([tag("dt", r["name"]), *(tag("dd", x) for x in r["reasons"])]) for r in facts["refused"]]
    return join([
        tag("h2", "Candidates"),
        table(("layout > transport", "predicted", "", "receives", "peak"), rows, "wnnnn", chosen=0),
        *([tag("h2", "Refused"), tag("dl", *refused)] if refused else []),
    ])  # fmt: skip
