"""The sections of a report, each from a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from attnplan.cost import catalogue
from attnplan.errors import AttnPlanError
from attnplan.pictures import graph_figure, heading, inline_svg, length_figure, mask_figure, roofline_figure
from attnplan.plan import Plan
from attnplan.report.html import Html, bar, folded, join, table, tag
from attnplan.units import format_bytes, format_count, format_number, format_seconds
from attnplan.what_if import Row, factor, label, what_if

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Facts = dict[str, Any]
LONGEST_TEXT = 150_000
"""Characters of one listing; the rest is left out, and the page says so."""
OTHER_DEVICES = ("a100", "h100", "b200")


def summary(plan: Plan, facts: Facts) -> Html:
    """Return the title and the figures of the choice, each with its basis."""
    spec, choice, device = facts["spec"], facts["choice"], facts["device"]
    versions = ", ".join(f"{n} {v}" for n, v in choice["versions"].items() if v)
    assumed = "" if device["here"] else "assumed there"
    cards = [
        (choice["name"], "choice" + "".join(f", {x}" for x in (versions, assumed) if x)),
        (format_seconds(choice["seconds"]), f"{choice['work']}, predicted ({choice['basis']})"),
        (
            format_bytes(choice["peak_bytes"]),
            f"peak beside {format_bytes(choice['inputs_and_output_bytes'])} of inputs and output",
        ),
        _share(facts["does"]),
    ]
    note = f" ({device['note']})" if device["note"] else ""
    return opening(spec, f"{device['title']}{note}. Figures: {device['source']}", cards)


def opening(spec: Facts, where: str, cards: Sequence[tuple[str, str]]) -> Html:
    """Return the title, the place where it runs, and cards of a figure and what it is."""
    return join([
        tag("h1", spec["title"]),
        tag("p", tag("code", spec["shape"])),
        tag("p", where, class_="muted"),
        tag("div", *(tag("div", tag("b", head), tag("span", below), class_="card") for head, below in cards),
            class_="cards"),
    ])  # fmt: skip


def _share(does: Facts) -> tuple[str, str]:
    each = " per branch" if does["branches"] > 1 else ""
    if does["pairs"] is None:
        proved = f"each proved covered exactly once{each}"
        return "all that is asked for", f"pairs depend on the operands of each call; {proved}"
    share = 100 * does["pairs"] / does["dense_pairs"]
    pairs = f"{format_count(does['pairs'])} of {format_count(does['dense_pairs'])} {does['dense']}"
    return f"{share:.3g} % of the pairs", f"{pairs}, each proved covered exactly once{each}"


def picture(name: str, label: str, make: Callable[[], Figure], scroll: bool = False) -> Html:
    """Return a picture, or the reason why there is none."""
    try:
        svg = Html(inline_svg(make(), name, label))
    except AttnPlanError as error:
        return tag("p", f"no picture: {error}", class_="muted")
    return tag("figure", svg, class_="scroll" if scroll else name, tabindex="0")


def mask(plan: Plan, facts: Facts) -> Html:
    """Return the picture of the mask."""
    return join(
        [tag("h2", "Mask"), picture("mask", f"mask of {facts['spec']['title']}", lambda: mask_figure(plan.spec))]
    )


def passes(plan: Plan, facts: Facts) -> Html:
    """Return the passes that ran, and the graph after each, folded."""
    rows = [(p["name"], p["before"], p["after"], format_seconds(p["seconds"])) for p in facts["passes"]]
    return join([
        tag("h2", "Passes"),
        tag("p", "After each pass, every pair is proved covered exactly once.", class_="muted"),
        table(("pass", "ops before", "after", "time"), rows, "wnnn"),
        *(folded(f"Graph after {s.name}, {len(s.graph)} ops", listing(str(s.graph))) for s in plan.steps),
    ])  # fmt: skip


def listing(content: str) -> Html:
    """Return preformatted text, the end left out where it is very long."""
    if len(content) <= LONGEST_TEXT:
        return tag("pre", content)
    left = len(content) - LONGEST_TEXT
    return join([tag("pre", content[:LONGEST_TEXT]), tag("p", f"... and {left:,} more characters", class_="muted")])


def ops(plan: Plan, facts: Facts) -> Html:
    """Return the table of ops with their shares of the time, the roofline, and the graph, folded."""
    total = sum(o["seconds"] for o in facts["ops"])  # of the ops: a call may wait for the host beside
    costly = [o for o in facts["ops"] if o["seconds"] > 0]
    free = len(facts["ops"]) - len(costly)
    note = f"{free} more ops are views and take no time. " if free else ""
    return join([
        tag("h2", "Ops"),
        table(
            ("op", "time", "share", "bound", "roofline", "GFLOP", "MiB", "what", "result"),
            (_op_row(o, total) for o in costly), "wnwwnnnww",
        ),
        tag("p", f"{note}Roofline: least possible time over predicted time.", class_="muted"),
        picture("roofline", f"roofline of {facts['choice']['name']}", lambda: roofline_figure(plan)),
        folded(f"Graph, {len(plan.graph)} ops",
               picture("graph", "the graph of the plan", lambda: graph_figure(plan.graph, heading(plan)), scroll=True),
               listing(str(plan.graph))),
    ])  # fmt: skip


def _op_row(op: Facts, total: float) -> tuple[object, ...]:
    share = op["seconds"] / total
    return (
        f"%{op['id']} {op['op']}",
        format_seconds(op["seconds"]),
        join([bar(share), f" {100 * share:.2g} %"]),
        op["bound"],
        f"{100 * op['roofline']:.0f} %",
        format_number(op["gflop"]) if op["gflop"] else "-",
        format_number(op["bytes"] / 2**20),
        op["what"],
        tag("code", op["result"]),
    )


def candidates(plan: Plan, facts: Facts) -> Html:
    """Return every way to run the spec: its prediction, or every reason why it is refused."""
    every = [facts["choice"], *facts["others"]]
    accepted = [c for c in every if not c["refused"]]
    refused = [join([tag("dt", c["name"]), *(tag("dd", r) for r in c["refused"])]) for c in every if c["refused"]]
    best = facts["choice"]["seconds"]
    rows = [
        (c["name"], format_seconds(c["seconds"]), f"x {c['seconds'] / best:.3g}", format_bytes(c["peak_bytes"]))
        for c in accepted
    ]
    return join([
        tag("h2", "Candidates"),
        tag("p", f"{len(every)} ways to run it: {len(accepted)} accepted, {len(refused)} refused.", class_="muted"),
        table(("way", "predicted", "", "peak"), rows, "wnnn", chosen=0),
        picture("length", "predicted time of every candidate against length",
                lambda: length_figure(plan.spec, plan.target, refusals=False)),
        *([tag("h2", "Refused"), tag("dl", *refused)] if refused else []),
    ])  # fmt: skip


def what_ifs(plan: Plan, facts: Facts) -> Html:
    """Return what other devices and half the memory would change."""
    changes: list[dict[str, Any]] = [
        {"device": name} for name in OTHER_DEVICES if name in catalogue() and name != plan.device.name
    ]
    if plan.predicted.peak_bytes > 2:
        changes.append({"max_memory": plan.predicted.peak_bytes // 2})
    if plan.spec.batch > 1:
        changes.append({"batch": 1})
    changes.append({"training": not plan.spec.training})
    target = plan.target
    options = {**plan.pins, "device": target.torch_device or target.device.name}
    try:
        rows = what_if(plan.spec, options, changes)
    except AttnPlanError as error:
        return join([tag("h2", "What if"), tag("p", f"not for this spec: {error}", class_="muted")])
    return join([
        tag("h2", "What if"),
        table(("", "choice", "predicted", "", "basis", "peak"), (_what_row(r, rows[0]) for r in rows), "wwnnwn"),
        tag("p", "More: ", tag("code", "attnplan explain SPEC --what-if device=...,seq_len=...,max_memory=..."),
            class_="muted"),
    ])  # fmt: skip


def _what_row(row: Row, first: Row) -> tuple[object, ...]:
    if row.plan is None:
        return label(row), tag("div", row.error, class_="bad reasons"), "-", "", "", "-"
    found = row.plan.predicted
    times = (format_seconds(found.seconds), factor(row, first), found.basis)
    return label(row), row.plan.choice, *times, format_bytes(found.peak_bytes)


def source(plan: Plan, facts: Facts) -> Html:
    """Return the emitted program, folded, or why there is none."""
    return join([tag("h2", "Program"), *_source(plan)])


def _source(plan: Plan) -> Iterator[Html]:
    if find_spec("torch") is None:
        yield tag("p", "torch is not installed here, and emitting a program needs it.", class_="muted")
        return
    try:
        text = plan.source
    except AttnPlanError as error:
        yield tag("p", f"nothing was emitted: {error}", class_="muted")
        return
    yield folded(f"Emitted source, {text.count(chr(10)) + 1} lines", listing(text))


def spec_text(plan: Plan, facts: Facts) -> Html:
    """Return the spec as TOML, or why it has no text form."""
    try:
        shown = listing(plan.spec.to_toml())
    except AttnPlanError as error:
        shown = tag("p", f"no text form: {error}", class_="muted")
    return join([tag("h2", "Spec"), shown])
