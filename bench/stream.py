"""Streams LongNet over 2^24 tokens whose q, k, v and output lie in host memory, and measures what limits it.

    python -m bench.stream --gpu --json bench/results/stream-h100.json --budget 100
    python -m bench.stream --log2 14 --max-memory 4MiB                           small, on the CPU: tries the script

The copies alone and the computing alone are measured in the same run, on the same pieces: the wall time should be near
the longer of the two. Sampled rows are compared with float64. The result is written after each step, and a length that
does not fit on the host is followed by half of it. Most of the time goes into 64 GiB of host memory: all threads touch
its pages, no faster than the machine hands them out, and they are pinned afterwards.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
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
from bench.deadline import deadline
from bench.memory import MIB, warm_up

HEADS, HEAD_DIM = 8, 64
LEAST_ROOM = 1 << 30
"""Bytes of host memory that stay free while more is touched."""
Row = dict[str, Any]


def spec_of(log2: int, dtype: str, branches: int) -> AttentionSpec:
    """Return LongNet with segments of 2,048 tokens and more, each branch 4 times as long as the last."""
    widths = [min(2048 * 4**i, 2**log2) for i in range(branches)]
    rates = [4**i for i in range(branches)]
    pattern = P.longnet(widths, rates)
    return AttentionSpec(seq_len=2**log2, heads=HEADS, head_dim=HEAD_DIM, dtype=dtype, pattern=pattern, causal=True)


def inputs(spec: AttentionSpec, device: str, seed: int = 0) -> tuple[Tensor, ...]:
    """Return q, k, v on the host, made on the device piece by piece, and room for the output; pinned beside CUDA."""
    torch.manual_seed(seed)
    dtype = getattr(torch, spec.dtype)
    sizes = (1, spec.heads, spec.shape.seq_len, spec.head_dim)
    made = [torch.empty(sizes, dtype=dtype) for _ in range(4)]
    try:
        for x in made if device == "cuda" else ():
            touch(x.flatten())
            pin(x)
        step = 2**22
        for x in made[:3]:
            for head in range(spec.heads):
                for start in range(0, sizes[2], step):
                    stop = min(start + step, sizes[2])
                    x[0, head, start:stop].copy_(torch.randn(stop - start, sizes[3], device=device, dtype=dtype))
    except BaseException:
        unpin(made)
        raise
    return tuple(made)


def touch(x: Tensor, patience: float = 10.0) -> None:
    """Write zeros to all pages, by as many threads as torch has; slowly where a virtual machine's memory has to grow.

    Raises
    ------
    MemoryError
        If no more memory becomes available.
    """
    size, start, until = x.element_size(), 0, time.perf_counter() + patience
    while start < x.numel():
        room = available()
        if room < LEAST_ROOM:
            if time.perf_counter() > until:
                raise MemoryError(f"{format_bytes(room)} of host memory left for {patience:.0f} s")
            time.sleep(0.02)
            continue
        step = min(2**29, (room - LEAST_ROOM // 2) // 4) // size
        x[start : start + step].zero_()
        start, until = start + step, time.perf_counter() + patience


def available() -> int:
    """Return the bytes of host memory that can be had at this moment."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable:"))


def pin(x: Tensor) -> None:
    """Pin the pages of a tensor for good, so that a device copies them by itself.

    Raises
    ------
    RuntimeError
        If the driver refuses.
    """
    error = int(torch.cuda.cudart().cudaHostRegister(x.data_ptr(), x.numel() * x.element_size(), 1))
    if error or not x.is_pinned():
        raise RuntimeError(f"cudaHostRegister of {format_bytes(x.numel() * x.element_size())}: error {error}")


def unpin(tensors: Sequence[Tensor]) -> None:
    """Let go of pinned pages."""
    for x in tensors if torch.cuda.is_available() else ():
        if x.is_pinned():
            torch.cuda.cudart().cudaHostUnregister(x.data_ptr())


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


def prepared(options: argparse.Namespace, found: Row) -> tuple[Plan, tuple[Tensor, ...]]:
    """Return the plan of a length and its tensors; what is known of them is added to the row."""
    device = "cuda" if options.gpu else "cpu"
    start = time.perf_counter()
    spec = spec_of(options.log2, "bfloat16" if options.gpu else "float32", options.branches)
    plan = attnplan.compile(spec, device=device)
    chosen = choose(plan, options.max_memory, 1, [1, 2, 3, 4])
    found |= {
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
    return plan, tensors


def walls(plan: Plan, tensors: tuple[Tensor, ...], options: argparse.Namespace, found: Row) -> None:
    """Run the stream several times."""
    if options.gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    found["walls"] = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        plan.stream(*tensors[:3], out=tensors[3], max_memory=options.max_memory)
        found["walls"].append(time.perf_counter() - start)
        if time.perf_counter() - options.start > options.budget:
            break
    found["wall"] = min(found["walls"])
    if options.gpu:
        found["measured"] = torch.cuda.max_memory_allocated() - before
        found["fits"] = found["measured"] <= found["max_memory"]
        found["close"] = found["predicted"] <= max(1.3 * found["measured"], found["measured"] + 16 * MIB)


def run(options: argparse.Namespace, found: Row, write: Callable[[], None]) -> None:
    """Run the stream and everything that it is compared with; what fails is said, and what can be measured still is."""
    plan, tensors = prepared(options, found)
    write()
    sizes = format_bytes(found["predicted"]), format_bytes(found["host_bytes"])
    print(f"{found['choice']}: {found['pieces']} pieces, {sizes[0]} predicted; {sizes[1]} on the host", flush=True)

    def compared() -> None:
        found["compute"] = computing(plan, options.max_memory)

    def copied() -> None:
        found["copy"] = copies(plan, tensors, options.max_memory)

    def right() -> None:
        found["relative_error"] = checked(plan.spec, tensors, options.rows)

    steps: list[tuple[str, Callable[[], None]]] = [("wall", lambda: walls(plan, tensors, options, found))]
    steps += [("relative_error", right)]
    steps += [("copy", copied), ("compute", compared)] if options.gpu else []  # the copies write over the output
    try:
        for name, step in steps:
            try:
                with deadline(options.limit):
                    step()
            except Exception as error:  # one figure must not lose the others
                found[f"{name}_failed"] = f"{type(error).__name__}: {str(error)[:600]}"
            if {"wall", "copy", "compute"} <= set(found):
                found["over_longest"] = found["wall"] / max(found["copy"], found["compute"])
            write()
    finally:
        if options.gpu:
            torch.cuda.synchronize()
            unpin(tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on CUDA, in bfloat16; the default is the CPU, in float32")
    parser.add_argument("--json", type=Path, help="write the result to this file, after each step")
    parser.add_argument("--log2", type=int, default=24, help="logarithm of the number of tokens")
    parser.add_argument("--least", type=int, help="shortest length that is tried if longer ones fail; --log2 - 3")
    parser.add_argument("--branches", type=int, default=6)
    parser.add_argument("--max-memory", default="8 GiB")
    parser.add_argument("--rows", type=int, default=64, help="rows that are compared with float64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=float, default=100.0, help="seconds after which nothing else is started")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that one step may take")
    options = parser.parse_args()
    options.start = time.perf_counter()
    rows: list[Row] = []

    def write() -> None:
        if options.json:
            from attnplan.harness import environment

            text = json.dumps({"environment": environment(), "row": rows[-1], "rows": rows}, indent=1)
            options.json.write_text(text + "\n")

    least = options.log2 - 3 if options.least is None else options.least
    while options.log2 >= least:
        rows.append({"log2": options.log2})
        try:
            run(options, rows[-1], write)
        except Exception as error:  # a host that is too small: half the length is tried
            rows[-1]["failed"] = f"{type(error).__name__}: {str(error)[:600]}"
            write()
        for name, value in rows[-1].items():
            print(f"{name:<18} {value}", flush=True)
        if "wall" in rows[-1] or time.perf_counter() - options.start > options.budget:
            break
        gc.collect()
        options.log2 -= 1


if __name__ == "__main__":
    main()
