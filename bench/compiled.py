"""The compiled backend beside FlexAttention by hand: `python -m bench.compiled --json bench/results/compiled-cpu.json`.

On a GPU: `python -m bench.compiled --gpu --json bench/results/compiled-h100.json`. With `--dry-run` everything is
planned at full size and run at a small one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def in_turns(works: dict[str, Callable[[], Any]], rounds: int, wait: Callable[[], None]) -> dict[str, list[float]]:
    """Return the seconds of each work, run in turns so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            wait()
            start = time.perf_counter()
            work()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {n: {"median": statistics.median(x), "min": min(x), "max": max(x)} for n, x in seconds.items()}


def cpu_row(name: str, length: int = 16_384, heads: int = 4, head_dim: int = 64, rounds: int = 9) -> dict[str, Any]:
    """Return a plan's forward beside FlexAttention by hand, and its training step beside its forward."""
    pattern, causal, rule = CPU[name]
    spec = AttentionSpec(
        seq_len=length, heads=heads, head_dim=head_dim, pattern=pattern, causal=causal, dtype="float32"
    )
    plan = attnplan.compile(spec, backend="compiled")
    q, k, v = (torch.randn(1, heads, length, head_dim) for _ in range(3))
    by_hand = torch.compile(flex_attention, dynamic=False)
    blocks = create_block_mask(rule, None, None, length, length, device="cpu")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    grad = torch.randn_like(q)
    with torch.no_grad():
        error = (plan(q, k, v) - by_hand(q, k, v, block_mask=blocks)).norm() / q.norm()
        forward = in_turns({"plan": lambda: plan(q, k, v), "by hand": lambda: by_hand(q, k, v, block_mask=blocks)},
                           rounds, lambda: None)  # fmt: skip
    training = in_turns(
        {
            "forward": lambda: plan(*leaves),
            "forward and backward": lambda: torch.autograd.grad(plan(*leaves), leaves, grad),
        },
        max(2, rounds // 3),
        lambda: None,
    )
    best = {n: min(x) for n, x in {**forward, **training}.items()}
    return {
        "case": name, "shape": [1, heads, length, head_dim], "dtype": "float32", "plan": repr(plan),
        "forward": summary(forward), "training": summary(training), "relative_l2": float(error),
        "times_by_hand_at_best": best["plan"] / best["by hand"],
        "training_over_its_forward_at_best": best["forward and backward"] / best["forward"],
    }  # fmt: skip


def gpu_row(
    name: str, length: int = 65_536, heads: int = 16, head_dim: int = 128, rounds: int = 15, device: str = "cuda"
) -> dict[str, Any]:
    """Return forward, and forward and backward, of a plan and of FlexAttention written by hand.

    Targets: each at most 1.02 times as long as by hand.
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
    plan = attnplan.compile(spec, device=device, backend="compiled")
    by_hand = torch.compile(flex_attention, dynamic=False)
    make = torch.compile(create_block_mask) if device == "cuda" else create_block_mask
    mask = make(rule, None, None, length, length, device=device)
    made = [torch.randn(1, heads, length, head_dim, dtype=torch.bfloat16, device=device) for _ in range(3)]
    leaves = [x.clone().requires_grad_() for x in made]
    grad = torch.randn_like(made[0])
    runs = {"plan": lambda *x: plan(*x, **operands), "by hand": lambda *x: by_hand(*x, block_mask=mask)}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.no_grad():
        forward = in_turns({n: lambda r=r: r(*made) for n, r in runs.items()}, rounds, wait)
    row: dict[str, Any] = {"case": name, "shape": [1, heads, length, head_dim], "dtype": "bfloat16", "plan": repr(plan)}
    row |= {"forward": summary(forward), "times_by_hand": ratio(forward)}
    if device == "cuda":  # FlexAttention has no backward on the CPU
        both = in_turns(
            {n: lambda r=r: torch.autograd.grad(r(*leaves), leaves, grad) for n, r in runs.items()}, rounds, wait
        )
        row |= {"forward_and_backward": summary(both), "training_times_by_hand": ratio(both)}
        auto = attnplan.compile(spec, device=device)
        with torch.no_grad():
            row["auto"] = {
                "plan": repr(auto),
                **summary(in_turns({"auto": lambda: auto(*made, **operands)}, rounds, wait)),
            }
    return row


def ratio(seconds: dict[str, list[float]]) -> float:
    return statistics.median(seconds["plan"]) / statistics.median(seconds["by hand"])


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

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    works = {"with attention": lambda: step("with attention"), "without": lambda: step("without"), "plans": plans_alone}
    seconds = in_turns(works, rounds, wait)
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
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    runs = {
        "plan": lambda *x: plan(*x, alibi_slopes=slopes),
        "by hand": lambda *x: by_hand(*x, lambda s, b, h, q, k: s - slopes[h] * (q - k), mask),
    }
    with torch.no_grad():
        forward = in_turns({n: lambda r=r: r(*made) for n, r in runs.items()}, rounds, wait)
        error = (runs["plan"](*made) - runs["by hand"](*made)).norm() / made[0].norm()
    row: dict[str, Any] = {"case": "alibi", "shape": [1, heads, length, head_dim], "plan": repr(plan)}
    row |= {"forward": summary(forward), "times_by_hand": ratio(forward), "relative_l2": float(error)}
    if device == "cuda":
        leaves = [x.clone().requires_grad_() for x in made]
        grad = torch.randn_like(made[0])
        both = in_turns(
            {n: lambda r=r: torch.autograd.grad(r(*leaves), leaves, grad) for n, r in runs.items()}, rounds, wait
        )
        learned = slopes.clone().requires_grad_()
        own = in_turns(
            {"with slopes": lambda: torch.autograd.grad(plan(*leaves, alibi_slopes=learned), (*leaves, learned), grad)},
            max(2, rounds // 3), wait,
        )  # fmt: skip
        row |= {"forward_and_backward": summary(both), "training_times_by_hand": ratio(both), **summary(own)}
    return row


RATIOS = ("times_by_hand", "training_times_by_hand", "times_by_hand_at_best", "training_over_its_forward_at_best",
          "times_its_parts")  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        found = ", ".join(f"{name} {row[name]:.3f}" for name in RATIOS if name in row)
        lines.append(f"{row['case']:14} {found or row.get('error', 'nothing')}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--budget", type=float, default=float("inf"), help="begin no row after this many seconds")
    options = parser.parse_args()
    small = {"length": 1024, "heads": 2, "rounds": 1} if options.dry_run else {}
    if options.gpu:
        small |= {"device": "cpu", "head_dim": 32} if options.dry_run else {}
        names = ("window", "longformer", "random blocks", "documents")
        works = {name: lambda name=name: gpu_row(name, **small) for name in names}
        works |= {"alibi": lambda: alibi_row(**small), "12 layers": lambda: model_row(**small)}
    else:
        works = {name: lambda name=name: cpu_row(name, **small) for name in CPU}
    rows: list[dict[str, Any]] = []
    found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    start = time.perf_counter()
    for name, work in works.items():
        if time.perf_counter() - start > options.budget:
            rows.append({"case": name, "error": "left out: the budget was spent"})
        else:
            try:
                rows.append(work())
            except Exception as error:  # one row must not lose the others
                rows.append({"case": name, "error": f"{type(error).__name__}: {error}"[:2000]})
        if options.json and not options.dry_run:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not options.json:
        print(json.dumps(found, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
