"""Times grouped dilated attention on a CPU against hand-written strided SDPA and the published class.

    python -m bench.dilated --json bench/results/dilated-cpu.json

The published class (dilated-attention-pytorch 0.2.0, its kernel call replaced by SDPA) computes another normalisation;
it is listed where it is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
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
from attnplan.verify import relative_error
from bench.published_package import loaded
from bench.spine import interleaved, summary

WIDTHS, RATES = [2048, 4096, 8192], [1, 2, 4]


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute grouped dilated attention the way a careful user would: strided views, SDPA, one write per group."""
    heads, length = q.shape[1:3]
    sizes = [heads // len(WIDTHS) + (j < heads % len(WIDTHS)) for j in range(len(WIDTHS))]
    out = torch.zeros_like(q)
    first = 0
    for j, (w, r, size) in enumerate(zip(WIDTHS, RATES, sizes, strict=True)):
        here = slice(first, first + size)
        rows = [x[:, here].unflatten(2, (length // w, w))[:, :, :, j % r :: r].flatten(0, 2) for x in (q, k, v)]
        part = F.scaled_dot_product_attention(*(x.unsqueeze(1) for x in rows)).squeeze(1)
        view = out[:, here].unflatten(2, (length // w, w))[:, :, :, j % r :: r]
        view.copy_(part.view(view.shape))
        first += size
    return out


def published() -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    """Return the published class as a function of [B, H, S, D], or None where it is not installed."""
    try:
        with loaded() as package:
            module = package.DilatedAttention(WIDTHS, RATES)
    except ImportError:
        return None
    return lambda q, k, v: module(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def row(length: int, heads: int, backward: bool, rounds: int) -> dict[str, Any]:
    spec = AttentionSpec(
        seq_len=length, heads=heads, head_dim=64, dtype="float32", pattern=P.grouped(WIDTHS, RATES), training=backward
    )
    plan = attnplan.compile(spec, device="cpu")
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, length, 64, requires_grad=backward) for _ in range(3))
    upstream = torch.randn(1, heads, length, 64)
    contestants: dict[str, Any] = {"plan": plan, "strided SDPA by hand": by_hand, "published class": published()}

    def call(run: Callable[..., Tensor]) -> Any:
        return torch.autograd.grad(run(q, k, v), (q, k, v), upstream) if backward else run(q, k, v)

    runs = {name: (lambda run=run: call(run)) for name, run in contestants.items() if run is not None}
    times = interleaved(runs, rounds)
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        "name": "grouped dilated attention",
        "work": "forward and backward" if backward else "forward",
        "spec": spec.to_dict(),
        "plan": repr(plan),
        "predicted_seconds": plan.predicted.seconds,
        "seconds": {name: summary(t) for name, t in times.items()},
        "ratios_to_plan": {name: median / medians["plan"] for name, median in medians.items()},
        "relative_l2_to_hand_written": relative_error(plan(q, k, v), by_hand(q, k, v)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    rows = [row(8192, 9, backward, arguments.rounds) for backward in (False, True)]
    if arguments.json:
        arguments.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    for one in rows:
        print(one["work"], {name: round(r, 3) for name, r in one["ratios_to_plan"].items()}, one["seconds"]["plan"])


if __name__ == "__main__":
    main()
