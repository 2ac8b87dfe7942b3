"""The compiled backend beside FlexAttention by hand: `python -m bench.compiled --json bench/results/compiled-cpu.json`.

On a GPU: `python -m bench.compiled --gpu --budget 110 --json bench/results/compiled-h100.json`: rows are compiled side
by side, then measured one by one, each in a process of its own. With `--dry-run` everything runs at a small size.
`--rows lattice,alibi` measures rows beside those that targets ask for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import attrs
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attnplan
from attnplan import AttentionSpec
from attnplan import patterns as P
from bench.side_by_side import run, write_row

WINDOW, GLOBAL = 512, 64
Row = Generator[None, None, dict[str, Any]]
"""A row that stops once, when all is compiled and has run."""


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


HAND = "create_block_mask with tiles of 128 x 128, torch.compile(flex_attention, dynamic=False), torch's own options"


def gpu_row(
    name: str, length: int = 65_536, heads: int = 16, head_dim: int = 128, rounds: int = 15, device: str = "cuda"
) -> Row:
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
    made = [torch.randn(1, heads, length, head_dim, dtype=torch.bfloat16, device=device) for _ in range(3)]
    leaves, grad = [x.clone().requires_grad_() for x in made], torch.randn_like(made[0])
    by_hand = torch.compile(flex_attention, dynamic=False)
    make = torch.compile(create_block_mask) if device == "cuda" else create_block_mask
    mask = make(rule, None, None, length, length, device=device)
    row: dict[str, Any] = {
        "case": name, "shape": [1, heads, length, head_dim], "dtype": "bfloat16", "by_hand": HAND, "plans": {},
    }  # fmt: skip
    turns = {}
    for what in ("forward", "training"):
        training = what == "training"
        runs: dict[str, Callable[..., Any]] = {"by hand": lambda *x: by_hand(*x, block_mask=mask)}
        if training and device == "cpu":  # a dry run, where FlexAttention has no backward
            runs = {"by hand": torch.nn.functional.scaled_dot_product_attention}
        runs |= plans_of(spec, leaves if training else made, operands, row["plans"], training=training)
        works = {n: (lambda r=r: r(*made)) for n, r in runs.items()}
        if training:
            works = {n: (lambda r=r: torch.autograd.grad(r(*leaves), leaves, grad)) for n, r in runs.items()}
        row |= errors(works, what)
        turns[what] = works
    yield
    for what, works in turns.items():
        with torch.set_grad_enabled(what == "training"):
            seconds = in_turns(works, rounds, device)
        row |= {what: summary(seconds), **compared(seconds, "training_" if what == "training" else "")}
    return row


def plans_of(
    spec: AttentionSpec, given: list[Any], operands: dict[str, Any], said: dict[str, str], *, training: bool
) -> dict[str, Callable[..., Any]]:
    """Return the plans that run; what each is, or why there is none, is added to ``said``."""
    device, runs = given[0].device.type, {}
    for backend in ("compiled", "auto", "flash"):
        label = f"{backend}, training" if training else backend
        try:
            plan = attnplan.compile(attrs.evolve(spec, training=training), device=device, backend=backend)
            with torch.set_grad_enabled(training):
                plan(*given, **operands)
        except Exception as error:  # a package that is missing, or a plan that fails, is a fact of its own
            said[label] = f"{type(error).__name__}: {error}"[:300]
        else:
            said[label] = f"{plan.strategy} > {plan.backend} ({plan.schedule})"
            runs[backend] = lambda *x, plan=plan: plan(*x, **operands)
    return runs


def errors(works: dict[str, Callable[[], Any]], what: str) -> dict[str, Any]:
    """Run each work once, and return how far its first result, an output or dq, is from that by hand."""
    with torch.set_grad_enabled(what == "training"):
        found = {n: w() for n, w in works.items()}
    first = {n: (x[0] if isinstance(x, tuple) else x).float() for n, x in found.items()}
    expected = first.pop("by hand")
    return {f"{what}_relative_l2": {n: float((x - expected).norm() / expected.norm()) for n, x in first.items()}}


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


def model_row(length: int = 16_384, heads: int = 8, head_dim: int = 128, rounds: int = 9, device: str = "cuda") -> Row:
    """Return a compiled training step of 12 mixed layers beside its plans alone and the model without attention.

    Target: at most 1.05 times their sum.
    """
    kinds = (P.full(), P.window(1024), P.longnet([2048, 4096, 8192, 16_384], [1, 2, 4, 8]))
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    common = {"seq_len": length, "heads": heads, "head_dim": head_dim, "dtype": dtype, "layout": "bshd"}
    plans = [
        attnplan.compile(AttentionSpec(pattern=kinds[n % 3], causal=True, training=True, **common), device=device)
        for n in range(12)
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
    for work in works.values():
        work()
    yield
    seconds = in_turns(works, rounds, device)
    middle = {name: statistics.median(x) for name, x in seconds.items()}
    return {
        "case": "12 layers", "shape": [1, heads, length, head_dim],
        "plans": [f"{p.strategy} > {p.backend} ({p.schedule})" for p in plans[:3]],
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


def works_of(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Return the rows, those that a target asks for first; the last two are beside them."""
    small: dict[str, Any] = {"length": 1024, "heads": 2, "rounds": 1} if options.dry_run else {}
    if not options.gpu:
        return {name: lambda name=name: cpu_row(name, **small) for name in CPU}
    small |= {"device": "cpu", "head_dim": 32} if options.dry_run else {}
    works: dict[str, Callable[[], Any]] = {n: lambda n=n: gpu_row(n, **small) for n in ("window", "documents")}
    works |= {"12 layers": lambda: model_row(**small)}
    works |= {n: lambda n=n: gpu_row(n, **small) for n in ("longformer", "random blocks")}
    return works | {"lattice": lambda: lattice_row(**small), "alibi": lambda: alibi_row(**small)}


BESIDE = ("lattice", "alibi")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=60.0, help="most seconds in which a row is measured on a GPU")
    parser.add_argument("--rows", default="", help="names of rows, separated by commas; those of targets by default")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    works = works_of(options)
    if options.row:
        write_row(options.row, works[options.row], options.into)
        return
    names = [n for n in works if (n in options.rows.split(",") if options.rows else n not in BESIDE)]
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": []}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    start = time.perf_counter()

    def done(row: dict[str, Any]) -> None:
        found["rows"].append(row)
        found["seconds"] = round(time.perf_counter() - start, 1)
        if options.json and not options.dry_run:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    flags = {"--gpu": options.gpu, "--dry-run": options.dry_run}
    command = [sys.executable, "-m", "bench.compiled", *(flag for flag, given in flags.items() if given)]
    limit = options.limit if options.gpu else options.budget
    with tempfile.TemporaryDirectory() as folder:
        for some in [names] if options.gpu else [[name] for name in names]:  # a CPU is measured by one at a time
            run(some, command, Path(folder), options.budget - (time.perf_counter() - start), limit, done)
    if not options.json:
        print(json.dumps(found, indent=1))
    print(table(found["rows"]))


if __name__ == "__main__":
    main()
