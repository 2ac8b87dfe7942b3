"""Writes what docs/performance.md says about targets and about the planner, from committed rows.

    python -m bench.performance             rewrites the part of docs/performance.md between the marks
    python -m bench.performance --check     exits with 1 if it is out of date

Targets are those of ``bench.targets``. The planner's rows are ``bench/results/regret-DEVICE*.json``, and judgements
``bench/results/judged-DEVICE.json`` of ``bench.regret``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnplan.cost import catalogue
from attnplan.harness.rows import read_rows
from bench import targets
from bench.grid import FAMILIES, GRIDS
from bench.targets_longnet import longnet, timeline, times
from bench.targets_planner import planner

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "bench" / "results"
BEGIN, END = "<!-- begin: python -m bench.performance -->", "<!-- end: python -m bench.performance -->"
FEWEST = 3
"""Specs of which a median is worth a line."""
Row = dict[str, Any]


def percent(x: float | None) -> str:
    return "-" if x is None else f"{100 * x:.1f} %"


def devices() -> list[str]:
    """Return the devices of which there are rows, the GPUs first."""
    known = sorted(catalogue(), key=lambda name: (catalogue()[name].kind == "cpu", name))
    return [name for name in known if files(name)]


def files(device: str) -> list[Path]:
    return sorted(RESULTS.glob(f"regret-{device}*.json"))


def rows_of(device: str) -> tuple[Row, dict[str, list[Row]]]:
    """Return the environment of the first file, and what was timed of each spec in any of them."""
    found: dict[str, dict[str, Row]] = {}
    heads = []
    for path in files(device):
        head, rows = read_rows(path)
        heads.append(head)
        for row in rows:
            if "seconds" in row and row.get("ok"):
                found.setdefault(row["spec"], {}).setdefault(row["candidate"], row)
    versions = {}
    for head in heads:
        versions |= head["environment"]["versions"]
    return {**heads[0]["environment"], "versions": versions}, {spec: list(got.values()) for spec, got in found.items()}


def page() -> str:
    """Return the generated part of the page."""
    lines = [BEGIN, ""]
    lines += reached()
    known = len(lines)
    for device in devices():
        lines += section(device)
    if len(lines) == known:
        lines += ["No rows are committed yet.", ""]
    return "\n".join([*lines, END])


PARTS = {
    "GPU backends": (
        targets.backends,
        "One H100, bfloat16, medians of 50 interleaved rounds. Host time is of calls that the device does not hold up.",
    ),
    "FlexAttention, and compiled models": (
        targets.compiled,
        "flash-attn 4 was not installed in that run. `auto` takes FlexAttention where it makes up for compiling\n"
        "within 100,000 calls; remarks say what it took in the run, which may be older than that rule. Graphs,\n"
        "breaks and recompilations are counted by tests.",
    ),
    "LongNet": (
        longnet,
        "A: 65,536 tokens, 12 heads of 64, segments 2,048 to 32,768, rates 1 to 16. B: 131,072 tokens, 16 heads of\n"
        "128, segments 4,096 to 131,072, rates 1, 4, 16, 16. gA and gB: the same with grouped heads; the published\n"
        "class, by xformers, computes another normalisation. The plan is the one that `auto` chose; kernels alone are\n"
        "attention on rows that lie gathered, the fastest of the run. `cuDNN` and `flash-attn 4` are two\n"
        "environments, each one run; where flash-attn 4 is, kernels alone are the faster of both.",
    ),
    "Memory": (
        targets.memory,
        "Predicted and measured are bytes beside q, k, v and the output. That refusals are right is tried by tests.",
    ),
    "Several ranks": (
        targets.rings,
        "In per cent of one GPU's time on the whole, divided by the number of GPUs; bfloat16, 32 heads, 8 for keys\n"
        "and values, 128 features. Parity, bytes, hops and dry runs are asserted by tests.\n"
        "Where the time went: [rings](ring.md#where-the-time-goes).",
    ),
    "The planner": (
        planner,
        "The cost model is fitted to half of the specs and judged on the other, for three splits, of which the worst\n"
        "counts; figures by policy and by family are below. What is left of the regret is mostly the host, whose\n"
        "pace differs by 1.8 times from one race of candidates to another.",
    ),
}
"""Headings of targets, what makes them, and how they were measured."""


def reached() -> Iterator[str]:
    """Return a table of every target beside its figure."""
    yield "## Targets"
    yield ""
    made, known = {}, targets.Results(RESULTS)
    for title, (make, _) in PARTS.items():
        mine = targets.Results(RESULTS)
        made[title] = (list(make(mine)), mine)
    every = [t for found, _ in made.values() for t in found]
    met, missed = sum(t.met is True for t in every), sum(t.met is False for t in every)
    yield f"{len(every)} figures are beside what was wanted before the work began: {met} met, {missed} missed, and"
    yield f"{len(every) - met - missed} not measured yet. Missed ones say what the rows say of the reason."
    yield ""
    for title, (found, mine) in made.items():
        yield f"### {title}"
        yield ""
        yield from PARTS[title][1].splitlines()
        if mine.used:
            yield f"Rows: {', '.join(f'`{name}.json`' for name in mine.used)}."
        yield ""
        yield "| what | wanted | measured | | remark |"
        yield "|---|---|---|---|---|"
        yield from (t.line() for t in found)
        yield ""
        if title == "LongNet" and mine.used:
            yield from times(known)
            yield from timeline(known)


def section(device: str) -> Iterator[str]:
    environment, found = rows_of(device)
    versions = ", ".join(f"{n} {v}" for n, v in environment["versions"].items() if n != "attnplan")
    yield f"## The planner on {catalogue()[device].title}"
    yield ""
    names = ", ".join(f"`{p.relative_to(ROOT)}`" for p in files(device))
    whole = len(GRIDS["cpu" if catalogue()[device].kind == "cpu" else "gpu"]())
    count = f"{len(found)} of the grid's {whole} specs"
    yield f"{count}, {sum(map(len, found.values()))} measured candidates and calls by hand: {names}"
    yield f"({environment['device']}; {versions}), by `python -m bench.regret --measure`."
    yield ""
    yield from judgement(device)
    yield from families(found)


def judgement(device: str) -> Iterator[str]:
    path = RESULTS / f"judged-{device}.json"
    if not path.exists():
        return
    judged = json.loads(path.read_text(encoding="utf-8"))
    yield "The cost model is fitted to half of the specs and judged on the other, by"
    yield "`python -m bench.regret --judge`, for three splits. Regret is the time of the choice over that of the best"
    yield "candidate that the planner may choose by itself in the same environment, minus 1; that of a policy is"
    yield "against everything measured there. Packages that exclude each other are environments of their own."
    yield ""
    yield "| split | top-1 within noise | error dense | error sparse | error of the device's part | of the data sheet |"
    yield "|---|---|---|---|---|---|"
    for one in judged["seeds"]:
        names = ("top-1 within noise", "MAPE dense", "MAPE sparse", "MAPE device", "MAPE data sheet")
        cells = ("-" if one.get(name) is None else percent(one[name]) for name in names)
        yield f"| {one['seed']} | {' | '.join(cells)} |"
    yield ""
    yield "| regret on held-out specs | choices | mean | 95th percentile | worst |"
    yield "|---|---|---|---|---|"
    for name in judged["seeds"][0]["regret"]:
        got = [one["regret"][name] for one in judged["seeds"] if one["regret"][name]["specs"]]
        if got:
            figures = (statistics.mean(g[k] for g in got) for k in ("mean", "p95", "worst"))
            specs = round(statistics.mean(g["specs"] for g in got))
            yield f"| {name} | {specs} | {' | '.join(map(percent, figures))} |"
    yield ""
    yield "Figures are means over the splits. A policy counts for the specs that its kernel can run; over these it"
    yield f"takes, in total, {', '.join(totals(judged))} the time of the planner's choices. A call by hand counts where"
    yield "candidates with its library were measured, too."
    yield ""
    yield from beaten(judged)


MOST = 12
"""Specs that are listed at most."""


def beaten(judged: Row) -> Iterator[str]:
    """Say in which held-out specs something by hand, or by name, beats the planner's choice by more than 5 %."""
    worst: dict[str, Row] = {}
    for one in judged["seeds"]:
        for got in one.get("by hand", []):
            if got["slower by"] > worst.get(got["spec"], {}).get("slower by", 0.0):
                worst[got["spec"]] = got
    if not worst:
        return
    rows = sorted(worst.values(), key=lambda r: -r["slower by"])
    yield f"In {len(rows)} held-out specs of any split something that the planner does not choose by itself is over 5 %"
    yield "faster than its choice: a call by hand, without a plan's checks on the host, or what runs by name only."
    yield from ["The worst:"] if len(rows) > MOST else []
    yield ""
    yield "| spec | choice | faster | choice is slower by | on the device alone |"
    yield "|---|---|---|---|---|"
    for got in rows[:MOST]:
        share, alone = percent(got["slower by"]), percent(got["slower on the device by"])
        yield f"| {got['spec']} | `{got['auto']}` | `{got['faster']}` | {share} | {alone} |"
    yield ""


def totals(judged: Row) -> Iterator[str]:
    for name in judged["seeds"][0]["totals"]:
        got = [one["totals"][name] for one in judged["seeds"] if one["totals"][name]["specs"]]
        if got:
            yield f"{name} {statistics.mean(g['policy'] / g['auto'] for g in got):.2f} x"


def families(found: dict[str, list[Row]]) -> Iterator[str]:
    """Say by how much the best plan is faster than SDPA by hand, with a dense mask where the pattern needs one."""
    lines = []
    for family in FAMILIES:
        ratios = []
        for rows in found.values():
            plans = [r["seconds"] for r in rows if r["kind"] == "candidate" and r["family"] == family]
            hand = [r["seconds"] for r in rows if r["candidate"] == "by hand: sdpa" and r["family"] == family]
            if plans and hand:
                ratios.append(hand[0] / min(plans))
        if len(ratios) >= FEWEST:
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            lines.append(f"| {family} | {len(ratios)} | x {middle:.3g} | x {low:.3g} to x {high:.3g} |")
    if lines:
        yield "| family | specs | best plan against SDPA by hand, median | range |"
        yield "|---|---|---|---|"
        yield from lines
        yield ""


def updated(text: str) -> str:
    """Return a page with its generated part replaced, or added at its end."""
    if BEGIN not in text:
        return f"{text.rstrip()}\n\n{page()}\n"
    before, _, rest = text.partition(BEGIN)
    return before + page() + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    if given.check:
        sys.exit(0 if updated(text) == text else f"{PAGE} is out of date: run python -m bench.performance")
    PAGE.write_text(updated(text), encoding="utf-8")


if __name__ == "__main__":
    main()
