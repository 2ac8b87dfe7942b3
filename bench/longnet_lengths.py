"""LongNet from 16 thousand to 4 million tokens: segments and rates grow with the length, a token's time should not.

    python -m bench.longnet_lengths --gpu --json bench/results/longnet-lengths-h100.json --budget 120
    python -m bench.longnet_lengths --plot bench/results/longnet-lengths-h100.json --svg docs/img/longnet-lengths.svg
    python -m bench.longnet_lengths --tiny                          on the CPU: tries the script, measures nothing

Branch i has segments of 2048 * 4^i at rate 4^i, as long as they fit: every branch has inner length 2048, and costs a
quarter of the one before. Kernels alone are measured up to half a million tokens; beyond, two contestants remain, so
that their tensors fit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.longnet import automatic, forward_of, plan_of
from bench.longnet_clock import Bench
from bench.longnet_lengths_plot import flatness, svg
from bench.longnet_peers import Case, kernels_alone

_ALONE = 1 << 19  # tokens up to which kernels are measured alone
FLAT_FROM, FLAT = 1 << 16, 1.10
"""Tokens from which the time of a token should be flat, and within what: the slowest over the fastest."""


def case_of(tokens: int, first: int, heads: int, head_dim: int) -> Case:
    """Return LongNet of a length whose branches end with it."""
    segments = [first]
    while segments[-1] * 4 <= tokens:
        segments.append(segments[-1] * 4)
    rates = tuple(length // first for length in segments)
    return Case(f"{tokens}", "longnet", tokens, heads, head_dim, tuple(segments), rates)


def contest(bench: Bench, case: Case) -> dict[str, Callable[[], Any]]:
    """Return what the planner chooses, plans on views, and kernels alone."""
    tensors = bench.tensors(case)
    made: dict[str, Callable[[], Any]] = {"plan auto": partial(automatic, bench, case, tensors, backward=False)}
    schedules = bench.schedules if case.tokens <= _ALONE else bench.schedules[-1:]
    for backend, schedule in schedules:
        made[f"plan views {schedule.runs}"] = partial(
            lambda b, s: forward_of(plan_of(bench, case, "views", b, s), tensors), backend, schedule
        )
        if case.tokens <= _ALONE:
            alone = (kernels_alone, case, schedule.runs, bench.device, bench.dtype)
            made[f"kernels {schedule.runs}"] = partial(*alone, batched=False, backward=False)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="run on CUDA")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plot", type=Path, help="read rows from here, and only draw them")
    parser.add_argument("--svg", type=Path, help="write the picture here")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which no contestant begins")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--kernels", default="cudnn,fa4")
    options = parser.parse_args()
    rows = _measured(options) if options.plot is None else json.loads(options.plot.read_text())["rows"]
    if options.svg is not None:
        options.svg.write_text(svg(rows))
    for name, (tokens, ratio) in flatness(rows, FLAT_FROM).items():
        print(
            f"{name:<24} slowest over fastest token from {FLAT_FROM} to {tokens} tokens: {ratio:.3f} (at most {FLAT})"
        )


def _measured(options: argparse.Namespace) -> list[dict[str, Any]]:
    bench = Bench(
        options.json, options.budget, options.kernels, gpu=options.gpu, rounds=options.rounds, seconds=2.0
    )  # fmt: skip
    sizes = (16, 4, 16) if options.tiny or not options.gpu else (2048, 8, 64)
    lengths = (64, 256) if options.tiny or not options.gpu else [1 << n for n in range(14, 23)]
    for tokens in lengths:
        case = case_of(tokens, *sizes)
        where = {"tokens": tokens, "case": case.name, "causal": False}
        contestants = bench.step(where, partial(contest, bench, case))
        if contestants is not None:
            bench.race(where, contestants, replay=tokens <= _ALONE)
        del contestants
        if bench.gpu:
            torch.cuda.empty_cache()
    print(f"\n{'tokens':>9} {'':<24} ns a token, started by the host and replayed from a CUDA graph")
    for row in bench.rows:
        if "ms" in row:
            each = [f"{row[k] * 1e6 / row['tokens']:>8.2f}" if k in row else f"{'-':>8}" for k in ("ms", "graph_ms")]
            print(f"{row['tokens']:>9} {row['name']:<24} {'  '.join(each)}")
    return bench.rows


if __name__ == "__main__":
    main()
