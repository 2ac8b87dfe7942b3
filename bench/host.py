"""Host time of a call: a plan beside the kernel that it calls, on tensors so small that the device waits.

`python -m bench.host --json bench/results/host-cpu.json`, or with `--gpu` on a GPU. Target: a plan of one kernel call
costs at most 15 microseconds more than the call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.cost import resolve
from attnplan.plan import Plan
from attnplan.search import every_way
from bench.kernels_by_hand import raw

BACKENDS = ("eager", "flash", "xformers")
SIZES = {"cpu": {"seq_len": 16, "heads": 2, "head_dim": 16}, "cuda": {"seq_len": 128, "heads": 2, "head_dim": 64}}
CASES = {
    "causal": {"causal": True},
    "window": {"causal": True, "pattern": P.window(8)},
    "longnet": {"causal": True, "pattern": P.longnet([4, 8, 16], [1, 2, 4])},
    "sinks": {"causal": True, "sink_logits": True},
}


def plans(spec: AttentionSpec, device: str) -> Iterator[Plan]:
    """Iterate over the cheapest plan of each schedule that takes a spec here."""
    seen = set()
    target = resolve(device)
    accepted = [(c, f) for c, f in every_way(spec, target) if f is not None and c.backend in BACKENDS]
    for candidate, found in sorted(accepted, key=lambda pair: pair[0].prediction.seconds):
        if (candidate.backend, candidate.schedule) not in seen:
            seen.add((candidate.backend, candidate.schedule))
            yield Plan(spec, target, found, {}, strict=True)


def in_turns(
    works: dict[str, Callable[[], Any]], rounds: int, calls: int, wait: Callable[[], None]
) -> dict[str, float]:
    """Return microseconds of host time a call, the median of rounds in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        for _ in range(3):
            work()
    for _ in range(rounds):
        for name, work in works.items():
            wait()
            start = time.perf_counter()
            for _ in range(calls):
                work()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: 1e6 * statistics.median(x) for name, x in seconds.items()}


def rows(device: str, rounds: int, calls: int) -> Iterator[dict[str, Any]]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    size = SIZES[device]
    q, k, v = (
        torch.randn(1, size["heads"], size["seq_len"], size["head_dim"], device=device, dtype=dtype) for _ in range(3)
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    for name, options in CASES.items():
        spec = AttentionSpec(dtype=dtype, **size, **options)
        given = {"sink_logits": torch.zeros(2, device=device)} if spec.sink_logits else {}
        for plan in plans(spec, device):
            works: dict[str, Callable[[], Any]] = {
                "plan": lambda plan=plan, given=given: plan(q, k, v, **given),
                "plan with gradients": lambda plan=plan, given=given: plan(*leaves, **given),
            }
            if name == "causal" and plan.backend == "eager":
                works["raw"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
                works["raw with gradients"] = lambda: F.scaled_dot_product_attention(*leaves, is_causal=True)
            if name == "causal" and plan.backend != "eager":
                works["raw"] = raw(plan, q, k, v)
            if name == "causal":
                works["attention()"] = lambda: attnplan.attention(q, k, v, causal=True)
            try:
                found = in_turns(works, rounds, calls, wait)
            except Exception as error:  # one row must not lose the others
                yield {"case": name, "plan": repr(plan), "error": f"{type(error).__name__}: {error}"[:500]}
                continue
            more = {"over_raw": found["plan"] - found["raw"]} if "raw" in found else {}
            yield {"case": name, "plan": repr(plan), "microseconds": found, **more}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--budget", type=float, default=float("inf"), help="begin no row after this many seconds")
    options = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__, "rows": []}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    start = time.perf_counter()
    for row in rows("cuda" if options.gpu else "cpu", options.rounds, options.calls):
        found["rows"].append(row)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        each = ", ".join(f"{n} {x:.1f}" for n, x in row.get("microseconds", {}).items())
        print(f"{row['case']:8} {row['plan'][6:70]:64} {each or row['error']}")
        if time.perf_counter() - start > options.budget:
            break


if __name__ == "__main__":
    main()
