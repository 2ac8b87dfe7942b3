"""Time against memory budget: each budget is half the one before it, until the pieces have few rows.

    python -m bench.budget_curve --json bench/results/budget-curve-cpu.json --budget 300
    python -m bench.budget_curve --gpu --json bench/results/budget-curve-h100.json --budget 60 --limit 30
    python -m bench.budget_curve --plot docs/img/time-budget.svg --json bench/results/budget-curve-h100.json

The first budget is what the fastest plan needs. Plans of one spec are timed in turns, so that a slow moment of the
machine meets all of them; a row says how much longer its plan takes than the one of twice its budget. The last form
measures nothing: it draws the rows of a file.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import MemoryBudgetError
from attnplan.ir import Output
from attnplan.plan import Plan
from bench.deadline import deadline
from bench.memory import call_of, measured, seconds, warm_up

LEAST_ROWS = 4096
"""Pieces of fewer rows are measured once more, and no smaller ones."""
HOPELESS = 8
"""A plan that is predicted to take so many times as long as the fastest is the last of its curve."""
SLOW = 1.0
"""Seconds that a call on CUDA may be predicted to take."""
Rows = list[dict[str, Any]]


def specs(gpu: bool, tiny: bool = False) -> dict[str, AttentionSpec]:
    """Return what is measured, by name, the most informative first."""
    if gpu:
        return _on_gpu()
    long, longer, heads = (512, 1024, 2) if tiny else (8192, 65_536, 2)
    common: dict[str, Any] = {"heads": heads, "head_dim": 64, "dtype": "float32", "causal": True}
    longnet = P.longnet([256, 1024, 4096], [1, 4, 16]) if not tiny else P.longnet([64, 256], [1, 4])
    return {
        f"causal, {long} tokens": AttentionSpec(seq_len=long, **common),
        f"LongNet, {longer} tokens": AttentionSpec(seq_len=longer, pattern=longnet, **common),
        f"causal, {long} tokens, training": AttentionSpec(seq_len=long, training=True, **common),
        f"LongNet, {longer} tokens, training": AttentionSpec(seq_len=longer, pattern=longnet, training=True, **common),
    }


def _on_gpu() -> dict[str, AttentionSpec]:
    dense: dict[str, Any] = {"seq_len": 65_536, "heads": 16, "head_dim": 128, "dtype": "bfloat16", "causal": True}
    long: dict[str, Any] = {"seq_len": 2**20, "heads": 8, "head_dim": 64, "dtype": "bfloat16", "causal": True}
    b: dict[str, Any] = {"seq_len": 131_072, "heads": 16, "head_dim": 128, "dtype": "bfloat16"}
    windows, rates = [4096, 16_384, 65_536, 131_072], [1, 4, 16, 16]
    longnet = P.longnet([2048, 8192, 32_768], [1, 4, 16])
    found = {
        "LongNet, 1048576 tokens": AttentionSpec(pattern=longnet, **long),
        "causal, 65536 tokens": AttentionSpec(**dense),
        "window 2048, 65536 tokens": AttentionSpec(pattern=P.window(2048), **dense),
        "LongNet B, 131072 tokens": AttentionSpec(pattern=P.longnet(windows, rates), **b),
    }
    return found | {f"{name}, training": attrs.evolve(spec, training=True) for name, spec in found.items()}


def rows_of(plan: Plan) -> int:
    """Return the query rows of a piece of a plan."""
    output = plan.graph.output.op
    assert isinstance(output, Output)
    whole = plan.spec.shape.seq_len
    return whole if output.loop is None else min(whole, output.loop[2])


def ladder(spec: AttentionSpec, device: str, least_rows: int) -> list[tuple[int, Plan]]:
    """Return the plans of halved budgets, up to the first with fewer rows in a piece or the last that there is."""
    free = attnplan.compile(spec, device=device)
    found, budget = [(free.predicted.peak_bytes, free)], free.predicted.peak_bytes // 2
    while True:
        try:
            plan = attnplan.compile(spec, device=device, max_memory=budget)
        except MemoryBudgetError:
            return found
        found.append((budget, plan))
        if rows_of(plan) < least_rows or plan.predicted.seconds > HOPELESS * free.predicted.seconds:
            return found
        budget //= 2


def curve(name: str, spec: AttentionSpec, device: str, rounds: int, least_rows: int) -> Rows:
    """Measure the plans of one spec."""
    plans = ladder(spec, device, least_rows)
    if device != "cpu" and plans[-1][1].predicted.seconds > SLOW:
        plans.pop()
    peaks = [measured(call_of(plan, device), device).allocated for _, plan in plans]
    calls = [call_of(plan, device) for _, plan in plans]
    for call in calls:
        call()
    times: list[list[float]] = [[] for _ in plans]
    for _ in range(rounds):
        for mine, call in zip(times, calls, strict=True):
            mine += seconds(call, device, 1)
    medians = [statistics.median(mine) for mine in times]
    return [
        {
            "name": name,
            "budget": budget,
            "choice": next(c.name for c in plan.candidates if c.prediction is plan.predicted),
            "rows_of_piece": rows_of(plan),
            "predicted": plan.predicted.peak_bytes,
            "measured": peaks[i],
            "fits": peaks[i] <= budget,
            "seconds": medians[i],
            "fastest_seconds": min(times[i]),
            "over_twice_the_budget": medians[i] / medians[max(0, i - 1)],
            "over_the_fastest": medians[i] / medians[0],
        }
        for i, (budget, plan) in enumerate(plans)
    ]


def run(options: argparse.Namespace, write: Callable[[Rows], None]) -> Rows:
    """Measure every spec while there is time; a failure is a row, too."""
    device = "cuda" if options.gpu else "cpu"
    warm_up(device)
    start, found = time.perf_counter(), Rows()
    for name, spec in specs(options.gpu, options.tiny).items():
        if time.perf_counter() - start > options.budget:
            found.append({"name": name, "skipped": f"the {options.budget:.0f} s are over"})
            continue
        try:
            with deadline(options.limit):
                found += curve(name, spec, device, options.rounds, 128 if options.tiny else LEAST_ROWS)
        except Exception as error:  # one spec must not lose the others
            found.append({"name": name, "failed": f"{type(error).__name__}: {str(error)[:400]}"})
        write(found)
        attnplan.cache_clear()
        gc.collect()
    return found


def summary(found: Rows, least_rows: int = LEAST_ROWS) -> dict[str, Any]:
    """Return the most that halving a budget costs while pieces have enough rows."""
    counted = [r for r in found if "seconds" in r and r["rows_of_piece"] >= least_rows]
    return {
        "rows": len(found),
        "failed": sum("failed" in r for r in found),
        "over_budget": sum(not r["fits"] for r in found if "fits" in r),
        "worst_halving": max((r["over_twice_the_budget"] for r in counted), default=None),
    }


def draw(found: Rows, path: Path) -> None:
    """Draw time against budget, both relative to those of the fastest plan, of each spec with two budgets or more."""
    from matplotlib.figure import Figure

    from bench.blocks_plot import save

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    title = ""
    for name in dict.fromkeys(r["name"] for r in found if "seconds" in r):
        mine = [r for r in found if r["name"] == name and "seconds" in r]
        if len(mine) < 2:  # the fastest plan alone says nothing of budgets
            continue
        shares = [r["budget"] / mine[0]["budget"] for r in mine]
        (line,) = axes.plot(shares, [r["over_the_fastest"] for r in mine], marker="o", markersize=4, label=name)
        small = [
            (s, r["over_the_fastest"]) for s, r in zip(shares, mine, strict=True) if r["rows_of_piece"] < LEAST_ROWS
        ]
        if small:
            title = f"empty circles: pieces of fewer than {LEAST_ROWS:,} rows"
            axes.plot(*zip(*small, strict=True), "o", markerfacecolor="white", color=line.get_color(), markersize=6)
    axes.set_xscale("log", base=2)
    axes.invert_xaxis()
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("memory budget, as a share of what the fastest plan needs")
    axes.set_ylabel("time, as a multiple of the fastest plan's")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(title=title or None, fontsize="small")
    save(figure, path, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on CUDA; the default is the CPU")
    parser.add_argument("--json", type=Path, help="write the rows to this file, or read them from it to draw them")
    parser.add_argument("--plot", type=Path, help="draw the rows of --json there, and measure nothing")
    parser.add_argument("--tiny", action="store_true", help="a thousand tokens: tries the script")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=300.0, help="seconds after which no other spec is started")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one spec may take")
    options = parser.parse_args()
    if options.plot is not None:
        draw(json.loads(options.json.read_text())["rows"], options.plot)
        return
    from attnplan.harness import environment

    def write(found: Rows) -> None:
        if options.json:
            text = json.dumps({"environment": environment(), "summary": summary(found), "rows": found}, indent=1)
            options.json.write_text(text + "\n")

    found = run(options, write)
    for r in found:
        print({k: v for k, v in r.items() if k in ("name", "budget", "rows_of_piece", "seconds", "failed", "choice")})
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
