"""The join alone at the sizes of ``bench.longnet``, for several block sizes and numbers of warps: what to set them to.

    python -m bench.longnet_pull --gpu --json bench/results/longnet-pull-h100.json --budget 60
    python -m bench.longnet_pull --tiny                             on the CPU: tries the script, measures nothing

Joins are those of plans on views, of the output and of dq, as the kernels leave their parts.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from attnplan.runtime.fused import pull
from bench.longnet import CASES, TINY, best, plan_of, training_of
from bench.longnet_clock import Bench
from bench.longnet_peers import Case

_SETTINGS = [(4096, 32, 4), (2048, 32, 4), (4096, 32, 8), (8192, 32, 8), (4096, 64, 4), (4096, 64, 8)]
"""(elements that a program writes, features that it takes at a time, warps)."""


def joins(bench: Bench, case: Case) -> dict[str, Callable[[], Any]]:
    """Return the joins of output and of dq as calls, each setting after the other, on what the kernels gave once."""
    found: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    first = {"output": pull.PullMerge.forward, "dq": pull.PullSum.forward}

    def seen(name: str) -> Callable[..., Any]:
        def forward(module: Any, *args: Any) -> Any:
            found.setdefault(name, (module, args))
            return first[name](module, *args)

        return forward

    plan = plan_of(bench, case, "views", *best(bench))
    with (
        mock.patch.object(pull.PullMerge, "forward", seen("output")),
        mock.patch.object(pull.PullSum, "forward", seen("dq")),
    ):
        training_of(plan, bench.tensors(case, 4))()
    made: dict[str, Callable[[], Any]] = {}
    for name, (module, args) in found.items():
        for setting in _SETTINGS:
            elements, piece, warps = setting
            made[f"{name}: {elements} elements, {piece} features, {warps} warps"] = partial(
                _ready, module, args, setting
            )
    return made


def _ready(module: Any, args: tuple[Any, ...], setting: tuple[int, int, int]) -> Callable[[], Any]:
    """Return a join with a setting of its own. It adds to what is in place again and again, which takes as long."""
    options: dict[str, Any] = {"base": module.base, "there": module.there, "weights": module.weights}
    if isinstance(module, pull.PullMerge):
        options["disjoint"] = module.disjoint
    with mock.patch.object(pull, "_WARPS", setting[2]):
        join = type(module)(module.sources, **options)

    def run() -> Any:
        pull._ELEMENTS, pull._PIECE = setting[:2]
        return join(*args)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="run on CUDA")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, by Triton's interpreter")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds after which no contestant begins")
    parser.add_argument("--cases", default="A,B", help="which specs")
    options = parser.parse_args()
    if not options.gpu:
        os.environ["TRITON_INTERPRET"] = "1"
    bench = Bench(options.json, options.budget, "cudnn,fa4", gpu=options.gpu, rounds=9, seconds=1.0)
    for case in TINY if options.tiny else [c for c in CASES if c.name in options.cases.split(",")]:
        where = {"case": case.name, "causal": False}
        contestants = bench.step(where, partial(joins, bench, case))
        if contestants is not None:
            bench.race(where, contestants)
    for row in sorted((r for r in bench.rows if "ms" in r), key=lambda r: (r["case"], r.get("graph_ms", r["ms"]))):
        print(f"{row['case']:>4} {row['name']:<40} {row['ms']:.4f} ms, replayed {row.get('graph_ms', 0):.4f}")


if __name__ == "__main__":
    main()
