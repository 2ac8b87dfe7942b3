"""What LongNet plans were to reach, beside committed rows; and where their time goes. See ``bench.targets``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.longnet_lengths_plot import flatness
from bench.longnet_table import fastest, groups, targets
from bench.targets import Results, Row, Target, at_least, at_most, run_of

RUNS = (
    ("cuDNN", ("longnet-forward-h100", "longnet-training-h100")),
    ("flash-attn 4", ("longnet-forward-fa4-h100", "longnet-training-fa4-h100")),
)
"""Both environments: with cuDNN alone, and with flash-attn 4 beside it."""
TIMELINE = "longnet-timeline-h100"


def longnet(results: Results) -> Iterator[Target]:
    """Return the targets of LongNet, for what the planner chose."""
    for run, files in RUNS:
        for file in files:
            rows = results.rows(file)
            known = {_title(where): found for where, found in groups(rows).items()}
            for one in targets(rows, on_cpu=False):
                yield from _of(one, rows, known, run)
    rows = results.rows("longnet-lengths-h100")
    tokens, ratio = flatness(rows, 1 << 16).get("plan auto", (0, None))
    what = "time of a token from 65,536 to 4,194,304 tokens, slowest over fastest"
    yield at_most(what, ratio, 1.10, "" if tokens == 1 << 22 else f"up to {tokens:,} tokens only")
    for row in results.rows("dilated-cpu"):
        value = row["ratios_to_plan"]["strided SDPA by hand"]
        yield at_least(f"CPU, grouped heads, {row['work']}: strided SDPA by hand / plan", value, 1.0)


def _title(where: tuple[str, bool, bool]) -> str:
    case, causal, backward = where
    return f"{case}{' causal' if causal else ''}{' forward + backward' if backward else ' forward'}"


def _named(what: str) -> str:
    return what.replace(", auto:", ":").replace(": ms", ": time")


def _of(one: Row, rows: list[Row], known: dict[str, list[Row]], run: str) -> Iterator[Target]:
    if "best plan by hand:" in one["what"]:
        return
    title = one["what"].partition(", auto:")[0].partition(": auto /")[0]
    took = next((r["auto"] for r in rows if "auto" in r and _title(_where(r)) == title), "")
    notes = [] if one["met"] else [_why(one, known[title], took)]
    yield _shown(one, f"{_named(one['what'])}, {run}", "; ".join(filter(None, [*notes, run_of(*known[title])])))


def _where(row: Row) -> tuple[str, bool, bool]:
    return row["case"], row["causal"], row["backward"]


def _shown(one: Row, what: str, note: str) -> Target:
    unit = " ms" if one["what"].endswith(": ms") else ""
    make = at_most if one["sign"] == "<=" else at_least
    return make(what, one["value"], one["limit"], note, unit=unit)


def _why(one: Row, found: list[Row], took: str) -> str:
    """Return what the same rows say of a target that was missed: the host, the device alone, the same plan by name."""
    auto, best = fastest(found, "plan auto"), fastest(found, "plan", "plan auto")
    assert auto is not None
    host = f"host {auto['host_ms']:.2f} of {auto['ms']:.2f} ms"
    if ": auto /" in one["what"]:
        assert best is not None
        same = took.startswith(f"lattice-{best['name'].split()[1]} ")
        return f"{'the same plan, timed twice' if same else f'took {took}'}; {host}"
    if "graph_ms" not in auto:
        return f"{host}; the device's part is below"
    if one["what"].endswith(": ms"):
        return f"{auto['graph_ms']:.3f} ms when replayed from a CUDA graph; {host}"
    start = "kernels" if "kernels alone" in one["what"] else "hand-written eager"
    other = min(r["graph_ms"] for r in found if r["name"].startswith(start) and "graph_ms" in r)
    ratio = auto["graph_ms"] / other if start == "kernels" else other / auto["graph_ms"]
    return f"{ratio:.3f} when both are replayed from CUDA graphs; {host}"


NAMES = {
    "plan auto": "plan",
    "kernels": "kernels alone",
    "hand-written eager": "eager by hand",
    "hand-written compiled": "compiled by hand",
    "published": "published class",
}
"""Beginnings of contestants' names, and the columns that have the fastest of each."""


def times(results: Results) -> Iterator[str]:
    """Return a table of milliseconds of what the planner chose and its peers, and of the bytes that it moves."""
    yield f"| case, milliseconds | by | {' | '.join(NAMES.values())} | MiB moved | compulsory |"
    yield "|---|---|" + "---|" * (len(NAMES) + 2)
    for run, files in RUNS:
        for file in files:
            rows = results.rows(file)
            for where, found in groups(rows).items():
                best = [fastest(found, name) for name in NAMES]
                shown = " | ".join(f"{r['ms']:.2f}" if r else "-" for r in best)
                about = next((r for r in rows if "auto" in r and _where(r) == where), {})
                yield f"| {_title(where)} | {run} | {shown} | {_moved(about)} |"
    yield ""
    for file in (f for _, files in RUNS for f in files):
        late = sum(r.get("failed") == "no time left" for r in results.rows(file))
        if late:
            yield f"Not run for want of time in `{file}.json`: {late} rows."
        broken = [r for r in results.rows(file) if r.get("failed", "no time left") != "no time left"]
        if broken:
            names = ", then ".join(f"`{r['name']}`" for r in broken)
            yield f"Failed in `{file}.json`: {names}: {broken[0]['failed'].splitlines()[0]}."
            yield ""


def _moved(about: Row) -> str:
    return f"{about.get('moved_mib') or '-'} | {about.get('compulsory_mib') or '-'}"


def timeline(results: Results) -> Iterator[str]:
    """Return a table of device time by kind of kernel: alone, and in the plan."""
    found: dict[tuple[str, bool, bool], dict[str, Row]] = {}
    for row in results.rows(TIMELINE):
        if "span_us" in row:
            kind = "alone" if "kernels" in row["name"] else "plan"
            found.setdefault(_where(row), {})[kind] = row
    lines = []
    for where, pair in found.items():
        if {"alone", "plan"} <= pair.keys():
            alone, plan = pair["alone"], pair["plan"]
            times = [_sum(alone, "cudnn"), _sum(plan, "cudnn"), _sum(plan, "pull_kernel")]
            count = f"{_calls(alone):.0f} | {_calls(plan):.0f}"
            ratio = (times[1] + times[2]) / times[0]
            spent = " | ".join(f"{t / 1e3:.2f}" for t in times)
            lines.append(f"| {_title(where)} | {count} | {spent} | {ratio:.3f} | {plan['gaps_us'] / 1e3:.2f} |")
    if lines:
        yield "Device time by the profiler, in milliseconds (cuDNN; `bench/results/longnet-timeline-h100.json`):"
        yield ""
        yield "| case | launches alone | in the plan | attention alone | in the plan | joins | both over alone | gaps |"
        yield "|---|---|---|---|---|---|---|---|"
        yield from lines
        yield ""
        yield "A plan starts more launches, since rows that strides express are not copied into one, and joins the"
        yield "branches afterwards; with short kernels both weigh more. Gaps are the host's, which the profiler slows."
        yield ""


def _kernels(row: Row, name: str) -> list[dict[str, Any]]:
    return [k for k in row["kernels"] if name in k["kernel"] and not k["kernel"].startswith("attnplan")]


def _sum(row: Row, name: str) -> float:
    return float(sum(k["us"] for k in _kernels(row, name)))


def _calls(row: Row) -> float:
    return float(sum(k["calls"] for k in _kernels(row, "fprop")))
