"""Measures what plans need beside what they were predicted to need, under budgets from generous to one that just fits.

    python -m bench.memory --json bench/results/memory-cpu.json                    counted allocation by allocation
    python -m bench.memory --gpu --json bench/results/memory-h100.json --budget 75

On the CPU the peak is the sum of the allocator's events under torch's profiler; on CUDA it is
``torch.cuda.max_memory_allocated``. Both leave out q, k, v, the output and the gradients of all four.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.errors import MemoryBudgetError
from attnplan.plan import Plan
from attnplan.units import format_bytes
from bench.deadline import deadline

MIB = 2**20
SHARES = (0.5, 0.25, 1.0, 0.125, 0.0, 2.0)
"""Budgets as shares of what the fastest plan needs, the most informative first; 0 is the smallest that works."""
LONG, SHORT = 65_536, 4096
"""Tokens on CUDA. A plan that just fits is measured at the shorter: it may take a thousand times as long."""
SLOW = 0.25
"""Seconds that a call on CUDA may be predicted to take; the spec is measured at the shorter length if it is more."""
ROW_LIMIT = 20.0
"""Seconds that a row on CUDA may take, planning included."""


def patterns(unit: int) -> dict[str, dict[str, Any]]:
    """Return patterns by name; ``unit`` is the shortest segment."""
    return {
        "full": {"pattern": P.full()},
        "causal, grouped heads": {"pattern": P.full(), "causal": True, "kv_heads": 2},
        "window": {"pattern": P.window(unit), "causal": True},
        "longnet": {"pattern": P.longnet([unit, 4 * unit, 16 * unit], [1, 4, 16])},
        "longnet causal": {"pattern": P.longnet([unit, 2 * unit, 8 * unit], [1, 2, 8]), "causal": True},
        "grouped": {"pattern": P.grouped([unit, 4 * unit], [1, 4])},
        "mean of two": {"pattern": P.mix([P.segments(unit), P.dilated(4 * unit, 4)], rule="mean")},
    }


def specs(gpu: bool, length: int = 0) -> Iterator[tuple[str, AttentionSpec]]:
    """Iterate over the specs."""
    length = length or (LONG if gpu else 4096)
    heads, unit, dtype = (8, length // 32, "bfloat16") if gpu else (4, length // 16, "float32")
    found = patterns(unit)
    for training in (False, True):
        for name, rest in found.items():
            if gpu or not (training and name == "full"):
                spec = AttentionSpec(seq_len=length, heads=heads, head_dim=64, dtype=dtype, training=training, **rest)
                yield f"{name}{', training' if training else ''}", spec
    short = length // 8 if gpu else length // 2
    plain: dict[str, Any] = {"heads": heads, "head_dim": 64, "dtype": "float32", "softcap": 30.0}
    for training in (False, True):
        for causal in (False, True):
            name = f"materialised scores{', causal' if causal else ''}{', training' if training else ''}"
            yield name, AttentionSpec(seq_len=short, causal=causal, training=training, **plain)


@attrs.frozen
class Peak:
    """What a call allocated."""

    allocated: int
    """Bytes beside inputs and outputs at the worst moment."""
    reserved: int
    """On CUDA, bytes of the segments that the allocator took for it; 0 on the CPU."""


def call_of(plan: Plan, device: str, seed: int = 0) -> Callable[[], tuple[Tensor, ...]]:
    """Return a call that gives everything which is not counted: the output and, in training, the gradients."""
    spec, shape = plan.spec, plan.spec.shape
    torch.manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    sizes = {
        "q": (spec.heads, shape.seq_len, spec.head_dim),
        "k": (spec.kv_heads, shape.kv_len, spec.head_dim),
        "v": (spec.kv_heads, shape.kv_len, spec.value_dim),
        "grad": (spec.heads, shape.seq_len, spec.value_dim),
    }
    swap = spec.layout == "bshd"
    orders = ((rows, heads, features) if swap else (heads, rows, features) for heads, rows, features in sizes.values())
    q, k, v, grad = (torch.randn(spec.batch, *order, device=device, dtype=dtype) for order in orders)

    def run() -> tuple[Tensor, ...]:
        if not spec.training:
            return (plan(q, k, v),)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = plan(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    return run


def measured(run: Callable[[], tuple[Tensor, ...]], device: str) -> Peak:
    """Return the peak of a call; masks and tables that stay with the plan are part of the first."""
    gc.collect()
    if device == "cpu":
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            results = run()
        live = top = 0
        for event in profile.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                top = max(top, live)
        return Peak(top - _bytes(results), 0)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, segments = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    torch.cuda.synchronize()
    own = _bytes(results)
    found = Peak(torch.cuda.max_memory_allocated() - before - own, torch.cuda.max_memory_reserved() - segments - own)
    del results
    return found


def _bytes(results: tuple[Tensor, ...]) -> int:
    return sum(x.numel() * x.element_size() for x in results)


def warm_up(device: str) -> None:
    """Let libraries allocate what they keep for good, which is no part of any plan."""
    if device != "cpu":
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(256, 256, device=device, dtype=dtype, requires_grad=True)
            (x @ x).sum().backward()
            (x[None] @ x[None]).sum().backward()
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], device: str, rounds: int) -> list[float]:
    """Return wall times of a call."""
    found = []
    for _ in range(rounds):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found


def smallest(spec: AttentionSpec, device: str) -> int:
    """Return the smallest budget that works, as the refusal of one byte says."""
    try:
        return attnplan.compile(spec, device=device, max_memory=1).predicted.peak_bytes
    except MemoryBudgetError as error:
        refused = str(error)
    found = re.search(r"max_memory='(\d+) KiB'", refused)
    if found is None:
        raise ValueError(refused)
    return int(found[1]) * 2**10


class TooSlowError(RuntimeError):
    """A plan is predicted to take longer than a row has time for."""


def row(
    name: str, spec: AttentionSpec, share: float, device: str, rounds: int, slow: float = float("inf")
) -> dict[str, Any]:
    """Compile one spec under one budget, run it, and compare.

    Raises
    ------
    TooSlowError
        If the plan is predicted to take longer than ``slow`` seconds.
    """
    fastest = attnplan.compile(spec, device=device)
    start = time.perf_counter()
    budget = smallest(spec, device) if share == 0.0 else max(1, int(fastest.predicted.peak_bytes * share))
    found: dict[str, Any] = {"name": name, "share": share, "budget": budget, "device": device}
    found["tokens"] = spec.shape.seq_len
    if share == 0.0:
        found["refusing"] = time.perf_counter() - start  # one byte, which nothing meets
    start = time.perf_counter()
    try:
        plan = attnplan.compile(spec, device=device, max_memory=budget)
    except MemoryBudgetError as error:
        return {**found, "refused": str(error)}
    found["planning"] = time.perf_counter() - start
    if plan.predicted.seconds > slow:
        raise TooSlowError(f"{plan} is predicted to take {plan.predicted.seconds:.1f} s")
    chosen = next(c for c in plan.candidates if c.prediction is plan.predicted)
    run = call_of(plan, device)
    peak = measured(run, device)
    predicted = plan.predicted
    times = seconds(run, device, max(1, min(rounds, int(1 + 0.3 / max(predicted.seconds, 1e-6)))))
    return {
        **found,
        "choice": chosen.name,
        "predicted": predicted.peak_bytes,
        "parts": attrs.asdict(predicted.memory),
        "measured": peak.allocated,
        "reserved": peak.reserved,
        "fits": peak.allocated <= budget,
        "below": predicted.peak_bytes < peak.allocated,
        "close": predicted.peak_bytes <= max(1.3 * peak.allocated, peak.allocated + 16 * MIB),
        "seconds": statistics.median(times),
        "fastest_seconds": min(times),
        "predicted_seconds": predicted.seconds,
    }


def rows(gpu: bool, budget: float, rounds: int, write: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Measure every row while there is time; a failure is a row, too."""
    device = "cuda" if gpu else "cpu"
    warm_up(device)
    start, found = time.perf_counter(), list[dict[str, Any]]()
    shorter = dict(specs(gpu, SHORT)) if gpu else {}
    for share in SHARES:
        for name, spec in specs(gpu):
            if time.perf_counter() - start > budget:
                found.append({"name": name, "share": share, "skipped": f"the {budget:.0f} s are over"})
                continue
            sizes = [spec] if not gpu else [shorter[name]] if share == 0.0 else [spec, shorter[name]]
            found.append(_first(name, sizes, share, device, rounds))
            write(found)
            print(line(found[-1]), flush=True)
    write(found)
    return found


def _first(name: str, sizes: list[AttentionSpec], share: float, device: str, rounds: int) -> dict[str, Any]:
    """Return the row of the first size whose plan is fast enough, or what went wrong."""
    on_gpu = device != "cpu"
    try:
        with deadline(ROW_LIMIT) if on_gpu else nullcontext():
            for spec in sizes:
                try:
                    return row(name, spec, share, device, rounds, SLOW if on_gpu and spec is not sizes[-1] else 4.0)
                except TooSlowError as error:
                    reason = str(error)
        return {"name": name, "share": share, "slow": reason}
    except Exception as error:  # one row must not lose the others
        return {"name": name, "share": share, "failed": f"{type(error).__name__}: {str(error)[:400]}"}
    finally:
        attnplan.cache_clear()
        gc.collect()


def line(found: dict[str, Any]) -> str:
    """Return a row as one line of the table."""
    head = f"{found['name']:<38} {found['share']:>5}"
    if "measured" not in found:
        return f"{head}  {next(found[k] for k in ('refused', 'failed', 'slow', 'skipped') if k in found)}"
    marks = "" if found["fits"] else "  OVER BUDGET"
    marks += "  BELOW" if found["below"] else ""
    marks += "" if found["close"] else "  FAR"
    return (
        f"{head}  budget {format_bytes(found['budget']):>9}  predicted {format_bytes(found['predicted']):>9}  "
        f"measured {format_bytes(found['measured']):>9}  {1e3 * found['seconds']:9.2f} ms  {found['choice']}{marks}"
    )


def summary(found: list[dict[str, Any]]) -> dict[str, float]:
    """Return how many rows do what they must, and how long the slowest refusal took."""
    run = [r for r in found if "measured" in r]
    return {
        "rows": len(found),
        "measured": len(run),
        "refused": sum("refused" in r for r in found),
        "failed": sum("failed" in r or "slow" in r for r in found),
        "over_budget": sum(not r["fits"] for r in run),
        "predicted_below": sum(r["below"] for r in run),
        "predicted_far": sum(not r["close"] for r in run),
        "slowest_refusal": max((r["refusing"] for r in found if "refusing" in r), default=0.0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on CUDA; the default is the CPU")
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each of them")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    from attnplan.harness import environment

    def write(found: list[dict[str, Any]]) -> None:
        if options.json:
            text = json.dumps({"environment": environment(), "summary": summary(found), "rows": found}, indent=1)
            options.json.write_text(text + "\n")

    print(json.dumps(summary(rows(options.gpu, options.budget, options.rounds, write))))


if __name__ == "__main__":
    main()
