"""A training step of the example LongNet under a memory budget for its attention, against the same step without one.

    python -m bench.train_step --json bench/results/train-step-cpu.json
    python -m bench.train_step --gpu --max-memory 40MiB --json bench/results/train-step-h100.json --budget 90

The length is the longest, in powers of two, whose plan meets the budget, at most ``--most``. Both steps start from the
same weights and bytes. Compared are the loss, the gradients of all weights, what a call of the plan allocates and what
it was predicted to, and what the steps allocate.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnplan
from attnplan import AttentionSpec
from attnplan.errors import MemoryBudgetError
from attnplan.plan import Plan
from attnplan.units import parse_bytes
from bench.deadline import deadline
from bench.memory import MIB, call_of, measured, warm_up
from examples.longnet_lm.model import ByteLM, Settings

HEADS, DIM, LAYERS = 4, 128, 2
ROW_LIMIT = 60.0
"""Seconds that a budget may take, planning included."""


class Planned(nn.Module):
    """Attention by one plan, which a model may have in place of its own."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Run the plan."""
        out: Tensor = self.plan(q, k, v)
        return out


def spec_of(length: int) -> AttentionSpec:
    """Return what the example's attention is at a length: segments of 64 bytes, and of 256 at every second byte."""
    pattern = attnplan.patterns.longnet([64, 256], [1, 2])
    return AttentionSpec(
        seq_len=length, heads=HEADS, head_dim=DIM // HEADS, causal=True, dtype="float32", training=True, layout="bshd",
        pattern=pattern,
    )  # fmt: skip


def longest(max_memory: int | str, most: int, device: str) -> int:
    """Return the longest length, a power of two, that meets a budget.

    Raises
    ------
    MemoryBudgetError
        If not even 256 bytes do.
    """
    length = 256
    attnplan.compile(spec_of(length), device=device, max_memory=max_memory)
    while 2 * length <= most:
        try:
            attnplan.compile(spec_of(2 * length), device=device, max_memory=max_memory)
        except MemoryBudgetError:
            break
        length *= 2
    return length


def step(plan: Plan, length: int, device: str) -> tuple[float, list[Tensor], int, float]:
    """Return (loss, gradients, bytes allocated beside the gradients, seconds) of one step from fixed weights."""
    torch.manual_seed(0)
    model = ByteLM(Settings(length=length, batch=1, steps=1, layers=LAYERS, heads=HEADS, dim=DIM), spec_of(256).pattern)
    for block in model.blocks:
        block.attention.attend = Planned(plan)
    model = model.to(device)
    tokens = torch.randint(256, (1, length + 1), generator=torch.Generator().manual_seed(1)).to(device)
    losses: list[float] = []

    def run() -> tuple[Tensor, ...]:
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        found = torch.autograd.grad(loss, list(model.parameters()))
        losses.append(loss.item())
        return tuple(found)

    peak = measured(run, device).allocated
    start = time.perf_counter()
    gradients = run()
    return losses[-1], list(gradients), peak, time.perf_counter() - start


def row(max_memory: int | str, most: int, device: str) -> dict[str, Any]:
    """Compare the step under a budget with that without."""
    budget = parse_bytes(max_memory)
    length = longest(budget, most, device)
    spec = spec_of(length)
    free, tight = attnplan.compile(spec, device=device), attnplan.compile(spec, device=device, max_memory=budget)
    loss_free, gradients_free, step_free, seconds_free = step(free, length, device)
    loss, gradients, step_peak, seconds = step(tight, length, device)
    call = measured(call_of(tight, device), device).allocated
    apart = [float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(gradients, gradients_free, strict=True)]
    return {
        "length": length,
        "max_memory": budget,
        "choice": next(c.name for c in tight.candidates if c.prediction is tight.predicted),
        "without": next(c.name for c in free.candidates if c.prediction is free.predicted),
        "predicted": tight.predicted.peak_bytes,
        "predicted_without": free.predicted.peak_bytes,
        "measured": call,
        "fits": call <= budget,
        "below": tight.predicted.peak_bytes < call,
        "close": tight.predicted.peak_bytes <= max(1.3 * call, call + 16 * MIB),
        "loss": loss,
        "loss_without": loss_free,
        "loss_apart": abs(loss - loss_free) / abs(loss_free),
        "gradients_apart": max(apart),
        "step": step_peak,
        "step_without": step_free,
        "seconds": seconds,
        "seconds_without": seconds_free,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on CUDA; the default is the CPU")
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each of them")
    parser.add_argument("--max-memory", nargs="+", default=["3 MiB", "6 MiB"], help="budgets of the attention")
    parser.add_argument("--most", type=int, default=0, help="longest length; 2^17 on CUDA, 2^13 on the CPU")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds after which no other row is started")
    options = parser.parse_args()
    from attnplan.harness import environment

    device = "cuda" if options.gpu else "cpu"
    warm_up(device)
    start, rows = time.perf_counter(), list[dict[str, Any]]()
    for max_memory in options.max_memory:
        if time.perf_counter() - start > options.budget:
            rows.append({"max_memory": max_memory, "skipped": f"the {options.budget:.0f} s are over"})
            continue
        try:
            with deadline(ROW_LIMIT):
                rows.append(row(max_memory, options.most or (2**17 if options.gpu else 2**13), device))
        except Exception as error:  # one budget must not lose the others
            rows.append({"max_memory": max_memory, "failed": f"{type(error).__name__}: {str(error)[:400]}"})
        if options.json:
            options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    for one in rows:
        print(json.dumps(one))


if __name__ == "__main__":
    main()
