"""The compiled backend beside FlexAttention by hand: `python -m bench.compiled --json bench/results/compiled-cpu.json`.

On a GPU: `python -m bench.compiled --gpu --budget 540 --json bench/results/compiled-h100.json`: rows are compiled side
by side, then measured one by one, each in a process of its own. With `--dry-run` everything runs at a small size.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P

WINDOW, GLOBAL = 512, 64


def window_by_hand(b, h, q, k):
    return (q >= k) & (q - k <= WINDOW)


def longformer_by_hand(b, h, q, k):
    return ((q - k).abs() <= WINDOW // 2) | (q < GLOBAL) | (k < GLOBAL)


CPU = {
    "window": (P.window(WINDOW), True, window_by_hand),
    "longformer": (P.window(WINDOW // 2) | P.global_tokens(GLOBAL), False, longformer_by_hand),
}


def in_turns(works: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Return the seconds of each work, run in turns so that a busy machine slows all of them alike.

    On a GPU these are seconds of its stream, which is never empty: what the host does meanwhile costs nothing, as in a
    model.
    """
    for work in works.values():
        work()
    if device == "cuda":
        return in_turns_on_gpu(works, rounds)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def in_turns_on_gpu(works: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    torch.cuda.synchronize()
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in works}
    for work in works.values():  # a queue that is ahead of the host's next call
        work()
    for _ in range(rounds):
        for name, work in works.items():
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            work()
            pair[1].record()
            events[name].append(pair)
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in events.items()}


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {n: {"median": statistics.median(x), "min": min(x), "max": max(x)} for n, x in seconds.items()}


def cpu_row(name: str, length: int = 16_384, heads: int = 4, head_dim: int = 64, rounds: int = 9) -> dict[str, Any]:
    """Return a plan's forward beside FlexAttention by hand, and its training step beside its forward."""
    pattern, causal, rule = CPU[name]
    spec = AttentionSpec(
        seq_len=length, heads=heads, head_dim=head_dim, pattern=pattern, causal=causal, dtype="float32"
    )
    plan = attnplan.compile(spec, backend="compiled")
    trained = attnplan.compile(attrs.evolve(spec, training=True), backend="compiled")
    q, k, v = (torch.randn(1, heads, length, head_dim) for _ in range(3))
    by_hand = torch.compile(flex_attention, dynamic=False)
    blocks = create_block_mask(rule, None, None, length, length, device="cpu")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    with torch.no_grad():
        error = (plan(q, k, v) - by_hand(q, k, v, block_mask=blocks)).norm() / q.norm()
        forward = in_turns({"plan": lambda: plan(q, k, v), "by hand": lambda: by_hand(q, k, v, block_mask=blocks)},
                           rounds)  # fmt: skip
    training = in_turns(
        {
            "forward": lambda: trained(*leaves),
            "forward and backward": lambda: torch.autograd.grad(trained(*leaves), leaves, grad),
            "nothing kept": lambda: torch.autograd.grad(plan(*leaves), leaves, grad),
        },
        max(2, rounds // 3),
    )
    with torch.no_grad():
        error = max(error, (trained(q, k, v) - plan(q, k, v)).norm() / q.norm())
    best = {n: min(x) for n, x in {**forward, **training}.items()}
    return {
        "case": name, "shape": [1, heads, length, head_dim], "dtype": "float32", "plan": repr(plan),
        "plan_trained": repr(trained), "saved_mib": trained.predicted.memory.saved / 2**20,
        "forward": summary(forward), "training": summary(training), "relative_l2": float(error),
        "times_by_hand_at_best": best["plan"] / best["by hand"],
        "training_over_its_forward_at_best": best["forward and backward"] / best["forward"],
        "training_over_that_without_keeping": best["forward and backward"] / best["nothing kept"],
    }  # fmt: skip


def gpu_row(
    name: str, length: int = 65_536, heads: int = 16, head_dim: int = 128, rounds: int = 15, device: str = "cuda"
) -> dict[str, Any]:
    """Return forward, and forward and backward, of plans and of FlexAttention written by hand, all run in turns.

    Targets: ``compiled`` at most 1.02 times as long as by hand, ``auto`` no longer than the best of the others.
    """
    documents = torch.arange(0, length + 1, max(1, length // 16), dtype=torch.int32, device=device)
    ids = torch.searchsorted(
        documents[1:].contiguous(), torch.arange(length, device=device, dtype=torch.int32), right=True
    )
    blocks = P.random_blocks(0.1, 128, 0)
    layout = torch.from_numpy(dense_layout(blocks, length)).to(device)
    cases: dict[str, tuple[Any, bool, Callable[..., Any], dict[str, Any]]] = {
        "window": (P.window(4096), True, lambda b, h, q, k: (q >= k) & (q - k <= 4096), {}),
        "longformer": (P.window(1024) | P.global_tokens(128), False,
                       lambda b, h, q, k: ((q - k).abs() <= 1024) | (q < 128) | (k < 128), {}),
        "random blocks": (blocks, False, lambda b, h, q, k: layout[q // 128, k // 128], {}),
        "documents": (P.documents(), True, lambda b, h, q, k: (q >= k) & (ids[q] == ids[k]), {"documents": documents}),
    }  # fmt: skip
    pattern, causal, rule, operands = cases[name]
    spec = AttentionSpec(
        seq_len=length, heads=heads, head_dim=head_dim, pattern=pattern, causal=causal, dtype="bfloat16"
    )
    by_hand = torch.compile(flex_attention, dynamic=False)
    make = torch.compile(create_block_mask) if device == "cuda" else create_block_mask
    mask = make(rule, None, None, length, length, device=device)
    made = [torch.randn(1, heads, length, head_dim, dtype=torch.bfloat16, device=device) for _ in range(3)]
    row: dict[str, Any] = {"case": name, "shape": [1, heads, length, head_dim], "dtype": "bfloat16", "plans": {}}
    runs: dict[str, Callable[..., Any]] = {"by hand": lambda *x: by_hand(*x, block_mask=mask)}
    for backend in ("compiled", "auto", "flash"):
        try:
            plan = attnplan.compile(spec, device=device, backend=backend)
            plan(*made, **operands)
        except Exception as error:  # a package that is missing, or a plan that fails, is a fact of its own
            row["plans"][backend] = f"{type(error).__name__}: {error}"[:500]
        else:
            row["plans"][backend] = repr(plan)
            runs[backend] = lambda *x, plan=plan: plan(*x, **operands)
    with torch.no_grad():
        expected = runs["by hand"](*made).float()
        row["relative_l2"] = {
            n: float((r(*made).float() - expected).norm() / expected.norm()) for n, r in runs.items() if n != "by hand"
        }
        forward = in_turns({n: lambda r=r: r(*made) for n, r in runs.items()}, rounds, device)
    row |= {"forward": summary(forward), **compared(forward, "")}
    if device == "cuda":  # FlexAttention has no backward on the CPU
        leaves = [x.clone().requires_grad_() for x in made]
        grad = torch.randn_like(made[0])
        works = {n: lambda r=r: torch.autograd.grad(r(*leaves), leaves, grad) for n, r in runs.items()}
        both = in_turns(works, rounds, device)
        row |= {"forward_and_backward": summary(both), **compared(both, "training_")}
    return row


def compared(seconds: dict[str, list[float]], prefix: str) -> dict[str, float]:
    """Return the median time of ``compiled`` over that by hand, and that of ``auto`` over the best of the others."""
    middle = {name: statistics.median(x) for name, x in seconds.items()}
    found = {}
    if "compiled" in middle:
        found[f"{prefix}times_by_hand"] = middle["compiled"] / middle["by hand"]
    if "auto" in middle:
        found[f"{prefix}auto_times_best"] = middle["auto"] / min(t for n, t in middle.items() if n != "auto")
    return found


def ratio(seconds: dict[str, list[float]]) -> float:
    return statistics.median(seconds["plan"]) / statistics.median(seconds["by hand"])


def lattice_row(
    length: int = 65_536, heads: int = 12, head_dim: int = 64, rounds: int = 9, device: str = "cuda"
) -> dict[str, Any]:
    """Return LongNet as Inductor fuses it around torch's kernels, beside the plan that the planner chooses."""
    unit = length // 32
    pattern = P.longnet([unit << n for n in range(5)], [1 << n for n in range(5)])
    dtype = "bfloat16" if device == "cuda" else "float32"
    spec = AttentionSpec(seq_len=length, heads=heads, head_dim=head_dim, pattern=pattern, causal=True, dtype=dtype)
    plans = {
        "fused": attnplan.compile(spec, device=device, backend="compiled"),
        "auto": attnplan.compile(spec, device=device),
    }
    made = [torch.randn(1, heads, length, head_dim, dtype=getattr(torch, dtype), device=device) for _ in range(3)]
    leaves, grad = [x.clone().requires_grad_() for x in made], torch.randn_like(made[0])
    with torch.no_grad():
        error = (plans["fused"](*made) - plans["auto"](*made)).norm() / plans["auto"](*made).norm()
        forward = in_turns({n: lambda p=p: p(*made) for n, p in plans.items()}, rounds, device)
    works = {n: lambda p=p: torch.autograd.grad(p(*leaves), leaves, grad) for n, p in plans.items()}
    both = in_turns(works, rounds, device)
    middle = [statistics.median(x[n]) for x in (forward, both) for n in ("fused", "auto")]
    return {
        "case": "lattice", "shape": [1, heads, length, head_dim], "plans": {n: repr(p) for n, p in plans.items()},
        "relative_l2": float(error), "forward": summary(forward), "forward_and_backward": summary(both),
        "fused_over_auto": middle[0] / middle[1], "training_fused_over_auto": middle[2] / middle[3],
    }  # fmt: skip


def dense_layout(blocks: Any, length: int) -> Any:
    """Return which blocks of 128 x 128 are kept, bool ``[rows, columns]``."""
    import numpy as np

    tables = {n: t[0] for n, t in blocks.tables(attnplan.patterns.Shape(length, length, 1)).items()}
    at = np.arange(0, length, 128)
    return np.broadcast_to(blocks.pairs(tables, np.array(0), at[:, None], at), (len(at), len(at))).copy()


class Mixed(torch.nn.Module):
    """Twelve layers: projections, attention by a plan or none, a residual."""

    def __init__(self, plans: list[Any], heads: int, head_dim: int) -> None:
        super().__init__()
        self.plans, self.heads = plans, heads
        width = heads * head_dim
        self.inward = torch.nn.ModuleList(torch.nn.Linear(width, 3 * width, bias=False) for _ in plans)
        self.outward = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in plans)

    def forward(self, x: Any) -> Any:
        for plan, inward, outward in zip(self.plans, self.inward, self.outward, strict=True):
            q, k, v = inward(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)
            x = x + outward((q + k + v if plan is None else plan(q, k, v)).flatten(-2))
        return x


def model_row(
    length: int = 16_384, heads: int = 8, head_dim: int = 128, rounds: int = 9, device: str = "cuda"
) -> dict[str, Any]:
    """Return a compiled training step of 12 mixed layers beside its plans alone and the model without attention.

    Target: at most 1.05 times their sum.
    """
    kinds = (P.full(), P.window(1024), P.longnet([2048, 4096, 8192, 16_384], [1, 2, 4, 8]))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    common = {"seq_len": length, "heads": heads, "head_dim": head_dim, "dtype": dtype, "layout": "bshd"}
    plans = [
        attnplan.compile(AttentionSpec(pattern=kinds[n % 3], causal=True, **common), device=device) for n in range(12)
    ]
    x = torch.randn(1, length, heads * head_dim, device=device, dtype=dtype)
    models = {name: Mixed(given, heads, head_dim).to(device, dtype) for name, given in
              {"with attention": plans, "without": [None] * 12}.items()}  # fmt: skip
    steps = {name: torch.compile(model, fullgraph=True) for name, model in models.items()}

    def step(name: str) -> None:
        steps[name](x).square().mean().backward()
        models[name].zero_grad(set_to_none=True)

    leaves = [torch.randn(1, length, heads, head_dim, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    grad = torch.randn_like(leaves[0])

    def plans_alone() -> None:
        for plan in plans:
            torch.autograd.grad(plan(*leaves), leaves, grad)

    works = {"with attention": lambda: step("with attention"), "without": lambda: step("without"), "plans": plans_alone}
    seconds = in_turns(works, rounds, device)
    middle = {name: statistics.median(x) for name, x in seconds.items()}
    return {
        "case": "12 layers", "shape": [1, heads, length, head_dim], "plans": [repr(p) for p in plans[:3]],
        "training_step": summary(seconds), "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "times_its_parts": middle["with attention"] / (middle["without"] + middle["plans"]),
    }  # fmt: skip


def alibi_row(
    length: int = 16_384, heads: int = 16, head_dim: int = 128, rounds: int = 15, device: str = "cuda"
) -> dict[str, Any]:
    """Return ALiBi by a plan, whose slopes may have gradients, beside FlexAttention with a score function by hand."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    spec = AttentionSpec(seq_len=length, heads=heads, head_dim=head_dim, causal=True, dtype=dtype, alibi_slopes=True)
    plan = attnplan.compile(spec, device=device, backend="compiled")
    slopes = 2.0 ** -torch.arange(1, heads + 1, device=device).mul(8 / heads)
    by_hand = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)
    made = [torch.randn(1, heads, length, head_dim, dtype=dtype, device=device) for _ in range(3)]
    runs = {
        "plan": lambda *x: plan(*x, alibi_slopes=slopes),
        "by hand": lambda *x: by_hand(*x, lambda s, b, h, q, k: s - slopes[h] * (q - k), mask),
    }
    with torch.no_grad():
        forward = in_turns({n: lambda r=r: r(*made) for n, r in runs.items()}, rounds, device)
        error = (runs["plan"](*made) - runs["by hand"](*made)).norm() / made[0].norm()
    row: dict[str, Any] = {"case": "alibi", "shape": [1, heads, length, head_dim], "plan": repr(plan)}
    row |= {"forward": summary(forward), "times_by_hand": ratio(forward), "relative_l2": float(error)}
    if device == "cuda":
        leaves = [x.clone().requires_grad_() for x in made]
        grad = torch.randn_like(made[0])
        both = in_turns(
            {n: lambda r=r: torch.autograd.grad(r(*leaves), leaves, grad) for n, r in runs.items()}, rounds, device
        )
        learned = slopes.clone().requires_grad_()
        own = in_turns(
            {"with slopes": lambda: torch.autograd.grad(plan(*leaves, alibi_slopes=learned), (*leaves, learned), grad)},
            max(2, rounds // 3), device,
        )  # fmt: skip
        row |= {"forward_and_backward": summary(both), "training_times_by_hand": ratio(both), **summary(own)}
    return row


RATIOS = ("times_by_hand", "auto_times_best", "training_times_by_hand", "training_auto_times_best",
          "times_by_hand_at_best", "training_over_its_forward_at_best", "times_its_parts", "fused_over_auto",
          "training_fused_over_auto")  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        found = ", ".join(f"{name} {row[name]:.3f}" for name in RATIOS if name in row)
        lines.append(f"{row['case']:14} {found or row.get('error', 'nothing')}")
    return "\n".join(lines)


def works_of(options: argparse.Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the rows, those that a target asks for first."""
    small: dict[str, Any] = {"length": 1024, "heads": 2, "rounds": 1} if options.dry_run else {}
    if not options.gpu:
        return {name: lambda name=name: cpu_row(name, **small) for name in CPU}
    small |= {"device": "cpu", "head_dim": 32} if options.dry_run else {}
    small |= {"rounds": 1} if options.warm else {}
    works = {name: lambda name=name: gpu_row(name, **small) for name in ("window", "longformer", "documents")}
    works |= {"12 layers": lambda: model_row(**small), "random blocks": lambda: gpu_row("random blocks", **small)}
    return works | {"lattice": lambda: lattice_row(**small), "alibi": lambda: alibi_row(**small)}


def begun(name: str, options: argparse.Namespace, into: Path, *, warm: bool) -> subprocess.Popen[bytes]:
    """Start a process that measures one row, in a group of its own: the compilers that it starts end with it."""
    command = [sys.executable, "-m", "bench.compiled", "--row", name, "--into", str(into)]
    chosen = {"--gpu": options.gpu, "--dry-run": options.dry_run, "--warm": warm}
    command += [flag for flag, given in chosen.items() if given]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[bytes], name: str, into: Path, limit: float) -> dict[str, Any]:
    """Return the row of a process, or how it ended; after ``limit`` seconds it is ended."""
    try:
        _, said = process.communicate(timeout=max(limit, 1))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return {"case": name, "error": f"ended after {limit:.0f} seconds"}
    if into.exists():
        found: dict[str, Any] = json.loads(into.read_text(encoding="utf-8"))
        return found
    return {"case": name, "error": f"ended with {process.returncode}: {said.decode(errors='replace')[-1500:]}"}


def write_row(options: argparse.Namespace) -> None:
    """Measure one row and write it; what goes wrong is its text."""
    try:
        row = works_of(options)[options.row]()
    except Exception as error:  # one row must not lose the others
        row = {"case": options.row, "error": f"{type(error).__name__}: {error}"[:2000]}
    options.into.write_text(json.dumps(row), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--budget", type=float, default=float("inf"), help="begin no row after this many seconds")
    parser.add_argument("--limit", type=float, default=150, help="most seconds of one row on a GPU")
    parser.add_argument("--rows", default="", help="names of rows, separated by commas; all by default")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        write_row(options)
        return
    names = [name for name in works_of(options) if not options.rows or name in options.rows.split(",")]
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": []}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder:
        measure(names, options, Path(folder), found)
    if not options.json:
        print(json.dumps(found, indent=1))
    print(table(found["rows"]))


def measure(names: list[str], options: argparse.Namespace, folder: Path, found: dict[str, Any]) -> None:
    """Compile all rows side by side, then measure one after the other, each in a process that can fail alone."""
    start = time.perf_counter()

    def left() -> float:
        return options.budget - (time.perf_counter() - start)

    limit = options.limit if options.gpu else 3600.0
    if options.gpu:  # what they compile stays in the caches of Inductor and Triton
        warm = {name: begun(name, options, folder / f"warm {name}", warm=True) for name in names}
        until = time.perf_counter() + min(limit, left() / 2)
        rows = [ended(p, n, folder / f"warm {n}", until - time.perf_counter()) for n, p in warm.items()]
        found["compiling"] = {r["case"]: r["error"] for r in rows if "error" in r}
        found["compiling_seconds"] = round(time.perf_counter() - start, 1)
    for name in names:
        if left() < 5:
            row: dict[str, Any] = {"case": name, "error": "left out: the budget was spent"}
        else:
            into = folder / name
            row = ended(begun(name, options, into, warm=False), name, into, min(limit, left()))
        found["rows"].append(row)
        if options.json and not options.dry_run:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
