"""What was measured of each spec in each environment, with what the cost model needs to price it.

Libraries of kernels exclude each other, so a grid is measured in several environments, one file each. A choice is
judged among what its environment can run, in times of one run: hosts differ by half from one run to the next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import attrs

from attnplan.cost import Device, catalogue
from attnplan.cost.fit import Sample, alone
from attnplan.cost.model import loads
from attnplan.cost.setting import Setting
from attnplan.harness.entrants import digest
from attnplan.harness.rows import read_rows
from attnplan.search import CALLS, every_way
from bench.grid import GRIDS, Case

Row = dict[str, Any]
LIBRARIES: Mapping[str, tuple[str, ...]] = {
    "flash": ("flash-attn", "flash-attn-3", "flash-attn-4"), "xformers": ("xformers", "mslk"),
}  # fmt: skip
"""The packages whose kernels a backend runs. Others need torch alone, which every environment has."""


OFFERED: Mapping[str, str] = {"sdpa": "eager", "cudnn": "eager", "flex": "compiled", "fa4": "flash"}
"""The backend whose candidates run the kernel of a call by hand."""


@attrs.frozen(eq=False)
class Timed:
    """One candidate of a spec, with what the model needs to price it and what was measured."""

    name: str
    row: Row
    sample: Sample | None
    """None for calls by hand, and for graphs that the spec no longer has."""
    peak: int | None = None
    """Predicted bytes beside inputs and output."""
    automatic: bool = False
    """Whether the planner may choose it by itself."""
    once: float = 0.0
    """What it adds to the price of a call because its first one compiles."""
    lent: bool = False
    """Whether the environment could run it, and another one did: nobody learns from it twice."""

    @property
    def seconds(self) -> float:
        return float(self.row["seconds"])


@attrs.frozen(eq=False)
class Judged:
    """Everything that was measured of one spec in one environment."""

    case: Case
    ways: tuple[Timed, ...]
    stand_ins: tuple[Sample, ...] = ()
    """What calls by hand say about the device's time of candidates that were not measured."""
    libraries: tuple[str, ...] = ()
    """Packages of kernels in the environment, beside torch."""

    @property
    def own(self) -> list[Timed]:
        """What was measured in this environment itself."""
        return [w for w in self.ways if not w.lent]

    @property
    def samples(self) -> list[Sample]:
        """What a fit may learn from."""
        return [*(w.sample for w in self.own if w.sample is not None), *self.stand_ins]

    @property
    def name(self) -> str:
        """The spec and, where there are several environments, what is installed."""
        return f"{self.case.name} [{', '.join(self.libraries)}]" if self.libraries else self.case.name

    @property
    def comparable(self) -> list[Timed]:
        """What was measured, but calls by hand with a library of which no candidate was measured beside them."""
        offered = {w.row["backend"] for w in self.ways if w.sample is not None}
        return [w for w in self.ways if w.sample is not None or OFFERED.get(w.row["backend"]) in offered]

    @property
    def best(self) -> float:
        """The best of what is comparable, calls by hand included."""
        return min(w.seconds for w in self.comparable)

    @property
    def best_candidate(self) -> float:
        """The best of what the planner can run at all, by name if it has to be."""
        return min(w.seconds for w in self.ways if w.sample is not None)

    @property
    def best_automatic(self) -> float:
        """The best of what the planner may choose by itself."""
        return min(w.seconds for w in self.ways if w.automatic)


def device_of(head: Row) -> Device:
    """Return the device of the catalogue on which rows were measured."""
    name = head["environment"]["device"]
    if name == "cpu":
        return catalogue()["cpu-2core"]
    return next(d for d in catalogue().values() if any(part in name for part in d.match))


def read(paths: Sequence[Path]) -> tuple[Device, list[Judged], int]:
    """Return the device, what was measured of each spec in each file, and how many rows are out of date.

    A file is an environment. What needs torch alone and was measured in another file only is lent to it.
    """
    runs = [_Run.of(path) for path in paths]
    devices = {run.device.name: run.device for run in runs}
    if len(devices) != 1:
        raise SystemExit(f"rows of one device, please: these are of {', '.join(devices)}")
    (device,) = devices.values()
    judged, stale = [], 0
    for case in GRIDS[runs[0].head["grid"]]():
        known = priceable(case, device)
        for run in runs:
            found, old = _judged(case, run, runs, known, device)
            stale += old
            if any(w.automatic for w in found.ways):
                judged.append(found)
    return device, judged, stale


@attrs.frozen(eq=False)
class _Run:
    """The rows of one file that say how long something took."""

    head: Row
    rows: Mapping[str, Mapping[str, Row]]
    """By candidate, by spec."""

    @classmethod
    def of(cls, path: Path) -> _Run:
        head, rows = read_rows(path)
        found: dict[str, dict[str, Row]] = {}
        for row in rows:
            if "seconds" in row and row.get("ok"):
                run = f"{path.stem}: {row['spec']}"
                found.setdefault(row["spec"], {}).setdefault(row["candidate"], {**row, "run": run})
        return cls(head, found)

    @property
    def device(self) -> Device:
        return device_of(self.head)

    @property
    def libraries(self) -> tuple[str, ...]:
        installed = self.head["environment"]["versions"]
        return tuple(name for names in LIBRARIES.values() for name in names if name in installed)

    def could_run(self, row: Row) -> bool:
        """Return whether its environment has what a row of another one needs."""
        needed = LIBRARIES.get(OFFERED.get(row["backend"], row["backend"]))
        return needed is None or any(name in self.libraries for name in needed)


def _judged(
    case: Case, run: _Run, runs: Sequence[_Run], known: Mapping[str, Known], device: Device
) -> tuple[Judged, int]:
    own, ways, stale = run.rows.get(case.name, {}), [], 0
    for source in (run, *(other for other in runs if other is not run)) if own else ():
        for name, row in source.rows.get(case.name, {}).items():
            lent = source is not run
            if lent and (not run.could_run(row) or any(w.name == name for w in ways)):
                continue
            if row["kind"] != "candidate":
                ways.append(Timed(name, row, None, lent=lent))
            elif name not in known or known[name][0] != row["graph"]:
                stale += not lent
            else:
                sample = _sample(row, *known[name][1:3], device)
                ways.append(Timed(name, row, sample, *known[name][3:], lent=lent))
    several = run.libraries if len(runs) > 1 else ()
    return Judged(case, tuple(ways), tuple(_stand_ins(own, known)), several), stale


@lru_cache(maxsize=1024)
def _target(device: Device) -> Any:
    from attnplan.cost import Target

    return Target(device, None)


Known = tuple[str, Any, Any, int, bool, float]
"""Digest of the graph, setting, kernel, predicted peak, whether auto may take it, what compiling adds to a call."""


def priceable(case: Case, device: Device) -> dict[str, Known]:
    """Return what is known of each candidate that accepts a spec, in the order of :data:`Known`."""
    found = {}
    for candidate, way in every_way(case.spec, _target(device)):
        if way is not None:
            kernel = way.schedule.priced
            setting = Setting.of(way.lowered.graph, case.spec, kernel)
            peak = candidate.prediction.peak_bytes if candidate.prediction else 0
            automatic = not way.backend.by_name_only(case.spec, way.schedule)
            once = way.schedule.compiles_for(case.spec.training) / CALLS
            found[candidate.name] = (digest(way.lowered.graph), setting, kernel, peak, automatic, once)
    return found


OVER_BY_HAND = 1.2e-5
"""Seconds of the host that a plan adds to the call by hand: bench/results/gpu-backends-fa4-h100.json, cuDNN."""
STAND_INS = {"by hand: cudnn": "dense > eager (cudnn)", "by hand: fa4": "dense > flash (fa4)"}


def _stand_ins(rows: Mapping[str, Row], known: Mapping[str, Known]) -> Iterator[Sample]:
    for hand, name in STAND_INS.items():
        if hand in rows and name in known and name not in rows:
            row = rows[hand]
            on_device = alone(row["seconds"], row["device"], row["host"])
            _, setting, kernel, *_ = known[name]
            host = row["host"] + OVER_BY_HAND if row["burst"] > 1 else None  # alone, it slept before
            yield Sample.of(loads(setting), setting.spec, kernel, None, on_device, host, run=row["run"])


UNLED = {False: 0.8, True: 0.3}
"""Share of a call's host time before the device has anything to do, in a forward and in a training call."""


def _sample(row: Row, setting: Any, kernel: Any, device: Device) -> Sample:
    host = row["host"] if device.kind == "cuda" else None
    on_device, exposed = None, 0.0
    if host is not None:
        if "led" not in row:  # each burst began on an idle device: it holds the host's time up to the first kernel
            exposed = UNLED[setting.spec.training] / row["burst"]
        waited = 0.0 if row["device"] else exposed * host
        on_device = alone(row["seconds"] - waited, row["device"], host)
    return Sample.of(loads(setting), setting.spec, kernel, row["seconds"], on_device, host, exposed, row["run"])
