"""The tables that ``bench.longnet`` prints last: times, and every ratio beside what it should be."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def table(rows: list[Row]) -> None:
    """Print times, each beside the fastest kernels alone of its group, and timelines."""
    for (case, causal, backward), found in groups(rows).items():
        alone = fastest(found, "kernels")
        print(f"\n{case}{' causal' if causal else ''} {'forward + backward' if backward else 'forward'}")
        for r in sorted(found, key=lambda r: r["ms"]):
            host, device, peak = r["host_ms"], r.get("graph_ms", 0), r.get("peak_mib", 0)
            ratio = r["ms"] / alone["ms"] if alone else float("nan")
            print(f"  {r['name']:<32} {r['ms']:>9.3f} ms  {ratio:>6.2f} x kernels  host {host:>7.3f}", end="")
            print(f"  device {device:>8.3f}  peak {peak:>6} MiB")
    for row in (r for r in rows if "span_us" in r):
        print(f"\n{row['case']}{' + backward' if row['backward'] else ''} {row['name']}: ", end="")
        print(f"{row['span_us']} us, kernels {row['busy_us']}, gaps {row['gaps_us']}")
        for one in row["kernels"]:
            print(f"  {one['us']:>9.1f} us {one['calls']:>5.1f} x {one['kernel']}")


def groups(rows: list[Row]) -> dict[tuple[str, bool, bool], list[Row]]:
    """Return the rows with a time by case, whether causal, and whether with the backward."""
    found: dict[tuple[str, bool, bool], list[Row]] = {}
    for row in rows:
        if "ms" in row and "backward" in row:
            found.setdefault((row["case"], row["causal"], row["backward"]), []).append(row)
    return found


def fastest(rows: list[Row], start: str, but: str = "-") -> Row | None:
    """Return the fastest row whose name begins so, and is not another; None if there is none."""
    return min(
        (r for r in rows if r["name"].startswith(start) and r["name"] != but), key=lambda r: r["ms"], default=None
    )


KERNELS = {
    ("A", False): 1.15,
    ("B", False): 1.06,
    ("A", True): 1.20,
    ("B", True): 1.10,
}
"""Time of a plan over that of the fastest kernels alone, at most, by case and whether with the backward."""
EAGER, COMPILED = {"A": 4.3, "B": 3.7}, {"A": 1.9, "B": 2.0}
"""Time of hand-written code over that of the plan, at least."""
GROUPED_MS, PUBLISHED = {"gA": 0.62, "gB": 2.70}, {"gA": 3.0, "gB": 2.5}
"""Milliseconds of the forward, at most; forward and backward of the published class over ours, at least."""
CHOICE = 1.05
"""Time of the planner's choice over that of the best plan that was chosen by hand, at most."""


def targets(rows: list[Row], *, on_cpu: bool) -> list[Row]:
    """Return each target as what, value, sign, limit, and whether it is met, for the planner's own choice.

    The best plan chosen by hand stands behind it where its ratio is another.
    """
    made: list[Row] = []
    for (case, causal, backward), found in groups(rows).items():
        auto, best = fastest(found, "plan auto"), fastest(found, "plan", "plan auto")
        what = f"{case}{' causal' if causal else ''}{' forward + backward' if backward else ' forward'}"
        eager = fastest(found, "hand-written eager")
        if auto is not None and best is not None:
            _add(made, f"{what}: auto / best plan by hand ({best['name']})", auto["ms"] / best["ms"], "<=", CHOICE)
        for name, plan in (("auto", auto), ("best plan by hand", best)):
            if plan is None:
                continue
            label = f"{what}, {name}"
            if on_cpu and eager is not None:
                _add(made, f"{label}: eager hand-written / plan", eager["ms"] / plan["ms"], ">=", 1.0)
            elif not on_cpu:
                _on_gpu(made, found, plan, label, (case, causal, backward))
    return made


def _on_gpu(made: list[Row], found: list[Row], plan: Row, label: str, where: tuple[str, bool, bool]) -> None:
    case, causal, backward = where
    kernels, eager = fastest(found, "kernels"), fastest(found, "hand-written eager")
    compiled, package = fastest(found, "hand-written compiled"), fastest(found, "published")
    if kernels is not None and (case, backward) in KERNELS and (backward or not causal):
        _add(made, f"{label}: plan / kernels alone", plan["ms"] / kernels["ms"], "<=", KERNELS[case, backward])
    if eager is not None and case in EAGER and not causal and not backward:
        _add(made, f"{label}: eager hand-written / plan", eager["ms"] / plan["ms"], ">=", EAGER[case])
    if compiled is not None and case in COMPILED and not backward:
        _add(made, f"{label}: compiled hand-written / plan", compiled["ms"] / plan["ms"], ">=", COMPILED[case])
        share = plan["peak_mib"] / max(compiled["peak_mib"], 1)
        _add(made, f"{label}: peak memory / compiled hand-written's", share, "<=", 0.5)
    if case in GROUPED_MS and not causal and not backward:
        _add(made, f"{label}: ms", plan["ms"], "<=", GROUPED_MS[case])
    if package is not None and backward and not causal:
        _add(made, f"{label}: published class / plan", package["ms"] / plan["ms"], ">=", PUBLISHED[case])


def _add(made: list[Row], what: str, value: float, sign: str, limit: float) -> None:
    met = value <= limit if sign == "<=" else value >= limit
    made.append({"what": what, "value": round(value, 4), "sign": sign, "limit": limit, "met": met})
