"""Measures what the core promises on a CPU, and writes the rows as JSON.

    python -m bench.spine --json bench/results/spine-cpu.json

Every ratio is taken within one process, the contestants interleaved, medians compared.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import attnplan
import attnplan.cost
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.harness import environment
from attnplan.runtime.clock import uncollected
from attnplan.verify import relative_error

WIDTHS, RATES = [512, 1024, 2048, 4096, 8192], [1, 2, 4, 8, 16]


def interleaved(
    contestants: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Return seconds of each contestant in each round, after one untimed round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for i in range(rounds + 1):
        for name, run in contestants.items():
            start = clock()
            run()
            if i:
                times[name].append(clock() - start)
    return times


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def log_multiplicity(heads: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the bias [1, H, S, S] under which one softmax equals the mixture: log of how many branches see a pair."""
    count = torch.zeros(heads, length, length, dtype=torch.int8)
    for w, r in zip(WIDTHS, RATES, strict=True):
        for head in range(heads):
            for start in range(0, length, w):
                rows = torch.arange(start + head % r, min(start + w, length), r)
                count[head, rows[:, None], rows[None]] += 1
    return count.to(dtype).log_().unsqueeze(0)


def longnet(length: int = 8192, heads: int = 8, rounds: int = 5) -> dict[str, Any]:
    """Time LongNet against its equivalent single SDPA call and against dense SDPA, and check it against float64."""
    spec = AttentionSpec(seq_len=length, heads=heads, head_dim=64, dtype="float32", pattern=P.longnet(WIDTHS, RATES))
    plan = attnplan.compile(spec, device="cpu")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 64) for _ in range(3))
    bias = log_multiplicity(heads, length, torch.float32)
    times = interleaved(
        {
            "plan": lambda: plan(q, k, v),
            "sdpa with log-multiplicity bias": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias),
            "dense sdpa": lambda: F.scaled_dot_product_attention(q, k, v),
        },
        rounds,
    )
    got = plan(q, k, v)
    errors = []
    for head in range(heads):  # in float64, head by head: the scores of all heads together are 4 GiB
        one = [x[:, head : head + 1].double() for x in (q, k, v)]
        want = F.scaled_dot_product_attention(*one, attn_mask=bias[:, head : head + 1].double())
        errors.append(relative_error(got[:, head : head + 1], want))
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "name": "longnet",
        "spec": spec.to_dict(),
        "plan": repr(plan),
        "predicted_seconds": plan.predicted.seconds,
        "seconds": {name: summary(t) for name, t in times.items()},
        "times_faster_than_bias": medians["sdpa with log-multiplicity bias"] / medians["plan"],
        "times_faster_than_dense": medians["dense sdpa"] / medians["plan"],
        "worst_relative_l2": max(errors),
    }


def _microseconds(contestants: Mapping[str, Callable[[], Any]], calls: int, rounds: int) -> dict[str, float]:
    """Return the median over rounds of the mean time of one call, in microseconds of the calling thread.

    Thread time, because all of a tiny call happens on the calling thread, and other processes do not disturb it.
    """
    loops = {name: (lambda run=run: [run() for _ in range(calls)]) for name, run in contestants.items()}
    return {
        name: 1e6 * statistics.median(t) / calls for name, t in interleaved(loops, rounds, time.thread_time).items()
    }


def host_overhead(calls: int = 500, rounds: int = 31) -> dict[str, Any]:
    """Measure what a plan and attnplan.attention add to a call of SDPA, on tensors too small to matter."""
    spec = AttentionSpec(seq_len=8, heads=2, head_dim=8, causal=True, dtype="float32")
    plan = attnplan.compile(spec, device="cpu")
    result: dict[str, Any] = {"name": "host overhead", "spec": spec.to_dict()}
    for grad in (False, True):
        q, k, v = (torch.randn(1, 2, 8, 8, requires_grad=grad) for _ in range(3))
        contestants = {
            "sdpa": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            "plan": lambda q=q, k=k, v=v: plan(q, k, v),
            "attention": lambda q=q, k=k, v=v: attnplan.attention(q, k, v, causal=True),
        }
        us = _microseconds(contestants, calls, rounds)
        label = "with gradients" if grad else "without gradients"
        result[label] = {
            "microseconds": us,
            "plan_adds": us["plan"] - us["sdpa"],
            "attention_adds": us["attention"] - us["sdpa"],
        }
    return result


PACE = 0.025
"""Seconds of :func:`pace` on the machine that the limit of planning is meant for, while nothing disturbs it."""


def pace() -> float:
    """Return the seconds of a fixed piece of plain Python: what shares a core makes all Python as slow as this."""
    text = inspect.getsource(argparse)
    with uncollected():
        start = time.process_time()
        ast.unparse(ast.parse(text))
        return time.process_time() - start


def beside_pace(work: Callable[[], object]) -> tuple[float, float, float]:
    """Return the seconds of a call, those of the processor, and how much slower than :data:`PACE` Python was by it."""
    before, start, start_cpu = pace(), time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    return wall, cpu, max(1.0, (before + pace()) / (2 * PACE))


def planning(rounds: int = 9) -> dict[str, Any]:
    """Time planning LongNet over 1,000,003 tokens, 32 heads, 10 branches: lowering, passes, proofs, search.

    ``at_pace_seconds`` are those of the processor, divided in each round by how much slower than :data:`PACE` plain
    Python was in it.
    """
    pattern = P.longnet([1024 * 2**i for i in range(10)], [2**i for i in range(10)])
    wall, cpu, slower = [], [], []
    pace()  # the first one is slow
    for i in range(rounds):
        spec = AttentionSpec(seq_len=1_000_003, heads=32, head_dim=64, pattern=pattern, causal=True, scale=1 + i / 64)
        times = beside_pace(partial(attnplan.compile, spec, device="h100"))
        for found, one in zip((wall, cpu, slower), times, strict=True):
            found.append(one)
    return {
        "name": "planning",
        "spec": spec.to_dict(),
        "seconds": summary(wall),
        "cpu_seconds": summary(cpu),
        "at_pace_seconds": summary([seconds / by for seconds, by in zip(cpu, slower, strict=True)]),
        "slower_than_pace": summary(slower),
        "first_cpu_seconds": cpu[0],
    }


def explain_without_torch(spec_file: str, rounds: int = 5) -> dict[str, Any]:
    """Time `attnplan explain FILE --device h100` against `import torch`, as whole processes.

    Both run from bytecode, as installed packages do. The share is that of a round, whatever the machine's pace in it.
    """
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    commands = {
        "explain": [sys.executable, "-m", "attnplan", "explain", spec_file, "--device", "h100"],
        "import torch": [sys.executable, "-c", "import torch"],
    }
    run = partial(subprocess.run, check=True, capture_output=True, env=environ)
    times = interleaved({name: partial(run, command) for name, command in commands.items()}, rounds)
    shares = [mine / other for mine, other in zip(times["explain"], times["import torch"], strict=True)]
    return {
        "name": "explain without torch",
        "seconds": {name: summary(t) for name, t in times.items()},
        "share_of_import_torch": statistics.median(shares),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--spec", default="examples/longnet.toml")
    arguments = parser.parse_args()
    rows = [host_overhead(), planning(), explain_without_torch(arguments.spec), longnet()]
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(json.dumps({k: v for k, v in row.items() if k != "spec"}, indent=1))


if __name__ == "__main__":
    main()
