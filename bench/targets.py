"""What was to be reached, beside what committed rows say: the tables that ``bench.performance`` writes.

    python -m bench.targets          prints every target with its figure

A target whose rows are not there says ``not measured``. Nothing is rounded towards its limit.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs

from attnplan.testing.matrix import AGREES, DIFFERS, FAILED

RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


@attrs.frozen
class Target:
    """One thing to reach: what, its limit, its figure (None if not measured), whether it is met, and a remark."""

    what: str
    limit: str
    figure: str | None
    met: bool | None
    note: str = ""

    @property
    def verdict(self) -> str:
        return {None: "not measured", True: "met", False: "**missed**"}[self.met]

    def line(self) -> str:
        return f"| {self.what} | {self.limit} | {self.figure or '-'} | {self.verdict} | {self.note} |"


def at_most(what: str, value: float | None, limit: float, note: str = "", *, unit: str = "", digits: int = 3) -> Target:
    """Return a target that is met up to a limit.

    Examples
    --------
    >>> at_most("plan / kernel", 1.0512, 1.05).verdict
    '**missed**'
    >>> at_most("plan / kernel", None, 1.05).verdict
    'not measured'
    """
    return _target(what, "<=", value, limit, note, unit, digits)


def at_least(
    what: str, value: float | None, limit: float, note: str = "", *, unit: str = "", digits: int = 3
) -> Target:
    """Return a target that is met from a limit on.

    Examples
    --------
    >>> at_least("by hand / plan", 4.31, 4.3, unit=" x", digits=2).line()
    '| by hand / plan | >= 4.3 x | 4.31 x | met |  |'
    """
    return _target(what, ">=", value, limit, note, unit, digits)


def _target(what: str, sign: str, value: float | None, limit: float, note: str, unit: str, digits: int) -> Target:
    shown = f"{sign} {limit:g}{unit}"
    if value is None:
        return Target(what, shown, None, None, note)
    met = value <= limit if sign == "<=" else value >= limit
    return Target(what, shown, f"{value:.{digits}f}{unit}", met, note)


@attrs.frozen
class Results:
    """The files of a folder of results, and which of them were read."""

    folder: Path
    used: list[str] = attrs.field(factory=list)

    def data(self, name: str) -> Row:
        """Return a file, or an empty one where there is none."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            return {"rows": []}
        if name not in self.used:
            self.used.append(name)
        return dict(json.loads(path.read_text(encoding="utf-8")))

    def rows(self, name: str) -> list[Row]:
        return list(self.data(name)["rows"])

    def row(self, file: str, /, **wanted: Any) -> Row:
        """Return the first row that has these values, or an empty one."""
        return next((r for r in self.rows(file) if all(r.get(k) == v for k, v in wanted.items())), {})


# ------------------------------------------------------------------------------------------------------------ backends

OF_TORCH = ("eager (cudnn)", "eager (flash)", "eager (efficient)")
PLAIN = (
    ("with xformers", "kernels-xformers-h100", (*OF_TORCH, "xformers (flash)", "xformers (cutlass)")),
    ("with flash-attn 4", "kernels-fa4-h100", (*OF_TORCH, "flash (fa4)")),
)
"""Schedules of plain causal attention beside their raw kernels, by environment."""
OF_DENSE = {0.5: 0.95, 0.2: 0.95, 0.1: 0.95, 0.05: None, 0.02: 0.75}
"""Kept share of the blocks, and at least what of 1 / share a plan is faster than dense (None: not stated)."""


def refusals(results: Results) -> Target:
    """Return how many refusals of the catalogue were wrong, of those that kernels were asked about by hand."""
    rows = [row for half in ("xformers", "fa4") for row in results.rows(f"refusals-{half}-h100")]
    said = Counter(row["verdict"] for row in rows)
    tried = said["right"] + said["wrong"]
    note = f"{tried} tried; {said['no argument']} more ask for what no argument of the kernel stands for"
    if not tried:
        note = "`python -m bench.kernels_refusals --gpu` tries them"
    share = 100 * said["wrong"] / tried if tried else None
    return at_most("wrong refusals of the catalogue, tried by hand", share, 2.0, note, unit=" %", digits=1)


def backends(results: Results) -> Iterator[Target]:
    """Return the targets of the GPU backends."""
    yield from agreement(results)
    yield refusals(results)
    for where, file, schedules in PLAIN:
        for schedule in schedules:
            row = results.row(file, what="plain causal", plan=f"dense > {schedule}")
            what, share = f"plain causal, `{schedule}` {where}", 100 * (row["ratio"] - 1) if row else None
            yield at_most(f"{what}: over the raw kernel", share, 1.0, run_of(row), unit=" %", digits=2)
            host = row.get("microseconds over raw")
            yield at_most(f"{what}: host over the raw kernel", host, 15, run_of(row), unit=" us", digits=0)
    yield from blocks(results)
    plans = [r for r in results.rows("kernels-fa4-h100") if r["what"] == "longformer" and "plan seconds" in r]
    plans = [r for r in plans if ">" in r["plan"] and "without" not in r["plan"]]
    best = min(plans, key=lambda r: r["plan seconds"], default=None)
    ms = 1e3 * best["plan seconds"] if best else None
    note = f"by `{best['plan']}`; where it goes: [backends](backends.md#what-was-measured-on-an-h100)" if best else ""
    note += f"; {run_of(best)}" if best and run_of(best) else ""
    yield at_most("Longformer over 65,536 tokens", ms, 2.4, note, unit=" ms", digits=2)


def agreement(results: Results) -> Iterator[Target]:
    for extra in ("xformers", "fa4"):
        matrices = results.data(f"cross-validation-{extra}-h100").get("matrices", [])
        told = [r["status"] for m in matrices for r in m["results"]]
        ran, raised, wrong = sum(s in (AGREES, DIFFERS) for s in told), told.count(FAILED), told.count(DIFFERS)
        notes = [f"{ran} runs of {len(matrices)} specs"]
        notes += [f"{raised} more raised, which is refused now"] if raised else []
        if wrong and all(
            r.get("schedule") == "cudnn" for m in matrices for r in m["results"] if r["status"] == DIFFERS
        ):
            notes.append(MENDED)
        told_of = "; ".join(notes) if told else ""
        yield at_most(f"disagreements with float64, with {extra}", float(wrong) if told else None, 0, told_of, digits=0)


MENDED = "all of cuDNN's gradients, [mended since](backends.md#what-was-measured-on-an-h100)"


def run_of(*rows: Row) -> str:
    """Return a remark on rows of which one is older than the others of its file."""
    return "a run before" if any(row.get("earlier") for row in rows) else ""


def blocks(results: Results) -> Iterator[Target]:
    name = "kernels-fa4-h100"
    for keep, share in OF_DENSE.items():
        row = results.row(name, what="random blocks", keep=keep)
        over = 100 * (row["ratio"] - 1) if row else None
        yield at_most(f"random blocks, {keep:g} kept: over `fa4` by hand", over, 2.0, run_of(row), unit=" %", digits=1)
        if share is not None:
            of = row.get("of the ideal")
            note = f"{row['faster than dense']:.1f} times as fast as dense" if row else ""
            yield at_least(f"random blocks, {keep:g} kept: speed over dense, of 1 / kept", of, share, note, digits=2)
    row = results.row(name, what="causal window 4096", plan="dense > flash (fa4)")
    over = 100 * (row["ratio"] - 1) if row else None
    yield at_most("causal window 4,096: over `fa4` by hand", over, 2.0, run_of(row), unit=" %", digits=2)


# ------------------------------------------------------------------------------------------------------------ compiled


def compiled(results: Results) -> Iterator[Target]:
    """Return the targets of FlexAttention, and of plans in compiled models."""
    for case in ("window", "longformer"):
        row = results.row("compiled-cpu", case=case)
        by_hand, training = row.get("times_by_hand_at_best"), row.get("training_over_its_forward_at_best")
        yield at_most(f"CPU, {case}: forward over FlexAttention by hand", by_hand, 1.05)
        old = "" if "training_over_that_without_keeping" in row else "rows from before the forward kept its weights"
        yield at_most(f"CPU, {case}: forward and backward over forward", training, 3.0, old, digits=2)
    for case in ("window", "longformer", "random blocks", "documents"):
        row = results.row("compiled-h100", case=case)
        for prefix, what in (("", "forward"), ("training_", "forward and backward")):
            ratio = row.get(f"{prefix}times_by_hand")
            note = f"fastest rounds: {_fastest(row['training' if prefix else 'forward']):.3f}" if row else ""
            yield at_most(f"{case}, {what}: `compiled` over FlexAttention by hand", ratio, 1.02, note)
            yield _auto(row, f"{case}, {what}: `auto` over the best backend", prefix)
    row = results.row("compiled-h100", case="12 layers")
    note = f"{row['graphs']} graphs" if row else ""
    yield at_most("training step of 12 mixed layers, over its parts", row.get("times_its_parts"), 1.05, note)


def _auto(row: Row, name: str, prefix: str) -> Target:
    """Return how long auto's plan takes beside the better of the compiled one and flash-attn's, where it is neither."""
    more = ", training" if prefix else ""
    plans, ratio = row.get("plans", {}), row.get(f"{prefix}auto_times_best")
    plan = plans.get(f"auto{more}", "")
    note = f"took `{plan}`" if plan else ""
    if plan and plan == plans.get(f"compiled{more}") and "Error" in plans.get(f"flash{more}", ""):
        times = row["training" if prefix else "forward"]
        clock = times["auto"]["median"] / times["compiled"]["median"]
        return at_most(
            name, 1.0, 1.0, f"the compiled plan itself, {clock:.3f} times its time; no flash-attn there", digits=2
        )
    return at_most(name, ratio, 1.0, note, digits=2)


def _fastest(times: Row) -> float:
    return float(times["compiled"]["min"] / times["by hand"]["min"])


# -------------------------------------------------------------------------------------------------------------- memory


def memory(results: Results) -> Iterator[Target]:
    """Return the targets of memory budgets, virtual rings, streams and recomputing."""
    for device, name in (("H100", "memory-h100"), ("CPU", "memory-cpu")):
        yield from budgets(results, device, name)
    for device in ("CPU", "H100"):
        yield from rings_on_one_device(results, device)
    rows = [r for r in results.rows("budget-curve-h100") if "seconds" in r and r["rows_of_piece"] >= 4096]
    worst = max(rows, key=lambda r: r["over_twice_the_budget"], default={})
    why = "why: [memory](memory.md#what-a-budget-costs)"
    note = f"{worst['name']}, pieces of {worst['rows_of_piece']:,} rows; {why}" if worst else ""
    yield at_most("halving a budget, pieces of 4,096 rows or more", worst.get("over_twice_the_budget"), 1.10, note)
    far = [r for r in rows if r["predicted"] > max(1.3 * r["measured"], r["measured"] + 2**24)]
    worst = max(far, key=lambda r: r["predicted"] / r["measured"], default={})
    note = f"{worst['predicted'] / worst['measured']:.2f} x: `{worst['choice']}`" if worst else ""
    value = float(len(far)) if rows else None
    yield at_most("these: predicted above 1.3 x and 16 MiB more than measured", value, 0, note, digits=0)
    row = results.row("stream-h100", log2=24)
    times = "{wall:.2f} s; copies alone take {copy:.2f}, kernels alone {compute:.2f}"
    what = "LongNet over 2^24 tokens in host memory: over the longer of copies and kernels"
    yield at_most(what, row.get("over_longest"), 1.25, times.format(**row) if row else "")
    used = row["measured"] / 2**30 if row else None
    yield at_most("the same: memory of the device", used, 8.0, unit=" GiB", digits=2)
    wrong = row.get("relative_error")
    yield at_most("the same: relative error of sampled rows", wrong, 4e-3, "the tolerance of bfloat16", digits=4)
    for row in results.rows("train-step-h100"):
        about = f"training step of LongNet, {row['length']:,} tokens, {row['max_memory'] >> 20} MiB"
        slower = row["seconds"] / row["seconds_without"]
        note = f"{slower:.0f} times as long as without a budget"
        yield at_most(f"{about}: loss, from that without", row["loss_apart"], 1e-6, note, digits=7)
        peak, told = row["measured"] / 2**20, row["predicted"] / 2**20
        yield at_most(f"{about}: peak", peak, row["max_memory"] / 2**20, f"predicted {told:.1f}", unit=" MiB", digits=1)


def budgets(results: Results, device: str, name: str) -> Iterator[Target]:
    rows = [r for r in results.rows(name) if "skipped" not in r]
    measured = [r for r in rows if r.get("measured") is not None]
    left = len(results.rows(name)) - len(rows)
    ran = float(len(rows)) if rows else None
    yield at_least(
        f"{device}: specs x budgets that ran", ran, 80, f"{left} not for lack of time" if left else "", digits=0
    )
    over = float(sum(not r["fits"] for r in measured)) if measured else None
    yield at_most(f"{device}: plans over their budget", over, 0, f"of {len(measured)} measured", digits=0)
    below = float(sum(r["below"] for r in measured)) if measured else None
    yield at_most(f"{device}: predicted below what was measured", below, 0, digits=0)
    far = [r for r in measured if not r["close"]]
    worst = max(far, key=lambda r: r["predicted"] / r["measured"], default={})
    note = f"the worst: {worst['predicted'] / worst['measured']:.2f} x, {worst['name']}" if worst else ""
    value = float(len(far)) if measured else None
    yield at_most(f"{device}: predicted above 1.3 x and 16 MiB more than measured", value, 0, note, digits=0)


def rings_on_one_device(results: Results, device: str) -> Iterator[Target]:
    name = f"seed-table-{device.lower()}"
    rows = [r for r in results.rows(name) if "working_share" in r]
    for ring in (2, 4, 8, 16):
        found = [r for r in rows if r["ring"] == ring and r["kernel"] == "materialising"]
        share = max((r["working_share"] for r in found), default=None)
        what = f"{device}, materialised scores, ring {ring}: working memory of ring 1's"
        yield at_most(what, share, 1 / ring + 0.05, f"the largest of {len(found)}")
    kinds = {
        "materialising": "materialised scores",
        "planned": "flash kernels",
        "gathered": "flash kernels, all keys gathered",
    }
    for kernel, what in kinds.items():
        found = [r for r in rows if r["ring"] == 16 and r["kernel"] == kernel]
        worst = max(found, key=lambda r: r["time_share"], default={})
        note = f"{worst['name']}, {worst['tokens']:,} tokens" if worst else ""
        if "kernels_share" in worst:  # what no change around the kernels can reach
            calls = f"its {worst['launches']} kernels" if worst["launches"] > 1 else "its kernel"
            note += f"; {calls}, by hand on the same pieces, alone: {worst['kernels_share']:.2f}"
        yield at_most(f"{device}, {what}: time of ring 16 over ring 1", worst.get("time_share"), 1.10, note, digits=2)


# --------------------------------------------------------------------------------------------------------------- rings

NOT_FOUR = "on 2 H200 instead of 4; rows of an earlier version"
RINGS = (
    ("causal 8192 a rank: auto", 88, 90),
    ("causal 8192 a rank: zigzag > ring", 84, 88),
    ("causal 32768 a rank: auto", 95, 95),
    ("longnet 32768 a rank: auto", 90, 90),
)
"""Rows, and the least per cent of ideal, forward and with the backward."""


def rings(results: Results) -> Iterator[Target]:
    """Return the targets of several ranks."""
    for name, forward, training in RINGS:
        row = results.row("ring-h200-x2", name=name)
        for limit, kind in ((forward, "forward"), (training, "training")):
            value = 100 * row[f"efficiency_{kind}"] if row else None
            note = f"{NOT_FOUR}; {row['layout']} > {row['transport']}" if row else ""
            what = f"{name}, {'forward' if kind == 'forward' else 'forward and backward'}: of ideal"
            yield at_least(what, value, limit, note, unit=" %", digits=0)
    yield Target("LongNet over 2^30 tokens on 4 H200", "runs", None, None, "`python -m bench.ring_billion`")
    faults = results.rows("ring-faults-cpu")
    bound = results.data("ring-faults-cpu").get("timeout_s", 0) + 5
    named = sum(r["named"] == r["times"] >= 20 for r in faults)
    value = 100 * named / len(faults) if faults else None
    note = f"{named} of {len(faults)} kinds, 20 times each, over gloo" if faults else ""
    yield at_least("faults that all survivors name", value, 100, note, unit=" %", digits=0)
    slowest = max((r["slowest_s"] for r in faults), default=None)
    yield at_most("the slowest of them, of timeout + 5 s", slowest, bound, unit=" s", digits=2)


def main() -> None:
    from bench.targets_longnet import longnet  # these import this module
    from bench.targets_planner import planner

    results = Results(RESULTS)
    for make in (backends, compiled, longnet, memory, rings, planner):
        print(f"\n{make.__name__}")
        for target in make(results):
            print(f"  {target.verdict:<12} {target.what}: {target.figure or '-'} ({target.limit}) {target.note}")


if __name__ == "__main__":
    main()
