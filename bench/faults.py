"""Breaks rings over gloo, each fault many times, and counts how often every survivor names the culprit in time.

    python -m bench.faults                                  every fault 20 times, as far as --budget goes
    python -m bench.faults --times 2 --only hang --json OUT.json --budget 300

Four processes run a plan; rank 2 misbehaves at its second step. A run counts if every other rank raises a RingError
that names rank 2 and the step, within the timeout and 5 seconds, and ends by itself. Nothing may return a result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs

from tests.ring_group import Ended, run_group
from tests.ring_workers import CULPRIT, RANKS, TIMEOUT, broken_plan, off_by

SLACK = 5.0
STRATEGIES = ("zigzag > ring", "contiguous > all-gather", "contiguous > ulysses", "contiguous > rows")
PHASES = ("keys and values", "gradients of keys")
SPREAD = ("queries", "gradients of outputs")
"""What ``ulysses`` exchanges instead."""


@attrs.frozen
class Fault:
    """One way to break a ring."""

    name: str
    transport: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    hangs: bool = False
    culprit_raises: str = ""
    """How the error of the culprit begins, where it does not die or hang."""


def faults() -> Iterator[Fault]:
    """Iterate over all faults."""
    for strategy, fault in itertools.product(STRATEGIES, ("death", "hang", "exception")):
        transport = strategy.split(" > ")[1]
        for when in (*(SPREAD if transport == "ulysses" else PHASES), "between"):
            own = "ValueError" if fault == "exception" else ""
            yield Fault(
                f"{fault}, {when}", transport, broken_plan, (strategy, fault, when), fault == "hang", own
            )  # fmt: skip
    for strategy, validate in itertools.product(STRATEGIES[:2], ("always", "first")):
        transport = strategy.split(" > ")[1]
        for how in ("shorter", "longer", "dtype", "batch", "plan", "gradients", "call"):
            if validate == "first" and how == "call":
                continue  # ranks that see no change of their own do not compare
            own = "SpecError" if how in ("shorter", "longer", "dtype") else "RingError"
            yield Fault(f"{how}, {validate}", transport, off_by, (strategy, how, validate), False, own)


def judged(fault: Fault, found: list[Ended]) -> tuple[str, float]:
    """Return what is wrong with a run, empty if nothing is, and the seconds of its slowest survivor."""
    survivors = [one for one in found if one.rank != CULPRIT]
    slowest = max(one.seconds for one in survivors)
    for one in survivors:
        if not one.error.startswith("RingError"):
            return f"rank {one.rank} says {one.error[:300] or one}", slowest
        if one.facts[:2] != (one.rank, CULPRIT) or f"rank {CULPRIT}" not in one.error:
            return f"rank {one.rank} names {one.facts}: {one.error[:300]}", slowest
        if one.facts[3] != 2:
            return f"rank {one.rank} is at step {one.facts[3]}", slowest
        if one.exit_code != 1:
            return f"rank {one.rank} had to be killed", slowest
        if one.seconds > TIMEOUT + SLACK:
            return f"rank {one.rank} took {one.seconds:.1f} s", slowest
    own = found[CULPRIT]
    if fault.culprit_raises and not own.error.startswith(fault.culprit_raises):
        return f"the culprit says {own.error[:300] or own}", slowest
    return "", slowest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--only", default="", help="faults whose name or transport holds this word")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds")
    args = parser.parse_args()
    end, rows = time.monotonic() + args.budget, []
    for fault in faults():
        if args.only not in f"{fault.name} {fault.transport}":
            continue
        wrong, slowest, ran = [], 0.0, 0
        while ran < args.times and time.monotonic() < end:
            hangs = CULPRIT if fault.hangs else -1
            found = run_group(RANKS, fault.function, *fault.arguments, deadline=60.0, hangs=hangs)
            why, seconds = judged(fault, found)
            wrong, slowest, ran = wrong + [why] * bool(why), max(slowest, seconds), ran + 1
        row = {
            "fault": fault.name, "transport": fault.transport, "times": ran, "named": ran - len(wrong),
            "slowest_s": round(slowest, 2), "wrong": wrong[:3],
        }  # fmt: skip
        rows.append(row)
        print(f"{fault.transport:<11} {fault.name:<32} {ran - len(wrong):>3}/{ran:<3} {slowest:5.2f} s", flush=True)
        for why in wrong[:3]:
            print(f"    {why}", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"timeout_s": TIMEOUT, "ranks": RANKS, "rows": rows}, indent=1) + "\n")
    good = sum(r["named"] == r["times"] > 0 for r in rows)
    print(f"{good} of {len(rows)} faults were named by every survivor every time")


if __name__ == "__main__":
    main()
