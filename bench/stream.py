"""Streams LongNet over 2^24 tokens whose q, k, v and output lie in host memory, and measures what limits it.

    python -m bench.stream --gpu --json bench/results/stream-h100.json --budget 400
    python -m bench.stream --log2 14 --max-memory 4MiB                           small, on the CPU: tries the script

The copies alone and the computing alone are measured in the same run, on the same pieces: the wall time should be near
the longer of the two. Sampled rows are compared with float64.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.plan import Plan
from attnplan.streams import choose
from attnplan.units import format_bytes, parse_bytes
from bench.memory import warm_up

HEADS, HEAD_DIM = 8, 64


def spec_of(log2: int, dtype: str, branches: int) -> AttentionSpec:
    """Return LongNet with segments of 2,048 tokens and more, each branch 4 times as long as the last."""
    widths = [min(2048 * 4**i, 2**log2) for i in range(branches)]
    rates = [4**i for i in range(branches)]
    pattern = P.longnet(widths, rates)
    return AttentionSpec(seq_len=2**log2, heads=HEADS, head_dim=HEAD_DIM, dtype=dtype, pattern=pattern, causal=True)


def inputs(spec: AttentionSpec, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Return q, k, v on the host, made on the device head by head, and room for the output; pinned beside CUDA."""
    torch.manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    sizes = (1, spec.heads, spec.shape.seq_len, spec.head_dim)
    pinned = device == "cuda"
    made = [torch.empty(sizes, dtype=dtype, pin_memory=pinned) for _ in range(4)]
    step = 2**22
    for x in made[:3]:
        for head in range(spec.heads):
            for start in range(0, sizes[2], step):
                stop = min(start + step, sizes[2])
                x[0, head, start:stop].copy_(torch.randn(stop - start, sizes[3], device=device, dtype=dtype))
    return tuple(made)


def copies(plan: Plan, tensors: tuple[Tensor, ...], max_memory: str) -> float:
    """Return the seconds that the copies of all pieces take, both ways at once, with nothing to compute."""
    q, k, v, out = tensors
    group = plan.spec.heads // plan.spec.kv_heads
    chosen = choose(plan, max_memory, 1, [1, 2, 3, 4])
    inward, outward = torch.cuda.Stream(), torch.cuda.Stream()
    most = max(p.piece.heads * group * p.piece.rows for p in chosen.parts)
    keys = max(p.piece.heads * (p.keys[1] - p.keys[0]) for p in chosen.parts)
    here = [torch.empty(n, HEAD_DIM, device="cuda", dtype=q.dtype) for n in (most, keys, keys, most)]
    torch.cuda.synchronize()
    start, last = time.perf_counter(), None
    for part in chosen.parts:
        piece = part.piece
        for i in range(piece.heads):
            rows = slice(piece.row, piece.row + piece.rows)
            with torch.cuda.stream(inward):
                here[0][: piece.rows].copy_(q[0, piece.head + i, rows], non_blocking=True)
                if last != (piece.head, part.keys):
                    span = part.keys[1] - part.keys[0]
                    here[1][:span].copy_(k[0, piece.head + i, slice(*part.keys)], non_blocking=True)
                    here[2][:span].copy_(v[0, piece.head + i, slice(*part.keys)], non_blocking=True)
            with torch.cuda.stream(outward):
                out[0, piece.head + i, rows].copy_(here[3][: piece.rows], non_blocking=True)
        last = (piece.head, part.keys)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def computing(plan: Plan, max_memory: str) -> float:
    """Return the seconds that the programs of all pieces take on tensors that are on the device already."""
    from attnplan.passes.chunk import normal

    chosen = choose(plan, max_memory, 1, [1, 2, 3, 4])
    total, known = 0.0, dict[Any, float]()
    for part in chosen.parts:
        if part.graph is None:
            continue
        body = normal(part.graph)
        if body not in known:
            known[body] = _one(plan, body, part)
        total += known[body]
    return total


def _one(plan: Plan, body: Any, part: Any) -> float:
    dtype = getattr(torch, plan.spec.dtype)
    program = plan._emit(plan.spec, body)
    piece, span = part.piece, part.keys[1] - part.keys[0]
    sizes = [(1, piece.heads, n, HEAD_DIM) for n in (piece.rows, span, span)]
    q, k, v = (torch.randn(s, device="cuda", dtype=dtype) for s in sizes)
    times = []
    with torch.no_grad():
        for _ in range(4):
            torch.cuda.synchronize()
            start = time.perf_counter()
            program(q, k, v, {}, False)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return sorted(times[1:])[1]


def checked(spec: AttentionSpec, tensors: tuple[Tensor, ...], count: int, seed: int = 1) -> float:
    """Return the largest relative error of some rows against float64, from the pairs that the pattern names."""
    q, k, v, out = tensors
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0
    for _ in range(count):
        head = int(torch.randint(spec.heads, (1,), generator=generator))
        row = int(torch.randint(spec.shape.seq_len, (1,), generator=generator))
        want = expected_row(spec, q, k, v, head, row)
        got = out[0, head, row].double()
        worst = max(worst, float((got - want).norm() / want.norm().clamp_min(1e-3)))
    return worst


def expected_row(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, head: int, row: int) -> Tensor:
    """Return one output row in float64: one softmax over the keys of all branches, each as often as branches see it."""
    keys = []
    for width, rate in zip(spec.pattern.segment_lengths, spec.pattern.dilation_rates, strict=True):
        first = row // width * width
        if (row - first) % rate == head % rate:
            keys.append(torch.arange(first + head % rate, row + 1, rate))
    if not keys:
        return torch.zeros(spec.value_dim, dtype=torch.float64)
    every = torch.cat(keys)
    scores = k[0, head, every].double() @ q[0, head, row].double() * spec.softmax_scale
    weights: Tensor = torch.softmax(scores, 0)
    return weights @ v[0, head, every].double()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the stream and everything that it is compared with."""
    device = "cuda" if options.gpu else "cpu"
    start = time.perf_counter()
    spec = spec_of(options.log2, "bfloat16" if options.gpu else "float32", options.branches)
    plan = attnplan.compile(spec, device=device)
    chosen = choose(plan, options.max_memory, 1, [1, 2, 3, 4])
    found: dict[str, Any] = {
        "tokens": spec.shape.seq_len,
        "pattern": repr(spec.pattern),
        "choice": repr(plan),
        "pieces": len(chosen.parts),
        "loop": chosen.loop,
        "max_memory": parse_bytes(options.max_memory),
        "predicted": chosen.total,
        "planning": time.perf_counter() - start,
    }
    warm_up(device)
    start = time.perf_counter()
    tensors = inputs(spec, device)
    found["host_bytes"] = sum(x.numel() * x.element_size() for x in tensors)
    found["making_inputs"] = time.perf_counter() - start
    sizes = format_bytes(found["predicted"]), format_bytes(found["host_bytes"])
    print(f"{found['choice']}: {found['pieces']} pieces, {sizes[0]} predicted; {sizes[1]} on the host", flush=True)
    if options.gpu:
        found["compute"] = computing(plan, options.max_memory)
        found["copy"] = copies(plan, tensors, options.max_memory)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    walls = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        plan.stream(*tensors[:3], out=tensors[3], max_memory=options.max_memory)
        walls.append(time.perf_counter() - start)
        if sum(walls) > options.budget:
            break
    found["walls"], found["wall"] = walls, min(walls)
    if options.gpu:
        found["measured"] = torch.cuda.max_memory_allocated() - before
        found["fits"] = found["measured"] <= found["max_memory"]
        found["over_longest"] = found["wall"] / max(found["copy"], found["compute"])
    found["relative_error"] = checked(spec, tensors, options.rows)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on CUDA, in bfloat16; the default is the CPU, in float32")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--log2", type=int, default=24, help="logarithm of the number of tokens")
    parser.add_argument("--branches", type=int, default=6)
    parser.add_argument("--max-memory", default="8 GiB")
    parser.add_argument("--rows", type=int, default=64, help="rows that are compared with float64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which no other round is started")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    try:
        found = run(options)
    except (attnplan.errors.AttnPlanError, RuntimeError, MemoryError) as error:
        found = {"failed": f"{type(error).__name__}: {str(error)[:600]}"}
    if options.json:
        from attnplan.harness import environment

        options.json.write_text(json.dumps({"environment": environment(), "row": found}, indent=1) + "\n")
    for name, value in found.items():
        print(f"{name:<18} {value}")


if __name__ == "__main__":
    main()
