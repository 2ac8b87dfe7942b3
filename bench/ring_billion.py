"""LongNet over 2^30 tokens on the GPUs of one machine: ``python -m bench.ring --gpu --only longnet30``.

One head of 32 features, bfloat16, forward, segments of 8,192 rows and up with rates that double. Each rank generates
its rows on its device from their positions, so that any row of any rank can be generated again: sampled rows of the
output are compared with float64, by keys that are named here and not by the plan. Where 2^30 tokens do not fit, or
fail, half as many are tried, and so on; what failed is in the rows.
"""

from __future__ import annotations

import gc
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P

FEATURES = 32
FIRST = 8192
CHUNK = 1 << 22
SAMPLES = 64


def spec_of(length: int, first: int, dtype: str) -> AttentionSpec:
    segments, rates = [first], [1]
    while segments[-1] < length:
        segments.append(2 * segments[-1])
        rates.append(2 * rates[-1])
    pattern = P.longnet(segments, rates)
    return AttentionSpec(seq_len=length, heads=1, head_dim=FEATURES, causal=True, pattern=pattern, dtype=dtype)


def rows_of(positions: Tensor, which: int, dtype: torch.dtype) -> Tensor:
    """Return rows ``[n, D]`` of q (0), k (1) or v (2): numbers that look random, from their positions alone."""
    x = positions[:, None] * FEATURES + torch.arange(FEATURES, device=positions.device) + which * 0x51ED2701
    for shift, factor in ((15, 0x2C1B3C6D), (12, 0x297A2D39), (15, 0x1B873593)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return ((x ^ (x >> 16)).double() / 2**32 * 3.4 - 1.7).to(dtype)


def filled(positions: Tensor, which: int, dtype: torch.dtype) -> Tensor:
    """Return rows ``[1, 1, n, D]``, made a few at a time."""
    made = torch.empty(1, 1, len(positions), FEATURES, dtype=dtype, device=positions.device)
    for start in range(0, len(positions), CHUNK):
        made[0, 0, start : start + CHUNK] = rows_of(positions[start : start + CHUNK], which, dtype)
    return made


def expected(spec: AttentionSpec, first: int, row: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the output of one row in float64: the softmax over the keys of all branches, in which it takes part."""
    keys = []
    width, rate = first, 1
    while width <= spec.shape.seq_len:
        if row % rate == 0:
            keys.append(torch.arange(row // width * width, row + 1, rate, device=device))
        width, rate = 2 * width, 2 * rate
    positions = torch.cat(keys)
    q = rows_of(torch.tensor([row], device=device), 0, dtype).double()
    k, v = (rows_of(positions, which, dtype).double() for which in (1, 2))
    return torch.softmax(spec.softmax_scale * (q @ k.mT), -1) @ v


def attempt(bench: Any, length: int, first: int) -> dict[str, Any]:
    """Run one length; every rank returns or raises."""
    spec = spec_of(length, first, bench.setting.dtype)
    started = time.perf_counter()
    plan = attnplan.compile(spec, mesh=bench.mesh)
    planned = time.perf_counter() - started
    dtype = getattr(torch, spec.dtype)
    positions = plan.positions().to(bench.device)
    q, k, v = (filled(positions, which, dtype) for which in range(3))
    with torch.no_grad():
        out = plan(q, k, v)
        del out
        seconds = bench.timed(lambda: plan(q, k, v), warm=0, rounds=3)
        out = plan(q, k, v)
    generator = torch.Generator().manual_seed(bench.rank)
    worst = 0.0
    special = torch.tensor([0, len(positions) - 1, len(positions) // 2])  # a row of many branches among them
    for i in torch.cat([special, torch.randint(0, len(positions), (SAMPLES - 3,), generator=generator)]).tolist():
        want = expected(spec, first, int(positions[i]), dtype, bench.device)[0]
        worst = max(worst, ((out[0, 0, i].double() - want).norm() / want.norm()).item())
    error = bench.slowest(worst)
    return {
        "spec": {"tokens": length, "heads": 1, "head_dim": FEATURES, "first_segment": first, "dtype": spec.dtype},
        "forward_s": seconds,
        "planning_s": bench.slowest(planned),
        "bytes_sent_forward": int(bench.slowest(plan.traffic(bench.rank).sent)),
        "layout": plan.layout,
        "transport": plan.transport,
        "backend": f"{plan.backend} ({plan.schedule})",
        "predicted_s": plan.predicted.seconds,
        "sampled_rows": SAMPLES * bench.ranks,
        "error": error,
        "right": error <= (8e-3 if spec.dtype == "bfloat16" else 1e-5),
        "peak_bytes": int(bench.slowest(bench.peak())),
    }


def run(bench: Any, write: Any) -> None:
    """Try 2^30 tokens, then half as many, until a length runs."""
    gpu = bench.setting.kind == "cuda"
    first, most, least = (FIRST, 30, 24) if gpu else (64, 12, 11)
    for power in range(most, least - 1, -1):
        bench.add(
            f"longnet over 2^{power} tokens", {"ranks": bench.ranks}, lambda n=1 << power: attempt(bench, n, first)
        )
        write()
        row = bench.rows[-1]
        gc.collect()
        if gpu:
            torch.cuda.empty_cache()
        failed = torch.tensor([0.0 if "forward_s" in row else 1.0], device=bench.device)
        dist.all_reduce(failed, dist.ReduceOp.MAX)
        if not failed.item() or "skipped" in row:
            return
