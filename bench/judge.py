"""Judges the planner on measured rows: fits the cost model to half of the specs, and judges choices on the rest."""

from __future__ import annotations

import json
import random
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import attrs

from attnplan.cost import Device
from attnplan.cost.fit import Sample, fitted
from attnplan.cost.model import timed
from attnplan.cost.parameters import Parameters, defaults
from attnplan.harness.rows import read_rows
from bench.judged import Judged, Row, Timed, read

NOISE = 0.02
"""A choice within this share of the best, or within its own spread, is as good as the best."""
POLICIES: Mapping[str, tuple[str, ...]] = {
    "always SDPA": ("by hand: sdpa",),
    "always Flex": ("compiled (flex)", "by hand: flex"),
    "always FA4": ("flash (fa4)", "by hand: fa4"),
    "always cuDNN": ("eager (cudnn)", "by hand: cudnn"),
}


def predicted(way: Timed, device: Device, table: Parameters) -> float:
    """Return the seconds that a table predicts for a candidate."""
    assert way.sample is not None
    return timed(way.sample.loads, way.sample.spec, way.sample.kernel, device, table)[1]


def halves(judged: Sequence[Judged], seed: int) -> tuple[list[Judged], list[Judged]]:
    """Return two halves of the specs by a seed, a spec's forward and training on the same side."""
    shapes = sorted({j.case.name.rsplit(",", 1)[0] for j in judged})
    random.Random(seed).shuffle(shapes)
    first = set(shapes[: len(shapes) // 2])
    parts: tuple[list[Judged], list[Judged]] = ([], [])
    for one in judged:
        parts[one.case.name.rsplit(",", 1)[0] not in first].append(one)
    return parts


def losses(
    judged: Sequence[Judged], choose: Callable[[Judged], Timed | None], best: str = "best_automatic"
) -> list[float]:
    """Return the regret of each spec for which there is a choice, against one of the bests of :class:`Judged`."""
    chosen = ((j, choose(j)) for j in judged)
    return [w.seconds / getattr(j, best) - 1 for j, w in chosen if w is not None]


def by_price(device: Device, table: Parameters) -> Callable[[Judged], Timed | None]:
    def choose(one: Judged) -> Timed | None:
        return min((w for w in one.ways if w.automatic), key=lambda w: predicted(w, device, table) + w.once)

    return choose


def always(names: Sequence[str]) -> Callable[[Judged], Timed | None]:
    """Return the policy that takes the best of what one kernel can do for a spec, None where it can do nothing."""

    def choose(one: Judged) -> Timed | None:
        mine = [w for w in one.comparable if any(w.name.endswith(n) for n in names)]
        return min(mine, key=lambda w: w.seconds, default=None)

    return choose


def by_other_rounds(one: Judged) -> Timed | None:
    """Return the winner of the even rounds: its regret in all rounds is what noise alone costs."""
    mine = [w for w in one.ways if w.automatic]
    several = [w for w in mine if len(w.row["rounds"]) > 1]
    return min(several or mine, key=lambda w: statistics.median(w.row["rounds"][::2]))


def spread_of(one: Judged) -> float:
    best = min((w for w in one.ways if w.automatic), key=lambda w: w.seconds)
    return max(NOISE, float(best.row["spread"]))


def summary(found: Sequence[float]) -> Row:
    if not found:
        return {"specs": 0}
    ordered = sorted(found)
    return {
        "specs": len(found),
        "mean": statistics.mean(found),
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "worst": ordered[-1],
    }


def errors(judged: Sequence[Judged], device: Device, table: Parameters) -> Iterator[tuple[Judged, Timed, float]]:
    for one in judged:
        for way in one.own:
            if way.sample is not None:
                yield one, way, way.sample.predicted(device, table)[0] / way.seconds - 1


def mape(judged: Sequence[Judged], device: Device, table: Parameters, *, sparse: bool) -> float | None:
    found = [abs(e) for one, _, e in errors(judged, device, table) if one.case.sparse == sparse]
    return statistics.mean(found) if found else None


def mape_of_device(judged: Sequence[Judged], device: Device, table: Parameters) -> float | None:
    """Return the error of what the device alone takes, where the host's time is known apart."""
    samples = [w.sample for one in judged for w in one.own if w.sample is not None and w.sample.alone]
    found = [abs(s.predicted(device, table)[1] / (s.alone or 1.0) - 1) for s in samples]
    return statistics.mean(found) if found else None


def judge(judged: Sequence[Judged], device: Device, seed: int) -> Row:
    """Fit to one half, judge on the other."""
    train, held_out = halves(judged, seed)
    sheet = defaults(device.kind)
    samples = [sample for j in train for sample in j.samples]
    table, _ = fitted(samples, device, sheet)
    choose = by_price(device, table)
    top = [_within(j, choose(j)) for j in held_out]
    policies = {
        "auto": losses(held_out, choose),
        "auto, data sheet": losses(held_out, by_price(device, sheet)),
        "auto, beside what runs by name": losses(held_out, choose, "best_candidate"),
        "auto, beside calls by hand": losses(held_out, choose, "best"),
        "noise floor": losses(held_out, by_other_rounds),
        **{name: losses(held_out, always(names), "best") for name, names in POLICIES.items()},
    }
    return {
        "seed": seed,
        "fitted specs": len({j.case.name for j in train}),
        "held-out specs": len({j.case.name for j in held_out}),
        "held-out choices": len(held_out),
        "top-1 within noise": sum(top) / max(1, len(top)),
        "MAPE dense": mape(held_out, device, table, sparse=False),
        "MAPE sparse": mape(held_out, device, table, sparse=True),
        "MAPE device": mape_of_device(held_out, device, table),
        "MAPE data sheet": statistics.mean(abs(e) for _, _, e in errors(held_out, device, sheet)),
        "regret": {name: summary(found) for name, found in policies.items()},
        "totals": {name: _totals(held_out, choose, always(names)) for name, names in POLICIES.items()},
        "by hand": list(_beaten(held_out, choose)),
    }


BEATEN = 0.05
"""A call by hand that is faster than the choice by more than this is listed."""


def _beaten(judged: Sequence[Judged], choose: Callable[[Judged], Timed | None]) -> Iterator[Row]:
    """Iterate over the specs in which something by hand beats the choice, the worst first."""
    found = []
    for one in judged:
        chosen, best = choose(one), min(one.comparable, key=lambda w: w.seconds)
        if chosen is not None and not best.automatic and chosen.seconds > (1 + BEATEN) * best.seconds:
            device_times = [
                statistics.median(w.row["device"]) if w.row["device"] else w.seconds for w in (chosen, best)
            ]
            found.append(
                {
                    "spec": one.name,
                    "auto": chosen.name,
                    "seconds": chosen.seconds,
                    "faster": best.name,
                    "its seconds": best.seconds,
                    "slower by": chosen.seconds / best.seconds - 1,
                    "slower on the device by": device_times[0] / device_times[1] - 1,
                }
            )
    return iter(sorted(found, key=lambda r: -r["slower by"]))


def _within(one: Judged, chosen: Timed | None) -> bool:
    return chosen is not None and chosen.seconds <= one.best_automatic * (1 + spread_of(one))


def _totals(
    judged: Sequence[Judged], auto: Callable[[Judged], Timed | None], other: Callable[[Judged], Timed | None]
) -> Row:
    """Return the seconds of auto and of a policy over the specs that the policy can run."""
    pairs = [(auto(j), other(j)) for j in judged]
    both = [(a.seconds, b.seconds) for a, b in pairs if a is not None and b is not None]
    return {"specs": len(both), "auto": sum(a for a, _ in both), "policy": sum(b for _, b in both)}


def coverage(judged: Sequence[Judged]) -> float:
    """Return the share of specs with three candidates from two backends that ran."""
    enough = 0
    for one in judged:
        mine = [w for w in one.ways if w.sample is not None]
        enough += len(mine) >= 3 and len({w.row["backend"] for w in mine}) >= 2
    return enough / max(1, len(judged))


def render(found: Sequence[Row]) -> str:
    def percent(x: float | None) -> str:
        return "-" if x is None else f"{100 * x:.1f} %"

    lines = []
    for one in found:
        lines.append(
            f"seed {one['seed']}: {one['fitted specs']} specs fitted, {one['held-out specs']} held out, "
            f"{one['held-out choices']} choices; "
            f"top-1 {percent(one['top-1 within noise'])}; MAPE dense {percent(one['MAPE dense'])}, "
            f"sparse {percent(one['MAPE sparse'])}, data sheet {percent(one['MAPE data sheet'])}"
        )
        lines.append(f"  {'regret':<26} {'specs':>5} {'mean':>8} {'p95':>8} {'worst':>8}")
        for name, got in one["regret"].items():
            if got["specs"]:
                figures = " ".join(f"{percent(got[k]):>8}" for k in ("mean", "p95", "worst"))
                lines.append(f"  {name:<26} {got['specs']:>5} {figures}")
        for name, got in one["totals"].items():
            if got["specs"]:
                ratio = got["policy"] / got["auto"]
                lines.append(f"  {name}: {ratio:.2f} x the time of auto over the {got['specs']} specs that it runs")
        for got in one["by hand"]:
            lines.append(
                f"  {got['spec']}: {got['faster']} takes {1e6 * got['its seconds']:,.0f} us, {got['auto']} "
                f"{percent(got['slower by'])} more, on the device {percent(got['slower on the device by'])}"
            )
    return "\n".join(lines)


SHIPPED = Path(__file__).resolve().parent.parent / "attnplan" / "cost" / "calibrations"


KIN: Mapping[str, tuple[str, ...]] = {"h100": ("h200",)}
"""Devices that get the shares of another's data sheet, unless they have rows of their own."""


def _of_device_only(judged: Judged, way: Timed, changed: str) -> Iterator[Sample]:
    """Yield the sample of a candidate; without what the host took where its path has changed."""
    if way.sample is None:
        return
    mode = "training" if judged.case.spec.training else "forward"
    if not changed or re.search(changed, f"{way.name}, {judged.case.family}, {mode}") is None:
        yield way.sample
    elif way.sample.alone is not None:
        yield attrs.evolve(way.sample, seconds=None, host=None)


def ship(paths: Sequence[Path], leave: Sequence[str] = (), changed: str = "") -> None:
    """Fit the cost model to all rows, and write the calibration that comes with the package.

    Numbers that begin so, or whose last part is so, as ``leave`` says keep their published value: what the rows say of
    them is out of date. Of rows that ``changed`` matches, a pattern for ``"candidate, family, mode"``, only the time of
    the device counts: the host has another way to start the same kernels now.
    """
    device, judged, stale = read(paths)
    samples = [s for j in judged for w in j.own for s in _of_device_only(j, w, changed)]
    samples += [sample for j in judged for sample in j.stand_ins]
    table, numbers = fitted(samples, device, defaults(device.kind))
    versions: dict[str, str] = {}
    for path in paths:
        versions |= read_rows(path)[0]["environment"]["versions"]
    versions.pop("attnplan", None)
    left = tuple(leave)
    numbers = {p: n for p, n in numbers.items() if p.rpartition("/")[2] not in left and not p.startswith(left)}
    name = read_rows(paths[0])[0]["environment"]["device"]
    where = device.title if name == "cpu" else f"an {name}"
    about = f"calibrated on {where}: {', '.join(f'{n} {v}' for n, v in versions.items())}"
    about += f"; published: {', '.join(leave)}" if leave else ""
    SHIPPED.mkdir(exist_ok=True)
    out = SHIPPED / f"{device.name}.json"
    out.write_text(json.dumps({"about": about, "numbers": numbers}, indent=1) + "\n", encoding="utf-8")
    for kin in KIN.get(device.name, ()):
        if not (SHIPPED / f"{kin}.json").exists():
            like = {"like": device.name, "about": f"{about}; transferred by data sheet"}
            (SHIPPED / f"{kin}.json").write_text(json.dumps(like, indent=1) + "\n", encoding="utf-8")
    off = statistics.mean(abs(e) for _, _, e in errors(judged, device, table))
    print(f"{out}: {len(samples)} measurements, {stale} out of date, off by {100 * off:.1f} % on average")


def main(paths: Sequence[Path], seeds: Sequence[int], out: Path | None) -> None:
    device, judged, stale = read(paths)
    found = [judge(judged, device, seed) for seed in seeds]
    specs, rows = len({j.case.name for j in judged}), sum(len(j.own) for j in judged)
    print(f"{device.title}: {specs} specs, {rows} rows, {stale} out of date; "
          f"three candidates of two backends in {100 * coverage(judged):.0f} %")  # fmt: skip
    print(render(found))
    if device.kind == "cuda":
        from bench.peaks import report  # which reads rows by this module

        print(report(judged))
    if out is not None:
        out.write_text(json.dumps({"device": device.name, "seeds": found}, indent=1) + "\n", encoding="utf-8")
