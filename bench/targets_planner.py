"""What the planner's judgement was to reach, beside what committed rows say; the worst of the splits counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bench.targets import Results, Target, at_least, at_most

Split = dict[str, Any]


def regret(policy: str, what: str) -> Callable[[Split], float]:
    """Return what reads a figure of regret from a split, in per cent."""
    return lambda split: 100 * float(split["regret"][policy][what])


def share(name: str) -> Callable[[Split], float]:
    """Return what reads another figure from a split, in per cent."""
    return lambda split: 100 * float(split[name])


H100 = (
    ("regret of `auto`, mean", regret("auto", "mean"), 2.0),
    ("regret of `auto`, 95th percentile", regret("auto", "p95"), 10.0),
    ("regret of `auto`, worst", regret("auto", "worst"), 25.0),
    ("error of predicted times, dense", share("MAPE dense"), 12.0),
    ("error of predicted times, sparse", share("MAPE sparse"), 18.0),
    ("regret by the data sheet alone, mean", regret("auto, data sheet", "mean"), 8.0),
)
"""What is held, how it is read from a split, and the most per cent that it may be."""
CPU = ((*H100[0][:2], 5.0), (*H100[1][:2], 20.0))


def planner(results: Results) -> Iterator[Target]:
    """Return the targets of the choice among candidates."""
    splits = results.data("judged-h100").get("seeds", [])
    for what, of, limit in H100:
        yield _worst(f"H100, held out: {what}", splits, of, limit)
    top = [100 * split["top-1 within noise"] for split in splits]
    what = "H100, held out: the best choice, within noise"
    yield at_least(what, min(top, default=None), 85.0, _each(top), unit=" %", digits=1)
    moved = results.data("transfer-h200")
    mean = 100 * moved["regret"]["auto"]["mean"] if "regret" in moved else None
    note = f"{moved['specs']} specs; fitted to an {moved['from'].upper()}" if mean is not None else ""
    yield at_most("H200, transferred by data sheet: regret of `auto`, mean", mean, 5.0, note, unit=" %", digits=1)
    splits = results.data("judged-cpu").get("seeds", [])
    for what, of, limit in CPU:
        yield _worst(f"2-core CPU, held out: {what}", splits, of, limit)


def _worst(what: str, splits: Sequence[Split], of: Callable[[Split], float], limit: float) -> Target:
    found = [of(split) for split in splits]
    return at_most(what, max(found, default=None), limit, _each(found), unit=" %", digits=1)


def _each(found: Sequence[float]) -> str:
    return f"splits: {', '.join(f'{x:.1f}' for x in found)}" if found else ""
