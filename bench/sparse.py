"""Measures sparse patterns on a CPU: block tables of long sequences, and speed against SDPA with a dense mask.

    python -m bench.sparse --json bench/results/sparse-cpu.json

Tables are built in a process of their own, so that its peak memory is theirs; ratios of speed are taken within one
process, the contestants interleaved.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from attnplan.harness import environment
from attnplan.patterns.counts import count_pairs
from attnplan.patterns.tiles import block_table
from attnplan.runtime.tiles import TileBuilder
from attnplan.verify import relative_error
from bench.spine import beside_pace, interleaved, pace, summary

MILLION = 1_048_576
TABLES = {
    "causal window 4096, 1M tokens": ("window(4096) & causal()", MILLION, 1),
    "causal window 4096, 64K tokens": ("window(4096) & causal()", 65_536, 1),
    "causal window 4096 | 1024 global, 1M tokens": ("(window(4096) | global_tokens(1024)) & causal()", MILLION, 1),
    "window 4096 | 1024 global, 1M tokens": ("window(4096) | global_tokens(1024)", MILLION, 1),
    "longnet branch 2048 / 1, 32 heads, 1M tokens": ("segments(2048)", MILLION, 32),
    "longnet branch 4096 / 2, 32 heads, 1M tokens": ('dilated(4096, 2, "interleave")', MILLION, 32),
    "longnet branch 65536 / 32, 32 heads, 1M tokens": ('dilated(65536, 32, "interleave")', MILLION, 32),
}
SPEEDS = {
    "window 512": P.window(512),
    "longformer 512 + 64 global": P.window(512) | P.global_tokens(64),
}


def _peak_kib(reset: bool = False) -> int:
    """Return the most memory that this process has held since the last reset, itself and not its parent.

    ``ru_maxrss`` outlives ``exec``: a child of a large process would seem to need nothing.
    """
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def table(text: str, length: int, heads: int, rounds: int = 5) -> dict[str, Any]:
    """Build one table several times, in this process; the first time counts too, and is listed.

    ``at_pace_seconds`` are those of the processor, each but the first divided by how much slower than
    :data:`~bench.spine.PACE` plain Python was beside it. The first, in whose heap nothing is free yet, is that of the
    peak.
    """
    pattern, shape = P.parse(text).bind(heads), P.Shape(length, length, heads)
    refused, kept, pairs = None, None, None

    def build() -> None:
        nonlocal refused, kept, pairs
        try:
            built = block_table(pattern, shape)
            kept, pairs = len(built.column), built.count_pairs()
        except attnplan.errors.SpecError as error:
            refused = str(error)

    block_table(P.causal(), P.Shape(256, 256, 1))  # what is imported at first use is part of the baseline
    before, start = _peak_kib(reset=True), time.process_time()
    build()
    cpu = [time.process_time() - start]
    peak, at_pace = (_peak_kib() - before) / 2**10, cpu.copy()
    pace()  # the first one is slow
    for _ in range(rounds - 1):
        _, seconds, slower = beside_pace(build)
        cpu.append(seconds)
        at_pace.append(seconds / slower)
    exact = None if refused else pairs == count_pairs(pattern, shape)
    return {
        "cpu_seconds": summary(cpu),
        "at_pace_seconds": summary(at_pace),
        "first": cpu[0],
        "peak_mib": peak,
        "tiles": kept,
        "counts_agree": exact,
        "refused": refused,
    }


def table_alone(name: str) -> dict[str, Any]:
    """Return :func:`table` of a named case, from a fresh process."""
    code = f"import json; from bench import sparse; print(json.dumps(sparse.table(*sparse.TABLES[{name!r}])))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {"pattern": TABLES[name][0], **json.loads(done.stdout.splitlines()[-1])}


def _trained(run: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], grad: Tensor) -> Callable[[], Any]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(run(*leaves), leaves, grad)


def speed(name: str, length: int = 16_384, heads: int = 4, rounds: int = 3) -> dict[str, Any]:
    """Time a plan against SDPA with a dense boolean mask, forward and with backward, and compare sampled numbers."""
    pattern = SPEEDS[name]
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(1, heads, length, 64) for _ in range(4))
    i = torch.arange(length)
    mask = pattern.pairs({}, torch.tensor(0), i[:, None], i[None])
    row: dict[str, Any] = {"length": length, "heads": heads, "head_dim": 64, "dtype": "float32"}

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    for training in (False, True):
        spec = AttentionSpec(
            seq_len=length, heads=heads, head_dim=64, dtype="float32", pattern=pattern, training=training
        )
        plan = attnplan.compile(spec, device="cpu")
        runs = {"plan": plan, "sdpa with a dense mask": dense}
        if training:
            contestants = {n: _trained(run, [q, k, v], grad) for n, run in runs.items()}
        else:
            contestants = {n: (lambda run=run: run(q, k, v)) for n, run in runs.items()}
        times = interleaved(contestants, rounds)
        ratio = statistics.median(times["sdpa with a dense mask"]) / statistics.median(times["plan"])
        row["training" if training else "forward"] = {
            "choice": f"{plan.strategy} > {plan.backend} ({plan.schedule})",
            "predicted": plan.predicted.seconds,
            "seconds": {n: summary(t) for n, t in times.items()},
            "times_faster": ratio,
            "times_faster_at_best": min(times["sdpa with a dense mask"]) / min(times["plan"]),
        }
    rows = torch.randint(0, length, (64,))
    scores = (q[:, :, rows].double() @ k.double().transpose(-1, -2) / 8).masked_fill(~mask[rows], -torch.inf)
    row["relative_l2"] = relative_error(plan(q, k, v)[:, :, rows].double(), scores.softmax(-1) @ v.double())
    return row


def packed(batches: int = 1000, length: int = 16_384, timed: int = 5) -> dict[str, Any]:
    """Run packed batches with different boundaries through one plan; time the tables of all, the calls of some."""
    spec = AttentionSpec(seq_len=length, heads=4, head_dim=64, dtype="float32", pattern=P.documents(), causal=True)
    plan = attnplan.compile(spec, device="cpu")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 4, length, 64) for _ in range(3))
    program = plan.program
    builders = [m for m in program.forward.modules() if isinstance(m, TileBuilder)]
    assert len(builders) == 1, plan
    tables, calls = [], []
    for n in range(batches):
        ends = torch.cat([torch.tensor([0]), torch.randint(1, length, (11,)).sort().values, torch.tensor([length])])
        start = time.perf_counter()
        builders[0]({"documents": ends}, q, k)
        tables.append(time.perf_counter() - start)
        if n % (batches // timed) == 0:
            start = time.perf_counter()
            plan(q, k, v, documents=ends)
            calls.append(time.perf_counter() - start)
    assert plan.program is program
    share = statistics.median(tables) / statistics.median(calls)
    return {"batches": batches, "documents": 12, "tables": summary(tables), "calls": summary(calls), "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    rows: dict[str, Any] = {"environment": environment(), "tables": {}, "speeds": {}}
    for name in TABLES:
        rows["tables"][name] = found = table_alone(name)
        print(f"{name:<48} {1e3 * found['cpu_seconds']['median']:8.1f} ms {found['peak_mib']:6.0f} MiB  "
              f"{found['refused'] or found['tiles']}")  # fmt: skip
    for name in SPEEDS:
        rows["speeds"][name] = found = speed(name)
        for mode in ("forward", "training"):
            print(
                f"{name:<48} {mode}: {found[mode]['times_faster']:.1f} x SDPA with a dense mask, "
                f"{found[mode]['choice']}"
            )
    rows["packed"] = packed()
    print(f"{'1000 packed batches, one plan':<48} tables are {100 * rows['packed']['share']:.1f} % of a call")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
