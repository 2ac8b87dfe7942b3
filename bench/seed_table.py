"""The seed library's memory table, measured again: working memory and time of its two ring classes.

    python -m bench.seed_table --json bench/results/seed-table-cpu.json
    python -m bench.seed_table --json bench/results/seed-table-cpu.json --only planned gathered
    python -m bench.seed_table --gpu --json bench/results/seed-table-h100.json --budget 120

Rows: 8,192 tokens at ring sizes 1, 2, 4, 8, 16 and 4,096 tokens at ring size 16, on a kernel that materialises scores
and on the kernels that the planner chooses; with these also on the transport that starts the fewest of them. Beside
each row stand the seed's own figures where it gave some. What a ring saves on one device is the scores of a kernel that
materialises them; q, k, v and the output stay whole.

Each ring is timed in turns with ring size 1, and with its own kernels called by hand on the very tensors that the ring
called them with: kernels have shorter blocks for few queries, and that part of a ring's time is none of ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attnplan
from attnplan import AttentionSpec
from attnplan.errors import AttnPlanError
from attnplan.nn import RingAttentionCorrectV2, RingDilatedAttentionV2
from attnplan.plan import Plan
from attnplan.units import format_bytes
from bench.deadline import deadline
from bench.memory import measured, seconds, warm_up

MB = 1e6
ROWS = ((8192, 1), (8192, 2), (8192, 4), (8192, 8), (8192, 16), (4096, 1), (4096, 16))
"""(tokens, ring size); the rows of ring size 1 are what the others are compared with."""
SEED: dict[tuple[str, int, int], dict[str, float]] = {
    ("RingAttentionCorrectV2", 8192, 2): {"ms": 877.1, "MB": 1544.5, "saved": 50.0},
    ("RingAttentionCorrectV2", 8192, 4): {"ms": 1043.3, "MB": 776.5, "saved": 75.0},
    ("RingAttentionCorrectV2", 8192, 8): {"ms": 1230.9, "MB": 392.5, "saved": 87.5},
    ("RingAttentionCorrectV2", 8192, 16): {"ms": 1396.2, "MB": 200.5, "saved": 93.8},
    ("RingDilatedAttentionV2", 8192, 8): {"ms": 1023.8, "MB": 392.5},
    ("RingAttentionCorrectV2", 4096, 16): {"saved": 89.8},
}
"""The seed's report of 2025-06-27 on a GTX 1080: milliseconds, megabytes, percentage saved. It gave no others."""
HEAD_DIM = 64
TRANSPORT = "contiguous > all-gather"
"""As many launches as ranks: how a ring on a GPU materialises scores, and how ``"gathered"`` rows run. What a planner
chooses for ranks on devices of their own may start the square of that, one after the other on one device."""
KERNELS = ("materialising", "planned", "gathered")
CELL_LIMIT = 60.0
"""Seconds that a cell may take, planning included."""
SEGMENTS, RATES = [1024, 2048, 4096], [1, 2, 4]


@attrs.frozen
class Row:
    """One cell of the table."""

    name: str
    tokens: int
    ring: int
    kernel: str
    """``"materialising"``, ``"planned"``, or ``"gathered"``: the planned kernels on :data:`TRANSPORT`."""


class ByHand(TorchDispatchMode):
    """The attention kernels of torch that run inside of it, to be called again with the same tensors.

    Examples
    --------
    >>> q = torch.zeros(1, 1, 16, 8)
    >>> with torch.no_grad(), ByHand() as kernels:
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> len(kernels.calls)
    1
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note a call of an attention kernel."""
        if "attention" in str(func):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def run(self) -> None:
        """Call the kernels again, in the same order."""
        with torch.no_grad():
            for func, args, kwargs in self.calls:
                func(*args, **kwargs)


def rows() -> Iterator[Row]:
    """Iterate over the cells, the materialising kernel first."""
    for kernel in ("materialising", "planned"):
        for name in ("RingAttentionCorrectV2", "RingDilatedAttentionV2"):
            for tokens, ring in ROWS:
                yield Row(name, tokens, ring, kernel)
    for tokens, ring in ROWS:
        if ring > 1:
            yield Row("RingAttentionCorrectV2", tokens, ring, "gathered")


def pattern(one: Row, heads: int) -> Any:
    """Return the pattern of the class of :mod:`attnplan.nn`."""
    if one.name == "RingAttentionCorrectV2":
        return RingAttentionCorrectV2().pattern(one.tokens, heads)
    segments = [min(w, one.tokens) for w in SEGMENTS]
    return RingDilatedAttentionV2(segments, RATES, ring_size=1).pattern(one.tokens, heads)


def plan_of(one: Row, device: str, dtype: str, heads: int) -> Plan:
    """Return the plan of a cell. The materialising kernel is plain torch, in float32."""
    spec = AttentionSpec(
        seq_len=one.tokens,
        heads=heads,
        head_dim=HEAD_DIM,
        pattern=pattern(one, heads),
        dtype="float32" if one.kernel == "materialising" else dtype,
        softcap=1e6 if one.kernel == "materialising" else None,  # far above any score: no fused kernel of torch has it
        ring_size=one.ring,
    )
    gathers = one.kernel == "gathered" or (one.kernel == "materialising" and one.ring > 1 and device != "cpu")
    plan = attnplan.compile(spec, device=device, backend="eager", strategy=TRANSPORT if gathers else "auto")
    if one.kernel == "materialising" and "math" not in str(getattr(plan, "schedule", "math")):
        raise AttnPlanError(f"the planner chose {plan}, which materialises nothing")
    return plan


def cell(one: Row, device: str, dtype: str, heads: int, rounds: int) -> dict[str, Any]:
    """Measure one cell; flash kernels, which are short, in three times as many rounds."""
    found: dict[str, Any] = {**attrs.asdict(one), "device": device, "seed": SEED.get((one.name, one.tokens, one.ring))}
    plan = plan_of(one, device, dtype, heads)
    torch.manual_seed(0)
    given = getattr(torch, plan.spec.dtype)
    q, k, v = (torch.randn(1, heads, one.tokens, HEAD_DIM, device=device, dtype=given) for _ in "qkv")

    def run() -> tuple[Tensor]:
        return (plan(q, k, v),)

    first = measured(run, device)  # masks and tables that stay, and compilation
    peak = measured(run, device)
    with ByHand() as kernels:
        run()
    turns = {"seconds": run}
    if kernels.calls:
        turns["kernels"] = kernels.run
    if one.ring > 1:
        alone = plan_of(attrs.evolve(one, ring=1, kernel=_same(one.kernel)), device, dtype, heads)
        turns["ring_1"] = lambda: alone(q, k, v)
        alone(q, k, v)
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds if one.kernel == "materialising" else 3 * rounds):
        for name, call in turns.items():
            times[name] += seconds(call, device, 1)
    return {
        **found,
        "choice": repr(plan),
        "working": peak.allocated,
        "first": first.allocated,
        "reserved": peak.reserved,
        "inputs_and_output": 4 * q.numel() * q.element_size(),
        "predicted": plan.predicted.peak_bytes,
        "launches": len(kernels.calls),
        **{name: statistics.median(each) for name, each in times.items()},
        **{("fastest" if name == "seconds" else f"{name}_fastest"): min(each) for name, each in times.items()},
    }


def _same(kernel: str) -> str:
    """Return what ring size 1 runs on, which gathers nothing."""
    return "planned" if kernel == "gathered" else kernel


def compared(found: list[dict[str, Any]]) -> None:
    """Add to each row the working memory and time as shares of those at ring size 1."""
    first = {(r["name"], r["tokens"], r["kernel"]): r for r in found if r.get("ring") == 1 and "working" in r}
    for r in found:
        base = first.get((r["name"], r["tokens"], _same(r["kernel"])))
        if base is not None and "working" in r:
            r["working_share"] = r["working"] / base["working"] if base["working"] else None
            alone = r.get("ring_1", base["seconds"])  # of the same turns
            r["time_share"] = r["seconds"] / alone
            if "kernels" in r:
                r["kernels_share"] = r["kernels"] / alone


def line(r: dict[str, Any]) -> str:
    """Return a row as one line of the table."""
    head = f"{r['name']:<24}{r['tokens']:>6}{r['ring']:>4}  {r['kernel']:<14}"
    if "working" not in r:
        return f"{head}  {r.get('refused') or r.get('skipped')}"
    seed = r["seed"] or {}
    theirs = "  ".join(f"{seed[k]:g} {k}" if k != "saved" else f"{seed[k]:g} % saved" for k in seed)
    share = "" if r.get("working_share") is None else f"{100 * (1 - r['working_share']):6.1f} % saved"
    working, beside = r["working"] / MB, r["inputs_and_output"] / MB
    kernels = "" if "kernels" not in r else f" ({r['launches']} kernels alone {1e3 * r['kernels']:.2f})"
    return (
        f"{head}{1e3 * r['seconds']:>10.2f} ms{kernels}  {working:>9.1f} MB beside {beside:.1f} MB"
        f"  {share:>14}   seed: {theirs or '-'}"
    )


def measure(
    device: str,
    dtype: str,
    heads: int,
    budget: float,
    rounds: int,
    write: Callable[[list[dict[str, Any]]], None],
    kept: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Measure every cell while there is time, except those of the kernels of ``kept`` rows; a refusal is a row, too."""
    warm_up(device)
    start, found = time.perf_counter(), list(kept)
    for one in rows():
        if one.kernel in {r["kernel"] for r in kept}:
            continue
        plain = {**attrs.asdict(one), "seed": SEED.get((one.name, one.tokens, one.ring))}
        if time.perf_counter() - start > budget:
            found.append({**plain, "skipped": f"the {budget:.0f} s are over"})
            continue
        try:
            with deadline(CELL_LIMIT):
                found.append(cell(one, device, dtype, heads, rounds))
        except Exception as error:  # one cell must not lose the others
            found.append({**plain, "refused": f"{type(error).__name__}: {str(error)[:300]}"})
        compared(found)
        write(found)
        print(line(found[-1]), flush=True)
        attnplan.cache_clear()
        gc.collect()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="on CUDA, in bfloat16; the default is the CPU, in float32")
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each of them")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--heads", type=int, help="32 on CUDA, 1 on the CPU")
    parser.add_argument("--only", nargs="+", choices=KERNELS, help="keep the file's rows of the other kernels")
    options = parser.parse_args()
    kept = []
    if options.only:
        kept = [r for r in json.loads(options.json.read_text())["rows"] if r["kernel"] not in options.only]
    from attnplan.harness import environment

    def write(found: list[dict[str, Any]]) -> None:
        if options.json:
            options.json.write_text(json.dumps({"environment": environment(), "rows": found}, indent=1) + "\n")

    device, dtype = ("cuda", "bfloat16") if options.gpu else ("cpu", "float32")
    heads = options.heads or (32 if options.gpu else 1)
    found = measure(device, dtype, heads, options.budget, options.rounds, write, kept)
    write(found)
    top = max((r["working"] for r in found if "working" in r), default=0)
    print(f"largest working memory {format_bytes(top)}")


if __name__ == "__main__":
    main()
